"""A second, slow reading of NAVSIM's two scorers: one plan at a time, least squares by pinv, polygons by shapely, filters by scipy.

It shares nothing with the library but the record of a scene, so that it can contradict it. Also here: random scenes for tests and the benchmark.
    python tests/slow_pdm.py        # writes the frozen cases tests/pdm_cases/*.npz again (only when the scorer's definition changes)
"""
import dataclasses

import numpy as np
import shapely
from scipy.signal import savgol_filter

from vlarepro.scoring.pdm.scene import Polygons, RedLights, Reference, SceneCache, Tracks

DT, N, HORIZON = 0.1, 40, 10
TO_FRONT, TO_REAR, HALF_WIDTH, WHEEL_BASE, TO_CENTER = 4.049, 1.127, 2.297 / 2, 3.089, 1.461
LANES, DRIVABLE, CROSSING, STATIC = (0, 11), (17, 1, 5, 15), 1, (3, 4, 5, 6)


# ---------------------------------------------------------------------------------------------------------------- simulation
def wrap(a): return np.arctan2(np.sin(a), np.cos(a))


def wrap_half_open(a): return (a + np.pi) % (2 * np.pi) - np.pi


def clock(t0_us, step_s, n): return np.array([int((k * step_s + t0_us * 1e-6) * 1e6) for k in range(n)])


def interpolated(times_us, poses, at_us):
    "Poses (x, y, heading) at other times; before and after the knots: the end knots."
    t, q = (np.asarray(times_us) - times_us[0]) * 1e-6, (at_us - times_us[0]) * 1e-6
    out = np.stack([np.interp(q, t, c) for c in (poses[:, 0], poses[:, 1], np.unwrap(poses[:, 2]))], -1)
    out[:, 2] = wrap_half_open(out[:, 2])
    return out


def matrix(pose): return np.array([[np.cos(pose[2]), -np.sin(pose[2]), pose[0]], [np.sin(pose[2]), np.cos(pose[2]), pose[1]], [0, 0, 1]])


def path_of_plan(plan, ego, t0_us):
    knots = [ego[:3]]
    for pose in plan:
        m = matrix(ego) @ matrix(pose)
        knots.append([m[0, 2], m[1, 2], np.arctan2(m[1, 0], m[0, 0])])
    times = clock(t0_us, 0.5, 9)
    times[0] = t0_us
    return interpolated(times, np.array(knots), clock(t0_us, DT, N + 1))


def running_sum():
    "First value plus dt times the slopes before each step: (40, 40)."
    out = np.zeros((N, N))
    for i in range(N): out[i, 0], out[i, 1:i + 1] = 1.0, DT
    return out


def fitted_speed(path):
    d, h, run = np.diff(path[:, :2], axis=0), path[:-1, 2], running_sum()
    a = np.empty((2 * N, N))
    a[0::2], a[1::2] = DT * np.cos(h)[:, None] * run, DT * np.sin(h)[:, None] * run
    r = np.zeros((N - 2, N))
    for i in range(N - 3): r[i, i + 1] = -1.0
    r[N - 3, N - 2], r[N - 3, N - 1] = -1.0, 1.0
    return run @ (np.linalg.pinv(a.T @ a + 1e-4 * r.T @ r) @ (a.T @ d.reshape(-1)))


def fitted_curvature(path, v):
    run = running_sum()
    a = (v * DT)[:, None] * run
    penalty = np.diag([1e-10] + [1e-2] * (N - 1))
    return run @ (np.linalg.pinv(a.T @ a + penalty) @ (a.T @ wrap(np.diff(path[:, 2]))))


