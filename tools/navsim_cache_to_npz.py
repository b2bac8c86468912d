"""Turn an official NAVSIM metric cache into plain arrays that vlarepro reads.

    python navsim_cache_to_npz.py CACHE OUT [--tokens tokens.txt] [--limit N]

Run it in YOUR OWN navsim environment, once in the one of branch v1.1 with the v1.1 cache, once in the one of v2 (main) with the v2
cache; both may write to the same OUT. CACHE is the folder that `run_metric_caching.py` filled
(<log>/<scenario type>/<token>/metric_cache.pkl). Every scene becomes OUT/<token>.v1.npz or OUT/<token>.v2.npz, arrays and strings only.
Afterwards, in the environment of vlarepro:

    from vlarepro.scoring.pdm.official import load_official
    scenes = load_official("OUT")          # list of SceneCache, both versions of a token joined

A metric cache is a pickle: loading one runs the code it contains. Open only caches that you made yourself. This file needs numpy and
nothing of vlarepro; navsim and nuplan are imported by the pickle.
"""
import argparse
import lzma
import pickle
import sys
from pathlib import Path

import numpy as np

FORMAT = "vlarepro-navsim-1"
TYPES = ("vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object", "ego")
RED = "red_light"
SAMPLES = {"v1": 51, "v2": 41}


def pose(p) -> list:
    "x, y, heading of anything that has them."
    return [p.x, p.y, p.heading]


def state(s) -> np.ndarray:
    "The 11 numbers of an ego state, rear axle: pose, velocity, acceleration, steering angle and rate, yaw rate and acceleration."
    d = s.dynamic_car_state
    v, a = d.rear_axle_velocity_2d, d.rear_axle_acceleration_2d
    return np.array([*pose(s.rear_axle), v.x, v.y, a.x, a.y, s.tire_steering_angle, d.tire_steering_rate, d.angular_velocity, d.angular_acceleration], float)


def box(polygon) -> np.ndarray:
    "x, y, heading, length, width of a rectangle whose corners are front left, rear left, rear right, front right."
    fl, rl, rr, fr = np.asarray(polygon.exterior.coords, float)[:4]
    ahead = fl - rl
    return np.array([*(fl + rl + rr + fr) / 4, np.arctan2(ahead[1], ahead[0]), np.hypot(*ahead), np.hypot(*(fl - fr))])


def tracks(maps, objects, version) -> dict:
    "Boxes at 10 Hz from the occupancy maps; type and velocity are those of the first sighting, as the scorers use them."
    n = SAMPLES[version]
    if len(maps) < n: raise ValueError(f"observation: expected {n} occupancy maps for {version}, got {len(maps)}")
    ids = [t for t in objects if not t.startswith(RED)]
    row = {t: i for i, t in enumerate(ids)}
    out = np.full((len(ids), n, 7), np.nan)
    for k, m in enumerate(maps[:n]):
        for token, polygon in zip(m._tokens, m._geometries):
            if token.startswith(RED): continue
            if token not in row: raise ValueError(f"observation: track {token!r} of sample {k} is not among its unique objects")
            v = getattr(objects[token], "velocity", None)
            out[row[token], k] = [*box(polygon), *((v.x, v.y) if v is not None else (0.0, 0.0))]
    kinds = [objects[t].tracked_object_type for t in ids]
    for t, kind in zip(ids, kinds):
        if not 0 <= int(kind.value) < len(TYPES): raise ValueError(f"track {t!r}: type {kind!r} is none of {TYPES}")
    codes = np.array([int(k.value) for k in kinds], np.int8)
    return {"tracks.state": out, "tracks.valid": np.isfinite(out[..., 0]), "tracks.type": codes, "tracks.id": np.array(ids, str)}


def polygons(geometries) -> tuple:
    "Every ring of some polygons: (xy, start, owner, is_hole)."
    rings, owner, hole = [], [], []
    for i, g in enumerate(geometries):
        for part in getattr(g, "geoms", (g,)):
            for h, r in ((False, part.exterior), *((True, r) for r in part.interiors)):
                rings.append(np.asarray(r.coords, float)[:-1, :2])
                owner.append(i)
                hole.append(h)
    xy = np.concatenate(rings) if rings else np.zeros((0, 2))
    return xy, np.cumsum([0, *map(len, rings)]).astype(np.int64), np.array(owner, np.int64), np.array(hole, bool)


