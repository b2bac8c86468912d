"The converter of official metric caches, with stand-ins for navsim's objects built from the oracle, and the reading side."
import importlib.util
import lzma
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely

from vlarepro.core.paths import root
from vlarepro.scoring.pdm.official import join_versions, load_official, pair_frames
from vlarepro.scoring.pdm.scene import TYPES, straight_scene
from vlarepro.scoring.pdm.schema import load_oracle_scene
from vlarepro.scoring.pdm.score import navsim_v1_pdms, navsim_v2_epdms

spec = importlib.util.spec_from_file_location("navsim_cache_to_npz", root() / "tools" / "navsim_cache_to_npz.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@dataclass
class Thing:
    "A picklable object with any attributes."
    values: dict = field(default_factory=dict)

    def __getattr__(self, name):
        values = object.__getattribute__(self, "__dict__").get("values", {})
        if name in values: return values[name]
        raise AttributeError(name)


def thing(**values): return Thing(values)


class Plan:
    def __init__(self, states): self.states = states
    def get_sampled_trajectory(self): return self.states


def xyh(p): return thing(x=float(p[0]), y=float(p[1]), heading=float(p[2]))
def vec(x, y): return thing(x=float(x), y=float(y))


def ego_state(s, us):
    car = thing(rear_axle_velocity_2d=vec(*s[3:5]), rear_axle_acceleration_2d=vec(*s[5:7]), tire_steering_rate=s[8],
                angular_velocity=s[9], angular_acceleration=s[10])
    return thing(rear_axle=xyh(s), dynamic_car_state=car, tire_steering_angle=s[7], time_point=thing(time_us=int(us)))


def rectangle(b):
    "Corners in nuPlan's order: front left, rear left, rear right, front right."
    c, s = np.cos(b[2]), np.sin(b[2])
    local = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [b[3] / 2, b[4] / 2]
    return shapely.Polygon(local @ np.array([[c, s], [-s, c]]) + b[:2])


def official(path, version):
    "A metric cache of the oracle's scene, as far as the converter looks."
    with np.load(path, allow_pickle=False) as f: z = {k: f[k] for k in f.files}
    oracle = load_oracle_scene(path)
    c, origin = oracle.cache, oracle.cache.origin
    t, maps, objects = c.tracks(version), [], {}
    world = z[f"in_{version}_tracks"]
    for k in range(t.valid.shape[1]):
        ids = [i for n, i in enumerate(t.id) if t.valid[n, k]]
        shapes = [rectangle(world[n, k]) for n in range(len(t.id)) if t.valid[n, k]]
        for n, i in enumerate(t.id):
            if t.valid[n, k]: objects.setdefault(i, thing(tracked_object_type=thing(value=int(t.type[n])), velocity=vec(*world[n, k, 5:7])))
        if version == "v2":
            for r in range(c.red_lights.active.shape[1]):
                if c.red_lights.active[k, r]: ids, shapes = [*ids, f"red_light_{r}"], [*shapes, shapely.Polygon(c.red_lights.ring(r) + origin)]
        maps.append(thing(_tokens=ids, _geometries=shapes))
    p = c.polygons
    area = thing(_tokens=list(p.id), _geometries=[shapely.Polygon(p.ring(i) + origin) for i in range(len(p))], _map_types=[int(x) for x in p.type])
    plan = Plan([ego_state([*s, *np.zeros(8)], us) for s, us in zip(z[f"in_pdm_states_{version}"], z[f"in_pdm_time_us_{version}"])])
    values = dict(observation=thing(_occupancy_maps=maps, _unique_objects=objects), trajectory=plan, drivable_area_map=area,
                  ego_state=ego_state(z["in_ego_state"], z["in_time_us"]), route_lane_ids=[i for i, on in zip(p.id, p.on_route) if on],
                  centerline=thing(discrete_path=[xyh(x) for x in z["in_centerline"]]))
    if version == "v2":
        past = Plan([ego_state(s, us) for s, us in zip(z["in_past_states"], z["in_past_time_us"])])
        values |= dict(past_human_trajectory=past, human_trajectory=thing(poses=z["in_human"]))
    return thing(**values), oracle


@pytest.fixture(scope="module")
def some(shared_folder): return [p for i, p in enumerate(sorted((shared_folder / "navsim" / "oracle").glob("*.npz"))) if i % 4 == 1]


def test_converted_scenes_score_as_the_oracle(some, tmp_path):
    tokens = []
    for i, path in enumerate(some):
        token = f"{i:016x}"
        tokens.append(token)
        for version in ("v1", "v2"):
            folder = tmp_path / version / "log" / "unknown" / token
            folder.mkdir(parents=True)
            cache, _ = official(path, version)
            with lzma.open(folder / "metric_cache.pkl", "wb", preset=0) as f: pickle.dump(cache, f)
    for version in ("v1", "v2"): assert tool.main([str(tmp_path / version), str(tmp_path / "out")]) == 0
    scenes = load_official(tmp_path / "out")
    assert [c.token for c in scenes] == tokens and all(c.log == "log" and not c.synthetic for c in scenes)
    for path, c in zip(some, scenes):
        oracle = load_oracle_scene(path)
        np.testing.assert_allclose(c.ego, oracle.cache.ego, atol=1e-8)
        np.testing.assert_array_equal(c.red_lights.active, oracle.cache.red_lights.active)
        columns = {navsim_v1_pdms: ("nc", "dac", "ttc", "comfort", "ep", "score"),
                   navsim_v2_epdms: ("nc", "dac", "ddc", "tlc", "ttc", "lk", "hc", "ep", "score")}
        for score, names in columns.items():
            got, want = score(c, oracle.candidates), score(oracle.cache, oracle.candidates)
            for n in names: np.testing.assert_allclose(getattr(got, n), getattr(want, n), atol=1e-6, err_msg=f"{path.stem} {score.__name__} {n}")


def test_one_version_alone(some):
    cache, oracle = official(some[0], "v1")
    c = join_versions(tool.arrays(cache, "0" * 16, "log"), None)
    navsim_v1_pdms(c, oracle.candidates)
    with pytest.raises(ValueError, match="reference_v2 is missing"): navsim_v2_epdms(c, oracle.candidates)
    assert c.human is None and len(c.past) == 0 and tool.arrays(cache, "0" * 17, "log")["synthetic"]


def test_versions_that_disagree(some):
    a, b = (tool.arrays(official(some[0], v)[0], "t", "log") for v in ("v1", "v2"))
    b["ego"] = b["ego"] + 1e-3
    with pytest.raises(ValueError, match="scene t: ego: the v1 and v2 files disagree by 0.001"): join_versions(a, b)


def test_boxes_and_states():
    b = np.array([10.0, -4, 2.5, 4.6, 1.9])
    np.testing.assert_allclose(tool.box(rectangle(b)), b)
    s = np.arange(1.0, 12)
    np.testing.assert_array_equal(tool.state(ego_state(s, 0)), s)


def test_polygons_with_holes_and_parts():
    yard = shapely.box(0, 0, 10, 10).difference(shapely.box(4, 4, 6, 6))
    xy, start, owner, hole = tool.polygons([yard, shapely.MultiPolygon([shapely.box(20, 0, 21, 1), shapely.box(30, 0, 31, 1)])])
    assert owner.tolist() == [0, 0, 1, 1] and hole.tolist() == [False, True, False, False] and len(xy) == start[-1] == 16
    assert tool.polygons([])[1].tolist() == [0]


def test_a_ghost_and_static_things():
    cone, kind = rectangle([5, 5, 0, 0.4, 0.4]), thing(value=TYPES.index("traffic_cone"))
    maps = [thing(_tokens=["c"], _geometries=[cone])] * 41
    t = tool.tracks(maps, {"c": thing(tracked_object_type=kind)}, "v2")
    assert t["tracks.valid"].all() and (t["tracks.state"][..., 5:] == 0).all() and t["tracks.type"].tolist() == [3]
    none = tool.tracks([thing(_tokens=[], _geometries=[])] * 41, {}, "v2")
    assert none["tracks.state"].shape == (0, 41, 7)


def test_bad_caches_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="expected 51 occupancy maps for v1, got 41"): tool.tracks([thing(_tokens=[], _geometries=[])] * 41, {}, "v1")
    with pytest.raises(ValueError, match="track 'x' of sample 0"): tool.tracks([thing(_tokens=["x"], _geometries=[rectangle([0, 0, 0, 1, 1])])] * 41, {}, "v2")
    odd = {"x": thing(tracked_object_type=SimpleNamespace(value=11))}
    with pytest.raises(ValueError, match="track 'x': type"): tool.tracks([thing(_tokens=[], _geometries=[])] * 41, odd, "v2")
    assert tool.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "no metric_cache.pkl" in capsys.readouterr().err
    bad = tmp_path / "log" / "unknown" / "0123456789abcdef"
    bad.mkdir(parents=True)
    (bad / "metric_cache.pkl").write_bytes(b"not lzma")
    assert tool.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "1 failed" in capsys.readouterr().out


def test_pairs_are_neighbours_of_one_log():
    at = lambda token, s, log="a", **k: straight_scene(token=token).replace(time_us=int(s * 1e6), log=log, reference_v1=None, reference_v2=None, **k)
    scenes = pair_frames([at("2", 1.5), at("0", 0), at("1", 1.0), at("x", 1.2, log="b"), at("3", 2.1), at("s", 1.9, synthetic=True)])
    assert {c.token: c.previous_time_us for c in scenes} == {"2": 1_000_000, "0": None, "1": None, "x": None, "3": None, "s": None}


def test_no_import_of_navsim():
    "The converter itself needs numpy alone, and the library never needs navsim."
    text = Path(tool.__file__).read_text()
    assert "import vlarepro" not in text and "import navsim" not in text and "import nuplan" not in text