def command(state, target, i, v, k):
    "Acceleration and steering rate that the tracker asks for at step i."
    j = min(i + HORIZON, N - 1)
    speed, goal = state[3], v[j]
    if goal <= 0.2 and speed <= 0.2: return -0.5 * (speed - goal), 0.0
    accel = -10 / 11 * (speed - goal)
    dx, dy, h = state[0] - target[0], state[1] - target[1], target[2]
    s, b = np.array([dy * np.cos(h) - dx * np.sin(h), wrap(state[2] - h), state[7]]), np.zeros(3)
    for n in range(HORIZON):
        w = speed + accel * DT * n
        step = np.array([[1, w * DT, 0], [0, 1, w * DT / WHEEL_BASE], [0, 0, 1]])
        bend = k[i + n] if i + n < j else k[j]
        s, b = step @ s - [0, w * bend * DT, 0], step @ b + [0, 0, DT]
    s[1:] = wrap(s[1:])
    q = np.diag([1.0, 10.0, 0.0])
    return accel, -(b @ q @ s) / (b @ q @ b + 1.0)


def drive(ego, path):
    "The simulated states (41, 11)."
    v = fitted_speed(path)
    k, step, out = fitted_curvature(path, v), 100000 * 1e-6, [np.array(ego, float)]
    for i in range(N):
        s = out[-1]
        asked, turn = command(s, path[i], i, v, k)
        accel = s[5] + step / (step + 0.2) * (asked - s[5])
        rate = step / (step + 0.05) * (step * turn) / step
        steering, speed = np.clip(s[7] + rate * step, -np.pi / 3, np.pi / 3), s[3] + accel * step
        yaw_rate = speed * np.tan(steering) / WHEEL_BASE
        x, y, heading = s[0] + s[3] * np.cos(s[2]) * step, s[1] + s[3] * np.sin(s[2]) * step, s[2] + s[3] * np.tan(s[7]) / WHEEL_BASE * step
        out.append(np.array([x, y, wrap_half_open(heading), speed, 0, accel, 0, steering, rate, yaw_rate, (yaw_rate - s[9]) / step]))
    return np.array(out)


# ---------------------------------------------------------------------------------------------------------------- boxes
def box_corners(x, y, h, front, rear, half_width):
    "Front left, rear left, rear right, front right: (..., 4, 2)."
    c, s = np.cos(h), np.sin(h)
    at = lambda along, left: np.stack([x + along * c - left * s, y + along * s + left * c], -1)
    return np.stack([at(front, half_width), at(-rear, half_width), at(-rear, -half_width), at(front, -half_width)], -2)


def ego_corners(states): return box_corners(states[..., 0], states[..., 1], states[..., 2], TO_FRONT, TO_REAR, HALF_WIDTH)


def ego_centers(states): return states[:, :2] + TO_CENTER * np.stack([np.cos(states[:, 2]), np.sin(states[:, 2])], -1)


def track_polygons(tracks):
    "Boxes as polygons (n, t); None where a track is absent."
    out = np.full(tracks.valid.shape, None, object)
    b = tracks.state[tracks.valid]
    if len(b): out[tracks.valid] = shapely.polygons(box_corners(b[:, 0], b[:, 1], b[:, 2], b[:, 3] / 2, b[:, 3] / 2, b[:, 4] / 2))
    return out


def bearing(state, point):
    "Angle between the heading and the way from the rear axle to a point."
    way = np.asarray(point) - state[:2]
    with np.errstate(invalid="ignore"): return np.arccos(np.clip(way @ [np.cos(state[2]), np.sin(state[2])] / np.linalg.norm(way), -1, 1))


# ---------------------------------------------------------------------------------------------------------------- comfort
def smooth(x, window, order, derivative=0): return np.round(savgol_filter(x, min(window, len(x)), order, deriv=derivative, delta=DT), 8)


def unwound(h): return np.concatenate([h[:1], h[1:] - 2 * np.pi * np.cumsum(np.round(np.diff(h) / (2 * np.pi)))])


def within(x, low, high): return bool(((x > low) & (x < high)).all())


