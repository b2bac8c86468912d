"""How hard the world is: labels as the simulator sees them, checks that can fail, and the world's page of the report."""

import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlarepro.core.paths import write_json
from vlarepro.core.seeds import rng
from vlarepro.evaluation import difficulty as module
from vlarepro.evaluation.difficulty import (
    BLIND,
    FEW,
    OPEN,
    PROBES,
    SIGHTED,
    Labels,
    decide,
    group_title,
    groups,
    in_order,
    label_samples,
    motion_readout,
    probe_table,
    sample_times,
    shares,
    short_card,
    shuffled_labels,
    split_faults,
    verdicts,
    visual_floors,
    write_difficulty,
)
from vlarepro.evaluation.gate import GateData, HeadFit, fit_head, gate_errors, plan_ade, read_errors, write_errors
from vlarepro.evaluation.world import difficulty_tables, navsim_tables, verdict_rows, write_world
from vlarepro.report.site import build_site, check_site
from vlarepro.report.world import card_rows, gallery_pictures
from vlarepro.world.scenarios import critical_flags, make_scene
from vlarepro.world.scene import DT_S, EVENT_KINDS, FAMILIES

FIT = HeadFit(
    steps=120,
    batch=64,
    lr=3e-3,
    weight_decay=0.01,
    warmup=10,
    dropout=0.0,
    width=32,
    token_code=4,
    attention_width=16,
    see_steps=120,
    see_dropout=0.0,
    see_code=4,
    see_noise=0.0,
    held_steps=40,
    ik_steps=40,
    ik_batch=32,
    ik_lr=3e-3,
)


def columns(n_scenes=50, k=8):
    "A sample table of straight drives: speed differs by sample, splits lie on maps of their own."
    g = rng("test-difficulty", n_scenes)
    n = n_scenes * k
    split = np.repeat(np.array(["train", "dev", "val", "test"])[np.digitize(np.arange(n_scenes), [25, 32, 45])], k)
    speed = g.uniform(2, 12, n).astype(np.float32)
    ego = np.zeros((n, 6), np.float32)
    ego[:, 0], ego[:, 4] = speed, g.normal(0, 0.1, n)
    future = np.zeros((n, 6, 3), np.float32)
    future[..., 0] = speed[:, None] * 0.5 * np.arange(1, 7)
    where = dict(train="singapore-onenorth", val="singapore-onenorth", dev="singapore-hollandvillage", test="boston-seaport")
    return dict(
        split=split,
        scene=np.repeat([f"scene-{i:04d}" for i in range(n_scenes)], k),
        location=np.array([where[s] for s in split]),
        ego=ego,
        future=future,
        history=np.zeros((n, 4, 3), np.float32),
        token=np.array([f"t{i}" for i in range(n)]),
    )


def world(table, tell=1.0):
    "Gate data whose present tokens tell the speed (or, with tell=0, nothing) and whose ego inputs do not."
    g, n = rng("test-difficulty-world"), len(table["split"])
    states = g.normal(0, 0.1, (n * 7, 4, 6))
    states[..., 0] += tell * np.r_[table["ego"][:, 0], np.repeat(table["ego"][:, 0], 6)][:, None] / 5
    future = torch.as_tensor(table["future"][..., :2])
    return GateData(
        torch.as_tensor(g.normal(0, 1, (n, 5)), dtype=torch.float32),
        torch.as_tensor(states.astype(np.float16)),
        torch.arange(n),
        n + torch.arange(n * 6).view(n, 6),
        future,
        torch.zeros_like(future),
        np.linalg.norm(table["future"][..., :2], axis=-1).mean(1),
        {},
        np.unique(table["scene"], return_inverse=True)[1],
        table["split"],
    )


@pytest.fixture(scope="module")
def table():
    return columns()


