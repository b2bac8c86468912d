"""The PDM scorer against the official outputs, a slow second implementation, the laws that scores must obey, and bad input."""
import dataclasses
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import slow_pdm as slow

from vlarepro.scoring.pdm.geometry import boxes_touch, in_ring, ring_touches_box, slice_rings
from vlarepro.scoring.pdm.oracle import freeze_scene, main_navsim, oracle_navsim
from vlarepro.scoring.pdm.rules import ego_progress
from vlarepro.scoring.pdm.scene import Polygons, RedLights, Tracks, load_cache, load_caches, save_cache
from vlarepro.scoring.pdm.schema import OracleScene, load_oracle_scene, oracle_paths
from vlarepro.scoring.pdm.score import PDMScorer, navsim_v1_pdms, navsim_v2_epdms, score_batch

CASES = Path(__file__).parent / "pdm_cases"
V1 = ("nc", "dac", "ep", "ttc", "comfort", "ddc", "score")
V2 = ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec", "unfiltered", "internal", "score")
CONTINUOUS = ("ep", "score", "unfiltered", "internal")
SEEDS = st.integers(0, 10**9)


def drawn(seed, k=4, **options):
    "A random scene with plans of now and of half a second ago."
    rng = np.random.default_rng(seed)
    given_options = dict(agents=int(rng.integers(0, 16)), red_light=bool(rng.random() < 0.6), extra_polygons=int(rng.integers(0, 4)), token=f"made-{seed}")
    cache = slow.made_scene(rng, **(given_options | options))
    return cache, *slow.made_plans(rng, cache, k)


def both(cache, plans, previous, **options): return navsim_v1_pdms(cache, plans), navsim_v2_epdms(cache, plans, previous_plans=previous, **options)


def assert_same(a, b, tol=1e-9):
    "Two results of `both`: discrete values equal, continuous ones within tol."
    for x, y, names in zip(a, b, (V1, V2)):
        for n in names:
            left, right = getattr(x, n), getattr(y, n)
            if left is None and right is None: continue
            np.testing.assert_allclose(left, right, rtol=0, atol=tol if n in CONTINUOUS else 0, err_msg=n)
        np.testing.assert_array_equal(x.metrics.comfort_flags, y.metrics.comfort_flags)
        np.testing.assert_array_equal(x.metrics.areas, y.metrics.areas)
        np.testing.assert_array_equal(x.metrics.collision_s, y.metrics.collision_s)
        np.testing.assert_array_equal(x.metrics.ttc_s, y.metrics.ttc_s)
        np.testing.assert_allclose(x.metrics.progress_m, y.metrics.progress_m, rtol=0, atol=max(tol, 1e-9))
    assert a[1].forgiven == b[1].forgiven


def assert_agrees(fast, theirs, names, at):
    "One plan's result by the fast scorer and by the slow one."
    for n in names:
        if theirs[n] is not None: np.testing.assert_allclose(getattr(fast, n)[at], theirs[n], rtol=0, atol=1e-9 if n in CONTINUOUS else 0, err_msg=n)
    m = fast.metrics
    np.testing.assert_array_equal(m.areas[at, :, :3], theirs["areas"])
    np.testing.assert_array_equal(m.comfort_flags[at], theirs["comfort_flags"])
    np.testing.assert_array_equal(np.rint(10 * np.array([m.collision_s[at], m.ttc_s[at]])), [theirs["collision"], theirs["ttc_at"]])
    np.testing.assert_allclose(m.progress_m[at], theirs["progress_m"], rtol=0, atol=1e-8)
    difference = fast.states[at] - theirs["states"]
    difference[:, 2] = slow.wrap(difference[:, 2])
    assert np.abs(difference).max() < 1e-6


def assert_agrees_with_slow(cache, plans, previous, every=1):
    fast = both(cache, plans, previous)
    v1, v2 = slow.SlowScorer(cache, "v1"), slow.SlowScorer(cache, "v2")
    for i in range(0, len(plans), every):
        assert_agrees(fast[0], v1.score(plans[i]), V1, i)
        theirs = v2.score(plans[i], previous[i])
        assert_agrees(fast[1], theirs, V2, i)
        assert fast[1].forgiven == theirs["forgiven"]