def comfort(states, version):
    "Six flags: longitudinal, lateral acceleration, jerk, longitudinal jerk, yaw acceleration, yaw rate."
    ax, ay, h = states[:, 5], states[:, 6], unwound(states[:, 2])
    size = smooth(np.hypot(ax, ay), 8, 2)
    if version == "v1": lon, lat, along, window = smooth(ax, len(ax), 2), smooth(ay, len(ay), 2), smooth(ax, 8, 2), len(ax)
    else:
        lon, lat, window = smooth(ax + TO_CENTER * (states[:, 9] ** 2 + states[:, 10]), 8, 2), smooth(ay, 8, 2), 15
        along = lon
    jerk, along_jerk, yaw_accel, yaw_rate = smooth(size, window, 2, 1), smooth(along, window, 2, 1), smooth(h, 5, 3, 2), smooth(h, 5, 2, 1)
    return [within(lon, -4.05, 2.40), within(lat, -4.89, 4.89), within(jerk, -8.37, 8.37), within(along_jerk, -4.13, 4.13), within(yaw_accel, -1.93, 1.93),
            within(yaw_rate, -0.95, 0.95)]


def past_at_10_hz(times_us, past):
    at = [t for t in range(int(times_us[0]), int(times_us[-1]), 100_000)][:-1]
    t, q = (times_us - times_us[0]) * 1e-6, (np.array(at) - times_us[0]) * 1e-6
    out = np.zeros((len(at), 11))
    for c in (0, 1, 3, 4, 5, 6): out[:, c] = np.interp(q, t, past[:, c])
    out[:, 2] = wrap_half_open(np.interp(q, t, np.unwrap(past[:, 2])))
    return out


def extended(now, before, dt_s):
    "Do the drives of two frames agree?"
    shift = round(dt_s / DT)
    features = []
    for s in (now[:N + 1 - shift], before[shift:]):
        a, h = smooth(np.hypot(s[:, 5], s[:, 6]), 8, 2), unwound(s[:, 2])
        features.append([a, smooth(a, 15, 2, 1), smooth(h, 5, 2, 1), smooth(h, 5, 2, 2)])
    return float(all(np.sqrt(np.mean((a - b) ** 2)) <= limit for a, b, limit in zip(*features, (0.7, 0.5, 0.1, 0.1))))