def test_labels_are_those_of_the_simulator(tmp_path):
    "Through minidrive.json and the sample table's tokens, the same critical flags as from the scene itself."
    scenes = [make_scene(s, f"scene-{s:04d}", "val", "singapore-onenorth") for s in range(6)]
    samples = [
        dict(token=f"{s.name}-{k}", scene_token=s.name, timestamp=1_600_000_000_000_000 + int(s.seed * 1e9) + k * 500_000) for s in scenes for k in range(41)
    ]
    write_json(tmp_path / "v/sample.json", samples[::-1])
    card = dict(scenes={s.name: dict(family=s.family) for s in scenes}, events={s.name: [asdict(e) for e in s.events] for s in scenes})
    rows = [x for x in samples if 4 <= int(x["token"].split("-")[-1]) <= 34]
    table = SimpleTable(scene=np.array([x["scene_token"] for x in rows]), token=np.array([x["token"] for x in rows]))
    got = label_samples(table, card, sample_times(tmp_path, "v"))
    want = np.concatenate([critical_flags(s, np.arange(4, 35) * 5) for s in scenes])
    assert got.kinds == tuple(k for k in EVENT_KINDS if k != "turn")
    assert np.array_equal(got.critical, want[:, [EVENT_KINDS.index(k) for k in got.kinds]]) and want.any()
    assert got.family.tolist() == [s.family for s in scenes for _ in range(31)] and set(got.family) <= set(FAMILIES)
    with pytest.raises(KeyError, match="different worlds"):
        label_samples(table, {"scenes": {}, "events": {}}, sample_times(tmp_path, "v"))


class SimpleTable(dict):
    def __len__(self):
        return len(self["scene"])


def test_data_without_a_card_have_kinematic_groups_alone(table):
    labels = label_samples(SimpleTable(table), {}, {})
    rows = np.flatnonzero(table["split"] == "val")
    gap = rng("test-gap").uniform(0, 4, len(table["split"]))
    assert set(groups(labels, gap, rows)) == {"full", "ego_dominated", "vision_critical"}
    s = shares(labels, gap, rows)
    assert s["event_critical"] is None and s["rho_event_critical"] is None and s["rho"] == sorted(s["rho"], reverse=True)


def test_rho_counts_samples_beyond_the_threshold():
    gap = np.array([0.1, 0.6, 1.4, 2.6, 4.5, 5.5])
    labels = Labels(np.full(6, "cut_in"), np.array([[0], [0], [1], [1], [1], [0]], bool), ("cut_in",))
    s = shares(labels, gap, np.arange(6))
    assert s["rho"] == [(gap > t).mean() for t in s["threshold_m"]]
    assert s["rho_event_critical"] == [(gap[2:5] > t).mean() for t in s["threshold_m"]] and s["event_critical"] == 0.5


def test_verdicts_need_the_whole_interval_and_enough_scenes():
    assert [decide(0.01, 0.2, 8), decide(-0.2, -0.01, 8), decide(-0.1, 0.3, 99), decide(0.1, 0.2, 7)] == [SIGHTED, BLIND, OPEN, FEW]
    g = rng("test-verdicts")
    scene, light = np.repeat(np.arange(30), 10), np.tile(np.arange(10) < 3, 30)
    errors = dict(
        cv=np.full((1, 300), 2.0), blind=0.5 + 0.5 * light + g.normal(0, 0.05, (3, 300)), image=np.full((3, 300), 1.0), direct=0.5 + g.normal(0, 0.05, (3, 300))
    )
    t = probe_table(
        errors, dict(full=np.ones(300, bool), critical_red_light=light, event_free=~light, critical_cut_in=scene < 5, critical_yield=scene == 0), scene, 400
    )
    assert [t[g]["verdict"] for g in ("critical_red_light", "event_free", "critical_cut_in")] == [SIGHTED, OPEN, FEW] and "critical_yield" not in t
    assert t["critical_red_light"]["gain"]["value"] == pytest.approx(0.5, abs=0.03) and t["full"]["cv"]["value"] == 2.0
    assert list(in_order(t)) == ["full", "event_free", "critical_cut_in", "critical_red_light"]
    with pytest.raises(KeyError, match="the gate must train"):
        probe_table({k: v for k, v in errors.items() if k != "image"}, {}, scene)


