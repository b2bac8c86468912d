"""minidrive as nuScenes v1.0: nuscenes-devkit loads, renders and projects it; worlds are deterministic and verifiable."""
import json
import shutil
import zipfile
from importlib import import_module

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from pyquaternion import Quaternion

from vlarepro.world.generate import WorldSize, clear_dead, generate, plan_scenes, verify
from vlarepro.world.nuscenes_writer import VERSION
from vlarepro.world.scenarios import make_scene
from vlarepro.world.unpack import summary, unpack

SIZE = WorldSize(2, 1, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "tiny"
    generate(out, SIZE, seed=0, workers=1)
    return out


@pytest.fixture(scope="module")
def nusc(root):
    unpack(root)
    return NuScenes(VERSION, str(root), verbose=False)


@pytest.fixture(scope="module")
def scenes():
    return {j.name: make_scene(j.seed, j.name, j.split, j.map) for j in plan_scenes(SIZE, 0)}


def offset(root, name):
    return np.array(json.loads((root / VERSION / "minidrive.json").read_text())["scenes"][name]["offset_m"])


def samples(nusc, scene_name):
    scene = next(s for s in nusc.scene if s["name"] == scene_name)
    token = scene["first_sample_token"]
    while token:
        sample = nusc.get("sample", token)
        yield sample
        token = sample["next"]


def test_tables_are_complete_and_linked(nusc):
    assert len(nusc.scene) == 3 and len(nusc.sample) == 3 * 41 and len(nusc.sample_data) == 3 * 41 * 4
    for scene in nusc.scene:
        chain = list(samples(nusc, scene["name"]))
        assert len(chain) == scene["nbr_samples"] == 41 and chain[-1]["token"] == scene["last_sample_token"]
        assert np.all(np.diff([s["timestamp"] for s in chain]) == 500_000)
        assert all(set(s["data"]) == {"CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "LIDAR_TOP"} for s in chain)
        assert nusc.get("log", scene["log_token"])["map_token"]
    assert all(len(r["token"]) == 32 for t in nusc.table_names if t != "visibility" for r in getattr(nusc, t))
    for inst in nusc.instance:
        ann, n = nusc.get("sample_annotation", inst["first_annotation_token"]), 1
        while ann["next"]:
            nxt = nusc.get("sample_annotation", ann["next"])
            assert nxt["prev"] == ann["token"] and nxt["instance_token"] == inst["token"]
            gap = nusc.get("sample", nxt["sample_token"])["timestamp"] - nusc.get("sample", ann["sample_token"])["timestamp"]
            assert gap >= 500_000
            ann, n = nxt, n + 1
        assert n == inst["nbr_annotations"] and ann["token"] == inst["last_annotation_token"]


def test_poses_and_velocities_are_the_scenes(nusc, root, scenes):
    for name, scene in scenes.items():
        shift = offset(root, name)
        agents = {a.id: a for a in scene.agents}
        checked = 0
        for k, sample in enumerate(samples(nusc, name)):
            lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            pose = nusc.get("ego_pose", lidar["ego_pose_token"])
            assert pose["timestamp"] == lidar["timestamp"] == sample["timestamp"]
            x, y, yaw = scene.ego[5 * k, :3]
            assert np.allclose(pose["translation"], [x + shift[0], y + shift[1], 0], atol=1e-4)
            assert abs((Quaternion(pose["rotation"]).yaw_pitch_roll[0] - yaw + np.pi) % (2 * np.pi) - np.pi) < 1e-5
            if not 0 < k < 40: continue
            for token in sample["anns"]:
                ann = nusc.get("sample_annotation", token)
                centre = np.array(ann["translation"][:2]) - shift
                a = min(agents.values(), key=lambda a: np.hypot(*(a.track[5 * k, :2] - centre)))
                assert np.allclose(a.track[5 * k, :2], centre, atol=1e-3)
                assert ann["size"] == pytest.approx(a.size_lwh[[1, 0, 2]], abs=1e-4)
                if ann["prev"] and ann["next"] and a.valid[5 * k - 5:5 * k + 6].all():
                    want = (a.track[5 * k + 5, :2] - a.track[5 * k - 5, :2]) / 1.0
                    assert np.allclose(nusc.box_velocity(token)[:2], want, atol=1e-3)
                    checked += 1
        assert checked > 20


def test_lidar_frame_and_points(nusc):
    sample = nusc.sample[5]
    sd = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    cs = nusc.get("calibrated_sensor", sd["calibrated_sensor_token"])
    assert cs["translation"] == [0.943713, 0.0, 1.84023]
    R = Quaternion(cs["rotation"]).rotation_matrix
    assert np.allclose(R @ [1, 0, 0], [0, -1, 0], atol=1e-5) and np.allclose(R @ [0, 1, 0], [1, 0, 0], atol=1e-5)
    cloud = LidarPointCloud.from_file(nusc.get_sample_data_path(sd["token"]))
    assert 20 < cloud.points.shape[1] <= 200
    below = cloud.points[2] < -1.6  # road points lie on the ground
    assert below.sum() > 10 and np.mean(np.abs(cloud.points[2, below] + 1.84023) < .02) > .7
    for channel in ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"):
        points, depth, image = nusc.explorer.map_pointcloud_to_image(sd["token"], sample["data"][channel])
        assert image.size == (128, 64) and points.shape[1] > 5 and depth.min() > 0


def test_devkit_boxes_match_rendered_instances(nusc, scenes):
    """Boxes that the devkit projects lie where the renderer painted the agents."""
    from nuscenes.utils.geometry_utils import view_points

    from vlarepro.world.raster import render_scene

    name, scene = next(iter(scenes.items()))
    inst = render_scene(scene).instances
    hits, total = 0, 0
    for k, sample in enumerate(samples(nusc, name)):
        _, boxes, K = nusc.get_sample_data(sample["data"]["CAM_FRONT"])
        ids = inst[k, 1]
        for box in boxes:
            p = view_points(box.center[:, None], K, normalize=True)[:2, 0].astype(int)
            if not (4 < p[0] < 123 and 4 < p[1] < 59) or box.center[2] > 25: continue
            total += 1
            hits += (ids[p[1] - 2:p[1] + 3, p[0] - 2:p[0] + 3] >= 0).any()
    assert total > 5 and hits / total > .8, (hits, total)


def test_rendering(nusc):
    sample = nusc.sample[45]
    for channel in ("CAM_FRONT", "LIDAR_TOP"):
        nusc.render_sample_data(sample["data"][channel], verbose=False)
    nusc.render_sample(sample["token"], verbose=False)
    nusc.render_pointcloud_in_image(sample["token"], dot_size=4, verbose=False)
    nusc.render_annotation(sample["anns"][0])
    plt.close("all")


def test_can_bus(nusc, root, scenes):
    can = NuScenesCanBus(str(root))
    for name, scene in scenes.items():
        pose = can.get_messages(name, "pose")
        assert len(pose) == 201 and pose[0]["utime"] == next(samples(nusc, name))["timestamp"]
        assert np.allclose([m["vel"][0] for m in pose], scene.ego[:, 3], atol=1e-3)
        assert np.allclose([m["rotation_rate"][2] for m in pose], scene.ego[:, 5], atol=1e-3)
        for message in ("ms_imu", "steeranglefeedback", "vehicle_monitor"): assert can.get_messages(name, message)
        assert set(can.get_messages(name, "meta")) == {"pose", "ms_imu", "steeranglefeedback", "vehicle_monitor"}
        route, path = can.get_pose_and_route(name)
        assert route.shape[1] == path.shape[1] == 2
        gap = np.hypot(*(path[:, None] - route[None]).transpose(2, 0, 1)).min(1)
        assert gap.max() < 5  # the devkit's own bound for an aligned route
        command = json.loads((root / "can_bus" / f"{name}_command.json").read_text())
        assert [c["command"] for c in command] == scene.command[::5].tolist()


def test_map_expansion(nusc, root):
    for scene in nusc.scene:
        location = nusc.get("log", scene["log_token"])["location"]
        m = NuScenesMap(str(root), location)
        outside = 0
        for sample in samples(nusc, scene["name"]):
            x, y, _ = nusc.get("ego_pose", nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["ego_pose_token"])["translation"]
            assert 57 < x < m.canvas_edge[0] - 57 and 57 < y < m.canvas_edge[1] - 57
            outside += not m.layers_on_point(x, y, ["drivable_area"])["drivable_area"]
            assert nusc.get("map", nusc.get("log", scene["log_token"])["map_token"])["mask"].is_on_mask(x, y).all()
            lane = m.get_closest_lane(x, y, radius=3)
            line = np.array(m.discretize_lanes([lane], .5)[lane])
            assert np.hypot(*(line[:, :2] - [x, y]).T).min() < 4
            m.get_outgoing_lane_ids(lane)
        assert outside == 0
        masks = m.get_map_mask((x, y, 60, 60), 0, ["drivable_area", "lane", "ped_crossing"], (60, 60))
        assert masks[0].mean() > .03 and masks[1].any()
        # no polygon layers: descartes, which the devkit draws them with, fails on shapely 2
        m.render_map_patch((x - 50, y - 50, x + 50, y + 50), ["road_divider", "lane_divider", "traffic_light"], figsize=(3, 3))
        m.render_map_mask((x, y, 60, 60), 0, ["drivable_area", "lane"], (60, 60), figsize=(3, 2))
        plt.close("all")
        near = m.get_records_in_radius(x, y, 80, ["lane", "stop_line", "traffic_light"])
        assert near["lane"]


def test_one_worker_or_two_give_the_same_bytes(root, tmp_path):
    again = tmp_path / "again"
    card = generate(again, SIZE, seed=0, workers=2)
    assert card == json.loads((root / VERSION / "minidrive.json").read_text())
    names = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file() and not {"samples", "sensor_blobs"} & set(p.parts))
    for n in names: assert (again / n).read_bytes() == (root / n).read_bytes(), n
    assert not list(tmp_path.glob(".*"))
    other = generate(tmp_path / "other", WorldSize(1, 0, 0), seed=1, workers=1)
    same = generate(tmp_path / "same", WorldSize(1, 0, 0), seed=0, workers=1)
    assert other["hash"] != same["hash"] != card["hash"]


def test_verify_names_the_first_difference(root, tmp_path):
    w = tmp_path / "w"
    shutil.copytree(root, w, ignore=shutil.ignore_patterns("samples"))
    assert verify(w)["ok"]
    p = w / "can_bus" / "scene-2002_pose.json"
    p.write_text(p.read_text().replace('"pos":[', '"pos":[9', 1))
    r = verify(w)
    assert not r["ok"] and r["first"] == "can_bus/scene-2002_pose.json" and r["made_on"] == r["here"]
    shutil.copy(root / "can_bus" / "scene-2002_pose.json", p)
    z = w / "blobs" / "samples-000.zip"
    raw = bytearray(z.read_bytes())
    raw[len(raw) // 3] ^= 255
    z.write_bytes(raw)
    assert verify(w)["first"].startswith("blobs/samples-000.zip")
    assert verify(root, reference=root)["ok"]


def test_a_failed_run_leaves_no_world(tmp_path, monkeypatch):
    "What is ready stays in a hidden folder, and only there; the next run goes on with it."
    g = import_module("vlarepro.world.generate")   # `import … as` would give the function of that name

    def full(*a, **k): raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(g, "write_zip", full)
        with pytest.raises(OSError, match="No space left"): generate(tmp_path / "w", WorldSize(1, 0, 0), workers=1)
    assert [p.name for p in tmp_path.iterdir()] == [".w.parts"] and not (tmp_path / ".w.parts" / "LOCK").exists()
    (tmp_path / ".w.parts" / "LOCK").write_text("1")                       # held by a process that is alive
    with pytest.raises((RuntimeError, PermissionError)): generate(tmp_path / "w", WorldSize(1, 0, 0), workers=1)
    (tmp_path / ".w.parts" / "LOCK").write_text("999999999")               # by one that is gone
    (tmp_path / ".w.parts" / "shard-000").mkdir()
    (tmp_path / ".w.parts" / "plan.json").write_text("{}")                 # shards of something else are not used
    generate(tmp_path / "w", WorldSize(1, 0, 0), workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    dead = tmp_path / ".w.killed"
    dead.mkdir()
    (dead / "GENERATING").write_text("999999999")
    assert clear_dead(tmp_path / "w") == 1 and not dead.exists()
    with pytest.raises(FileNotFoundError, match="no finished minidrive world"): summary(tmp_path)
    with pytest.raises(KeyError, match="did you mean 'smoke'"): generate(tmp_path / "w", "smok")


def test_language_and_splits(nusc, root):
    captions = json.loads((root / "language" / "captions.json").read_text())
    qa = json.loads((root / "language" / "qa.json").read_text())["questions"]
    coc = json.loads((root / "language" / "coc.json").read_text())
    tokens = {s["token"] for s in nusc.sample}
    assert set(captions) == set(coc) == tokens and {q["sample_token"] for q in qa} == tokens
    assert {q["template_type"] for q in qa} == {"exist", "count", "object", "status", "comparison"} and {q["num_hop"] for q in qa} == {0, 1}
    yes = np.mean([q["answer"] == "yes" for q in qa if q["template_type"] == "exist"])
    assert .3 < yes < .75
    splits = json.loads((root / VERSION / "splits.json").read_text())
    assert [len(splits[k]) for k in ("train", "dev", "val")] == [1, 1, 1]
    with zipfile.ZipFile(root / "blobs" / "labels-000.zip") as z, z.open("labels/scene-2001.npz") as f:
        d = np.load(f)
        assert d["seg"].shape == d["depth"].shape == (41, 3, 16, 32)
