"Second-stage frames of minidrive and the two-stage score."

import numpy as np
import pytest

import vlarepro.scoring.pdm.stages as module
from vlarepro.core.seeds import rng
from vlarepro.scoring.pdm.aggregate import METRICS
from vlarepro.scoring.pdm.scene import Tracks
from vlarepro.scoring.pdm.score import navsim_v2_epdms
from vlarepro.scoring.pdm.simulation import VEHICLE, centers
from vlarepro.scoring.pdm.stages import (
    Spread,
    constant_velocity,
    deviating_drive,
    group_keyframes,
    log_follower,
    make_group,
    reactive_metrics,
    second_stage,
    two_stage_score,
)
from vlarepro.world.scenarios import make_scene
from vlarepro.world.scene import box_corners, boxes_overlap


@pytest.fixture(scope="module")
def scene(): return make_scene(12, "scene-0012", "val", "boston-seaport")


@pytest.fixture(scope="module")
def group(scene): return make_group(scene, 8, 3, rng("test", 0))


def test_a_group_is_made_of_the_right_frames(scene, group):
    assert len(group.now.token) == len(group.previous.token) == 16 and group.now.time_us - group.previous.time_us == 500_000
    tokens = [c.token for c in group.caches()]
    assert len(set(tokens)) == 2 + 2 * 3
    for later, earlier in group.second:
        assert len(later.token) == len(earlier.token) == 17 and later.synthetic and earlier.synthetic and later.human is None
        assert (later.time_us - group.now.time_us, earlier.time_us - group.previous.time_us) == (4_000_000, 4_000_000)
        np.testing.assert_allclose(later.past[-2, :2] + later.origin, earlier.origin, atol=1e-9)      # one drive, two frames
        np.testing.assert_allclose(later.previous_ego[3], earlier.ego[3], atol=1e-9)
        assert len(later.reference_v2.states) == 51 and 0.05 < np.hypot(*(later.origin - scene.ego[80, :2])) < 8


def test_starts_stand_free_on_the_road(group):
    for c in (c for pair in group.second for c in pair):
        still = np.zeros((1, 41, 11)); still[:, :, :3] = c.ego[:3]
        mine = box_corners(centers(c.ego), c.ego[2], 2 * VEHICLE.half_length, 2 * VEHICLE.half_width)
        now = c.tracks_v2.state[c.tracks_v2.valid[:, 0], 0]
        assert not any(boxes_overlap(mine, box_corners(b[:2], b[2], b[3], b[4])) for b in now)
        assert module.scorer_of(c, "v2").metrics(still).dac[0] == 1


def test_the_same_generator_gives_the_same_group(scene, group):
    again = make_group(scene, 8, 3, rng("test", 0))
    for a, b in zip(group.caches(), again.caches()):
        np.testing.assert_array_equal(a.origin, b.origin)
        np.testing.assert_array_equal(a.reference_v2.states, b.reference_v2.states)
    other = make_group(scene, 8, 3, rng("test", 1))
    assert not np.allclose(group.second[0][0].origin, other.second[0][0].origin)


@pytest.mark.parametrize("keyframe", [8, 16])
def test_a_deviation_arrives_about_where_it_was_sent(keyframe):
    "In a scene whose ego keeps rolling: who stands cannot be moved aside."
    scenes = (make_scene(seed, f"scene-{seed:04}", "val", "boston-seaport") for seed in range(100))
    ego = next(s.ego for s in scenes if s.ego[keyframe * 5: keyframe * 5 + 41, 3].min() > 3)[keyframe * 5:]
    base, h = deviating_drive(ego, np.zeros(4)), ego[40, 2]
    for left, ahead in ((1.0, 0.0), (0.0, -3.0), (-0.5, 2.0)):
        d = (deviating_drive(ego, np.array([left, ahead, 0.0, 0.0])) - base)[-1, :2]
        assert abs(-np.sin(h) * d[0] + np.cos(h) * d[1] - left) < 0.6 and abs(np.cos(h) * d[0] + np.sin(h) * d[1] - ahead) < 0.8
    faster = deviating_drive(ego, np.array([0, 0, 0, 1.0]))[-1, 3]
    assert faster > base[-1, 3] + 0.3