def test_gate_errors_come_back_and_foreign_ones_are_refused(table, tmp_path):
    data = world(table)
    errors, _ = gate_errors(data, FIT, (0, 1), "val", arms=("blind", "image"))
    assert errors["image"].mean() < 0.8 * errors["blind"].mean(), "tokens tell the speed, the ego inputs do not"
    scene = data.scene[data.rows("val")]
    write_errors(tmp_path / "gate.npz", errors, scene, "val")
    back = read_errors(tmp_path / "gate.npz", scene, "val")
    assert set(back) == {"blind", "image"} and all(np.allclose(back[k], errors[k], atol=1e-6) for k in back)
    for bad in ((scene[:-1], "val"), (scene + 1, "val"), (scene, "dev")):
        with pytest.raises(ValueError, match="run the gate of this world again"):
            read_errors(tmp_path / "gate.npz", *bad)


def test_the_image_head_sees_no_ego_status(table):
    data = world(table)
    plan = fit_head("image", data, data.rows("train"), replace(FIT, steps=20), 0)
    rows = data.rows("val")
    before = plan(rows)
    data.ego[:] = 99.0
    assert torch.equal(plan(rows), before)


def test_speed_is_read_off_tokens_and_only_if_they_hold_it(table):
    told, silent = (motion_readout(world(table, tell), table, "val", 200) for tell in (1.0, 0.0))
    assert told["speed_mps"]["low"] > 0.9 and told["speed_mps"]["mae"] < 0.5 and told["yaw_rate_radps"]["high"] < 0.3
    assert silent["speed_mps"]["high"] < 0.2 and told["speed_mps"]["shuffled_r2"] < 0.2


def test_floors_find_what_settles_the_next_view(table):
    data = world(table)
    f = visual_floors(data, "val")
    assert set(f) == {1, 2, 3} and all(v["now"] < 0.9 * v["mean"] and v["ego"] > 0.98 * v["mean"] for v in f.values())
    ego = torch.as_tensor(table["ego"][:, :1] / 5)
    g = visual_floors(replace(data, ego=torch.cat([data.ego, ego], 1)), "val")
    assert g[3]["ego"] < 0.9 * g[3]["mean"], "the status that settles the view must lower the blind floor"


@pytest.mark.parametrize(
    "fault, what", [("scene", "is in"), ("test map", "test and train share the map"), ("dev map", "dev and train share the map"), ("drive", "the same drive")]
)
def test_every_fault_of_the_splits_is_found(table, fault, what):
    t = {k: v.copy() for k, v in table.items()}
    assert split_faults(t) == []
    train, test, dev = (np.flatnonzero(t["split"] == s) for s in ("train", "test", "dev"))
    if fault == "scene":
        t["scene"][test] = t["scene"][train[0]]
    if fault == "test map":
        t["location"][train] = "boston-seaport"
    if fault == "dev map":
        t["location"][dev] = t["location"][train[0]]
    if fault == "drive":
        for k in ("ego", "future", "history"):
            t[k][test[0]] = t[k][train[0]]
    assert any(what in f for f in split_faults(t))


def test_standing_still_twice_is_no_leak(table):
    t = {k: v.copy() for k, v in table.items()}
    for k in ("ego", "future", "history"):
        t[k][[0, -1]] = 0
    assert split_faults(t) == []


def test_shuffled_futures_give_chance_and_a_leak_is_seen(table, monkeypatch):
    data = world(table)
    assert not shuffled_labels(data, FIT, "val", ("image",))["image"]["leaks"]
    before = data.future.clone()
    monkeypatch.setattr(module, "_shuffled", lambda data, seed: data)  # labels that were not shuffled after all
    found = shuffled_labels(data, FIT, "val", ("image",))["image"]
    assert found["leaks"] and found["low"] > 0 and torch.equal(before, data.future)


def test_the_extrapolation_does_not_pass_for_a_leak(table):
    "Ego-reading heads correct an extrapolation that tells the future; on shuffled futures it must be out of the way."
    data = world(table)
    data = replace(data, base=0.95 * data.future)
    found = shuffled_labels(data, replace(FIT, steps=40), "val", ("direct", "blind"))
    assert not any(v["leaks"] for v in found.values())


