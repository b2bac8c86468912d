"""A planner of one's own through `vlarepro score` and `vlarepro export`, on a world made here."""
import json
import re

import numpy as np
import pytest

from vlarepro.evaluation.your_planner import PlannerError, Where, cache_files, hidden_future, load_planner, minidrive, score_planner
from vlarepro.report.cli import main
from vlarepro.scoring.pdm.scene import load_caches
from vlarepro.world.generate import WorldSize, generate

MINE = '''
import torch


class Straight:
    "Constant velocity, written again."
    def plan(self, batch, n_samples=1, generator=None):
        t = 0.5 * torch.arange(1, batch.future.shape[1] + 1)
        path = torch.stack([batch.ego[:, :1] * t, batch.ego[:, 1:2] * t, 0 * batch.ego[:, :1] * t], -1)
        return path[:, None].repeat(1, n_samples, 1, 1)


class Sees(Straight):
    image_frames, image_size = 2, (32, 64)
    def plan(self, batch, n_samples=1, generator=None):
        assert batch.images.shape[1:] == (2, 3, 3, 32, 64), batch.images.shape
        assert float(batch.images.float().std()) > 1
        assert not batch.future.any() and not batch.future_valid.any() and batch.boxes[:, 1:].isnan().all()
        return super().plan(batch, n_samples, generator)


class Noisy(Straight):
    def plan(self, batch, n_samples=1, generator=None):
        p = super().plan(batch, n_samples, generator)
        return p + torch.randn(p.shape, generator=generator)


class Short(Straight):
    def plan(self, batch, n_samples=1, generator=None): return super().plan(batch, n_samples, generator)[:, :, :5]


class Fails(Straight):
    def plan(self, batch, n_samples=1, generator=None): raise RuntimeError("out of memory")


class Sick(Straight):
    def plan(self, batch, n_samples=1, generator=None): return super().plan(batch, n_samples, generator) / 0


ready, number = Straight(), 3
def factory(gain=1.0): return Straight() if gain else None
'''


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A world of a few drives, a planner's file, and a place for its caches."
    d = tmp_path_factory.mktemp("score")
    (d / "mine.py").write_text(MINE)
    generate(d / "world", WorldSize(0, 0, 2, 3), workers=1)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("VLAREPRO_CACHE", str(d / "cache"))
        yield d


def cells(said, table, row):
    return next(r for t in said["tables"] if t["table"] == table for r in t["rows"] if r["row"] == row)["values"]


