"Reactive traffic: what must hold on any road, and a slow second implementation with shapely's geometry."

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from vlarepro.scoring.pdm.scene import LANE, ROADBLOCK, LaneGraph, Polygons, RedLights, SceneCache, Tracks
from vlarepro.scoring.pdm.traffic import reactive_tracks, traffic_start

WIDTH, LIMIT = 3.5, 12.0


def line(radius: float, left: float) -> np.ndarray:
    "200 m along x, then a quarter turn to the left; `left` of the reference line."
    x = np.arange(-100.0, 100.0)
    a = np.linspace(0, np.pi / 2, 41)
    straight = np.stack([x, np.full(len(x), left), np.zeros(len(x))], -1)
    bend = np.stack([100 + (radius - left) * np.sin(a), radius - (radius - left) * np.cos(a), a], -1)
    return np.concatenate([straight, bend])


def road(boxes, radius=30.0, limits=(LIMIT, LIMIT), ego_speed=8.0, kinds=None) -> SceneCache:
    "Two lanes; boxes are (x, y, heading, speed), cars of 4.5 x 1.9 m unless `kinds` says otherwise."
    lines = [line(radius, 0.0), line(radius, WIDTH)]
    edges = [(-WIDTH / 2, WIDTH / 2), (WIDTH / 2, 1.5 * WIDTH), (-WIDTH / 2, 1.5 * WIDTH)]
    rings = [np.concatenate([line(radius, a)[:, :2], line(radius, b)[::-1, :2]]) for a, b in edges]
    polygons = Polygons.of(rings, [LANE, LANE, ROADBLOCK], [True, True, False], ["a", "b", "block"])
    graph = LaneGraph(np.concatenate(lines), np.cumsum([0, *map(len, lines)]), np.array([0, 1]), np.array([0, 0]), np.zeros(2, bool), np.array(limits, float),
                      np.zeros((0, 2), np.int64), np.array([0]), ("a", "b"), ("block",))
    b = np.array(boxes, float).reshape(-1, 4)
    t = np.arange(51) * 0.1
    state = np.zeros((len(b), 51, 7))
    for c, v in ((0, np.cos(b[:, 2]) * b[:, 3]), (1, np.sin(b[:, 2]) * b[:, 3])):
        state[:, :, c], state[:, :, 5 + c] = b[:, c, None] + v[:, None] * t, v[:, None]
    state[..., 2], state[..., 3], state[..., 4] = b[:, 2, None], 4.5, 1.9
    kinds = np.zeros(len(b), np.int8) if kinds is None else np.array(kinds, np.int8)
    tracks = [Tracks(state[:, :n], np.ones((len(b), n), bool), kinds, tuple(f"t{i}" for i in range(len(b)))) for n in (51, 41)]
    ego = np.zeros(11); ego[3] = ego_speed
    return SceneCache("road", "test", 0, np.zeros(2), ego, np.zeros(0, np.int64), np.zeros((0, 11)), *tracks, polygons, RedLights.none(), lines[0], graph=graph)


def drive(accel=0.0, speed=8.0, x=0.0, y=0.0) -> np.ndarray:
    v = np.maximum(speed + accel * 0.1 * np.arange(41), 0)
    s = np.zeros((41, 11))
    s[:, 0], s[:, 1], s[:, 3] = x + np.concatenate([[0], np.cumsum(0.1 * v[:-1])]), y, v
    return s


AWAY = drive(speed=0.0, x=0.0, y=-30.0)       # an ego that is in nobody's way


@given(st.lists(st.tuples(st.floats(14, 40), st.floats(0, 9)), min_size=2, max_size=5), st.floats(0, 9))
def test_nobody_passes_a_leader(gaps, first):
    x, v = [40.0], [first]
    for gap, speed in gaps:
        x.append(x[-1] - gap - 4.5); v.append(min(speed, np.sqrt(2 * 2.0 * (gap - 5))))   # it can still stop
    tracks = reactive_tracks(road([(a, WIDTH, 0, b) for a, b in zip(x, v) if a > -90]), AWAY[None])[0]
    assert tracks.valid.all() and (np.diff(tracks.state[..., 0], axis=0) <= -4.5).all()   # bumper to bumper, never over
    speed = np.hypot(tracks.state[..., 5], tracks.state[..., 6])
    assert (np.abs(np.diff(speed[:, 1:], axis=1)) <= 0.2 + 1e-9).all() and speed.max() <= LIMIT + 1e-9