# ---------------------------------------------------------------------------------------------------------------- official outputs, frozen cases
@pytest.mark.parametrize("folder", ["navsim/oracle", "golden/navsim_pdm"])
def test_official_outputs(shared_folder, folder):
    if not (shared_folder / folder).is_dir(): pytest.skip(f"{folder} is not in the shared folder")
    report = oracle_navsim(shared_folder / folder)
    assert report["ok"] and report["mismatches"] == 0 and report["scenes"] >= 40, [c for c in report["checks"] if not c["ok"]]


def test_slow_scorer_equals_the_official_outputs(shared_folder):
    "The second implementation is worth something only if it is right by itself."
    folder = shared_folder / "navsim" / "oracle"
    if not folder.is_dir(): pytest.skip("navsim/oracle is not in the shared folder")
    for n, path in enumerate(oracle_paths(folder)):
        scene, i = load_oracle_scene(path), n % 12
        e, v1 = scene.expected, slow.SlowScorer(scene.cache, "v1").score(scene.candidates[i])
        v2 = slow.SlowScorer(scene.cache, "v2").score(scene.candidates[i], scene.previous_candidates[i])
        np.testing.assert_allclose([v1[k] for k in V1], e["out_v1"][i], rtol=0, atol=1e-9)
        np.testing.assert_allclose([v2[k] for k in V2[:8]], e["out_v2_filtered"][i, :8], rtol=0, atol=1e-9)
        official = [e[f"out_{k}"][i] for k in ("ec", "epdms_filtered", "epdms_raw")]
        np.testing.assert_allclose([v2["ec"], v2["score"], v2["unfiltered"]], official, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(v2["areas"], e["out_ego_areas"][i])


def test_frozen_cases(capsys):
    report = oracle_navsim(CASES)
    assert report["ok"] and report["scenes"] == len(slow.FROZEN), [c for c in report["checks"] if not c["ok"]]
    assert sum(p.stat().st_size for p in CASES.glob("*.npz")) < 100_000
    assert main_navsim(CASES) == 0


def test_frozen_cases_are_right_and_not_trivial():
    rows = []
    for path in oracle_paths(CASES):
        s = load_oracle_scene(path)
        assert_agrees_with_slow(s.cache, s.candidates, s.previous_candidates)
        e = s.expected
        rows.append(np.concatenate([e["out_v2_raw"][:, :8], e["out_ec"][:, None], e["out_v1"][:, [3, 4]]], 1))
    rows = np.concatenate(rows)
    for i, name in enumerate(("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec", "ttc v1", "comfort v1")):
        assert rows[:, i].min() < 1 and rows[:, i].max() == 1, f"{name} never changes"
    assert 0.5 in rows[:, 0]


def test_a_changed_outcome_is_noticed(tmp_path):
    "The oracle command fails when one recorded value differs."
    path = oracle_paths(CASES)[0]
    with np.load(path, allow_pickle=False) as z: arrays = {k: z[k] for k in z.files}
    changes = {"out_v1": lambda a: a + (np.arange(a.size).reshape(a.shape) == 1), "out_sim": lambda a: a + 1e-5, "out_epdms_filtered": lambda a: a + 1e-6}
    for name, change in changes.items():
        np.savez(tmp_path / "case.npz", **(arrays | {name: change(arrays[name])}))
        report = oracle_navsim(tmp_path)
        assert not report["ok"] and main_navsim(tmp_path) == 1, name


# ---------------------------------------------------------------------------------------------------------------- a second implementation
@given(SEEDS)
@settings(max_examples=25)
def test_fast_equals_slow(seed):
    assert_agrees_with_slow(*drawn(seed))


def test_fast_equals_slow_in_dense_traffic():
    assert_agrees_with_slow(*drawn(7, k=6, agents=47, extra_polygons=120, red_light=True))


@given(st.data())
@settings(max_examples=150)
def test_in_ring_equals_shapely_on_a_grid(data):
    "Integer corners and points: ties on edges and corners are exact, and the boundary is outside."
    n, seed = data.draw(st.integers(3, 12)), data.draw(SEEDS)
    rng = np.random.default_rng(seed)
    xy = rng.integers(-6, 7, (n, 2)).astype(float)
    around = xy[np.argsort(np.arctan2(*(xy - xy.mean(0) - 0.01).T[::-1]))]
    polygon = shapely.Polygon(around)
    if not polygon.is_valid or polygon.area == 0: return
    ring, grid = slice_rings(around, np.array([0, n])), np.stack(np.meshgrid(np.arange(-7, 8.0), np.arange(-7, 8.0)), -1).reshape(-1, 2)
    np.testing.assert_array_equal([in_ring(x, y, ring, 0) for x, y in grid], shapely.contains_xy(polygon, grid[:, 0], grid[:, 1]))


@given(SEEDS)
@settings(max_examples=100)
def test_touching_boxes_count(seed):
    "Boxes on a grid that share an edge or a corner intersect, as shapely says."
    rng = np.random.default_rng(seed)
    a, b, other = rng.integers(1, 5, 2) / 2, rng.integers(-6, 7, 2) / 2, rng.integers(1, 5, 2) / 2
    first, second = shapely.box(*-a, *a), shapely.box(*(b - other), *(b + other))
    assert boxes_touch(0.0, 0.0, 1.0, 0.0, *a, *b, 1.0, 0.0, *other) == first.intersects(second)
    ring = slice_rings(shapely.get_coordinates(second)[:-1], np.array([0, 4]))
    assert ring_touches_box(ring, 0, 0.0, 0.0, 1.0, 0.0, *a) == first.intersects(second)


# ---------------------------------------------------------------------------------------------------------------- laws
@given(SEEDS, st.floats(-3.1, 3.1), st.floats(-4e6, 4e6), st.floats(-4e6, 4e6))
@settings(max_examples=25)
def test_rigid_motion_of_the_scene(seed, angle, x, y):
    cache, plans, previous = drawn(seed)
    assert_same(both(cache, plans, previous), both(slow.turned(cache, angle, (x, y)), plans, previous), 1e-8)


def test_translation_through_a_file(tmp_path):
    "World coordinates near 4e6 m on disk, as UTM logs have them: read back, they give the scores of the same scene near the origin."
    cache, plans, previous = drawn(11, red_light=True, agents=10)
    plans[0] = 0.0
    results = []
    for name, origin in (("near", (0.0, 0.0)), ("far", (664_000.25, 3_997_000.5))):
        freeze_scene(tmp_path / f"{name}.npz", OracleScene(cache.replace(origin=np.array(origin)), plans, tuple("abcd"), previous, {}))
        s = load_oracle_scene(tmp_path / f"{name}.npz")
        results.append(both(s.cache, s.candidates, s.previous_candidates))
        assert oracle_navsim(tmp_path)["ok"]
    assert_same(*results, 1e-7)
    assert np.isfinite(results[1][1].states[0]).all() and np.abs(results[0][1].states[0] - results[1][1].states[0]).max() < 1e-6


def reordered(tracks, order): return Tracks(tracks.state[order], tracks.valid[order], tracks.type[order], tuple(tracks.id[i] for i in order))


@given(SEEDS)
@settings(max_examples=20)
def test_order_of_agents_polygons_and_candidates(seed):
    cache, plans, previous = drawn(seed, k=5, agents=9)
    rng, p = np.random.default_rng(seed), cache.polygons
    order, rings, shuffled = rng.permutation(9), rng.permutation(len(p)), rng.permutation(5)
    expected = both(cache, plans, previous)
    moved = Polygons.of([p.ring(i) for i in rings], p.type[rings], p.on_route[rings], rings)
    other = cache.replace(tracks_v1=reordered(cache.tracks_v1, order), tracks_v2=reordered(cache.tracks_v2, order), polygons=moved)
    assert_same(expected, both(other, plans, previous))
    for result, moved, names in zip(expected, both(cache, plans[shuffled], previous[shuffled]), (V1, V2)):
        for n in names: np.testing.assert_allclose(getattr(result, n)[shuffled], getattr(moved, n), rtol=0, atol=1e-12, err_msg=n)


@given(SEEDS)
@settings(max_examples=20)
def test_a_candidate_does_not_see_the_others(seed):
    cache, plans, previous = drawn(seed, k=5)
    together = both(cache, plans, previous)
    for i in range(5):
        for result, alone, names in zip(together, both(cache, plans[i:i + 1], previous[i:i + 1]), (V1, V2)):
            for n in names: np.testing.assert_allclose(getattr(result, n)[i], getattr(alone, n)[0], rtol=0, atol=1e-12, err_msg=n)


def raw(cache, plans): return [PDMScorer(cache, v).metrics(PDMScorer(cache, v).drive(plans)) for v in ("v1", "v2")]


@given(SEEDS)
@settings(max_examples=20)
def test_one_more_agent_never_helps(seed):
    cache, plans, _ = drawn(seed, k=6, agents=8)
    fewer = cache.replace(tracks_v1=reordered(cache.tracks_v1, range(7)), tracks_v2=reordered(cache.tracks_v2, range(7)))
    for more, less in zip(raw(cache, plans), raw(fewer, plans)):
        assert (more.nc <= less.nc).all() and (more.ttc <= less.ttc).all()
        assert (more.collision_s <= less.collision_s).all() and (more.ttc_s <= less.ttc_s).all()
        for n in ("dac", "ddc", "tlc", "lk", "comfort", "progress_m"): np.testing.assert_array_equal(getattr(more, n), getattr(less, n))


@given(SEEDS)
@settings(max_examples=20)
def test_a_red_light_never_helps(seed):
    cache, plans, _ = drawn(seed, k=6, red_light=True)
    lights = cache.red_lights
    longer = RedLights(lights.xy, lights.start, lights.active | (np.random.default_rng(seed).random(lights.active.shape) < 0.3))
    none, some, more = (raw(cache.replace(red_lights=r), plans)[1] for r in (RedLights.none(), lights, longer))
    assert (none.tlc == 1).all() and (some.tlc <= none.tlc).all() and (more.tlc <= some.tlc).all()
    for n in ("nc", "ttc", "dac", "ddc", "lk"): np.testing.assert_array_equal(getattr(none, n), getattr(some, n))
    assert (raw(cache, plans)[0].tlc == 1).all()


@given(SEEDS)
@settings(max_examples=20)
def test_less_road_never_helps(seed):
    cache, plans, _ = drawn(seed, k=6)
    p, rng = cache.polygons, np.random.default_rng(seed)
    drivable = np.flatnonzero(np.isin(p.type, slow.DRIVABLE))
    kept = np.setdiff1d(np.arange(len(p)), rng.choice(drivable, len(drivable) // 2, replace=False))
    fewer = Polygons.of([p.ring(i) for i in kept], p.type[kept], p.on_route[kept], kept)
    inner = [shapely.get_coordinates(shapely.Polygon(p.ring(i)).buffer(-0.3).exterior)[:-1] if i in drivable else p.ring(i) for i in range(len(p))]
    narrower = Polygons.of(inner, p.type, p.on_route, p.id)
    for polygons in (fewer, narrower):
        for less, more in zip(raw(cache.replace(polygons=polygons), plans), raw(cache, plans)): assert (less.dac <= more.dac).all()


@given(st.floats(0, 60), st.floats(0, 60), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 60), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["v1", "v2"]))
@settings(max_examples=300)
def test_more_progress_never_lowers_ep(a, b, product, reference_m, reference_product, version):
    low, high = ego_progress(np.array(sorted((a, b))), np.full(2, product), reference_m, reference_product, version)
    assert low <= high + 1e-12 and 0 <= low and high <= 1


# ---------------------------------------------------------------------------------------------------------------- bad input: plans
@pytest.fixture(scope="module")
def scene(): return drawn(3, agents=6, red_light=True)


OTHER_PLANS = {"no pose": np.zeros((4, 0, 3)), "3 s": np.zeros((4, 6, 3)), "10 Hz": np.zeros((4, 40, 3)), "no axis of candidates": np.zeros((8, 3)),
               "no heading": np.zeros((4, 8, 2)), "nan": np.full((4, 8, 3), np.nan), "inf": np.full((4, 8, 3), np.inf), "empty list": []}


@pytest.mark.parametrize("bad", OTHER_PLANS.values(), ids=OTHER_PLANS)
def test_plans_of_another_kind_are_refused(scene, bad):
    cache, plans, _ = scene
    for score in (navsim_v1_pdms, navsim_v2_epdms):
        with pytest.raises(ValueError, match=f"{cache.token}.*plans"): score(cache, bad)
    with pytest.raises(ValueError, match=f"{cache.token}.*previous.plans"): navsim_v2_epdms(cache, plans, previous_plans=bad)


def test_the_bad_candidate_is_named(scene):
    cache, plans, _ = scene
    broken = plans.copy()
    broken[2, 5, 1] = np.nan
    with pytest.raises(ValueError, match="candidate 2"): navsim_v1_pdms(cache, broken)


def test_no_candidates_give_empty_scores(scene):
    cache, plans, previous = scene
    for r in both(cache, plans[:0], previous[:0]): assert r.score.shape == (0,) and r.states.shape == (0, 41, 11)


def test_standing_and_absurd_plans_have_defined_scores(scene):
    cache, _, _ = scene
    stand, absurd = np.zeros((1, 8, 3)), np.concatenate([np.full((1, 8, 3), 1e7), np.full((1, 8, 3), 1e160)])
    assert_agrees_with_slow(cache, stand, stand)
    for r in both(cache, absurd, None):
        assert (r.dac == 0).all() and (r.score == 0).all()


def test_earlier_plans_need_an_earlier_frame(scene):
    cache, plans, previous = scene
    single = cache.replace(previous_ego=None, previous_time_us=None)
    with pytest.raises(ValueError, match=f"{cache.token}.*previous_ego"): navsim_v2_epdms(single, plans, previous_plans=previous)
    with pytest.raises(ValueError, match=f"{cache.token}.*previous_ego"): cache.replace(previous_ego=None)
    with pytest.raises(ValueError, match=f"{cache.token}.*previous plans"): navsim_v2_epdms(cache, plans, previous_plans=previous[:2])
    for gap_us in (2_000_000, 600_000, 0, -500_000):
        with pytest.raises(ValueError, match=f"{cache.token}.*previous"):
            navsim_v2_epdms(cache.replace(previous_time_us=cache.time_us - gap_us), plans, previous_plans=previous)
    plain = navsim_v2_epdms(single, plans)
    assert plain.ec is None and np.isfinite(plain.score).all()


def test_versions_and_batches_are_checked(scene):
    cache, plans, _ = scene
    with pytest.raises(ValueError, match="v1, v2.*'v3'"): PDMScorer(cache, "v3")
    with pytest.raises(ValueError, match="v1, v2.*'pdms'"): score_batch([cache], [plans], "pdms")
    with pytest.raises(ValueError, match="1 scenes.*2"): score_batch([cache], [plans, plans], "v1")
    with pytest.raises(ValueError, match="other.*human"): score_batch([cache, cache.replace(token="other", human=None)], [plans, plans], "v2")
    assert score_batch([], [], "v1") == []
    with pytest.raises(ValueError, match=f"{cache.token}.*states"): PDMScorer(cache, "v1").metrics(np.zeros((1, 40, 11)))


# ---------------------------------------------------------------------------------------------------------------- bad input: scenes
def test_reference_and_human_are_asked_for(scene):
    cache, plans, _ = scene
    for v, score in (("v1", navsim_v1_pdms), ("v2", navsim_v2_epdms)):
        with pytest.raises(ValueError, match=f"{cache.token}: reference_{v}"): score(cache.replace(**{f"reference_{v}": None}), plans)
    with pytest.raises(ValueError, match=f"{cache.token}.*human"): navsim_v2_epdms(cache.replace(human=None), plans)
    unfiltered = navsim_v2_epdms(cache.replace(human=None), plans, human_filter=False)
    np.testing.assert_array_equal(unfiltered.score, navsim_v2_epdms(cache, plans).unfiltered)
    synthetic = navsim_v2_epdms(cache.replace(synthetic=True, human=None), plans)
    assert synthetic.forgiven == () and (synthetic.score == unfiltered.score).all()


@pytest.mark.parametrize("shift_us", [-1_000_000_000, 1_000_000_000, -5_000_000])
def test_a_reference_of_another_time_is_refused(scene, shift_us):
    "Clipped to its end it would stand still, and progress would silently be 1."
    cache, plans, _ = scene
    r = cache.reference_v1
    late = dataclasses.replace(r, time_us=r.time_us + shift_us)
    with pytest.raises(ValueError, match=f"{cache.token}.*reference_v1"): navsim_v1_pdms(cache.replace(reference_v1=late), plans)


def test_scenes_with_holes_are_refused(scene):
    cache, _, _ = scene
    p, t = cache.polygons, cache.tracks_v2
    broken = t.state.copy()
    broken[0, np.flatnonzero(t.valid[0])[0], 4] = np.nan
    other = lambda part, **changes: dataclasses.replace(part, **changes)
    wrong = {
        "tracks_v2.state": dict(tracks_v2=other(t, state=broken)), "tracks_v2.valid": dict(tracks_v2=other(t, valid=t.valid[:, :40])),
        "tracks_v2.id": dict(tracks_v2=other(t, id=t.id[1:])), "tracks_v2.type": dict(tracks_v2=other(t, type=t.type + np.int8(9))),
        "tracks_v1.state": dict(tracks_v1=t),
        "polygons": dict(polygons=Polygons.of([p.ring(0)], [0], [True], ["lane"])), "polygons.xy": dict(polygons=other(p, xy=p.xy * np.nan)),
        "polygons.start": dict(polygons=other(p, start=p.start + 1)), "centerline": dict(centerline=cache.centerline[:1]), "ego": dict(ego=cache.ego * np.nan),
        "past_time_us": dict(past_time_us=cache.past_time_us[::-1].copy()), "past": dict(past=cache.past[:3]), "human": dict(human=cache.human[:7]),
        "red_lights": dict(red_lights=other(cache.red_lights, active=cache.red_lights.active[:, :1]))}
    for field, change in wrong.items():
        with pytest.raises(ValueError, match=f"scene {cache.token}: {field}"): cache.replace(**change)
    with pytest.raises(ValueError, match=f"scene {cache.token}: polygons.*empty map"): cache.replace(polygons=Polygons.of([], [], [], []))
    negative = other(t, state=np.where(np.arange(7) == 3, -1.0, t.state))
    with pytest.raises(ValueError, match=f"scene {cache.token}: tracks_v2.*positive"): cache.replace(tracks_v2=negative)


def test_no_agents_no_lights_no_history(scene):
    cache, plans, previous = scene
    empty = dict(tracks_v1=Tracks.none(51), tracks_v2=Tracks.none(41), red_lights=RedLights.none())
    bare = cache.replace(**empty, past=np.zeros((0, 11)), past_time_us=np.zeros(0, np.int64))
    v1, v2 = both(bare, plans, previous)
    for r in (v1, v2): assert (r.nc == 1).all() and (r.ttc == 1).all() and np.isinf(r.metrics.collision_s).all()
    assert (v2.tlc == 1).all() and (v2.hc == 1).all()
    assert_agrees_with_slow(bare, plans, previous)


def test_a_ghost_stands_at_every_sample(scene):
    "A thing seen in one frame only is there all the time: in the ego's way it costs the drive."
    cache, plans, previous = scene
    at = slow.interpolated(cache.reference_v1.time_us, cache.reference_v1.states, cache.time_us + np.array([2_000_000]))[0]
    ghost = lambda n: Tracks(np.tile(np.array([*at, 4.5, 1.9, 6.0, 0.0]), (1, n, 1)), np.ones((1, n), bool), np.zeros(1, np.int8), ("ghost",))
    haunted = cache.replace(tracks_v1=ghost(51), tracks_v2=ghost(41))
    forward = np.concatenate([cache.human[None], plans])
    v1, v2 = raw(haunted, forward)
    assert v1.nc[0] == 0 and v2.nc[0] == 0 and v1.collision_s[0] > 0
    assert_agrees_with_slow(haunted, plans, previous)


@pytest.mark.parametrize("speed_mps", [-0.3, -3.0, -20.0])
def test_rolling_backwards_is_defined(scene, speed_mps):
    cache, plans, previous = scene
    ego = cache.ego.copy()
    ego[3] = speed_mps
    backwards = cache.replace(ego=ego)
    assert_agrees_with_slow(backwards, plans, previous)
    assert (np.concatenate([r.metrics.progress_m for r in both(backwards, plans, previous)]) >= 0).all()


# ---------------------------------------------------------------------------------------------------------------- files
def test_save_and_load(scene, tmp_path):
    cache, plans, previous = scene
    fewer = dict(human=None, previous_ego=None, previous_time_us=None, reference_v2=None, synthetic=True)
    variants = {"a": cache, "b": cache.replace(**fewer), "c": cache.replace(tracks_v2=Tracks.none(41), red_lights=RedLights.none())}
    for name, c in variants.items(): save_cache(c, tmp_path / f"{name}.npz")
    for c, read in zip(variants.values(), load_caches(tmp_path, workers=2)):
        for f in dataclasses.fields(c):
            left, right = getattr(c, f.name), getattr(read, f.name)
            if not dataclasses.is_dataclass(left): np.testing.assert_array_equal(left, right, err_msg=f.name)
            else:
                for g in dataclasses.fields(left): np.testing.assert_array_equal(getattr(left, g.name), getattr(right, g.name), err_msg=f"{f.name}.{g.name}")
    assert_same(both(cache, plans, previous), both(load_cache(tmp_path / "a.npz"), plans, previous), 0)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as z: assert all(z[k].dtype.kind in "fiubU" for k in z.files)


def test_foreign_files_are_refused(scene, tmp_path):
    cache, _, _ = scene
    path = tmp_path / "scene.npz"
    save_cache(cache, path)
    good = path.read_bytes()
    with np.load(path, allow_pickle=False) as z: arrays = {k: z[k] for k in z.files}
    def refused(write):
        write()
        with pytest.raises(ValueError, match="scene.npz"): load_cache(path)
    for content in (b"", good[:len(good) // 2], good[:-1], b"not a scene", pickle.dumps({"a": 1})): refused(lambda content=content: path.write_bytes(content))
    refused(lambda: np.savez(path, a=np.zeros(3)))
    refused(lambda: np.savez(path, format=arrays["format"], ego=np.array([{}], object)))
    refused(lambda: np.savez(path, **(arrays | {"format": np.array("something-else-1")})))
    for lost in ("tracks_v1.valid", "polygons.start", "ego", "time_us"):
        kept = {k: v for k, v in arrays.items() if k != lost}
        refused(lambda kept=kept: np.savez(path, **kept))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="scene.npz"): load_cache(path)
    with pytest.raises(FileNotFoundError, match="no .*npz"): load_caches(tmp_path)


def test_a_flipped_byte_never_gives_another_scene(scene, tmp_path):
    "A damaged file is refused, or the damage lies where it says nothing."
    cache, _, _ = scene
    path = tmp_path / "scene.npz"
    save_cache(cache, path)
    good = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(good), 60):
        damaged = bytearray(good)
        damaged[at] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try: read = load_cache(path)
        except ValueError as e:
            assert "scene.npz" in str(e) or cache.token in str(e)
            continue
        np.testing.assert_array_equal(read.tracks_v2.state, cache.tracks_v2.state)
        np.testing.assert_array_equal(read.polygons.xy, cache.polygons.xy)


@pytest.mark.parametrize("field, value", [("tracks_v2.valid", 1.5), ("ego", "x"), ("time_us", "x"), ("polygons.on_route", 0.5), ("polygons.start", 0.5)])
def test_arrays_of_another_kind_are_refused(scene, tmp_path, field, value):
    cache, _, _ = scene
    path = tmp_path / "scene.npz"
    save_cache(cache, path)
    with np.load(path, allow_pickle=False) as z: arrays = {k: z[k] for k in z.files}
    np.savez(path, **(arrays | {field: np.full(arrays[field].shape, value)}))
    with pytest.raises(ValueError, match=field.split(".")[0]): load_cache(path)


# ---------------------------------------------------------------------------------------------------------------- batches
def test_batches_equal_single_calls_on_any_number_of_threads():
    caches, plans, previous = zip(*[drawn(s, k=3 + s % 4) for s in range(12)])
    single = [both(c, p, q) for c, p, q in zip(caches, plans, previous)]
    for workers in (1, 4, None):
        fresh = [c.replace() for c in caches]
        v1, v2 = score_batch(fresh, plans, "v1", workers), score_batch(fresh, plans, "v2", workers, previous)
        for a, b, c in zip(single, v1, v2): assert_same(a, (b, c), 0)
    plain = score_batch(caches, plans, "v2", 2, human_filter=False)
    for c, p, b in zip(caches, plans, plain): np.testing.assert_array_equal(navsim_v2_epdms(c, p).unfiltered, b.score)
    with pytest.raises(ValueError, match="previous_plans"): score_batch(caches, plans, "v2", previous_plans=previous[:3])
    with pytest.raises(ValueError, match="previous_plans"): score_batch(caches, plans, "v1", previous_plans=previous)


def test_one_scene_many_threads():
    "The same scene record used by several threads at once, nothing prepared before."
    cache, plans, _ = drawn(5, k=8, agents=12)
    expected = navsim_v2_epdms(cache.replace(), plans).score
    for r in score_batch([cache] * 16, [plans] * 16, "v2", 8): np.testing.assert_array_equal(r.score, expected)


# ---------------------------------------------------------------------------------------------------------------- the benchmark
@pytest.fixture
def benchmark(monkeypatch):
    "benchmarks/pdm_scorer.py with a clock that does not wait and small batches."
    spec = importlib.util.spec_from_file_location("pdm_scorer_benchmark", CASES.parent.parent / "benchmarks" / "pdm_scorer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ms", lambda f, *a: f() and 1.0 or 1.0)
    monkeypatch.setattr(module, "GRPO", (2, 3))
    monkeypatch.setattr(sys, "argv", ["pdm_scorer.py", "--json"])
    return module


def test_the_benchmark_prints_five_figures(benchmark, capsys):
    benchmark.main()
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == ["machine", "pdms_ms_k64", "epdms_ms_k64", "epdms_ms_k1", "grpo_call_ms"]
    assert figures["epdms_ms_k64"] == pytest.approx(1 / 64, rel=1e-3) and figures["epdms_ms_k1"] == figures["grpo_call_ms"] == 1


def test_the_benchmark_reports_nothing_when_its_peer_disagrees(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(slow, "HALF_WIDTH", 1.3)
    with pytest.raises(SystemExit, match="disagree"): benchmark.main()
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------- plans that are not finite
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_invalid_candidate_scores_zero_when_asked(scene, version, bad):
    cache, plans, _ = scene
    score = navsim_v1_pdms if version == "v1" else navsim_v2_epdms
    good, broken = plans[:2], plans[2].copy()
    broken[3, 1] = bad
    mixed = np.stack([good[0], broken, good[1]])
    with pytest.raises(ValueError, match="candidate 1 .*not finite"): score(cache, mixed)
    got, alone = score(cache, mixed, invalid="zero"), score(cache, good)
    assert got.valid.tolist() == [True, False, True] and alone.valid.all()
    for c in got.COLUMNS:
        np.testing.assert_array_equal(getattr(got, c)[[0, 2]], getattr(alone, c), err_msg=c)
        assert getattr(got, c)[1] == 0, c
    with pytest.raises(ValueError, match="invalid"): score(cache, mixed, invalid="nought")
    with pytest.raises(ValueError, match=f"{cache.token}.*plans"): score(cache, np.zeros((4, 6, 3)), invalid="zero")


def test_invalid_candidates_in_a_batch_and_none_left(scene):
    cache, plans, _ = scene
    nothing = np.full((2, 8, 3), np.nan)
    for version in ("v1", "v2"):
        a, b = score_batch([cache, cache], [nothing, plans], version, workers=1, invalid="zero")
        assert not a.valid.any() and not a.score.any() and b.valid.all() and len(b.score) == len(plans)


def test_an_invalid_earlier_plan_makes_its_candidate_invalid(scene):
    cache, plans, previous = scene
    before = previous.copy()
    before[1] = np.nan
    with pytest.raises(ValueError, match="previous.plans"): navsim_v2_epdms(cache, plans, previous_plans=before)
    got, plain = navsim_v2_epdms(cache, plans, previous_plans=before, invalid="zero"), navsim_v2_epdms(cache, plans, previous_plans=previous)
    assert got.valid.tolist() == [i != 1 for i in range(len(plans))] and got.ec[1] == got.score[1] == got.unfiltered[1] == 0
    np.testing.assert_array_equal(np.delete(got.score, 1), np.delete(plain.score, 1))
