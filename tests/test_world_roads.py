"""Roads of every kind: lane graph, areas, right of way, lights, what is drawn, and the map that nuscenes-devkit reads."""
import json
from dataclasses import replace

import numpy as np
import pytest
import shapely

from vlarepro.world.ground import CLASS_ID, ground_raster
from vlarepro.world.junctions import opposite_phase, phases, signal_cycle
from vlarepro.world.layouts import build_layout, make_layout, make_road, road_faults
from vlarepro.world.nuscenes_writer import DICT_LAYERS, LIST_LAYERS, Tokens, map_layers, mask_png, scene_extent, shelf_pack
from vlarepro.world.raster import render_scene
from vlarepro.world.roads import STYLES, connector, offset_line, reference_line, smooth_step
from vlarepro.world.scenarios import make_scene
from vlarepro.world.scene import GREEN, LOCATIONS, RED, ROAD_KINDS, SIGN_KINDS, YELLOW, Fixture, Prop, scene_hash
from vlarepro.world.shapes import scene_shapes

SEEDS = 24
T = np.arange(1201) * 0.1


@pytest.fixture(scope="module")
def layouts():
    return {(kind, s): make_layout(kind, np.random.default_rng([s, 11]), list(STYLES)[s % 4]) for kind in ROAD_KINDS for s in range(SEEDS)}


@pytest.fixture(scope="module")
def scenes():
    return {kind: make_scene(40 + i, f"scene-{i:04d}", "train", LOCATIONS[i % 4], road=kind) for i, kind in enumerate(ROAD_KINDS)}


def angle(a):
    return abs((a + np.pi) % (2 * np.pi) - np.pi)


# ---- validity


@pytest.mark.parametrize("kind", ROAD_KINDS)
def test_no_faults(layouts, kind):
    faults = {s: f for s in range(SEEDS) if (f := road_faults(layouts[kind, s].road))}
    assert not faults, faults


def test_lanes_meet_by_an_independent_measure(layouts):
    for layout in layouts.values():
        lanes = layout.road.lanes
        for lane in lanes.values():
            for j in lane.successors:
                assert np.hypot(*(lane.centerline[-1, :2] - lanes[j].centerline[0, :2])) < 0.01
                assert angle(lane.centerline[-1, 2] - lanes[j].centerline[0, 2]) < 0.02
                edge = np.array([lane.polygon[len(lane.centerline) - 1], lane.polygon[len(lane.centerline)]])
                begin = np.array([lanes[j].polygon[0], lanes[j].polygon[-1]])
                assert np.abs(edge - begin).max() < 0.06, (layout.road.kind, lane.id, j)  # the borders meet too


def test_headings_follow_the_line(layouts):
    for layout in layouts.values():
        for lane in layout.road.lanes.values():
            d = np.diff(lane.centerline[:, :2], axis=0)
            middle = (lane.centerline[1:, 2] + lane.centerline[:-1, 2]) / 2
            assert angle(np.arctan2(d[:, 1], d[:, 0]) - middle).max() < 0.03, (layout.road.kind, lane.id)


def test_limits_are_drivable_and_not_absurd(layouts):
    for layout in layouts.values():
        for lane in layout.road.lanes.values():
            kappa = np.abs(np.diff(lane.centerline[:, 2])) / np.hypot(*np.diff(lane.centerline[:, :2], axis=0).T)
            assert lane.speed_limit_mps**2 * kappa.max() <= 3.6
            assert 2.5 <= lane.speed_limit_mps <= layout.limit_mps
            if not lane.in_intersection and layout.road.kind != "work_zone":
                assert lane.speed_limit_mps >= 0.7 * layout.limit_mps, (layout.road.kind, lane.id, lane.speed_limit_mps, layout.limit_mps)