def test_a_blocked_lane_stops_the_queue():
    scene = road([(44, 0, 0, 6), (27, 0, 0, 6), (10, 0, 0, 6), (44, WIDTH, 0, 6)], limits=(6, 6))
    state = reactive_tracks(scene, drive(speed=0.0, x=60.0)[None])[0].state
    v = np.hypot(state[..., 5], state[..., 6])
    assert v[0, -1] < 0.5 and v[0, -1] < v[1, -1] < v[2, -1] < 5 and v[3, -1] > 5
    assert (state[0, :, 0] + 2.25 < 60 - 2.588).all() and (np.diff(state[:3, :, 0], axis=0) < -4.5).all()


def test_a_rail_ends_with_its_lane():
    length = 199 + 1 + 30 * np.pi / 2                                # the last metre of the straight and the quarter turn
    here = drive(speed=0.0, x=60.0, y=-40.0)[None]
    state = reactive_tracks(road([(90, 0, 0, 6.0)], limits=(30, 30)), here)[0].state[0]
    done = 190 + np.concatenate([[0], np.cumsum(np.hypot(*np.diff(state[:, :2], axis=0).T))])
    assert done[-1] < length and np.hypot(*state[-1, 5:7]) < 10, "it slows for the end of its lane although the limit is 30 m/s"
    free = reactive_tracks(road([(-20, 0, 0, 6.0)], limits=(30, 30)), here)[0].state[0]
    assert np.hypot(*free[-1, 5:7]) > np.hypot(*state[-1, 5:7])


def test_onward_rails_go_on_over_the_straightest_lane():
    scene = road([(85, 0, 0, 8)])
    g, bend = scene.graph, line(30.0, 0.0)
    end = bend[-1]
    ahead = end + np.stack([np.zeros(40), np.arange(40.0), np.zeros(40)], -1)
    turn = np.linspace(0, 1, 40)
    curve = end + np.stack([30 * (np.cos(turn) - 1), 30 * np.sin(turn), turn], -1)
    graph = LaneGraph(np.concatenate([g.center, curve, ahead]), np.append(g.start, g.start[-1] + [40, 80]), np.array([0, 1, -1, -1]), np.array([0, 0, 1, 2]),
                      np.array([False, False, True, True]), np.full(4, LIMIT), np.array([[0, 2], [0, 3]]), g.route,
                      ("a", "b", "curve", "ahead"), ("block", "c", "d"))
    scene, ego = scene.replace(graph=graph), drive(speed=0.0, x=60.0, y=-30.0)[None]
    alone, on = (reactive_tracks(scene, ego, onward=o)[0].state[0] for o in (False, True))
    assert np.hypot(*on[-1, 5:7]) > np.hypot(*alone[-1, 5:7]) + 0.5
    rails = traffic_start(scene, onward=True).rails
    np.testing.assert_allclose([rails.x[-1], rails.heading[-1]], [end[0], np.pi / 2])


def test_a_car_beside_the_road_stays_and_hides_only_from_contact():
    parked = (40.0, -4.0, 0.1, 0.0)
    tracks = reactive_tracks(road([parked, (0, WIDTH, 0, 8)]), AWAY[None])[0]
    i = tracks.id.index("t0")
    assert tracks.valid[i].all() and np.ptp(tracks.state[i], axis=0).max() == 0
    near = (40.0, -1.85, 0.0, 0.0)                                    # its side reaches into the lane, a car drives through
    tracks = reactive_tracks(road([near, (25, 0, 0, 8)]), AWAY[None])[0]
    i = tracks.id.index("t0")
    assert 0 < (~tracks.valid[i]).sum() < 40 and tracks.valid[i, :5].all()


def test_an_ego_in_front_makes_followers_brake():
    scene = road([(-25, 0, 0, 8), (-50, 0, 0, 8), (-25, WIDTH, 0, 8)])
    gone, soft, hard = reactive_tracks(scene, np.stack([AWAY, drive(-1.0), drive(-5.0)]))
    v = [np.hypot(t.state[:, -1, 5], t.state[:, -1, 6]) for t in (gone, soft, hard)]
    assert v[0][0] > v[1][0] > v[2][0] and v[0][1] > v[2][1]
    np.testing.assert_array_equal(gone.state[2], hard.state[2])
    assert hard.state[0, -1, 0] + 2.25 < drive(-5.0)[-1, 0] - 2.588


