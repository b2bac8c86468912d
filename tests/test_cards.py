"""Citation, changelog, cards and the hosted workflow say what the repository does."""
import re

import yaml

from vlarepro.core.params import load_params
from vlarepro.core.paths import root
from vlarepro.world.generate import LICENCE
from vlarepro.world.nuscenes_writer import WORLD_VERSION


def text(name): return (root() / name).read_text(encoding="utf-8")


def setting(name): return re.search(rf"^{name} = (.+)$", text("settings.ini"), flags=re.M)[1]


def test_citation():
    c = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(c) and (c["version"], c["license"]) == (setting("version"), "Apache-2.0")
    cited = {i["value"] for r in c["references"] for i in r["identifiers"]}
    assert cited == {"arXiv:2604.19710", "arXiv:2606.31160", "arXiv:2605.21061", "arXiv:2603.01928"}
    assert all({"type", "title", "authors"} <= set(r) and r["authors"] for r in c["references"])
    assert all(a in text("MODEL_CARD.md") for a in cited)


def test_changelog_names_the_version():
    assert f"({setting('version')})" in text("CHANGELOG.md") or f"[{setting('version')}]" in text("CHANGELOG.md")


def test_the_data_card_has_the_worlds_that_are_made():
    card, params = text("DATA_CARD.md"), load_params()
    assert f"world version {WORLD_VERSION}" in card and LICENCE.split(",")[0] in card
    line = r"^\| (\w+) \| (\d+) \((\d+)\) \| (\d+) \| (\d+) \| (\d+) × (\d+) \|$"
    rows = {name: numbers for name, *numbers in re.findall(line, card, flags=re.M)}
    assert set(rows) == {"smoke", "laptop", "gpu"}
    for profile, row in rows.items():
        w = params[profile]["world"]
        assert list(map(int, row)) == [*(w["scenes"][k] for k in ("train", "dev", "val", "test")), *w["image_size"]], profile


def test_hosted_ci_runs_what_ci_runs():
    w = yaml.safe_load(text(".github/workflows/ci.yml"))
    runs = [s["run"] for s in w["jobs"]["test"]["steps"] if "run" in s]
    assert runs == ["bash .ci/run"] and "make test" in text(".ci/run")
    assert w["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"] and setting("min_python") == "3.11"
    assert set(w[True]) == {"push", "pull_request"}   # YAML reads `on` as a truth value
