"""`vlarepro data`: a minidrive world laid out as the real sets are is found whole and opens; what is taken away is named."""

import importlib.util
import json
import shutil

import pytest

from vlarepro.core.paths import root as repository
from vlarepro.data.real_sets import Places, places
from vlarepro.report.cli import main
from vlarepro.report.data import NAVSIM_SPLITS, check, check_nuscenes, find, find_nuscenes, weights
from vlarepro.world.generate import generate

pytestmark = pytest.mark.xdist_group("data_check")
spec = importlib.util.spec_from_file_location("paper_miniature", repository() / "tools" / "paper_miniature.py")
miniature = importlib.util.module_from_spec(spec)
spec.loader.exec_module(miniature)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "tiny"
    generate(out, dict(train=2, dev=1, val=1, test=7), seed=5, workers=1)
    return out


@pytest.fixture(scope="module")
def real(world, tmp_path_factory):
    "The same world as a user of nuScenes and NAVSIM has them on disk."
    at = miniature.build(world, tmp_path_factory.mktemp("real") / "miniature")
    return Places(at["nuscenes"], "v1.0-trainval", at["openscene"], at["openscene"] / "train_test_split", at["caches"], at["teachers"])


def states(rows): return {r["part"]: r["state"] for r in rows}


def test_a_world_is_found_whole(world):
    got = states(find(places("laptop", nuscenes=world)))
    assert {got[k] for k in ("tables", "images", "map masks", "CAN bus", "nuScenes-QA", "SURDS", "reasoning")} == {"found"}
    assert {got[f"{s}: {k}"] for s in NAVSIM_SPLITS for k in ("logs", "sensor blobs")} == {"found"}
    assert {got[f"{s}: scene caches"] for s in NAVSIM_SPLITS} == {"missing"}


def test_the_miniature_is_found_whole(real):
    rows = find(real)
    assert [r["part"] for r in rows if r["state"] != "found"] == []


def test_samples_open(world, real):
    for p in (places("laptop", nuscenes=world), real):
        done = check(p, samples=4, logs=None)
        assert not [f for d in done.values() for f in d["faults"]] and {"nuScenes", *NAVSIM_SPLITS} <= set(done)
        got = done["nuScenes"]["counts"]
        assert got["opened"] == 4 and {got["texts"][k] for k in ("caption", "explanation", "coc")} == {4}
        assert done["navhard_two_stage"]["counts"]["windows"] > done["navhard_two_stage"]["counts"]["logs read"]
    assert {done[f"scene caches of {s}"]["counts"]["with both versions"] for s in NAVSIM_SPLITS[:2]} == {5, 4}
    assert set(got["commands"]) == {0} and "unknown" in got["note"]   # real nuScenes has no route command


def test_official_caches_come_back(real, world):
    "A scene written as the converter writes it is the scene that was written."
    from vlarepro.scoring.pdm.official import load_official
    from vlarepro.scoring.pdm.score import navsim_v1_pdms
    scenes = load_official(real.caches / "navtest")
    assert len(scenes) == 14 and all(s.human is not None and s.reference("v1") and s.reference("v2") for s in scenes)
    assert all(0 <= float(navsim_v1_pdms(s, s.human[None]).score[0]) <= 1 for s in scenes[:2])


def test_what_is_taken_away_is_named(real, tmp_path):
    base = tmp_path / "nuscenes"
    shutil.copytree(real.nuscenes, base)
    shutil.rmtree(base / "can_bus")
    gone = sorted((base / "samples" / "CAM_FRONT").iterdir())[0]
    gone.unlink()
    (base / "language" / "qa.json").unlink()
    rows = {r["part"]: r for r in find_nuscenes(base, "v1.0-trainval")}
    assert (rows["CAN bus"]["state"], rows["images"]["state"], rows["nuScenes-QA"]["state"]) == ("missing", "part", "missing")
    assert rows["images"]["detail"] == "fewest: CAM_FRONT" and "NuScenes-QA" in rows["nuScenes-QA"]["where"]
    got = check_nuscenes(base, "v1.0-trainval", 200)
    assert [f for f in got["faults"] if gone.name in f] and set(got["counts"]["ego status from"]) == {"none", "finite_differences"}
    assert "correct the version" in check_nuscenes(base, "v1.0-mini")["faults"][0]
    scenes = json.loads((base / "v1.0-trainval" / "scene.json").read_text())
    del scenes[0]["log_token"]
    (base / "v1.0-trainval" / "scene.json").write_text(json.dumps(scenes))
    assert "scene.json, record 0" in check_nuscenes(base, "v1.0-trainval")["faults"][0]


