"minidrive scenes as the PDM scorer reads them: what the simulator knows is what the cache says, and bad input is refused."
from dataclasses import replace

import numpy as np
import pytest
import shapely
import shapely.affinity

from vlarepro.scoring.pdm.minidrive import annotation_frames, cache_from_scene, caches_from_scene, scene_map, scorable_keyframes, type_code
from vlarepro.scoring.pdm.scene import DRIVABLE_TYPES, INTERSECTION, LANE_TYPES, ROADBLOCK, load_cache, save_cache
from vlarepro.scoring.pdm.score import navsim_v1_pdms, navsim_v2_epdms
from vlarepro.scoring.pdm.simulation import centers, corners
from vlarepro.scoring.pdm.worldmap import MapArea, WorldMap, hole_free, without
from vlarepro.world.blocks import block_name, connector_states, lane_blocks, lane_name
from vlarepro.world.scenarios import make_scene
from vlarepro.world.scene import KEYFRAME_STEP, LOCATIONS, RED


@pytest.fixture(scope="module")
def scenes(): return [make_scene(s, f"scene-{s:04d}", "val", LOCATIONS[s % len(LOCATIONS)]) for s in range(20, 30)]


@pytest.fixture(scope="module")
def caches(scenes):
    worlds = [scene_map(s) for s in scenes]
    return [(s, k, cache_from_scene(s, k, reference=False, world=w)) for s, w in zip(scenes, worlds) for k in (3, 14, 30)]


def union(cache, types):
    p = cache.polygons
    return shapely.union_all([shapely.Polygon(p.ring(i)).buffer(1e-6) for i in range(len(p)) if p.type[i] in types])


def test_motion_is_the_simulators(caches):
    for scene, k, c in caches:
        e = scene.ego[k * KEYFRAME_STEP]
        np.testing.assert_allclose(c.origin, e[:2])
        assert (c.ego[:2] == 0).all() and (c.ego[7:] == 0).all() and abs(c.ego[2]) <= np.pi
        np.testing.assert_allclose(c.ego[[3, 4, 5, 6]], [e[3], 0, e[4], e[3] * e[5]])
        assert np.diff(c.past_time_us).tolist() == [500_000] * 3 and c.past_time_us[-1] == c.time_us == c.previous_time_us + 500_000
        np.testing.assert_array_equal(c.previous_ego, c.past[2])
        cos, sin = np.cos(e[2]), np.sin(e[2])
        world = c.human[:, :2] @ np.array([[cos, sin], [-sin, cos]]) + c.origin
        np.testing.assert_allclose(world, scene.ego[k * KEYFRAME_STEP + KEYFRAME_STEP * np.arange(1, 9), :2], atol=1e-9)


def test_boxes_at_keyframes_are_the_agents(caches):
    for scene, k, c in caches:
        for tracks in (c.tracks_v1, c.tracks_v2):
            for n, name in enumerate(tracks.id):
                a = next(a for a in scene.agents if str(a.id) == name)
                assert tracks.type[n] == type_code(a.category)
                frozen = tracks.valid[n].all() and np.ptp(tracks.state[n, :, :2], axis=0).max() == 0
                if frozen and np.abs(a.track[:, 3]).max() > 0.1: continue  # a ghost
                for i in range(0, tracks.valid.shape[1], 5):
                    step = k * KEYFRAME_STEP + i
                    if tracks.valid[n, i] and a.valid[step]: np.testing.assert_allclose(tracks.state[n, i, :2] + c.origin, a.track[step, :2], atol=1e-9)


def test_the_map_holds_the_drive(caches):
    for scene, k, c in caches:
        now = k * KEYFRAME_STEP
        states = np.zeros((41, 11))
        states[:, :3] = scene.ego[now:now + 41, :3] - [*c.origin, 0]
        xy = centers(states)
        assert shapely.contains_xy(union(c, DRIVABLE_TYPES), *xy.T).all(), (scene.name, k)
        p = c.polygons
        on = shapely.union_all([shapely.Polygon(p.ring(i)).buffer(0.5) for i in range(len(p)) if p.on_route[i]])
        assert shapely.contains_xy(on, *xy.T).mean() > 0.8, (scene.name, k)
        line = shapely.LineString(c.centerline[:, :2])
        assert line.distance(shapely.Point(0, 0)) < 4.5 and line.length > 20


