"""The package by itself: what a wheel holds, what imports without the pipeline's packages, what commands say outside a clone."""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vlarepro.core.paths import root
from vlarepro.report.doctor import PIPELINE

ABSENT = ("papermill", "nbformat", "nbclient", "nbconvert", "ipykernel", "IPython", "jupyterlab", "nbdev", "execnb", "dvc", "seaborn", "ray",
          "submitit", "pytest")  # jinja2 stays: torch itself brings it
NEEDS_PIPELINE = {"vlarepro.report.figures", "vlarepro.report.ikvla", "vlarepro.report.site"}  # the report itself
BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {ABSENT!r}: raise ModuleNotFoundError(f'No module named {{name!r}} (blocked)', name=name)

sys.meta_path.insert(0, Block())
"""


def python(code, cwd, path=None):
    env = {**os.environ, "PYTHONPATH": str(path or root())}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "sdist from a copy of what git would give, wheel from that sdist, installed into a folder."
    d = tmp_path_factory.mktemp("built")
    src = d / "src"
    src.mkdir()
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(root() / name, src)
    for name in ("configs", "tools"): shutil.copytree(root() / name, src / name)   # lie beside the package and must not enter the wheel
    shutil.copytree(root() / "vlarepro", src / "vlarepro", ignore=shutil.ignore_patterns("__pycache__"))
    make = "from setuptools import build_meta; print(build_meta.build_sdist('../dist'))"
    subprocess.run([sys.executable, "-c", make], cwd=src, check=True, capture_output=True)
    sdist = next((d / "dist").glob("*.tar.gz"))
    with tarfile.open(sdist) as t:
        t.extractall(d / "unpacked", filter="data")
        names = t.getnames()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    unpacked = next((d / "unpacked").iterdir())
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(d / "dist"), str(unpacked)], check=True, capture_output=True)
    wheel = next((d / "dist").glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(d / "site"), str(wheel)], check=True, capture_output=True)
    return d, wheel, names


def test_the_wheel_holds_the_generated_package_and_nothing_else(built):
    d, wheel, sdist = built
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        meta = next(z.read(n).decode() for n in names if n.endswith("METADATA"))
        entry = next(z.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == {p.relative_to(root()).as_posix() for p in (root() / "vlarepro").rglob("*.py")}
    assert "vlarepro = vlarepro.report.cli:main" in entry and any(n.endswith("licenses/LICENSE") for n in names)
    plain = [line for line in meta.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not any(p in line for line in plain for p in ("dvc", "papermill", "nbconvert", "ipykernel", "jupyter", "jinja2", "seaborn"))
    extra = {e: {line.split()[1].split(">")[0].split(";")[0] for line in meta.splitlines() if f'extra == "{e}"' in line} for e in ("pipeline", "dev")}
    assert {p for p, _ in PIPELINE} <= extra["pipeline"] <= extra["dev"], "the extra dev must install the pipeline too: `make install` relies on it"
    top = Path(sdist[0]).parts[0]
    assert {f"{top}/settings.ini", f"{top}/LICENSE", f"{top}/CHANGELOG.md", f"{top}/CITATION.cff"} <= set(sdist)


def test_installed_outside_a_clone(built, tmp_path):
    "The library works, commands that need a clone say so, the doctor reports."
    site = built[0] / "site"
    code = "import vlarepro, sys; print(vlarepro.__file__); from vlarepro.report.cli import main; sys.exit(main(['tables']))"
    p = python(code, tmp_path, site)
    assert p.returncode == 2 and str(site) in p.stdout and "run from a clone" in p.stderr and "Traceback" not in p.stderr
    code = BLOCK + "from vlarepro.report.cli import main; sys.exit(main(['doctor', '--json']))"
    p = python(code, tmp_path, site)
    d = json.loads(p.stdout)
    assert p.returncode == 0 and d["problems"] == [] and all(not x["found"] for x in d["data"]), p.stderr
    p = python("from vlarepro.report.cli import main; import sys; sys.exit(main(['score', '--planner', 'cv']))", tmp_path, site)
    assert p.returncode == 2 and "--world DIR" in p.stderr
    p = python("from vlarepro.report.cli import main; import sys; sys.exit(main(['world', 'make', 'w', '--profile', 'smok']))", tmp_path, site)
    assert p.returncode == 2 and "did you mean 'smoke'" in p.stderr


def test_a_world_and_a_score_outside_a_clone(built, tmp_path):
    code = """
from vlarepro.report.cli import main
from vlarepro.world.generate import WorldSize, generate
if __name__ == '__main__':
    generate('world', WorldSize(0, 0, 1, 0), workers=1)
    raise SystemExit(main(['score', '--planner', 'cv', '--world', 'world', '--only', 'openloop', '--json']))
"""
    p = python(code, tmp_path, built[0] / "site")
    assert p.returncode == 0, p.stderr
    said = json.loads(p.stdout)
    assert [t["table"] for t in said["tables"]] == ["openloop", "strata", "minus_cv"] and set(said["tables"][2]["columns"]) >= {"UniAD_L2m_Avg"}
    assert all(c["value"] == 0 for c in said["tables"][2]["rows"][0]["values"].values())


def test_import_brings_no_torch_and_no_pipeline():
    heavy = ("torch", "transformers", "pandas", "matplotlib", *ABSENT)
    p = python(f"import vlarepro, vlarepro.core, vlarepro.scoring, vlarepro.data, sys; print([m for m in {heavy!r} if m in sys.modules])", root())
    assert p.stdout.strip() == "[]", p.stdout + p.stderr


def test_everything_but_the_report_imports_without_the_pipelines_packages():
    code = BLOCK + """
import importlib, pkgutil, vlarepro
bad = {}
for m in pkgutil.walk_packages(vlarepro.__path__, 'vlarepro.'):
    try: importlib.import_module(m.name)
    except ModuleNotFoundError as e: bad[m.name] = e.name
print(__import__('json').dumps(bad))
"""
    p = python(code, root())
    assert p.returncode == 0, p.stderr
    assert set(json.loads(p.stdout.strip().splitlines()[-1])) == NEEDS_PIPELINE


def test_a_command_that_needs_the_pipeline_names_the_extra(tmp_path):
    p = python(BLOCK + "from vlarepro.report.cli import main; sys.exit(main(['claims']))", root())
    assert p.returncode == 2 and "vlarepro[pipeline]" in p.stderr and "Traceback" not in p.stderr


def test_the_doctor_says_what_the_absence_switches_off(monkeypatch):
    import vlarepro.report.doctor as doctor
    real = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda n: None if n == "papermill" else real(n))
    d = doctor.examine()
    assert any("papermill is missing" in x and "make install" in x for x in d["problems"])
    monkeypatch.setattr(doctor, "clone", lambda: None)
    d = doctor.examine()
    row = next(o for o in d["optional"] if o["package"] == "papermill")
    assert not any("papermill" in x for x in d["problems"]) and row["how"] == "extra pipeline" and "stage" in row["without"]


def test_worlds_are_the_same_without_a_clone():
    from vlarepro.core.params import profile_params
    from vlarepro.report.cli import _library_world
    for profile in ("smoke", "laptop", "gpu"):
        assert _library_world(profile) == profile_params(profile)["world"]