# ---------------------------------------------------------------------------------------------------------------- the judge
class SlowScorer:
    "One version of the scorer for one scene."

    def __init__(self, cache, version):
        self.cache, self.version, self.v2 = cache, version, version == "v2"
        p, red = cache.polygons, cache.red_lights
        self.polygons = np.array([shapely.Polygon(p.ring(i)) for i in range(len(p))])
        shapely.prepare(self.polygons)
        self.tree, self.type, self.route = shapely.STRtree(self.polygons), p.type, p.on_route
        self.red = [(shapely.Polygon(red.ring(i)), red.active[:, i]) for i in range(red.active.shape[1])]
        self.line = shapely.LineString(cache.centerline[:, :2])
        self.tracks = cache.tracks_v2 if self.v2 else cache.tracks_v1
        self.boxes = track_polygons(self.tracks)
        self.reference = self.human = None

    def judged_tracks(self):
        "(static, stands, boxes) of each track that counts."
        ego = shapely.Polygon(ego_corners(self.cache.ego))
        for state, valid, kind, boxes in zip(self.tracks.state, self.tracks.valid, self.tracks.type, self.boxes):
            if not valid.any() or (self.v2 and valid[0] and ego.intersects(boxes[0])): continue
            yield kind in STATIC, np.hypot(*state[np.flatnonzero(valid)[0], 5:7]) <= 0.05, boxes

    def areas(self, states):
        "Across lanes, off the road, not on the route; centre and rear axle in an intersection: (41,) each."
        corners, center = ego_corners(states), ego_centers(states)
        touched, held, covered = np.zeros(N + 1, int), np.zeros(N + 1, bool), np.zeros((N + 1, 4), bool)
        route, center_crossing, axle_crossing = np.zeros((3, N + 1), bool)
        for i in self.tree.query(shapely.box(*corners.min((0, 1)), *corners.max((0, 1)))):
            p, kind = self.polygons[i], self.type[i]
            inside = shapely.contains_xy(p, corners[..., 0], corners[..., 1])
            if kind in DRIVABLE: covered |= inside
            if kind in LANES:
                touched += inside.any(1)
                held |= inside.all(1)
                if self.route[i]: route |= shapely.contains_xy(p, center[:, 0], center[:, 1])
            if kind == CROSSING:
                center_crossing |= shapely.contains_xy(p, center[:, 0], center[:, 1])
                axle_crossing |= shapely.contains_xy(p, states[:, 0], states[:, 1])
        return (touched > 1) & ~held, ~covered.all(1), ~route, center_crossing, axle_crossing

    def collisions(self, states, loose):
        "NC and the sample of the first collision that is the ego's fault."
        nc, at, corners = 1.0, np.inf, ego_corners(states)
        boxes, noses = shapely.polygons(corners), shapely.linestrings(corners[:, [0, 3]])
        for static, stands, track in self.judged_tracks():
            hit = np.flatnonzero(shapely.intersects(boxes, track[:N + 1]))
            if not len(hit): continue
            i = hit[0]
            if np.hypot(*states[i, 3:5]) <= 0.05: continue
            if not (static or stands):
                if bearing(states[i], shapely.get_coordinates(track[i].centroid)[0]) > np.deg2rad(150): continue
                if not noses[i].intersects(track[i]) and not loose[i]: continue
            nc, at = min(nc, 0.5 if static else 0.0), min(at, i)
        return nc, at

    def approaches(self, states, loose, axle_crossing):
        "TTC and the sample of the first infraction."
        n, offsets, at = (32 if self.v2 else 41), np.array([0, 3, 6, 9]), np.inf
        speed, corners = np.hypot(states[:n, 3], states[:n, 4]), ego_corners(states[:n])
        ahead = speed[:, None] * offsets * DT
        moved = np.stack([np.cos(states[:n, 2]), np.sin(states[:n, 2])], -1)[:, None] * ahead[..., None]
        boxes = shapely.polygons(corners[:, None] + moved[:, :, None])
        for _, _, track in self.judged_tracks():
            hit = shapely.intersects(boxes, track[np.arange(n)[:, None] + offsets]) & (speed >= 0.005)[:, None]
            if not hit.any(): continue
            i, f = divmod(int(hit.reshape(-1).argmax()), len(offsets))
            angle = bearing(states[i], shapely.get_coordinates(track[i + offsets[f]].centroid)[0])
            if angle < np.deg2rad(30) or ((loose[i] or axle_crossing[i]) and not angle > np.deg2rad(150)): at = min(at, i)
        return float(np.isinf(at)), at

    def metrics(self, states, history=True):
        "Everything that a drive (41, 11) earns by itself."
        across, off, oncoming, center_crossing, axle_crossing = self.areas(states)
        nc, nc_at = self.collisions(states, across | off)
        ttc, ttc_at = self.approaches(states, across | off, axle_crossing)
        center = ego_centers(states)
        step = np.concatenate([[0], np.linalg.norm(np.diff(center, axis=0), axis=1)]) * oncoming * (~center_crossing if self.v2 else 1)
        wrong_way = max(step[max(0, i - 10):i + 1].sum() for i in range(N + 1))
        points = shapely.points(center)
        with np.errstate(invalid="ignore"): along = shapely.line_locate_point(self.line, points[[0, N]])  # repeated points of the line
        flags = self.comfort(states, history)
        ddc = 1.0 if wrong_way < 2 else 0.5 if wrong_way < 6 else 0.0
        out = dict(nc=nc, dac=float(not off.any()), ddc=ddc, tlc=1.0, ttc=ttc, lk=1.0, comfort=float(all(flags)), comfort_flags=flags,
                   progress_m=max(0.0, along[1] - along[0]), collision=nc_at, ttc_at=ttc_at, areas=np.stack([across, off, oncoming], -1))
        if self.v2:
            boxes = shapely.polygons(ego_corners(states))
            out["tlc"] = float(not any((shapely.intersects(boxes, ring) & active).any() for ring, active in self.red))
            out["lk"] = self.keeps_lane(shapely.distance(self.line, points), center_crossing)
        out["product"] = out["nc"] * out["dac"] * (out["ddc"] * out["tlc"] if self.v2 else 1.0)
        return out

    def comfort(self, states, history):
        if not self.v2: return comfort(states, "v1")
        if not history or len(self.cache.past) < 2: return [True] * 6
        return comfort(np.concatenate([past_at_10_hz(self.cache.past_time_us, self.cache.past), states]), "v2")

    @staticmethod
    def keeps_lane(distance, crossing):
        away = 0
        for d, skip in zip(distance, crossing):
            if skip: continue
            away = away + 1 if d > 0.5 else 0
            if away == 20: return 0.0
        return 1.0

    def states_of(self, plan): return drive(self.cache.ego, path_of_plan(plan, self.cache.ego, self.cache.time_us))

    def prepare(self):
        "The reference's and the human's own results, once a scene."
        c, r = self.cache, self.cache.reference_v2 if self.v2 else self.cache.reference_v1
        if self.reference is None: self.reference = self.metrics(drive(c.ego, interpolated(r.time_us, r.states, clock(c.time_us, DT, N + 1))), history=False)
        if self.human is None and self.v2 and c.human is not None: self.human = self.metrics(self.states_of(c.human), history=False)

    def score(self, plan, previous_plan=None, human_filter=True):
        "Scores and sub-metrics of one plan (8, 3)."
        self.prepare()
        states = self.states_of(plan)
        m = self.metrics(states)
        r, raw, won = self.reference, m["progress_m"], m["product"]
        best = max(r["progress_m"] * r["product"], raw * won)
        out = m | {"states": states, "ec": None, "forgiven": ()}
        if not self.v2:
            out["ep"] = raw * won / best if best > 5 else float(won > 0)
            return out | {"score": won * (5 * out["ep"] + 5 * m["ttc"] + 2 * m["comfort"]) / 12}
        out |= {"ep": min(max(raw / best, 0.0), 1.0) if best > 5 else 1.0, "hc": m["comfort"]}
        if previous_plan is not None:
            c = self.cache
            before = drive(c.previous_ego, path_of_plan(previous_plan, c.previous_ego, c.previous_time_us))
            out["ec"] = extended(states, before, (c.time_us - c.previous_time_us) * 1e-6)
        out["unfiltered"], out["internal"] = self.epdms(out, out["ec"]), self.epdms(out, None)
        if human_filter and not self.cache.synthetic:
            out["forgiven"] = tuple(k for k in ("nc", "dac", "ddc", "tlc", "ttc", "lk") if self.human[k] == 0)
            for k in out["forgiven"]: out[k] = 1.0
        return out | {"score": self.epdms(out, out["ec"])}

    @staticmethod
    def epdms(m, ec):
        parts = 5 * m["ep"] + 5 * m["ttc"] + 2 * m["lk"] + 2 * m["hc"]
        return m["nc"] * m["dac"] * m["ddc"] * m["tlc"] * (parts / 14 if ec is None else (parts + 2 * ec) / 16)