def test_people_and_things_replay_and_later_vehicles_do_not_come():
    scene = road([(20, 0, 0, 5), (30, 4, 0, 1), (25, -2, 0, 0), (60, WIDTH, 0, 5)], kinds=[0, 1, 4, 0])
    valid = scene.tracks_v2.valid.copy(); valid[3, :10] = False
    state = np.where(valid[..., None], scene.tracks_v2.state, np.nan)
    scene = scene.replace(tracks_v2=Tracks(state, valid, scene.tracks_v2.type, scene.tracks_v2.id))
    tracks = reactive_tracks(scene, AWAY[None])[0]
    assert set(tracks.id) == {"t0", "t1", "t2"}
    for name in ("t1", "t2"): np.testing.assert_array_equal(tracks.state[tracks.id.index(name)], scene.tracks_v2.state[scene.tracks_v2.id.index(name)])
    np.testing.assert_array_equal(tracks.state[tracks.id.index("t0"), 0], scene.tracks_v2.state[0, 0])


def test_far_vehicles_vanish():
    scene = road([(95, 0, 0, 9), (0, WIDTH, 0, 5)])
    tracks = reactive_tracks(scene, drive(speed=0.0, x=-15)[None])[0]
    assert tracks.valid[:, 0].all() and not tracks.valid[tracks.id.index("t0"), 1:].any() and tracks.valid[tracks.id.index("t1")].all()


def test_an_unknown_limit_is_that_of_the_vehicle_before():
    boxes = [(40, 0, 0, 5), (20, WIDTH, 0, 5)]
    assert traffic_start(road(boxes, limits=(7, np.nan))).target.tolist() == [7, 7]
    assert traffic_start(road(boxes[::-1], limits=(7, np.nan))).target.tolist() == [10, 7]


def test_a_scene_without_vehicles_has_no_traffic():
    assert reactive_tracks(road([]), AWAY[None])[0].state.shape == (0, 41, 7)


def moved(scene: SceneCache, states: np.ndarray, turn: float) -> tuple[SceneCache, np.ndarray]:
    "Scene and drives turned about the origin."
    c, s = np.cos(turn), np.sin(turn)
    rot = np.array([[c, s], [-s, c]])
    def pose(a):
        a = a.copy(); a[..., :2], a[..., 2] = a[..., :2] @ rot, a[..., 2] + turn
        return a
    tracks = lambda t: Tracks(np.concatenate([pose(t.state)[..., :5], t.state[..., 5:] @ rot], -1), t.valid, t.type, t.id)
    p, g = scene.polygons, scene.graph
    turned = scene.replace(ego=pose(scene.ego), centerline=pose(scene.centerline), tracks_v1=tracks(scene.tracks_v1), tracks_v2=tracks(scene.tracks_v2),
                           polygons=Polygons(p.xy @ rot, p.start, p.type, p.on_route, p.id),
                           graph=LaneGraph(pose(g.center), g.start, g.polygon, g.block, g.is_connector, g.speed_limit_mps, g.edges, g.route, g.id, g.block_id))
    return turned, pose(states)


def crowd(seed: int, n: int = 14, radius: float = 30.0) -> SceneCache:
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(n):
        l = line(radius, rng.choice([0.0, WIDTH]))
        x, y, h = l[rng.integers(20, len(l) - 3)]
        boxes.append((x + rng.normal(0, 0.3), y + rng.normal(0, 0.3), h + rng.normal(0, 0.05), rng.uniform(0, 11)))
    return road(boxes, radius)


@pytest.mark.parametrize("seed", range(3))
def test_rigid_motion_changes_nothing(seed):
    scene, states = crowd(seed), np.stack([drive(), drive(-3.0, x=2)])
    for turn in (2.5, -1.2):
        turned, there = moved(scene, states, turn)
        for a, b in zip(reactive_tracks(scene, states), reactive_tracks(turned, there)):
            assert a.id == b.id and (a.valid == b.valid).all()
            back, _ = moved(scene.replace(tracks_v2=a), states, turn)
            np.testing.assert_allclose(np.nan_to_num(b.state[..., [0, 1, 3, 4, 5, 6]]), np.nan_to_num(back.tracks_v2.state[..., [0, 1, 3, 4, 5, 6]]), atol=1e-6)


