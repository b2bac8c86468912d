# Two commands do everything: `make repro` rebuilds every table, `make test` runs every check.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
export DVC_NO_ANALYTICS = 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test check install clean lab

repro: install  ## rebuild everything: make repro [PROFILE=smoke]
	$(BIN)/nbdev_export
ifdef PROFILE
	$(BIN)/python tools/repro_profile.py $(PROFILE)
else
	$(BIN)/dvc repro
	$(BIN)/vlarepro report --summary
endif

test: install  ## every check: style, drift, notebooks, the whole pipeline in the smoke profile, tests
	$(BIN)/ruff check .
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/python tools/repro_profile.py smoke
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: install  ## the quick part of `make test`
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadgroup --ignore tests/test_smoke_pipeline.py

clean: install  ## clean notebooks as the checks want them, and export them
	$(BIN)/nbdev_clean
	$(BIN)/python tools/clear_runs.py
	$(BIN)/nbdev_export

lab: install  ## open the notebooks
	$(BIN)/jupyter lab nbs

install: .venv/installed

# A torch that is already in .venv stays; TORCH= names another (a version or a wheel file); else the locked version.
.venv/installed: requirements.lock settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else f"Python 3.11 or 3.12 is needed, not {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python tools/constraints.py requirements.lock > .venv/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c .venv/constraints.txt
	touch $@