# ---------------------------------------------------------------------------------------------------------------- random scenes
def arc(kappa, heading, start):
    "Where a road of constant curvature is: (s, left offset) -> x, y, heading; s = 0, d = 0 lies at `start`."
    def at(s, d):
        s, d = np.broadcast_arrays(np.asarray(s, float), np.asarray(d, float))
        h = heading + kappa * s
        along, left = (np.sin(kappa * s) / kappa, (1 - np.cos(kappa * s)) / kappa) if kappa else (s, 0 * s)
        c, n = np.cos(heading), np.sin(heading)
        return np.stack([start[0] + along * c - left * n - d * np.sin(h), start[1] + along * n + left * c + d * np.cos(h), h], -1)
    return at


def strip(road, s0, s1, d0, d1, points):
    s = np.linspace(s0, s1, points)
    return np.concatenate([road(s, d0)[:, :2], road(s, d1)[::-1, :2]])


def made_map(rng, road, extra, points):
    "16 polygons: a road of three lanes through a crossing; `extra` more: a car park, then strips anywhere within 100 m."
    rings, types, route, ids = [], [], [], []
    ribbon = lambda *a: strip(*a, points)
    def add(ring, kind, on_route=False):
        rings.append(ring), types.append(kind), route.append(on_route), ids.append(str(len(ids)))
    for s0, s1, kind in ((-60, 25, 0), (25, 50, 11), (50, 110, 0)):
        add(ribbon(road, s0, s1, -1.75, 1.75), kind, True)
        add(ribbon(road, s0, s1, 1.75, 5.25), kind, True)
        add(ribbon(road, s0, s1, 5.25, 8.75), kind)
        if kind == 0: add(ribbon(road, s0, s1, -2.4, 5.25), 17), add(ribbon(road, s0, s1, 5.25, 9.3), 17)
    add(ribbon(road, 25, 50, -9, 15), 1)
    side = road(37.5, 0.0)
    cross = arc(0.0, side[2] - np.pi / 2, side[:2])
    add(ribbon(cross, 9, 70, -3.5, 0), 0), add(ribbon(cross, 9, 70, -3.6, 3.6), 17)
    for i in range(extra):
        if i == 0: add(ribbon(road, -25, 5, -7.5, -2.4), 15)
        else:
            anywhere = arc(rng.uniform(-0.01, 0.01), rng.uniform(-np.pi, np.pi), rng.uniform(-100, 100, 2))
            add(ribbon(anywhere, 0, rng.uniform(30, 90), -1.75, 1.75), (0, 17, 11, 0)[i % 4], i % 3 == 0)
    return Polygons.of(rings, types, route, ids)