def test_routes_are_connected_and_long_enough(layouts):
    for layout in layouts.values():
        lanes = layout.road.lanes
        assert all(b in lanes[a].successors for a, b in zip(layout.route, layout.route[1:]))
        length = sum(np.hypot(*np.diff(lanes[i].centerline[:, :2], axis=0).T).sum() for i in layout.route)
        assert length > 20 * layout.limit_mps + 60, (layout.road.kind, length, layout.limit_mps)
        assert len(layout.legs) == len(layout.crossings) + 1 == len(layout.ego_index)
        whole = [layout.leg_lanes[0]]
        for c, lane in zip(layout.crossings, layout.leg_lanes[1:]):
            whole += [*c.through, lane]
        assert tuple(whole) == layout.route


def test_same_seed_same_road():
    for kind in ROAD_KINDS:
        a, b = (make_road(kind, np.random.default_rng(5), "singapore-onenorth") for _ in range(2))
        assert scene_hash(a) == scene_hash(b)
        assert scene_hash(a) != scene_hash(make_road(kind, np.random.default_rng(6), "singapore-onenorth"))
    assert build_layout(np.random.default_rng(3), "boston-seaport", kind="merge").road.kind == "merge"


def test_kinds_drawn_at_random_are_all_kinds():
    drawn = {build_layout(np.random.default_rng(s), "boston-seaport").road.kind for s in range(60)}
    assert drawn == set(ROAD_KINDS)


# ---- what makes a kind


def turned(layout):
    line = layout.legs[0].line
    return np.diff(line[:, 2])


def test_each_kind_is_what_its_name_says(layouts):
    for (kind, s), layout in layouts.items():
        road, lanes = layout.road, layout.road.lanes
        assert road.kind == kind
        joins = [i for i, lane in lanes.items() if len(lane.predecessors) > 1 and not lane.in_intersection and not road.intersections]
        if kind == "straight":
            assert np.abs(turned(layout)).max() == 0 and len(layout.legs[0].forward) > 1
        elif kind == "curve":
            assert np.abs(turned(layout)).max() > 1 / 300
        elif kind == "s_curve":
            assert turned(layout).max() > 1 / 300 and turned(layout).min() < -1 / 300
        elif kind in ("four_way", "t_intersection"):
            ways = {lanes[c].predecessors[0] for c in lanes if lanes[c].in_intersection}
            near = [i for i in ways if np.hypot(*(lanes[i].centerline[-1, :2] - road.intersections[0].mean(0))) < 40]
            arms = {round(float(lanes[i].centerline[-1, 2] * 2 / np.pi)) % 4 for i in near}
            assert len(arms) == (4 if kind == "four_way" else 3), (s, arms)
        elif kind == "roundabout":
            assert len(layout.crossings[0].through) >= 3 and len(road.islands) >= 1
        elif kind == "merge":
            assert len(joins) == 1 and len(road.yields) == 1
            assert len(layout.legs[1].forward) == len(layout.legs[2].forward) + 1
        elif kind == "lane_drop":
            assert len(joins) == 1 and len(layout.legs[0].forward) == len(layout.legs[1].forward) + 1
        elif kind == "two_way":
            assert len(layout.legs[0].forward) == len(layout.legs[0].backward) == 1 and any(k == "center" for _, k in road.marks)
        elif kind == "work_zone":
            kinds = [f.category.split(".")[1] for f in road.fixtures]
            assert kinds.count("trafficcone") >= 8 and "barrier" in kinds and any(k == "temporary" for _, k in road.marks)