def red_lights(maps, version) -> dict:
    "Polygon of every red light and the samples at which it is in the occupancy map (v2; v1 caches hold none)."
    found = {}
    for k, m in enumerate(maps[:SAMPLES[version]]):
        for token, polygon in zip(m._tokens, m._geometries):
            if token.startswith(RED): found.setdefault(token, (polygon, []))[1].append(k)
    xy, start, owner, hole = polygons([p for p, _ in found.values()])
    active = np.zeros((SAMPLES[version], len(found)), bool)
    for j, (_, ks) in enumerate(found.values()): active[ks, j] = True
    return {"red.xy": xy, "red.start": start, "red.owner": owner, "red.hole": hole, "red.active": active}


def arrays(cache, token: str, log: str) -> dict:
    "All that vlarepro needs of one metric cache, as arrays and strings; world coordinates."
    version = "v2" if hasattr(cache, "past_human_trajectory") else "v1"
    maps, plan = cache.observation._occupancy_maps, cache.trajectory.get_sampled_trajectory()
    area, route = cache.drivable_area_map, set(cache.route_lane_ids)
    past = cache.past_human_trajectory.get_sampled_trajectory() if version == "v2" else []
    human = getattr(cache, "human_trajectory", None)
    xy, start, owner, hole = polygons(area._geometries)
    kinds = np.array([int(t) for t in area._map_types], np.int8)
    out = {"format": np.array(FORMAT), "version": np.array(version), "token": np.array(token), "log": np.array(log), "synthetic": np.array(len(token) == 17),
           "time_us": np.array(cache.ego_state.time_point.time_us, np.int64), "ego": state(cache.ego_state),
           "past_time_us": np.array([s.time_point.time_us for s in past], np.int64), "past": np.array([state(s) for s in past], float).reshape(-1, 11),
           "polygons.xy": xy, "polygons.start": start, "polygons.owner": owner, "polygons.hole": hole,
           "polygons.type": kinds, "polygons.id": np.array(area._tokens, str),
           "polygons.on_route": np.array([k in (0, 11) and t in route for t, k in zip(area._tokens, kinds)], bool),
           "centerline": np.array([pose(p) for p in cache.centerline.discrete_path], float),
           "reference.time_us": np.array([s.time_point.time_us for s in plan], np.int64),
           "reference.states": np.array([pose(s.rear_axle) for s in plan], float),
           **tracks(maps, cache.observation._unique_objects, version), **red_lights(maps, version)}
    if human is not None: out["human"] = np.asarray(human.poses, float)[:8]
    return out


def convert(path: Path, out: Path) -> Path:
    "One metric_cache.pkl to one npz."
    with lzma.open(path, "rb") as f: cache = pickle.load(f)
    token, log = path.parent.name, path.parents[2].name
    a = arrays(cache, token, log)
    target = out / f"{token}.{a['version']}.npz"
    part = target.with_suffix(".part")
    with open(part, "wb") as f: np.savez_compressed(f, **a)
    part.replace(target)
    return target


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("cache", type=Path, help="folder of metric caches")
    p.add_argument("out", type=Path, help="folder for the npz files")
    p.add_argument("--tokens", type=Path, help="file with one token a line; default: every scene")
    p.add_argument("--limit", type=int, help="convert so many at most")
    a = p.parse_args(argv)
    paths = sorted(a.cache.rglob("metric_cache.pkl"))
    if a.tokens: paths = [x for x in paths if x.parent.name in set(a.tokens.read_text().split())]
    if not paths:
        print(f"{a.cache}: no metric_cache.pkl below it" + (" with one of these tokens" if a.tokens else ""), file=sys.stderr)
        return 1
    a.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for path in paths[:a.limit]:
        try: print(convert(path, a.out))
        except Exception as e:  # one broken cache must not stop the rest
            failed += 1
            print(f"{path}: {type(e).__name__}: {e}", file=sys.stderr)
    print(f"{len(paths[:a.limit]) - failed} scenes written to {a.out}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