def made_track(rng, road, cross):
    "One of: same lane, beside, oncoming, crossing traffic, parked, pedestrian, bicycle, cone or barrier: (51, 7), type."
    t, kind = np.arange(51) * DT, rng.integers(8)
    if kind == 3: line, s, d, v, size, code = cross, rng.uniform(-40, 60), rng.uniform(-2.5, 1), rng.uniform(-9, 9), (4.6, 1.9), 0
    elif kind == 4: line, s, d, v, size, code = road, rng.uniform(-25, 60), rng.uniform(-4.5, -2.6), 0.0, (4.6, 1.9), 0
    elif kind == 5: line, s, d, v, size, code = cross, rng.uniform(-15, 15), rng.uniform(-14, 14), rng.uniform(-1.8, 1.8), (0.7, 0.7), 1
    elif kind == 6: line, s, d, v, size, code = road, rng.uniform(-15, 60), rng.uniform(-2.2, 0.5), rng.uniform(1.5, 6), (1.8, 0.6), 2
    elif kind == 7: line, s, d, v, size, code = road, rng.uniform(8, 60), rng.uniform(-3.5, 3), 0.0, (0.5, rng.uniform(0.4, 2.2)), int(rng.integers(3, 7))
    else:
        line, s, d, v = road, rng.uniform(-40, 70), (0, 3.5, 7)[kind] + rng.normal(0, 0.2), rng.uniform(2, 11) * (-1 if kind == 2 else 1)
        size, code = (rng.uniform(4, 9), rng.uniform(1.7, 2.5)), 0
    state = np.empty((51, 7))
    state[:, :3] = line(s + v * t, d)
    state[:, 5:] = v * np.stack([np.cos(state[:, 2]), np.sin(state[:, 2])], -1)
    state[:, 2] = wrap(state[:, 2] + (np.pi if v < 0 else 0) + rng.normal(0, 0.05))
    state[:, 3:5] = size
    return state, code