def test_a_candidate_does_not_depend_on_the_others():
    scene, states = crowd(7), np.stack([drive(), drive(-3.0), AWAY])
    together = reactive_tracks(scene, states)
    for i in (2, 0, 1): np.testing.assert_array_equal(reactive_tracks(scene, states[i:i + 1])[0].state, together[i].state)


class Slow:
    "The same traffic with shapely's polygons, written from the description."

    def __init__(self, scene, states):
        start, rails = traffic_start(scene), []
        r = start.rails
        for i in range(len(start.on)): rails.append(slice(r.start[i], r.start[i + 1]))
        self.path = [np.stack([r.x[k], r.y[k], r.heading[k]], -1) for k in rails]
        self.arc = [r.s[k] for k in rails]
        self.start, self.states, self.n = start, states, len(start.on)

    def pose(self, i, s): return np.array([np.interp(s, self.arc[i], self.path[i][:, c]) for c in range(3)])

    def strip(self, i, a, b):
        a, b = np.clip([a, b], 0, self.arc[i][-1])
        if b <= a: return shapely.Polygon()
        inner = self.path[i][(self.arc[i] > a) & (self.arc[i] < b), :2]
        points = np.concatenate([[self.pose(i, a)[:2]], inner, [self.pose(i, b)[:2]]])
        return shapely.LineString(points).buffer(self.start.size[i, 1] / 2, cap_style="flat", join_style="mitre")

    def box(self, x, y, h, length, width):
        c, s = np.cos(h), np.sin(h)
        local = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [length / 2, width / 2]
        return shapely.Polygon(local @ np.array([[c, s], [-s, c]]) + [x, y])

    def run(self):
        s, v, size = self.start.s.copy(), self.start.speed.copy(), self.start.size
        shapes = [self.box(*self.pose(i, s[i]), *size[i]) for i in range(self.n)]
        out, alive = np.zeros((self.n, 41, 2)), np.ones((self.n + 1, 41), bool)
        for t in range(1, 41):
            e = self.states[t - 1]
            ego = self.box(*e[:3], 5.176, 2.297)
            for i in range(self.n): alive[i, t] = alive[i, t - 1] and np.hypot(*(self.pose(i, s[i])[:2] - e[:2])) <= 100
            for i in np.flatnonzero(alive[:-1, t]):
                end, mine = self.arc[i][-1], self.pose(i, s[i])
                way = self.strip(i, s[i] if s[i] < end else end - 1, end)
                hits = [(shapes[i].distance(g), k) for k, g in enumerate([*shapes, ego]) if k != i and alive[k, t] and g.intersects(way)]
                if hits:
                    gap, k = min(hits)
                    lead = np.hypot(e[3], e[4]) * np.cos(e[2] - mine[2]) if k == self.n else v[k] * np.cos(self.pose(k, s[k])[2] - mine[2])
                else: gap, lead = end - s[i] - size[i, 0] / 2, 0.0
                wish = 1 + 1.5 * v[i] + v[i] * (v[i] - lead) / (2 * np.sqrt(2))
                a = np.clip(1 - (v[i] / self.start.target[i]) ** 4 - (wish / max(gap, 1)) ** 2, -2, 1)
                s[i], v[i] = s[i] + 0.1 * v[i], max(v[i] + 0.1 * a, 0)
                shapes[i] = shapely.union(self.box(*self.pose(i, s[i]), *size[i]), self.strip(i, s[i] - size[i, 0] / 2, s[i] + size[i, 0] / 2 + 1.5 * v[i]))
                out[i, t] = s[i], v[i]
        return out, alive[:-1]


@pytest.mark.parametrize("seed", range(4))
def test_a_slow_implementation_agrees(seed):
    scene, states = crowd(seed, 9, radius=[12.0, 30.0][seed % 2]), drive(-2.0, x=3.0)
    fast = reactive_tracks(scene, states[None])[0]
    slow = Slow(scene, states)
    want, alive = slow.run()
    np.testing.assert_array_equal(fast.valid[:slow.n, 1:], alive[:, 1:])
    for row in range(slow.n):
        t = np.flatnonzero(alive[row])[1:]
        place = np.array([slow.pose(row, a)[:2] for a in want[row, t, 0]]).reshape(-1, 2)
        np.testing.assert_allclose(fast.state[row, t, :2], place, atol=1e-6)
        np.testing.assert_allclose(np.hypot(*fast.state[row, t, 5:7].T), want[row, t, 1], atol=1e-6)