def test_a_standing_ego_can_deviate():
    stand = np.zeros((120, 7)); stand[:, 2] = 0.5
    drive = deviating_drive(stand, np.array([0.0, -2.0, 0.0, 0.0]))
    assert np.isfinite(drive).all() and np.abs(drive[:, :2]).max() < 0.5       # nobody is sent backwards
    ahead = deviating_drive(stand, np.array([0.0, 4.0, 0.0, 1.0]))
    assert 2 < np.cos(0.5) * ahead[-1, 0] + np.sin(0.5) * ahead[-1, 1] < 6


def test_replay_equals_the_scorer(group):
    for c in (group.now, group.second[0][0]):
        plans = np.stack([constant_velocity(c), 0.5 * constant_velocity(c)])
        got, states = reactive_metrics(c, plans, "replay")
        want = navsim_v2_epdms(c, plans)
        for k in METRICS: np.testing.assert_allclose(got[k], getattr(want, k), atol=1e-12)
        np.testing.assert_array_equal(states, want.states)


def test_a_vehicle_that_touches_the_ego_at_the_start_counts_in_reactive_traffic_alone(group):
    c = group.now
    t = c.tracks_v2
    ahead = 4.5 * np.array([np.cos(c.ego[2]), np.sin(c.ego[2])])
    box = np.tile([*ahead, c.ego[2], 4.5, 1.9, *c.ego[3] * ahead / 4.5], (1, 41, 1)).reshape(1, 41, 7)
    valid, kind = np.concatenate([t.valid, np.ones((1, 41), bool)]), np.append(t.type, 0).astype(np.int8)
    touching = Tracks(np.concatenate([t.state, box]), valid, kind, (*t.id, "touching"))
    c = c.replace(tracks_v2=touching, synthetic=True)
    plan = constant_velocity(c)[None]
    assert reactive_metrics(c, plan, "replay")[0]["nc"][0] == 1 and reactive_metrics(c, plan, "reactive")[0]["nc"][0] == 0


@pytest.mark.parametrize("traffic", ["reactive", "onward"])
def test_a_plan_does_not_depend_on_the_other_plans(group, traffic):
    c = group.second[0][0]
    plans = np.stack([constant_velocity(c), 0.3 * constant_velocity(c), 1.5 * constant_velocity(c)])
    together, _ = reactive_metrics(c, plans, traffic)
    for i in range(3):
        alone, _ = reactive_metrics(c, plans[i:i + 1], traffic)
        for k in METRICS: assert alone[k][0] == together[k][i]


def test_scores_of_planners(scene, group):
    good, bad = (two_stage_score([group], p) for p in (log_follower([scene]), lambda c: constant_velocity(c) * [3.0, 1.0, 1.0] + [0.0, 6.0, 0.0]))
    for r in (good, bad):
        for part in ("combined", "stage_one", "stage_two"): assert all(0 <= v <= 1 for v in r[part].values())
        w = np.array(r["per_token"]["weight"])
        np.testing.assert_allclose([w[2::2].sum(), w[3::2].sum()], 1)
    assert good["stage_one"]["score"] > 0.8 and bad["combined"]["score"] < 0.2


def test_bad_requests_are_refused(scene, group, monkeypatch):
    ok = group_keyframes(scene)
    with pytest.raises(ValueError, match="cannot begin a group: expected 4 to 22"): make_group(scene, ok.start - 1, 2, rng("x"))
    with pytest.raises(ValueError, match="must return 8 finite poses"): two_stage_score([group], lambda c: np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match="no groups"): two_stage_score([], constant_velocity)
    with pytest.raises(KeyError, match="is not among the scenes"): log_follower([])(group.now)
    with pytest.raises(ValueError, match="human: the filter needs the logged future"):
        reactive_metrics(group.now.replace(human=None), constant_velocity(group.now)[None])
    monkeypatch.setattr(module, "_free", lambda cache: False)
    with pytest.raises(ValueError, match="keyframe 8: only 0 of 1 second-stage starts stand free"): second_stage(scene, 8, 1, rng("x"), Spread())