def test_shuffling_touches_training_futures_alone(table):
    data = world(table)
    s = module._shuffled(data, 0)
    train, rest = data.rows("train"), np.flatnonzero(data.split != "train")
    assert torch.equal(s.future[rest], data.future[rest]) and not torch.equal(s.future[train], data.future[train])
    assert torch.equal(s.future[train].flatten(1).sum(1).sort().values, data.future[train].flatten(1).sum(1).sort().values)
    assert plan_ade(lambda r: data.future[torch.as_tensor(r)], data, rest).max() == 0


# The report

PART = dict(value=0.5, low=0.4, high=0.6)
PLANNERS = {p: {"score": PART | {"n": 30}, "nc": PART | {"n": 30}} for p in ("expert, logged", "PDM-Closed")}
NAVSIM = dict(profile="laptop", split="test", frames=30, logs=30, scores=dict(navsim_v1_pdms=PLANNERS, navsim_v2_epdms=PLANNERS))


def full_card():
    names = [f"scene-{i:04d}" for i in range(4)]
    return dict(
        name="minidrive",
        about="Synthetic driving scenes.",
        licence="Apache-2.0",
        version="v1.0-minidrive",
        world_version="3",
        seed=0,
        size=dict(train=2, val=2),
        image_size=[128, 64],
        counts=dict(sample=164, sample_annotation=900),
        navsim=dict(windows=dict(train=20, val=20), second_stage_pairs=3, suboptimal=dict(wrong_lane=2)),
        hash="ab" * 32,
        image_hash="cd" * 32,
        event_kinds=list(EVENT_KINDS),
        events={n: [dict(kind="cut_in", t_start_s=3.0, t_end_s=6.0, agent=None)] for n in names[:2]},
        scenes={
            n: dict(split="train" if i < 2 else "val", map="boston-seaport", road="merge", family="cut_in" if i < 2 else "cruise") for i, n in enumerate(names)
        },
    )


def report(card):
    g = {
        name: dict(n=90, scenes=20, share=0.3, verdict=SIGHTED, gain=PART, **dict.fromkeys(PROBES, PART))
        for name in ("full", "critical_cut_in", "family_yield", "event_critical")
    }
    r = dict(
        table=g,
        shares=dict(
            threshold_m=[1.0, 2.0],
            rho=[0.5, 0.3],
            rho_event_critical=[0.6, 0.5],
            rho_event_free=[0.4, 0.1],
            event_critical=0.27,
            kinematic_critical=0.25,
            kinematic_threshold_m=2.1,
            both=0.12,
            by_kind=dict(cut_in=0.27),
        ),
        readout=dict(speed_mps=dict(r2=0.86, low=0.8, high=0.9, mae=0.7, shuffled_r2=-0.01)),
        floors={h: dict(mean=1.0, copy=1.4, ego=0.9, now=0.8, both=0.7) for h in (1, 2, 3)},
        leaks=dict(image=dict(ade=3.1, chance=3.0, gain=-0.1, low=-0.2, high=-0.01, leaks=False)),
        faults=[],
        card=short_card(card),
        info=dict(split="val", seeds=[0, 1, 2]),
    )
    return r | dict(verdicts=verdicts(r))


def test_verdicts_name_what_is_missing(tmp_path):
    r = report(full_card())
    assert r["verdicts"] == dict(
        critical_cut_in=SIGHTED,
        critical_brake_leader=FEW,
        critical_pedestrian=FEW,
        critical_red_light=FEW,
        event_critical=SIGHTED,
        share_by_events=True,
        no_leak=True,
    )
    assert verdicts({**r, "faults": ["test and train share a map"]})["no_leak"] is False
    assert verdicts({**r, "leaks": dict(image=dict(leaks=True))})["no_leak"] is False
    assert verdicts({**r, "shares": {**r["shares"], "event_critical": 0.2}})["share_by_events"] is False
    written = write_difficulty(tmp_path / "d.json", r)
    assert set(written["floors"]) == {"1", "2", "3"}
    assert [row[0] for row in verdict_rows(written["verdicts"])][0].endswith(group_title("critical_cut_in"))