def test_environment_names_navsim(real, monkeypatch):
    monkeypatch.setenv("OPENSCENE_DATA_ROOT", str(real.navsim))
    assert places("paper").navsim == real.navsim and places("paper").filters == real.filters
    monkeypatch.setenv("OPENSCENE_DATA_ROOT", str(real.navsim / "nowhere"))
    monkeypatch.setenv("NAVSIM_DEVKIT_ROOT", "clone")
    assert places("paper").filters.parts[-3:] == ("config", "common", "train_test_split")
    assert "no folder" in find(places("paper"))[-1]["detail"]


def test_command(real, capsys):
    arguments = ["--root", str(real.nuscenes), "--navsim", str(real.navsim)]
    assert main(["data", "check", *arguments, "--samples", "2", "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert set(d) == {"parts", "checks"} and all(x["where"] and x["licence"] for x in d["parts"])
    assert main(["data", "check", *arguments[:2], "--version", "v1.0-mini"]) == 1
    assert "fault: " in capsys.readouterr().err
    assert main(["data", "--weights", "--json"]) in (0, 1)
    assert {w["name"] for w in json.loads(capsys.readouterr().out)} == {w["name"] for w in weights("nowhere")}


def test_nothing_given(monkeypatch, capsys):
    for name in ("OPENSCENE_DATA_ROOT", "NAVSIM_DEVKIT_ROOT"): monkeypatch.delenv(name, raising=False)
    assert main(["data", "check", "--profile", "paper"]) == 1
    out = capsys.readouterr().out
    assert "nothing to open" in out and "nuScenes (Motional)" in " ".join(out.split())


def test_published_texts_find_their_places(real, tmp_path, capsys):
    "NuScenes-QA as it is published, captions as a list, explanations as a mapping."
    base = tmp_path / "nuscenes"
    shutil.copytree(real.nuscenes / "v1.0-trainval", base / "v1.0-trainval")
    tool = importlib.util.spec_from_file_location("nuscenes_texts", repository() / "tools" / "nuscenes_texts.py")
    texts = importlib.util.module_from_spec(tool)
    tool.loader.exec_module(texts)
    one, two = sorted(texts.known_tokens(base))[:2]
    q = dict(split="val", sample_token=one, question="Is there a car?", answer="yes", template_type="exist", num_hop=0)
    captions = [dict(sample_token=t, caption="A street.") for t in (one, two, one)]
    files = {"qa": {"info": {}, "split": "val", "questions": [q]}, "captions": captions, "explanations": {two: "It stops."}}
    for name, content in files.items(): (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert texts.main([str(base), *(x for n in files for x in (f"--{n}", str(tmp_path / f"{n}.json")))]) == 0
    assert "1 further texts" in capsys.readouterr().err
    read = lambda n: json.loads((base / "language" / f"{n}.json").read_text())
    assert read("qa")["questions"] == [q] and read("explanations") == {two: {"text": "It stops."}}
    assert read("captions") == {one: "A street.", two: "A street."}
    (tmp_path / "captions.json").write_text(json.dumps({"nobody": "x"}))
    assert texts.main([str(base), "--captions", str(tmp_path / "captions.json")]) == 2 and "in no table" in capsys.readouterr().err
    (tmp_path / "qa.json").write_text(json.dumps([{k: v for k, v in q.items() if k != "num_hop"}]))
    assert texts.main([str(base), "--qa", str(tmp_path / "qa.json")]) == 2 and "lacks num_hop" in capsys.readouterr().err