def test_blocks_and_names(scenes):
    for scene in scenes:
        block, world = lane_blocks(scene.road), scene_map(scene)
        for i, l in scene.road.lanes.items():
            row = world.row[lane_name(scene, i)]
            assert world.block[row] == block_name(scene, block[i]) and world.lanes[row].connector == l.in_intersection
        outlines = {a.id: shapely.Polygon(a.ring) for a in world.areas if a.type == ROADBLOCK}
        for x in world.lanes:
            if not x.connector: assert outlines[x.block].buffer(0.01).contains(shapely.Polygon(x.ring).buffer(0)), (scene.name, x.id)


def test_the_graph_follows_the_lanes(caches):
    for scene, _, c in caches:
        g = c.graph
        assert len(g) == (np.isin(c.polygons.type, LANE_TYPES)).sum() and [c.polygons.id[i] for i in g.polygon] == list(g.id)
        names = {lane_name(scene, i): l for i, l in scene.road.lanes.items()}
        for a, b in g.edges: assert g.id[b] in {lane_name(scene, j) for j in names[g.id[a]].successors}
        for n, i in enumerate(g.id): np.testing.assert_allclose(g.lane(n)[:, :2] + c.origin, names[i].centerline[:, :2], atol=1e-9)


def test_red_lights_are_the_signals(caches):
    seen = 0
    for scene, k, c in caches:
        route = {c.graph.id[i] for i in np.flatnonzero(np.isin(c.graph.block, c.graph.route))}
        ids, state = connector_states(scene, (k + np.arange(9)) * KEYFRAME_STEP)
        want = {}
        for n, i in enumerate(ids):
            if lane_name(scene, i) in route and (state[:, n] == RED).any(): want[lane_name(scene, i)] = np.repeat(state[:, n] == RED, 5)[:41]
        r = c.red_lights
        assert r.active.shape == (41, len(want))
        rings = {i: c.polygons.ring(c.graph.polygon[c.graph.id.index(i)]) for i in want}
        for n in range(len(want)):
            name = next(i for i in want if np.array_equal(rings[i], r.ring(n)))
            np.testing.assert_array_equal(r.active[:, n], want[name])
        seen += len(want)
    assert seen > 0


def test_only_what_is_near(scenes):
    c = cache_from_scene(scenes[0], 10, reference=False)
    x, y = centers(c.ego[None])[0]
    box = shapely.box(x - 100, y - 100, x + 100, y + 100)
    p = c.polygons
    for i in range(len(p)):
        if p.type[i] not in LANE_TYPES: assert shapely.Polygon(p.ring(i)).intersects(box)
    world, box = scene_map(scenes[0]), shapely.affinity.translate(box, *c.origin)
    assert not {a.id for a, s in zip(world.areas, world.area_shape) if not s.intersects(box)} & set(p.id)


def test_scored_and_stored(scenes, tmp_path):
    scene = scenes[3]
    for c in caches_from_scene(scene, (5, 12)):
        plans = np.stack([c.human, np.zeros((8, 3))])
        v1, v2 = navsim_v1_pdms(c, plans), navsim_v2_epdms(c, plans)
        save_cache(c, tmp_path / "c.npz")
        back = load_cache(tmp_path / "c.npz")
        np.testing.assert_array_equal(navsim_v1_pdms(back, plans).score, v1.score)
        np.testing.assert_array_equal(navsim_v2_epdms(back, plans).score, v2.score)
        assert c.reference_v1.states.shape == (51, 3) and (v1.score >= 0).all() and (v1.score <= 1).all()


def test_the_expert_mostly_scores_well(scenes):
    "A gross error of frames, sizes or signs would put the expert off the road or into others."
    scores = []
    for scene in scenes[:6]:
        c = cache_from_scene(scene, 9)
        scores.append(float(navsim_v1_pdms(c, c.human[None]).score[0]))
    assert np.mean(scores) > 0.6, scores


def test_a_shared_map_changes_nothing(scenes):
    a, b = cache_from_scene(scenes[1], 9, reference=False), cache_from_scene(scenes[1], 9, reference=False, world=scene_map(scenes[1]))
    np.testing.assert_array_equal(a.polygons.xy, b.polygons.xy)
    np.testing.assert_array_equal(a.centerline, b.centerline)