def test_card_in_words_and_no_card():
    r = report(full_card())
    words = dict(card_rows(r))
    assert {"What it is", "What it is not", "Licence", "Version", "Hash", "Sizes", "Vision-critical"} <= set(words)
    assert "ab" * 32 in words["Hash"] and "world version 3" in words["Version"] and "27.0 %" in words["Vision-critical"] and "cut in 2" in words["Scenes with"]
    assert card_rows(report({})) == []


def test_tables_hold_every_group_and_planner():
    tables = {t["table"]: t for t in difficulty_tables(report(full_card())) + navsim_tables(NAVSIM)}
    assert set(tables) == {"probes", "shares", "rho", "floors", "readout", "leaks", "navsim_v1_pdms", "navsim_v2_epdms"}
    assert len(tables["probes"]["rows"]) == 4 and [r["row"] for r in tables["navsim_v1_pdms"]["rows"]] == ["expert, logged", "PDM-Closed"]
    assert list(tables["floors"]["rows"][0]["values"]) == ["mean view", "present view", "ego status and command", "present view, regressed", "both, regressed"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "A site with the world's results of two profiles and a gallery of one."
    d = tmp_path_factory.mktemp("world")
    (d / "records").mkdir()
    write_world(d / "results/laptop/world", "laptop", report(full_card()), NAVSIM, d / "records", [])
    write_world(d / "results/smoke/world", "smoke", report({}), {}, d / "records", [])
    pictures = [dict(file=f"{g}-x.jpg", title=f"{g} x", caption="Seed 3.") for g in ("road", "family", "pair")]
    write_json(d / "runs/laptop/gallery/gallery.json", pictures)
    for p in pictures:
        (d / "runs/laptop/gallery" / p["file"]).write_bytes(b"\xff\xd8\xff")
    return build_site(d / "report", results=d / "results", runs=d / "runs", library=d / "none").parent


def test_world_page_shows_card_tables_and_pictures(page):
    assert check_site(page) == []
    text = (page / "world.html").read_text()
    for what in (
        "What it is not",
        "Apache-2.0",
        "ab" * 32,
        "sighted wins",
        "25–30 % of samples",
        "expert, logged",
        "PDM-Closed",
        "0.860",
        "Scenario families",
        "Faults and their corrections",
        "they are not minidrive",
        "figures/world-pair-x.jpg",
        "critical: cut in",
    ):
        assert what in text, what
    heads = [text.index(f">{c}<") for c in ("constant velocity and yaw rate", "images", "both", "gain of seeing")]
    assert heads == sorted(heads) and "made by" not in text.split('id="t-probes"')[1]
    assert text.index("Four probes") < text.index("Rho") < text.index("NAVSIM v1") and text.count("<figure") == 3
    assert (page / "figures/world-road-x.jpg").is_file() and 'href="world.html"' in (page / "index.html").read_text()


def test_a_gallery_without_its_picture_stops_the_build(page, tmp_path):
    shutil.copytree(page.parent / "runs", tmp_path / "runs")
    (tmp_path / "runs/laptop/gallery/pair-x.jpg").unlink()
    with pytest.raises(ValueError, match="make the gallery again"):
        gallery_pictures(tmp_path / "runs/laptop/gallery")
    with pytest.raises(ValueError, match="make the gallery again"):
        build_site(tmp_path / "report", results=page.parent / "results", runs=tmp_path / "runs", library=tmp_path / "none")
    assert not (tmp_path / "report").exists()


def test_site_without_a_world_says_so(tmp_path):
    front = build_site(tmp_path / "report", results=tmp_path / "a", runs=tmp_path / "b", library=tmp_path / "c")
    text = (front.parent / "world.html").read_text()
    assert "Not measured yet" in text and "No pictures" in text and DT_S == 0.1


def test_stand_in_scene_is_enough_for_the_flags():
    "label_samples gives critical_flags events alone; should it read more of a scene, this fails first."
    scene = make_scene(1, "scene-0001", "val", "singapore-onenorth")
    k = np.arange(0, 201, 5)
    assert np.array_equal(critical_flags(SimpleNamespace(events=scene.events), k), critical_flags(scene, k))
