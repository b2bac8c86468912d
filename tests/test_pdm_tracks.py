"Tracks and red lights against NAVSIM's own caches of 40 scenes, and bad input."
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlarepro.scoring.pdm.scene import N_TRACK_SAMPLES, SceneCache, straight_scene
from vlarepro.scoring.pdm.tracks import Frame, both_horizons, frame_from_ego, hold_lights, interpolate_tracks, no_boxes

NOW = 3  # frame of the oracle's logs that is the scene


def oracle_frames(z):
    "Frames of a raw oracle log from now on, moved to the ego at frame NOW."
    poses, origin, frames = z["log_ego_pose"], z["log_ego_pose"][NOW, :2], []
    for k in range(NOW, len(poses)):
        a = z["log_annotations"][z["log_annotations"][:, 0] == k]
        pose = poses[k] - [*origin, 0.0]
        index = [str(int(i)) for i in a[:, 1]]
        frames.append(frame_from_ego(index, a[:, [3, 4, 9, 6, 7]], a[:, 10:12], a[:, 2].astype(np.int8), pose))
    return frames, origin


@pytest.fixture(scope="module")
def oracle(shared_folder):
    paths = sorted((shared_folder / "navsim" / "oracle").glob("*.npz"))
    assert len(paths) == 40
    out = []
    for p in paths:
        with np.load(p, allow_pickle=False) as z: a = {k: z[k] for k in z.files}
        out.append((p.stem, a, json.loads(str(a["meta_json"]))))
    return out


