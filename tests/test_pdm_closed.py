"""PDM-Closed: equal to the official planner's stored plans, and made-up scenes for every branch."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlarepro.scoring.pdm.pdm_closed import DECEL_MAX, decide, idm_acceleration, pdm_closed, pdm_closed_plan
from vlarepro.scoring.pdm.route import _shapes as shapes_of
from vlarepro.scoring.pdm.route import centerline_of_route, correct_route, find_blocks, lane_sequence, plan_route
from vlarepro.scoring.pdm.scene import INTERSECTION, LANE, LANE_CONNECTOR, ROADBLOCK, LaneGraph, Polygons, RedLights, Tracks, straight_scene
from vlarepro.scoring.pdm.schema import load_oracle_scene, oracle_paths


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_oracle_plans(shared_folder, version):
    "Every stored plan of the oracle, to 1e-6 m and rad."
    paths = oracle_paths(shared_folder / "navsim" / "oracle")
    wrong = {}
    for path in paths:
        cache = load_oracle_scene(path).cache
        want = cache.reference(version)
        got = pdm_closed(cache, version)
        np.testing.assert_array_equal(got.time_us, want.time_us)
        d = got.states - want.states
        d[:, 2] = np.arctan2(np.sin(d[:, 2]), np.cos(d[:, 2]))
        if np.abs(d).max() > 1e-6: wrong[path.stem] = float(np.abs(d).max())
    assert not wrong


def test_oracle_centerlines(shared_folder):
    "Every stored centreline, and the lanes that are on the route."
    for path in oracle_paths(shared_folder / "navsim" / "oracle"):
        cache = load_oracle_scene(path).cache
        line, lanes = centerline_of_route(cache.graph, cache.ego, cache.polygons)
        np.testing.assert_allclose(line, cache.centerline, atol=1e-9, err_msg=path.stem)
        rows = cache.graph.polygon[lanes]
        np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.flatnonzero(cache.polygons.on_route), err_msg=path.stem)


# ---- a made-up road: a chain of blocks along x, one or two lanes, optional connectors --------------------------------------------


def chain(cuts=(-40.0, 20.0, 35.0, 120.0), kinds="LCL", lanes_y=(0.0, 3.5), route=None, boxes=(), speed_mps=8.0, limit_mps=12.0, red=(), turn=0.0):
    "The ego at x = 0 in the first lane; block k reaches from cuts[k] to cuts[k + 1]; the whole world is turned by `turn`."
    rings, types, ids, center, block, connector = [], [], [], [], [], []
    for k, kind in enumerate(kinds):
        for j, y in enumerate(lanes_y):
            x = np.linspace(cuts[k], cuts[k + 1], 31)
            center.append(np.stack([x, 0 * x + y, 0 * x], -1))
            rings.append(np.array([[cuts[k], y - 1.75], [cuts[k + 1], y - 1.75], [cuts[k + 1], y + 1.75], [cuts[k], y + 1.75]]))
            types.append(LANE if kind == "L" else LANE_CONNECTOR)
            ids.append(f"lane{k}{j}"), block.append(k), connector.append(kind == "C")
    n, low, high = len(rings), min(lanes_y) - 1.75, max(lanes_y) + 1.75
    for k, kind in enumerate(kinds):
        rings.append(np.array([[cuts[k], low], [cuts[k + 1], low], [cuts[k + 1], high], [cuts[k], high]]))
        types.append(ROADBLOCK if kind == "L" else INTERSECTION)
        ids.append(f"block{k}" if kind == "L" else f"crossing{k}")
    m, c, s = len(lanes_y), np.cos(turn), np.sin(turn)
    spin = np.array([[c, s], [-s, c]])
    center = np.concatenate(center)
    center = np.column_stack([center[:, :2] @ spin, center[:, 2] + turn])
    polygons = Polygons.of([r @ spin for r in rings], types, [i < n for i in range(len(rings))], ids)
    graph = LaneGraph(center, 31 * np.arange(n + 1), np.arange(n), np.array(block), np.array(connector), np.full(n, limit_mps),
                      np.array([[i, i + m] for i in range(n - m)]).reshape(-1, 2), np.arange(len(kinds)) if route is None else np.array(route, np.int64),
                      polygons.id[:n], tuple(f"block{k}" for k in range(len(kinds))))
    turned = []
    for b in boxes: turned.append((*(np.array(b[:2]) @ spin), b[2] + turn, *b[3:5], *(np.array(b[5:7]) @ spin), b[7]))
    scene = straight_scene(turned, speed_mps, token="chain")
    ego = scene.ego.copy()
    ego[2] = turn
    lights = RedLights.of([polygons.ring(i) for i in red], np.ones((41, len(red)), bool))
    return scene.replace(polygons=polygons, graph=graph, ego=ego, red_lights=lights, reference_v1=None, reference_v2=None, centerline=center[:31])


def end_x(scene, version="v2"): return pdm_closed(scene, version).states[-1, 0]


def test_free_road_takes_the_limit():
    c = decide(chain(), "v2")
    assert c.best == 4 and abs(c.proposals.speed[4, -1] - 12.0) < 1.5
    assert pdm_closed_plan(chain(), "v2").shape == (8, 3)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_leader_is_not_hit(version):
    parked = chain(boxes=[(45.0, 0.0, 0.0, 4.5, 2.0, 0.0, 0.0, 0)])
    states = decide(parked, version).proposals.states(51)[:5]
    assert (states[:, -1, 0] + 4.049 < 45.0 - 2.25).all()            # the five straight proposals stop short
    slow = end_x(chain(boxes=[(25.0, 0.0, 0.0, 4.5, 2.0, 5.0, 0.0, 0)], lanes_y=(0.0,)), version)
    assert slow < end_x(chain(lanes_y=(0.0,)), version) - 1.0


def test_first_step_brakes_for_nothing():
    "The leader of the first sample stands at arc length zero: kept from the devkit."
    c = decide(chain(), "v2")
    np.testing.assert_allclose(np.diff(c.proposals.speed[:, :2])[:, 0], -0.3)


def test_what_overlaps_the_ego_is_ignored():
    box = (1.0, 0.0, 0.0, 4.5, 2.0, 0.0, 0.0, 0)
    assert end_x(chain(boxes=[box])) == end_x(chain())


def test_oncoming_reverse_and_static_boxes():
    ahead = dict(speed_mps=6.0, lanes_y=(0.0,))
    stands = end_x(chain(boxes=[(40.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 3)], **ahead))
    reverses = end_x(chain(boxes=[(40.0, 0.0, 0.0, 4.5, 2.0, -3.0, 0.0, 0)], **ahead))
    assert reverses < stands < end_x(chain(**ahead))


def test_red_light_ahead_stops_the_plan():
    red = chain(red=(2, 3))
    assert end_x(red) + 4.049 < 20.0 < end_x(chain())                # the connector begins at x = 20
    far = np.zeros((41, 2), bool)
    far[10:] = True                                                  # green now: the planner believes it stays so
    assert end_x(red.replace(red_lights=replace(red.red_lights, active=far))) == end_x(chain())
    assert end_x(chain()) == end_x(chain(red=(2, 3), route=[0, 1, 2]).replace(red_lights=RedLights.none()))


def test_red_light_around_the_ego():
    "Wholly inside a red connector: no leader, but v2's scorer gives 0 to all, and the first proposal wins; v1 drives on."
    inside = dict(cuts=(-80.0, -20.0, 60.0, 130.0))
    red = chain(red=(2, 3), **inside)
    assert decide(red, "v2").scores.max() == 0 and decide(red, "v2").best == 0
    assert end_x(red, "v1") == end_x(chain(**inside), "v1")


def test_a_box_that_is_not_seen_yet_is_no_leader_and_red_lanes_override_the_cache():
    plain = chain(boxes=[(45.0, 0.0, 0.0, 4.5, 2.0, 0.0, 0.0, 0)])
    later = plain.replace(tracks_v2=replace(plain.tracks_v2, seen_now=np.zeros(1, bool)))
    assert end_x(plain) < end_x(later) == end_x(chain())
    assert pdm_closed(chain(), "v2", red_lanes=[2, 3]).states[-1, 0] == end_x(chain(red=(2, 3)))


def test_bad_scenes_are_named():
    with pytest.raises(ValueError, match="scene chain: graph.route is empty"): pdm_closed(chain(route=[]), "v2")
    with pytest.raises(ValueError, match="scene chain: graph is missing"): pdm_closed(chain().replace(graph=None), "v2")
    far = replace(chain(route=[2]).graph, polygon=np.array([0, 1, 2, 3, -1, -1]), edges=np.zeros((0, 2), np.int64))  # the route is out of sight, no way there
    with pytest.raises(ValueError, match="scene chain: no lane of the route"): pdm_closed(chain().replace(graph=far), "v2")
    with pytest.raises(ValueError, match="scene chain: graph.speed_limit_mps of lane lane00 is 0.0"): pdm_closed(chain(limit_mps=0.0), "v2")
    with pytest.raises(ValueError, match="version"): pdm_closed(chain(), "v3")


def test_unknown_limit_is_15():
    np.testing.assert_allclose(decide(chain(limit_mps=np.nan), "v2").proposals.target_mps[:5], [3, 6, 9, 12, 15])


# ---- the route -----------------------------------------------------------------------------------------------------------------


def corrected(scene): return correct_route(scene.graph, scene.polygons, shapes_of(scene.polygons), scene.ego[:3])


def test_route_is_repaired():
    long = dict(cuts=(-90.0, -40.0, 20.0, 35.0, 60.0, 95.0), kinds="LLCLL")
    assert corrected(chain(**long)) == [0, 1, 2, 3, 4]
    assert corrected(chain(route=[2, 3], **long)) == [1, 2, 3]          # the ego stands in block 1
    assert corrected(chain(route=[1, 3, 4], **long)) == [1, 2, 3, 4]    # a link is missing
    assert corrected(chain(route=[1, 4], **long)) == [1, 2, 3, 4]
    assert corrected(chain(route=[1, 2, 2, 3], **long)) == [1, 2, 3]
    assert corrected(chain(route=[0], **long)) == [0]                   # the way is behind: nothing leads back, nothing is added


def test_ego_beyond_the_first_blocks_drops_them():
    "No way back from the route's start to the ego: forward to the route instead, and what lies before the meeting point is dropped."
    scene = chain(cuts=(-40.0, 20.0, 35.0, 120.0), route=[0, 1, 2])
    side = np.array([[-40.0, 10.0], [20.0, 10.0], [20.0, 13.5], [-40.0, 13.5]])
    x = np.linspace(-40, 20, 31)
    g, p = scene.graph, scene.polygons
    polygons = Polygons.of([p.ring(i) for i in range(len(p))] + [side], [*p.type, LANE], [*p.on_route, False], [*p.id, "side"])
    graph = replace(g, center=np.concatenate([g.center, np.stack([x, 0 * x + 11.75, 0 * x], -1)]), start=np.append(g.start, g.start[-1] + 31),
                    polygon=np.append(g.polygon, len(p)), block=np.append(g.block, 3), is_connector=np.append(g.is_connector, False),
                    speed_limit_mps=np.append(g.speed_limit_mps, 10.0),
                    edges=np.concatenate([g.edges, [[6, 2]]]), id=(*g.id, "side"), block_id=(*g.block_id, "block3"))
    assert correct_route(graph, polygons, shapes_of(polygons), np.array([0.0, 11.75, 0.0])) == [3, 1, 2]


def test_loops_are_cut():
    "A connector that overlaps an earlier one ends the route."
    scene = chain(cuts=(-40.0, 20.0, 35.0, 60.0, 75.0, 95.0), kinds="LCLCL")
    g, p = scene.graph, scene.polygons
    assert corrected(scene) == [0, 1, 2, 3, 4]
    crossing = [p.ring(i) for i in range(len(p))]
    crossing[6] = crossing[2] + 0.5                                     # the second crossing's lane lies on the first's
    q = Polygons.of(crossing, p.type, p.on_route, p.id)
    assert correct_route(g, q, shapes_of(q), scene.ego[:3]) == [0, 1, 2]


def test_start_lane_off_the_road():
    "Beside the road, the nearest lane of the route begins the centreline."
    scene = chain()
    r = plan_route(scene.graph, np.array([0.0, 7.5, 0.0]), scene.polygons)
    assert r.start == 1
    assert plan_route(scene.graph, np.array([0.0, 0.4, 0.0]), scene.polygons).start == 0


def test_lane_change_ends_the_centerline():
    "When the goal cannot be reached by lanes alone, the deepest lane ends it."
    g = chain().graph
    cut = replace(g, edges=np.array([[0, 2], [1, 3], [3, 5]]))
    assert lane_sequence(cut, 0, list(range(6)), 2) == [0, 2]
    assert lane_sequence(g, 1, list(range(6)), 2) == [1, 3, 5]
    assert lane_sequence(g, 1, [1, 5], 2) == [1]


@given(st.integers(0, 10_000))
def test_blocks_against_brute_force(seed):
    "The way found is a way, of the least number of blocks."
    r = np.random.default_rng(seed)
    n = 7
    links = [[int(b) for b in range(n) if b != a and r.random() < 0.25] for a in range(n)]
    goals = [int(b) for b in r.choice(n, 2, replace=False)]
    depth = int(r.integers(1, 6))
    reach, fewest = {0}, None
    for d in range(1, depth + 1):
        if reach & set(goals):
            fewest = d
            break
        reach = {b for a in reach for b in links[a]}
    way = find_blocks(links, 0, goals, depth)
    assert (way is None) == (fewest is None)
    if way is not None:
        assert len(way) == fewest and way[0] == 0 and way[-1] in goals
        assert all(b in links[a] for a, b in zip(way, way[1:]))


# ---- properties ----------------------------------------------------------------------------------------------------------------


@given(st.floats(-5, 30), st.floats(0.5, 30), st.floats(-50, 200), st.floats(-10, 30))
def test_idm_is_bounded_and_monotone(v, target, gap, lead):
    a = idm_acceleration(v, target, gap, lead)
    assert -DECEL_MAX <= a <= 1.5
    assert idm_acceleration(v, target, gap + 1, lead) >= a - 1e-12
    if v > 0 and 1 + 1.5 * v + v * (v - lead) > 0: assert idm_acceleration(v, target, gap, lead - 1) <= a + 1e-9


BOXES = [(30.0, 0.2, 0.05, 4.5, 2.0, 4.0, 0.1, 0), (18.0, 3.4, 0.0, 4.5, 1.9, 7.0, 0.0, 0),
         (26.0, -2.2, 1.0, 0.6, 0.6, 0.5, 0.7, 1), (50.0, 0.9, 0.0, 0.4, 0.4, 0.0, 0.0, 3)]


@pytest.mark.parametrize("turn", [0.7, 2.5, -1.9])
def test_rigid_motion(turn):
    "The plan in the ego frame does not depend on where north is."
    np.testing.assert_allclose(pdm_closed_plan(chain(boxes=BOXES, turn=turn), "v2"), pdm_closed_plan(chain(boxes=BOXES), "v2"), atol=1e-7)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_order_of_tracks_does_not_matter(version):
    a, b = chain(boxes=BOXES), chain(boxes=BOXES[::-1])
    np.testing.assert_allclose(pdm_closed(a, version).states, pdm_closed(b, version).states, atol=1e-12)


def test_future_does_not_leak():
    "The planner sees the boxes now; what the log does with them later changes nothing."
    scene = chain(boxes=BOXES)
    later = scene.tracks_v2.state.copy()
    later[:, 1:, :2] += 50.0
    other = scene.replace(tracks_v2=Tracks(later, scene.tracks_v2.valid, scene.tracks_v2.type, scene.tracks_v2.id))
    np.testing.assert_array_equal(pdm_closed(scene, "v2").states, pdm_closed(other, "v2").states)
