"""The whole pipeline in the smoke profile, as `make test` ran it just before: what it left, and what a second run does.

The copy lies in scratch/profiles/smoke (tools/repro_profile.py). Without it these tests skip, and `make test` never lets that happen."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "scratch" / "profiles" / "smoke"
ENV = {**os.environ, "PYTHONPATH": str(COPY), "DVC_NO_ANALYTICS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

pytestmark = [
    pytest.mark.skipif(not (COPY / "report" / "index.html").exists(), reason="run `python tools/repro_profile.py smoke` first"),
    pytest.mark.xdist_group("smoke"),
]


def dvc(*args, cwd=COPY):
    return subprocess.run(["dvc", *args], cwd=cwd, env=ENV, capture_output=True, text=True)


@pytest.fixture()
def copy(tmp_path):
    "A throw-away copy of the finished smoke run, to disturb."
    d = tmp_path / "copy"
    shutil.copytree(COPY, d, symlinks=True, ignore=shutil.ignore_patterns("tmp"))
    (d / ".dvc" / "tmp").mkdir(exist_ok=True)
    return d


def changed_stages(cwd):
    "Stages whose dependencies differ now."
    env = {**ENV, "PYTHONPATH": str(cwd)}
    r = subprocess.run(["dvc", "status", "--json"], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return set(json.loads(r.stdout)) - {"hardware"}  # looked at in every run


def test_nothing_changed_runs_nothing():
    r = dvc("repro")
    assert r.returncode == 0, r.stderr
    assert set(re.findall(r"Running stage '([^']+)'", r.stdout)) <= {"hardware"}, "the look at the hardware is all that runs, and it sets off nothing"


def test_tables_and_provenance_are_there():
    results = COPY / "results" / "smoke" / "ikvla"
    tables = {p.stem: json.loads(p.read_text()) for p in (results / "tables").glob("*.json")}
    ours = {"spoilt-next-state", "denoising-steps", "paths-averaged"}
    assert set(tables) == {"1", "2", "3", "5-stitching", "5-ablation", "6", "7", "8", "9", "10a", "10b", "11", "12", "13", "14", "15"} | ours
    for name, t in tables.items():
        assert t["profile"] == "smoke" and t["rows"]
        if name not in ("13", "14", "15"):  # some language metrics need Java or weights
            assert all(v["value"] is not None for r in t["rows"] for c, v in r["values"].items() if c != "EC"), name  # EC needs neighbouring frames
    latency = json.loads((results / "latency" / "16.json").read_text())
    assert all(v["value"] > 0 for r in latency["rows"] for v in r["values"].values())
    figures = json.loads((results / "figures" / "figures.json").read_text())
    assert {"stitched.png", "gradcam.png", "strata.svg", "nsp-scatter.png"} <= set(figures)
    assert all(f["alt"] and (results / "figures" / n).is_file() for n, f in figures.items())
    prov = json.loads((results / "provenance.json").read_text())
    assert prov["profile"] == "smoke" and prov["device"] and all(len(s["code"]) == 12 for s in prov["stages"].values())
    assert json.loads((results / "claims.json").read_text()) == [], "smoke gives no verdicts"


def test_the_world_was_measured():
    "Probes, shares, leaks and pictures of the world behind the tables, on a page of their own."
    world = COPY / "results" / "smoke" / "world"
    tables = {p.stem: json.loads(p.read_text()) for p in (world / "tables").glob("*.json")}
    assert {"probes", "shares", "rho", "floors", "readout", "leaks", "navsim_v1_pdms", "navsim_v2_epdms"} == set(tables)
    card = json.loads((world / "world.json").read_text())["card"]
    assert card["name"] == "minidrive" and len(card["hash"]) == 64
    page = (COPY / "report" / "world.html").read_text()
    assert card["hash"] in page and page.count("figures/world-pair-") == 6 and "figures/world-family-red_light.jpg" in page


def test_report_is_sound_and_offline():
    from vlarepro.report.site import check_site

    assert check_site(COPY / "report") == []


def test_every_arm_planned_every_sample():
    from vlarepro.data.table import load_table
    from vlarepro.evaluation.predictions import load_predictions

    val = load_table(COPY / "runs/smoke/prepare/table.npz").split("val")
    files = sorted((COPY / "runs/smoke/ikvla/evaluate").glob("*/predictions.npz"))
    p = load_predictions(files, val["token"])
    ablations = {"ikvla", "ikvla_wo_nsp", "ikvla_wo_ik", "ikvla_wo_diffusion"}
    assert ablations | {"opendrivevla", "ego_text_only", "oracle_next", "shuffled_next", "blind_nsp", "direct_blind", "cv"} <= set(p.plans)


def test_prose_reruns_nothing(copy):
    "A sentence in a library notebook and one in a run-notebook: the fingerprints come out equal."
    for name in ("nbs/30_scoring/10_displacement.ipynb", "nbs/runs/40_sft_ikvla.ipynb"):
        nb = json.loads((copy / name).read_text())
        nb["cells"].insert(1, {"cell_type": "markdown", "id": "prose", "metadata": {}, "source": ["One more sentence.\n"]})
        (copy / name).write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=copy, check=True, capture_output=True)
    before = {p.name: p.read_bytes() for p in (copy / "build/code").iterdir()}
    r = subprocess.run(["dvc", "repro", "code"], cwd=copy, env={**ENV, "PYTHONPATH": str(copy)}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert {p.name: p.read_bytes() for p in (copy / "build/code").iterdir()} == before
    assert changed_stages(copy) == set()


def test_one_groups_settings_touch_that_group_alone(copy):
    path = copy / "configs" / "ikvla.yaml"
    config = yaml.safe_load(path.read_text())
    group = json.loads(json.dumps(config["smoke"]["selfsup"]))  # the blocks share their settings through YAML anchors: change one alone
    group["settings"]["language"]["lr"] *= 2
    config["smoke"]["selfsup"] = group
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert changed_stages(copy) == {"sft-ikvla@smoke-selfsup", "evaluate-ikvla@smoke-selfsup"}


def test_code_of_one_method_touches_its_stages_alone(copy):
    "A change in the scoring code reruns tables (and the gate's statistics), never a training."
    path = copy / "vlarepro" / "scoring" / "openloop.py"
    path.write_text(path.read_text() + "\nCHANGED = 1\n")
    r = subprocess.run(["dvc", "repro", "code"], cwd=copy, env={**ENV, "PYTHONPATH": str(copy)}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    touched = changed_stages(copy)
    assert "tables-ikvla@smoke" in touched
    assert not {s for s in touched if s.startswith(("sft", "encoder", "embedded", "prepare"))}


def test_checkout_stays_as_it_was():
    "The smoke run leaves no trace outside scratch/."
    assert "active: [smoke]" not in (ROOT / "params.yaml").read_text()
    assert not (ROOT / "results" / "smoke").exists()


def test_an_unknown_profile_is_refused():
    r = subprocess.run([sys.executable, "tools/repro_profile.py", "smokey"], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 2 and "did you mean 'smoke'" in r.stderr