def sort_rows(state, valid, type):
    "Rows in an order that does not depend on names: by first valid sample's values."
    key = np.array([s[int(np.argmax(v))] for s, v in zip(state, valid)]).reshape(-1, 7)
    order = np.lexsort(np.concatenate([key.T, valid.sum(1)[None]]).round(5))
    return state[order], valid[order], type[order]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_equal_to_the_official_tracks(oracle, version):
    worst, ghosts = 0.0, 0
    for name, z, _ in oracle:
        frames, origin = oracle_frames(z)
        got = interpolate_tracks(frames, N_TRACK_SAMPLES[version])
        want, valid, kind = z[f"in_{version}_tracks"], z[f"in_{version}_track_valid"], z[f"in_{version}_track_type"]
        want = want - np.array([*origin, 0, 0, 0, 0, 0])
        assert len(got.id) == len(want), name
        (gs, gv, gt), (ws, wv, wt) = sort_rows(got.state, got.valid, got.type), sort_rows(want, valid, kind)
        np.testing.assert_array_equal(gv, wv, err_msg=name)
        np.testing.assert_array_equal(gt, wt, err_msg=name)
        d = gs - ws
        d[..., 2] = np.arctan2(np.sin(d[..., 2]), np.cos(d[..., 2]))
        if len(d): worst = max(worst, float(np.abs(d[gv]).max()))
        counts = {}
        for f in frames[:N_TRACK_SAMPLES[version] // 5 + 1]:
            for i in f.id: counts[i] = counts.get(i, 0) + 1
        ghosts += sum(n == 1 for n in counts.values())
    print(version, 'largest difference', worst, 'ghosts', ghosts)
    assert worst < 1e-9, worst       # world coordinates near 4e6 m have a step of 5e-10 m
    assert ghosts > 0                # the rule was exercised


def test_red_lights_equal_the_official_ones(oracle):
    reds = 0
    for name, z, meta in oracle:
        red = [i.removeprefix("red_light_") for i in meta["red_ids"]]
        lights = [[str(i) for i, on in f if on] for f in meta["log_traffic_lights"][NOW:]]
        ids, active = hold_lights(lights)
        keep = [ids.index(i) for i in red]
        np.testing.assert_array_equal(active[:, keep], z["in_red_active"], err_msg=name)
        reds += len(keep)
    assert reds > 0


def frame(rows):
    "Rows (id, x, y, heading, vx, vy)."
    box, velocity = np.array([[*r[1:4], 4.0, 2.0] for r in rows], float), np.array([r[4:6] for r in rows], float)
    return Frame(tuple(r[0] for r in rows), box.reshape(-1, 5), velocity.reshape(-1, 2), np.zeros(len(rows), np.int8))


def test_a_ghost_can_differ_between_the_versions():
    frames = [no_boxes()] * 8 + [frame([("a", 5, 0, 0, 1, 0)]), frame([("a", 6, 0, 0, 1, 0)]), no_boxes()]
    v1, v2 = both_horizons(frames)
    assert v2.valid.all() and np.ptp(v2.state[0], axis=0).max() == 0
    assert np.flatnonzero(v1.valid[0]).tolist() == list(range(40, 46))
    np.testing.assert_allclose(v1.state[0, 42, 0], 5.4)


def test_an_id_beyond_the_horizon_is_not_there():
    assert len(interpolate_tracks([no_boxes()] * 9 + [frame([("late", 0, 0, 0, 0, 0)])], 41).id) == 0


def test_the_input_is_not_changed():
    frames = [frame([("a", k, 0, 3.1 * (-1) ** k, 1, 0)]) for k in range(9)]
    before = [f.box.copy() for f in frames]
    interpolate_tracks(frames)
    assert all((f.box == b).all() for f, b in zip(frames, before))


@pytest.mark.parametrize("change, says", [
    (dict(box=np.array([[0, 0, 0, np.nan, 2.0]])), "box of track 'a' is not finite"),
    (dict(velocity=np.array([[np.inf, 0]])), "velocity of track 'a' is not finite"),
    (dict(box=np.array([[0, 0, 0, 0.0, 2.0]])), "both must be positive"),
    (dict(box=np.zeros((2, 5))), "expected shape (1, 5)"),
    (dict(type=np.array([8], np.int8)), "expected 0 to 7, got 8"),
    (dict(id=("a", "a"), box=np.ones((2, 5)), velocity=np.zeros((2, 2)), type=np.zeros(2, np.int8)), "'a' stands for two boxes"),
])
def test_bad_frames_are_refused(change, says):
    good = dict(id=("a",), box=np.array([[0, 0, 0, 4.0, 2.0]]), velocity=np.zeros((1, 2)), type=np.zeros(1, np.int8))
    Frame(**good)
    with pytest.raises(ValueError) as e: Frame(**{**good, **change})
    assert says in str(e.value)


@pytest.mark.parametrize("n", [0, 1, 5, 40, 42])
def test_odd_horizons_are_refused(n):
    with pytest.raises(ValueError, match="n_samples: expected 6, 11"): interpolate_tracks([no_boxes()] * 20, n)


def test_lights_need_every_frame():
    with pytest.raises(ValueError, match="41 samples need 9 frames"): hold_lights([[]] * 8)
    ids, active = hold_lights([[]] * 9)
    assert ids == () and active.shape == (41, 0)


def test_a_scene_takes_empty_tracks():
    v1, v2 = both_horizons([no_boxes()] * 11)
    assert isinstance(straight_scene().replace(tracks_v1=v1, tracks_v2=v2), SceneCache)


@given(st.lists(st.booleans(), min_size=9, max_size=9), st.integers(0, 2 ** 32 - 1))
def test_sightings_are_kept_exactly_and_the_rest_is_between(seen, seed):
    "At a sighting the box is the annotation; elsewhere it lies between its neighbours."
    rng = np.random.default_rng(seed)
    rows = [("a", *rng.uniform(-20, 20, 2), rng.uniform(-3, 3), *rng.uniform(-5, 5, 2)) for _ in range(9)]
    t = interpolate_tracks([frame([r] if s else []) for r, s in zip(rows, seen)])
    k = np.flatnonzero(seen)
    assert len(t.id) == min(1, len(k))
    if len(k) == 1: assert t.valid.all()
    if len(k) < 2: return
    np.testing.assert_array_equal(np.flatnonzero(t.valid[0]), np.arange(5 * k[0], 5 * k[-1] + 1))
    got, want = t.state[0, 5 * k][:, [0, 1, 5, 6]], np.array([rows[i] for i in k], object)[:, [1, 2, 4, 5]].astype(float)
    np.testing.assert_allclose(got, want, atol=1e-12)
    inside = t.state[0, t.valid[0]][:, [0, 1]]
    assert (inside >= want[:, :2].min(0) - 1e-9).all() and (inside <= want[:, :2].max(0) + 1e-9).all()