def made_tracks(rng, road, n):
    side = road(37.5, 0.0)
    cross = arc(0.0, side[2] - np.pi / 2, side[:2])
    state, valid, kinds = np.full((n, 51, 7), np.nan), np.ones((n, 51), bool), np.zeros(n, np.int8)
    for j in range(n):
        state[j], kinds[j] = made_track(rng, road, cross)
        luck = rng.random()
        if luck < 0.1: state[j] = state[j, rng.integers(51)]                                    # a ghost: seen once, frozen for good
        elif luck < 0.4: valid[j] = (np.arange(51) >= rng.integers(0, 20)) & (np.arange(51) <= rng.integers(20, 51))
        if kinds[j] > 2 and rng.random() < 0.5: state[j, :, 5:] = 0.0
    state[~valid] = np.nan
    cut = lambda t: Tracks(state[:, :t].copy(), valid[:, :t].copy(), kinds, tuple(f"track-{j}" for j in range(n)))
    return cut(51), cut(41)


def made_scene(rng, agents=6, extra_polygons=0, red_light=False, token="made", origin=(0.0, 0.0), kappa=None, speed=None, points=87):
    "A random scene on a curved road with a crossing 25 m ahead."
    heading, drawn, d0 = rng.uniform(-np.pi, np.pi), rng.uniform(3, 11), rng.normal(0, 0.25)
    speed = drawn if speed is None else speed
    moves = speed > 0
    kappa = rng.uniform(-0.012, 0.012) if kappa is None else kappa
    road = arc(kappa, heading, (d0 * np.sin(heading), -d0 * np.cos(heading)))
    s = speed * 0.5 * np.arange(-3, 1)
    past = np.zeros((4, 11))
    past[:, :3], past[:, 3], past[:, 5], past[:, 6] = road(s, d0), speed + moves * rng.normal(0, 0.1, 4), moves * rng.normal(0, 0.4, 4), speed**2 * kappa
    past[:, 2] = wrap(past[:, 2] + moves * rng.normal(0, 0.01, 4))
    past[:, :2] -= past[-1, :2]
    now_us = int(rng.integers(1_600_000_000_000_000, 1_700_000_000_000_000))
    line = road(np.linspace(-60, 110, 2 * points - 3), 0.0)
    ahead = road(speed * rng.uniform(0.85, 1.05) * DT * np.arange(51), np.linspace(d0, d0 * (1 - moves), 51))
    human = road(speed * 0.5 * np.arange(1, 9), d0 * np.exp(-moves * np.arange(1, 9) / 3)) - [0, 0, past[-1, 2]]
    c, n = np.cos(past[-1, 2]), np.sin(past[-1, 2])
    human[:, :2] = human[:, :2] @ np.array([[c, -n], [n, c]])
    v1, v2 = made_tracks(rng, road, agents)
    lights = RedLights.none()
    if red_light:
        rings = [strip(road, 25, 50, d - 1.75, d + 1.75, points) for d in (0.0, 3.5)]
        lights = RedLights.of(rings, np.arange(41)[:, None] < np.array([[rng.integers(15, 42), rng.integers(0, 42)]]))
    one = Reference(now_us + 100_000 * np.arange(51, dtype=np.int64), ahead)
    other = dataclasses.replace(one, states=road(speed * rng.uniform(0.85, 1.05) * DT * np.arange(51), np.linspace(d0, d0 * (1 - moves), 51)))
    return SceneCache(token, "made", now_us, np.array(origin, float), past[-1].copy(), now_us + 500_000 * np.arange(-3, 1, dtype=np.int64), past, v1, v2,
                      made_map(rng, road, extra_polygons, points), lights, line, one, other, human, now_us - 500_000, past[2].copy())


