"""Negative drives show their fault by measure; recoveries start bit for bit in their state and put it right."""
import dataclasses

import numpy as np
import pytest

from vlarepro.world.expert import uncomfortable
from vlarepro.world.scenarios import make_scene
from vlarepro.world.scene import DT_S, KEYFRAME_STEP, LOCATIONS, N_STEPS
from vlarepro.world.suboptimal import (
    FAULTS,
    NEGATIVE_KINDS,
    WINDOW,
    NoDrive,
    Replay,
    clearances,
    drive_scene,
    make_negative,
    make_recovery,
    measures,
    outside_lane,
    shows_fault,
    suboptimal_pairs,
)

N_SCENES = 90


@pytest.fixture(scope="module")
def pairs():
    """Up to two pairs a scene, and the scenes."""
    out, count = {k: [] for k in NEGATIVE_KINDS}, 0
    for s in range(N_SCENES):
        scene = make_scene(s, f"scene-{s:04d}", "train", LOCATIONS[s % 4])
        found = suboptimal_pairs(scene, np.random.default_rng(s))
        count += len(found)
        for bad, good in found:
            out[bad.kind].append((scene, bad, good))
    return out, count


def test_enough_of_every_kind(pairs):
    """SpanVLA's recipe needs 1.5K negatives and 0.5K recoveries to 4K positives; a scene gives more than one pair on average."""
    found, count = pairs
    assert count > 0.9 * N_SCENES, count
    assert all(len(v) >= 3 for v in found.values()), {k: len(v) for k, v in found.items()}


def test_negatives_start_as_the_expert_and_on_a_keyframe(pairs):
    for rows in pairs[0].values():
        for scene, bad, _ in rows:
            k = round(bad.t_start_s / DT_S)
            assert k % KEYFRAME_STEP == 0 and k + WINDOW < N_STEPS and bad.label == "negative" and bad.scene == scene.name
            assert np.array_equal(bad.ego[: k + 1], scene.ego[: k + 1]) and not np.array_equal(bad.ego[: k + 20], scene.ego[: k + 20])
            assert bad.ego.shape == (N_STEPS, 7) and np.isfinite(bad.ego).all()


def test_recoveries_start_bit_equal_in_their_negatives_state(pairs):
    for rows in pairs[0].values():
        for _, bad, good in rows:
            k = round(good.t_start_s / DT_S)
            assert k % KEYFRAME_STEP == 0 and good.t_start_s > bad.t_start_s and good.label == "recovery" and good.kind == bad.kind
            assert np.array_equal(good.ego[: k + 1], bad.ego[: k + 1]) and np.array_equal(good.inner[: k + 1], bad.inner[: k + 1])
            assert not np.array_equal(good.ego[k + 1 : k + 20], bad.ego[k + 1 : k + 20])


def test_hesitation_loses_progress(pairs):
    for scene, bad, good in pairs[0]["hesitation"]:
        k = round(bad.t_start_s / DT_S)
        way = [np.hypot(*np.diff(e[k : k + WINDOW + 1, :2], axis=0).T).sum() for e in (bad.ego, scene.ego)]
        assert way[0] < 0.7 * way[1]
        k = round(good.t_start_s / DT_S)
        assert good.ego[k : k + WINDOW, 3].mean() > bad.ego[k : k + WINDOW, 3].mean() + 0.5


def test_early_stop_stands_short_of_the_turn(pairs):
    for scene, bad, good in pairs[0]["early_stop"]:
        k = round(bad.t_start_s / DT_S)
        window = slice(k, k + WINDOW + 1)
        assert bad.ego[window, 3].min() < 0.8 < scene.ego[window, 3].min()
        assert good.ego[-1, 3] > 0.5 or np.hypot(*(good.ego[-1] - bad.ego[k])[:2]) > 15


def test_late_braking_is_outside_the_bounds(pairs):
    for scene, bad, good in pairs[0]["late_braking"]:
        k = round(bad.t_start_s / DT_S)
        assert bad.ego[k : k + WINDOW + 1, 4].min() < -4.05 or bad.fault["ttc_s"] < 0.9
        assert scene.ego[:, 4].min() > -4.05 and good.ego[round(good.t_start_s / DT_S) :, 4].min() > -4.05