def test_a_rule_written_again_scores_as_the_rule(here, capsys):
    rc = main(["score", "--planner", f"{here}/mine.py:Straight", "--world", str(here / "world"), "--out", str(here / "said.json"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert rc == 0 and json.loads((here / "said.json").read_text()) == said
    assert [t["table"] for t in said["tables"]] == ["openloop", "strata", "navsim_v1_pdms", "navsim_v2_epdms", "minus_cv"]
    for t in said["tables"]:
        assert {"columns", "rows", "title", "note", "lower_is_better"} <= set(t) and all(set(r["values"]) <= set(t["columns"]) for r in t["rows"])
    mine, rule = cells(said, "openloop", "Straight"), cells(said, "openloop", "constant velocity")
    assert {c: mine[c]["value"] for c in mine} == pytest.approx({c: rule[c]["value"] for c in rule}, abs=1e-4)
    assert all(abs(c["value"]) < 1e-4 for k, c in cells(said, "minus_cv", "Straight").items() if "STP3" in k or "UniAD" in k)
    assert len(cells(said, "openloop", "Straight")) == 16 and {"PDMS", "EP"} <= set(cells(said, "navsim_v1_pdms", "PDM-Closed"))
    assert set(said["tables"][2]["columns"]) == {"NC", "DAC", "TTC", "C.", "EP", "PDMS"}


def test_images_come_in_the_size_asked_for_and_the_future_does_not_come(here):
    said = score_planner(load_planner(f"{here}/mine.py:Sees"), minidrive(here / "world", drives=1))
    assert [t["table"] for t in said["tables"]][:2] == ["openloop", "strata"]
    assert "1 scenes" in said["tables"][0]["note"] and cells(said, "openloop", "Sees")["UniAD_L2m_Avg"]["low"] is None


def test_a_sampling_planner_repeats_itself_by_seed(here):
    where = Where(str(here / "world"))
    one, same, other = (score_planner(load_planner(f"{here}/mine.py:Noisy"), where, seed=s)["tables"][0] for s in (0, 0, 1))
    assert one == same and one != other


@pytest.mark.parametrize("name, options, says", [
    ("Strait", {}, "did you mean 'Straight'"), ("number", {}, "expected a class"), ("factory", {"gain": 0}, "without a method plan"),
    ("factory", {"gian": 1}, "cannot be called with"), ("ready", {"gain": 1}, "takes no options")])
def test_what_cannot_be_loaded_is_named(here, name, options, says):
    with pytest.raises(PlannerError, match=says):
        load_planner(f"{here}/mine.py:{name}", options)


def test_the_three_ways_to_name_a_planner(here, monkeypatch):
    monkeypatch.chdir(here)
    assert type(load_planner("mine:Straight")).__name__ == type(load_planner("mine.py:factory", {"gain": 2.0})).__name__ == "Straight"
    assert load_planner("mine:ready").plan and load_planner("cv_yaw", {"n_steps": 8}).n_steps == 8
    (here / "lame.py").write_text("import not_installed_here\n")
    for spec, says in (("lame:X", "lame was found and imports it"), ("nowhere.at_all:X", "run from the folder"), ("no.py:X", "there is no file no.py")):
        with pytest.raises(PlannerError, match=says):
            load_planner(spec)


@pytest.mark.parametrize("name, says", [("Short", r"returned shape \(1, 1, 5, 3\)"), ("Fails", "failed on a batch of 1 sample.*RuntimeError: out of memory"),
                                        ("Sick", "are not finite, first for sample")])
def test_what_a_planner_answers_wrongly_is_named(here, capsys, name, says):
    rc = main(["score", "--planner", f"{here}/mine.py:{name}", "--world", str(here / "world"), "--only", "openloop"])
    err = capsys.readouterr().err
    assert rc == 2 and "Traceback" not in err
    assert re.search(says, err), err


def official(c, version):
    "The arrays that tools/navsim_cache_to_npz.py would write for this frame: world coordinates."
    def moved(a):
        a = np.array(a, float)
        a[..., :2] += c.origin
        return a
    rings = lambda p, n: (moved(np.concatenate([p.ring(i) for i in range(n)])) if n else np.zeros((0, 2)), np.cumsum([0, *(len(p.ring(i)) for i in range(n))]),
                          np.arange(n), np.zeros(n, bool))
    t, r, red = c.tracks(version), c.reference(version), c.red_lights.active.shape[1]
    out = dict(format="vlarepro-navsim-1", version=version, token=c.token, log=c.log, synthetic=False, time_us=c.time_us, ego=moved(c.ego),
               past_time_us=c.past_time_us, past=moved(c.past), centerline=moved(c.centerline), human=c.human)
    out |= {"reference.time_us": r.time_us, "reference.states": moved(r.states), "tracks.state": moved(t.state), "tracks.valid": t.valid}
    out |= {"tracks.type": t.type, "tracks.id": np.array(t.id, str)}
    out |= dict(zip(("polygons.xy", "polygons.start", "polygons.owner", "polygons.hole"), rings(c.polygons, len(c.polygons))))
    out |= {"polygons.type": c.polygons.type, "polygons.on_route": c.polygons.on_route, "polygons.id": np.array(c.polygons.id, str)}
    return out | dict(zip(("red.xy", "red.start", "red.owner", "red.hole"), rings(c.red_lights, red))) | {"red.active": c.red_lights.active}


def test_real_roots_and_official_caches_give_the_same_scores(here, tmp_path, capsys):
    "The world laid out as real data would be: tables by --root, logs by --navsim, filters by --configs, converted metric caches by --caches."
    spec, world = f"{here}/mine.py:Straight", here / "world"
    for c in load_caches(minidrive(world).caches):
        for v in ("v1", "v2"): np.savez(tmp_path / f"{c.token}.{v}.npz", **official(c, v))
    assert main(["score", "--planner", spec, "--world", str(world), "--json"]) == 0
    want = json.loads(capsys.readouterr().out)
    navsim = ["--navsim", str(world / "navsim"), "--configs", str(world / "navsim" / "train_test_split"), "--caches", str(tmp_path)]
    assert main(["score", "--planner", spec, "--root", str(world), "--version", "v1.0-minidrive", *navsim, "--workers", "2", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    for t in ("openloop", "navsim_v1_pdms"):
        for row in ("Straight", "constant velocity"):
            a, b = cells(want, t, row), cells(got, t, row)
            assert {c: a[c]["value"] for c in a} == pytest.approx({c: b[c]["value"] for c in b}, abs=1e-3), (t, row)
    a, b = cells(want, "navsim_v2_epdms", "PDM-Closed"), cells(got, "navsim_v2_epdms", "PDM-Closed")
    assert {c: a[c]["value"] for c in a if c not in ("EC", "EPDMS")} == pytest.approx({c: b[c]["value"] for c in b if c not in ("EC", "EPDMS")}, abs=1e-3)
    assert len(list((tmp_path / "joined").glob("*.npz"))) == 30


def test_two_stage_splits_are_exported_and_not_scored(here, capsys):
    spec, navsim = f"{here}/mine.py:Straight", str(here / "world" / "navsim")
    assert main(["export", "--planner", spec, "--navsim", navsim, "--navsim-split", "navhard_two_stage", "--out", str(here / "two.npz"), "--json"]) == 0
    n = json.loads(capsys.readouterr().out)
    with np.load(here / "two.npz", allow_pickle=False) as z:
        length = np.array([len(t) for t in z["token"]])
        assert n["first_stage"] == 2 and n["second_stage"] >= 2 and set(length[z["stage"] == 1]) == {16} and set(length[z["stage"] == 2]) == {17}
    assert main(["score", "--planner", spec, "--navsim", navsim, "--navsim-split", "navhard_two_stage", "--caches", str(here)]) == 2
    assert "second stage" in capsys.readouterr().err


def test_caches_of_another_world_are_refused(here, tmp_path):
    with pytest.raises(FileNotFoundError, match="2 of 2 scored frames have no scene cache"):
        cache_files(tmp_path, ["a", "b"])


def test_predictions_are_plain_arrays(here, capsys):
    out = here / "plans.npz"
    rc = main(["export", "--planner", f"{here}/mine.py:Straight", "--world", str(here / "world"), "--out", str(out), "--json"])
    n = json.loads(capsys.readouterr().out)
    with np.load(out, allow_pickle=False) as z:
        assert rc == 0 and z["poses"].shape == (n["first_stage"] + n["second_stage"], 8, 3) and z["poses"].dtype == np.float32
        assert str(z["format"]) == "vlarepro-navsim-predictions-1" and set(z["stage"].tolist()) == {1} and np.isfinite(z["poses"]).all()


def test_a_sample_keeps_its_past(here):
    from vlarepro.data.nuscenes import NuScenesReader
    r = NuScenesReader(here / "world", "v1.0-minidrive", split="val")
    s = r.sample(r.anchors[0], images=False, texts=True)
    h = hidden_future(s, 6)
    assert np.array_equal(h.history, s.history) and np.array_equal(h.ego, s.ego) and h.command == s.command and h.texts == {}
    assert np.array_equal(h.boxes[0], s.boxes[0], equal_nan=True) and np.isnan(h.boxes[1:]).all() and not h.future.any()