def made_plans(rng, cache, k):
    "Plans around the human's, slower, faster, aside, some standing; and the same agents' plans half a second earlier: (k, 8, 3) each."
    base = np.concatenate([np.zeros((1, 3)), cache.human, cache.human[-1:] + (cache.human[-1:] - cache.human[-2:-1]) * np.arange(1, 6)[:, None]])
    reach = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(base[:, :2], axis=0), axis=1))])
    both = []
    pace, aside, when = rng.uniform(0, 1.5, k) * (rng.random(k) > 0.1), rng.normal(0, 1.5, k), rng.uniform(0.3, 1, k)
    for wobble in (0.0, 0.01):
        plans = np.empty((k, 8, 3))
        for i in range(k):
            p, t = pace[i] + wobble * rng.normal(), np.arange(1, 9) / 8
            d = (aside[i] + wobble * rng.normal()) * np.minimum(t / when[i], 1.0) * (pace[i] > 0)
            s = max(p, 0.0) * reach[8] * t
            for c in range(3): plans[i, :, c] = np.interp(s, reach, base[:, c])
            plans[i, :, :2] += d[:, None] * np.stack([-np.sin(plans[i, :, 2]), np.cos(plans[i, :, 2])], -1)
        both.append(plans)
    return both[0], both[1]


def turned(cache, angle, origin):
    "The same scene after a rigid motion: rotated about the ego, then moved to another place in the world."
    c, s = np.cos(angle), np.sin(angle)
    r = np.array([[c, s], [-s, c]])
    xy = lambda a: np.concatenate([np.asarray(a)[..., :2] @ r, np.asarray(a)[..., 2:]], -1)
    def pose(a):
        a = xy(a)
        a[..., 2] = wrap(a[..., 2] + angle)
        return a
    def boxes(t):
        state = pose(t.state)
        state[..., 5:] = t.state[..., 5:] @ r
        return dataclasses.replace(t, state=state)
    path = lambda ref: dataclasses.replace(ref, states=pose(ref.states))
    rings = lambda p: dataclasses.replace(p, xy=xy(p.xy))
    return cache.replace(
        origin=np.array(origin, float), ego=pose(cache.ego), past=pose(cache.past), previous_ego=pose(cache.previous_ego), tracks_v1=boxes(cache.tracks_v1),
        tracks_v2=boxes(cache.tracks_v2), polygons=rings(cache.polygons), red_lights=rings(cache.red_lights), centerline=pose(cache.centerline),
        reference_v1=path(cache.reference_v1), reference_v2=path(cache.reference_v2))


# ---------------------------------------------------------------------------------------------------------------- frozen cases
FROZEN = {  # name: seed, which of its 40 plans, where in the world, options
    "red_far_curve": (30, (3, 15, 30), (664_000.0, 3_997_000.0), dict(agents=3, kappa=0.012, red_light=True)),
    "ghost_and_cones": (229, (2, 5, 37), (331_000.5, -4_690_000.25), dict(agents=6)),
    "standing": (7, (0,), (0.0, 0.0), dict(agents=6, speed=0.0, red_light=True)),
}


def rounded(x):
    "Every array to 1/1024, so that files stay small."
    if dataclasses.is_dataclass(x): return dataclasses.replace(x, **{f.name: rounded(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return np.round(x * 1024) / 1024 if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def frozen_inputs(name):
    "The scene, 40 plans and 40 earlier plans behind a frozen case."
    seed, _, origin, options = FROZEN[name]
    rng = np.random.default_rng(seed)
    cache = rounded(made_scene(rng, token=name, origin=origin, points=7, **options))
    return cache, *map(rounded, made_plans(rng, cache, 40))


def main():
    from pathlib import Path

    from vlarepro.scoring.pdm.oracle import freeze_scene
    from vlarepro.scoring.pdm.schema import OracleScene
    for name, (_, chosen, *_) in FROZEN.items():
        cache, plans, previous = frozen_inputs(name)
        folder = Path(__file__).parent / "pdm_cases"
        folder.mkdir(exist_ok=True)
        freeze_scene(folder / f"{name}.npz", OracleScene(cache, plans[list(chosen)], tuple(f"plan-{i}" for i in chosen), previous[list(chosen)], {}))


if __name__ == "__main__":
    main()