def test_drift_and_wrong_lane_leave_the_lane(pairs):
    for kind, beyond in (("kerb_drift", 0.15), ("wrong_lane", 1.6)):
        for scene, bad, good in pairs[0][kind]:
            k = round(bad.t_start_s / DT_S)
            out = outside_lane(scene, bad.ego, slice(k, k + WINDOW + 1))
            assert out.max() > beyond and outside_lane(scene, scene.ego, slice(k, k + WINDOW + 1)).max() < out.max()
            end = min(round(good.t_start_s / DT_S) + WINDOW, N_STEPS - 1)
            assert abs(good.inner[end, 3]) < 0.3


def test_fast_bend_corners_too_hard(pairs):
    for scene, bad, _ in pairs[0]["fast_bend"]:
        k = round(bad.t_start_s / DT_S)
        window = slice(k, k + WINDOW + 1)
        lateral = [np.abs(e[window, 3] * e[window, 5]).max() for e in (bad.ego, scene.ego)]
        assert (lateral[0] > 4.89 or np.abs(bad.ego[window, 5]).max() > 0.95) and lateral[0] > 1.5 * lateral[1]


def test_recoveries_are_clean(pairs):
    for rows in pairs[0].values():
        for scene, bad, good in rows:
            k = round(good.t_start_s / DT_S)
            assert not clearances(scene, good.ego, slice(k, min(k + WINDOW + 1, N_STEPS))).any()
            assert max(uncomfortable(good.ego[k + 3 : min(k + WINDOW, N_STEPS)]).values()) == 0.0
            assert not clearances(scene, bad.ego, slice(round(bad.t_start_s / DT_S), k + 1)).any()


def test_the_expert_shows_no_fault_where_the_negative_does(pairs):
    for kind, rows in pairs[0].items():
        for scene, bad, _ in rows[:6]:
            r = Replay(scene)
            k = round(bad.t_start_s / DT_S)
            assert not shows_fault(kind, measures(r, scene.ego, r.inner, k))
            assert shows_fault(kind, measures(r, bad.ego, bad.inner, k)) and FAULTS[kind][0] in bad.fault


def test_states_agree_with_motion(pairs):
    for rows in pairs[0].values():
        for _, bad, good in rows[:4]:
            for drive in (bad, good):
                v = np.hypot(*np.gradient(drive.ego[:, :2], DT_S, axis=0).T)
                assert np.abs(v - drive.ego[:, 3])[1:-1].max() < 0.5, (drive.kind, drive.label, drive.scene)


def test_same_seed_same_pair():
    scene = make_scene(2, "scene-0002", "train", LOCATIONS[2])
    a, b = (suboptimal_pairs(scene, np.random.default_rng(7)) for _ in range(2))
    assert len(a) == len(b) and all(np.array_equal(x.ego, y.ego) for p, q in zip(a, b) for x, y in zip(p, q))


def test_a_drive_becomes_a_scene(pairs):
    scene, bad, good = pairs[0]["hesitation"][0]
    for drive in (bad, good):
        other = drive_scene(scene, drive)
        assert np.array_equal(other.ego, drive.ego) and other.command.shape == scene.command.shape and other.agents is scene.agents
    with pytest.raises(ValueError, match="belongs to"):
        drive_scene(dataclasses.replace(scene, name="scene-9999"), bad)


def test_what_cannot_be_made_is_refused(pairs):
    scene, bad, good = pairs[0]["hesitation"][0]
    with pytest.raises(ValueError, match="no such negative"):
        make_negative(scene, "speeding", np.random.default_rng(0))
    with pytest.raises(ValueError, match="label 'negative'"):
        make_recovery(scene, good, np.random.default_rng(0))
    with pytest.raises(ValueError, match="carries no plan"):
        Replay(dataclasses.replace(scene, plan_path=np.zeros((0, 3))))
    calm = make_scene(0, "scene-0000", "train", LOCATIONS[0], road="straight")
    with pytest.raises(NoDrive, match="no place for a early_stop|no place for a"):
        make_negative(calm, "early_stop", np.random.default_rng(0))