def test_all_kinds_but_ramps_have_oncoming_lanes(layouts):
    for (kind, _), layout in layouts.items():
        for leg in layout.legs:
            assert leg.backward or kind == "merge"
            for i, j in zip(leg.forward, leg.backward):
                a, b = layout.road.lanes[i].centerline, layout.road.lanes[j].centerline
                assert angle(a[len(a) // 2, 2] - b[len(b) // 2, 2] - np.pi) < 0.05


def test_traffic_turns_counter_clockwise_on_a_roundabout_and_reaches_every_exit(layouts):
    for s in range(SEEDS):
        road = layouts["roundabout", s].road
        inner = {i for i, lane in road.lanes.items() if lane.in_intersection}
        ring = [road.lanes[i] for i in inner if inner.issuperset(road.lanes[i].predecessors + road.lanes[i].successors)]
        center = road.islands[0].mean(0)
        for lane in ring:
            a = np.unwrap(np.arctan2(*(lane.centerline[:, :2] - center).T[::-1]))
            assert a[-1] > a[0]
        ends, seen, stack = set(), set(), [layouts["roundabout", s].route[0]]
        while stack:
            i = stack.pop()
            if i in seen:
                continue
            seen.add(i)
            stack += road.lanes[i].successors
            ends |= {i} if not road.lanes[i].successors else set()
        arms = sum(line.kind == "yield" for line in road.stop_lines)
        assert len(ends) == arms, (s, ends, arms)  # a U-turn to the own arm is possible too
        for i in road.yields:
            assert any(k in ring for k in (road.lanes[j] for j in road.yields[i]))


# ---- right of way and lights


def test_of_two_crossing_ways_exactly_one_waits(layouts):
    checked = 0
    for (kind, s), layout in layouts.items():
        if kind not in ("four_way", "t_intersection"):
            continue
        road, lanes = layout.road, layout.road.lanes
        group = {i: g for g, ids in enumerate([ids for groups in road.phases for ids in groups]) for n in ids for i in road.signals[n].lanes}
        areas = [shapely.Polygon(p).buffer(0.1) for p in road.intersections]
        middle = {i: shapely.Point(lane.centerline[len(lane.centerline) // 2, :2]) for i, lane in lanes.items() if lane.in_intersection}
        at = {i: next(k for k, area in enumerate(areas) if area.contains(point)) for i, point in middle.items()}
        for i in at:
            for j in at:
                a, b = lanes[i].predecessors[0], lanes[j].predecessors[0]
                if i >= j or at[i] != at[j] or angle(lanes[a].centerline[-1, 2] - lanes[b].centerline[-1, 2]) < 0.3 or group.get(a) != group.get(b):
                    continue
                if shapely.LineString(lanes[i].centerline[:, :2]).intersects(shapely.LineString(lanes[j].centerline[:, :2])):
                    assert (j in road.yields.get(i, ())) + (i in road.yields.get(j, ())) == 1, (kind, s, i, j)
                    checked += 1
                else:
                    assert j not in road.yields.get(i, ())
    assert checked > 200


def test_minor_roads_wait_and_major_roads_have_no_line(layouts):
    seen = 0
    for (kind, s), layout in layouts.items():
        for line in layout.road.stop_lines:
            if kind not in ("four_way", "t_intersection") or line.signal is not None:
                continue
            seen += 1
            assert line.kind in ("stop", "yield")
            ways = [c for i in line.lanes for c in layout.road.lanes[i].successors]
            assert any(c in layout.road.yields for c in ways), (kind, s)
    assert seen > 10


def test_phases_are_exclusive_and_each_group_gets_its_turn():
    cycle = signal_cycle(T, 3, 7.0, 4.0)
    assert ((cycle != RED).sum(1) <= 1).all() and all((cycle[:, g] == GREEN).any() for g in range(3))
    for g in range(3):
        after = cycle[1:, g][np.diff(cycle[:, g]) != 0]
        assert all((b, a) in {(GREEN, YELLOW), (YELLOW, RED), (RED, GREEN)} for b, a in zip(after, after[1:]))
    layout = next(x for s in range(40) if (x := make_layout("four_way", np.random.default_rng(s))).road.phases)
    state = phases(layout.road, T, np.random.default_rng(0))
    groups = layout.road.phases[0]
    assert all((state[:, list(ids)] == state[:, [ids[0]]]).all() for ids in groups)
    assert not ((state[:, groups[0][0]] != RED) & (state[:, groups[1][0]] != RED)).any()


def test_given_lights_are_kept_and_the_others_follow():
    layout = next(x for s in range(40) if (x := make_layout("four_way", np.random.default_rng(s))).road.phases)
    groups = layout.road.phases[0]
    mine = np.where(T < 8, GREEN, np.where(T < 9.5, YELLOW, np.where(T < 25, RED, GREEN))).astype(np.int8)
    state = phases(layout.road, T, np.random.default_rng(0), {groups[0][0]: mine})
    assert (state[:, list(groups[0])] == mine[:, None]).all()
    other = state[:, groups[1][0]]
    assert (other[mine != RED] == RED).all() and (other == GREEN).sum() > 50 and (other == YELLOW).sum() == 30
    short = np.where((T > 5) & (T < 8), RED, GREEN).astype(np.int8)
    assert (opposite_phase(short) == RED).all()  # three seconds of red open nothing


def test_lights_of_scenes_keep_their_phases():
    junctions = 0
    for seed in range(8):
        scene = make_scene(seed, "scene-0001", "train", LOCATIONS[seed % 4], road=("four_way", "t_intersection")[seed % 2])
        for first, second in scene.road.phases:
            assert all((scene.signal_state[:, list(ids)] == scene.signal_state[:, [ids[0]]]).all() for ids in (first, second))
            assert not ((scene.signal_state[:, first[0]] != RED) & (scene.signal_state[:, second[0]] != RED)).any()
            junctions += 1
    assert junctions > 4


# ---- the checks can fail


def damaged(road, **how):
    lane = next(lane for lane in road.lanes.values() if lane.in_intersection and lane.turn == "left")
    return replace(road, lanes={**road.lanes, lane.id: replace(lane, **{k: v(lane) for k, v in how.items()})})


def cone_at(xy):
    return Fixture("movable_object.trafficcone", np.array([*xy, 0.0]), np.array([0.4, 0.4, 0.9]), np.zeros(3, np.uint8))


def tree_at(xy):
    return Prop("tree", np.array([*xy, 0.0]), np.ones(3), 0.0, np.zeros(3, np.uint8))


@pytest.mark.parametrize(
    "what, needle",
    [
        (lambda r: damaged(r, centerline=lambda x: x.centerline + [0.02, 0, 0]), "apart from its successor"),
        (lambda r: damaged(r, centerline=lambda x: x.centerline + [0, 0, 0.03]), "turned"),
        (lambda r: damaged(r, predecessors=lambda x: ()), "does not name it as predecessor"),
        (lambda r: damaged(r, polygon=lambda x: x.polygon + [25.0, 0]), "not drivable"),
        (lambda r: damaged(r, polygon=lambda x: x.polygon[::3].repeat(2, 0)[np.arange(0, 8)[::-1] % 5]), "not simple"),
        (lambda r: damaged(r, speed_limit_mps=lambda x: 20.0), "sideways at its limit"),
        (lambda r: replace(r, intersections=[]), "outside the intersections"),
        (lambda r: replace(r, drivable=r.drivable[:-1]), "not drivable"),
        (lambda r: replace(r, fixtures=[cone_at(next(iter(r.lanes.values())).centerline[5, :2])]), "stands on it"),
        (lambda r: replace(r, yields={**r.yields, next(iter(r.yields.values()))[0]: (next(iter(r.yields)),)}), "waits for a lane that waits"),
        (lambda r: replace(r, stop_lines=[replace(r.stop_lines[0], line=r.stop_lines[0].line + 30.0)]), "does not cross its lane"),
        (lambda r: replace(r, phases=[]), "signals and phases"),
        (lambda r: replace(r, marks=[*r.marks, (r.marks[0][0], "dotted")]), "unknown mark"),
        (lambda r: replace(r, props=[tree_at(next(iter(r.lanes.values())).centerline[9, :2])]), "stands on the road"),
        (lambda r: replace(r, islands=[next(iter(r.lanes.values())).polygon]), "over an island"),
    ],
)
def test_damage_is_found(what, needle):
    layout = next(x for s in range(40) if (x := make_layout("four_way", np.random.default_rng(s))).road.phases and x.road.yields)
    assert not road_faults(layout.road)
    assert any(needle in fault for fault in road_faults(what(layout.road))), road_faults(what(layout.road))


def test_lanes_on_each_other_are_found():
    road = make_layout("straight", np.random.default_rng(0)).road
    a, b = list(road.lanes.values())[:2]
    moved = replace(b, polygon=b.polygon + (a.centerline[0, :2] - b.centerline[0, :2]) * 0.5)
    assert any("of each other" in f for f in road_faults(replace(road, lanes={**road.lanes, b.id: moved})))


def test_lines_move_over_smoothly():
    rng = np.random.default_rng(0)
    for _ in range(40):
        line = reference_line(rng.normal(size=3), np.full(61, rng.uniform(-0.01, 0.01)))
        over = offset_line(line, smooth_step(61, *rng.uniform(-4, 4, 2)))
        d = np.gradient(over[:, :2], axis=0)[1:-1]
        assert angle(np.arctan2(d[:, 1], d[:, 0]) - over[1:-1, 2]).max() < 0.01
        end = np.array([*rng.uniform(12, 30, 2), rng.uniform(0.5, 2.2)])
        bend = connector(np.zeros(3), end)
        assert np.allclose(bend[0], 0, atol=1e-9) and np.allclose(bend[-1], end, atol=1e-6)
        assert np.hypot(*np.diff(bend[:, :2], axis=0).T).min() > 0.05


# ---- what is drawn


def test_islands_are_no_road_and_rings_are(scenes):
    scene = scenes["roundabout"]
    ground = ground_raster(scene)
    A = ground.affine()

    def label(xy):
        x, y = np.rint(A @ [*xy, 1.0]).astype(int)
        return ground.labels[y, x] if 0 <= y < ground.labels.shape[0] and 0 <= x < ground.labels.shape[1] else None

    center = scene.road.islands[0].mean(0)
    assert label(center) == CLASS_ID["offroad"]
    on = [label(scene.road.lanes[i].centerline[len(scene.road.lanes[i].centerline) // 2, :2]) for i in scene.route]
    on = [v for v in on if v is not None]
    assert len(on) > 2 and all(v in (CLASS_ID["road"], CLASS_ID["mark"], CLASS_ID["crosswalk"]) for v in on)


def test_every_mark_is_painted(scenes):
    for kind, scene in scenes.items():
        ground = ground_raster(scene)
        A, shape = ground.affine(), ground.labels.shape
        for line, mark in scene.road.marks:
            if mark in ("dashed", "center", "double"):
                continue  # gaps, or beside the line
            px = np.rint((line if mark not in ("hatch", "arrow") else line[None].mean(1)) @ A[:, :2].T + A[:, 2]).astype(int)
            px = px[(px > 2).all(1) & (px < [shape[1] - 3, shape[0] - 3]).all(1)]
            near = [(ground.labels[y - 2:y + 3, x - 2:x + 3] == CLASS_ID["mark"]).any() for x, y in px]
            assert np.mean(near) > 0.9 if near else True, (kind, mark)


def test_signs_kerbs_and_works_have_shapes(scenes):
    for kind, scene in scenes.items():
        shapes = scene_shapes(scene)
        signs = [p for p in scene.road.props if p.kind in SIGN_KINDS]
        at = shapes.xyz[:, :2]
        for p in signs:
            assert (np.hypot(*(at - p.xyz[:2]).T) < 0.01).any()
        if kind in ("roundabout", "merge", "lane_drop", "work_zone"):
            assert signs


def test_works_are_in_the_picture(scenes):
    scene = scenes["work_zone"]
    cones = np.array([f.pose[:2] for f in scene.road.fixtures])
    near = [k for k in range(0, 41) if (((cones - scene.ego[5 * k, :2]) @ [np.cos(scene.ego[5 * k, 2]), np.sin(scene.ego[5 * k, 2])] > 4)
                                        & (np.hypot(*(cones - scene.ego[5 * k, :2]).T) < 22)).sum() >= 2][:3]
    assert near, "the ego never comes near the works"
    assert (render_scene(scene, keyframes=near).labels == CLASS_ID["obstacle"]).reshape(len(near), -1).any(1).all()
    assert {a.category for a in scene.agents} >= {f.category for f in scene.road.fixtures}


# ---- the map


@pytest.fixture(scope="module")
def devkit_map(scenes, tmp_path_factory):
    from nuscenes.map_expansion.map_api import NuScenesMap

    each = list(scenes.values())
    offset, sheet = shelf_pack(np.stack([scene_extent(s) for s in each]))
    tok, root = Tokens(0), tmp_path_factory.mktemp("map")
    layers = [map_layers(tok, s, o) for s, o in zip(each, offset)]
    record = {"version": "1.3", "canvas_edge": sheet}
    record |= {k: [r for part in layers for r in part[k]] for k in LIST_LAYERS}
    record |= {k: {a: b for part in layers for a, b in part[k].items()} for k in DICT_LAYERS}
    (root / "maps" / "expansion").mkdir(parents=True)
    (root / "maps" / "expansion" / "boston-seaport.json").write_text(json.dumps(record))
    mask = mask_png([p + o for s, o in zip(each, offset) for p in s.road.drivable], sheet)
    return NuScenesMap(str(root), "boston-seaport"), tok, dict(zip(scenes, offset)), mask, sheet


def test_devkit_reads_every_kind(scenes, devkit_map):
    m, tok, offset, _, _ = devkit_map
    for kind, scene in scenes.items():
        lanes = scene.road.lanes
        token = {i: tok("lane_connector" if lane.in_intersection else "lane", scene.name, i) for i, lane in lanes.items()}
        for i, lane in lanes.items():
            line = np.array(m.discretize_lanes([token[i]], 0.5)[token[i]])[:, :2]
            ours = shapely.LineString(lane.centerline[:, :2] + offset[kind])
            assert shapely.distance(shapely.points(line), ours).max() < 0.12, (kind, i)
            assert set(m.get_outgoing_lane_ids(token[i])) == {token[j] for j in lane.successors}
            assert set(m.get_incoming_lane_ids(token[i])) == {token[j] for j in lane.predecessors}
            x, y = lane.centerline[len(lane.centerline) // 2, :2] + offset[kind]
            assert m.layers_on_point(x, y, ["drivable_area"])["drivable_area"]
            polygon = m.extract_polygon(m.get("lane_connector" if lane.in_intersection else "lane", token[i])["polygon_token"])
            assert polygon.is_valid and abs(polygon.area / shapely.Polygon(lane.polygon).area - 1) < 0.02
    assert {r["stop_line_type"] for r in m.stop_line} <= {"TRAFFIC_LIGHT", "STOP_SIGN", "YIELD"}
    assert len(m.stop_line) == sum(len(s.road.stop_lines) for s in scenes.values())


def test_mask_agrees_with_the_drivable_area(scenes, devkit_map):
    import cv2

    _, _, offset, png, sheet = devkit_map
    mask = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert mask.shape == (sheet[1] * 10, sheet[0] * 10)
    rng = np.random.default_rng(0)
    for kind, scene in scenes.items():
        paved = shapely.union_all([shapely.Polygon(p).buffer(0) for p in scene.road.drivable])
        xy = rng.uniform(*np.array(paved.bounds).reshape(2, 2), (400, 2))
        sure = shapely.distance(shapely.points(xy), paved.boundary) > 0.4
        col, row = np.rint((xy + offset[kind]) * 10 - 0.5).astype(int).T
        on = mask[mask.shape[0] - 1 - row, col] > 0
        assert (on == shapely.contains(paved, shapely.points(xy)))[sure].all(), kind