def with_agent(scene, **changes): return replace(scene, agents=[replace(scene.agents[0], **changes), *scene.agents[1:]])


def test_a_scene_without_agents(scenes):
    c = cache_from_scene(replace(scenes[0], agents=[]), 9)
    assert c.tracks_v1.state.shape == (0, 51, 7)
    p = navsim_v1_pdms(c, c.human[None])
    assert p.nc[0] == p.ttc[0] == 1


def test_a_ghost(scenes):
    scene, k = scenes[0], 9
    track = scene.agents[0].track.copy()
    step = (k + 2) * KEYFRAME_STEP
    track[:, :2] = scene.ego[step, :2] + [3.0, 8.0]
    valid = np.zeros(len(track), bool)
    valid[step] = True
    c = cache_from_scene(with_agent(scene, track=track, valid=valid), k, reference=False)
    n = c.tracks_v2.id.index(str(scene.agents[0].id))
    assert c.tracks_v2.valid[n].all() and np.ptp(c.tracks_v2.state[n], axis=0).max() == 0


def test_far_agents_are_not_annotated(scenes):
    scene = scenes[0]
    track = np.tile([*(scene.ego[0, :2] + 1e4), 0.0, 0.0], (len(scene.t), 1))
    far = with_agent(scene, track=track, valid=np.ones(len(track), bool))
    assert all(str(scene.agents[0].id) not in f.id for f in annotation_frames(far, 9, np.zeros(2)))


def test_bad_input_is_refused(scenes):
    scene, k = scenes[0], 9
    track = scene.agents[0].track.copy()
    near = scene.ego[k * KEYFRAME_STEP, :2]
    track[:] = [*near, 0.0, np.nan]
    name = str(scene.agents[0].id)
    with pytest.raises(ValueError, match=f"velocity of track '{name}' is not finite"):
        cache_from_scene(with_agent(scene, track=track, valid=np.ones(len(track), bool)), k)
    with pytest.raises(ValueError, match=f"box of track '{name}' is 0.0 m long"):
        cache_from_scene(with_agent(scene, track=np.nan_to_num(track), valid=np.ones(len(track), bool), size_lwh=np.array([0.0, 2, 1])), k)
    with pytest.raises(ValueError, match="category 'tank' is unknown"):
        cache_from_scene(with_agent(scene, track=np.nan_to_num(track), valid=np.ones(len(track), bool), category="tank"), k)
    with pytest.raises(ValueError, match=f"{scene.name}: road.lanes: an empty map"): cache_from_scene(replace(scene, road=replace(scene.road, lanes={})), k)
    ego = scene.ego.copy()
    ego[60, 1] = np.nan
    with pytest.raises(ValueError, match=f"{scene.name}: ego: 1 values are not finite"): cache_from_scene(replace(scene, ego=ego), k)
    for bad in (2, 31, 40, -1):
        assert bad not in scorable_keyframes(scene)
        with pytest.raises(ValueError, match="so 3 to 30"): cache_from_scene(scene, bad)


def test_islands_leave_hole_free_rings():
    yard, island = shapely.box(0, 0, 40, 40), shapely.Point(20, 20).buffer(5)
    rings = without([shapely.get_coordinates(yard.exterior)[:-1]], [shapely.get_coordinates(island.exterior)[:-1]])
    assert np.isclose(sum(shapely.Polygon(r).area for r in rings), yard.area - island.area)
    two = yard.difference(island).difference(shapely.box(2, 2, 4, 4))
    assert np.isclose(sum(shapely.Polygon(r).area for r in hole_free(two)), two.area)
    w = WorldMap([], [MapArea(str(i), r, INTERSECTION) for i, r in enumerate(rings)])
    inside = shapely.union_all(w.area_shape)
    assert not inside.contains(shapely.Point(21, 21)) and inside.contains(shapely.Point(8, 21))


def test_corners_are_the_pacificas(caches):
    "The scorer draws nuPlan's car around minidrive's rear axle."
    c = caches[0][2]
    box = corners(c.ego)
    length = np.hypot(*(box[0] - box[1]))
    assert np.isclose(length, 5.176) and np.isclose(np.hypot(*(box[0] - box[3])), 2.297)
