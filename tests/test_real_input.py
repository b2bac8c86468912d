"""The adapters in tools/ and the readers on real samples of the shared folder; skipped when it is absent."""
import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from vlarepro.core.paths import root, shared
from vlarepro.data.nuscenes import NuScenesReader
from vlarepro.data.planner import build
from vlarepro.data.sample import collate
from vlarepro.data.table import build_table


def need(*parts):
    base = shared()
    if base is None: pytest.skip("shared folder not found: set VLAREPRO_SHARED")
    path = base.joinpath(*parts)
    if not path.exists(): pytest.skip(f"shared folder lacks {'/'.join(parts)}")
    return path


def convert(script, *args):
    subprocess.run([sys.executable, str(root() / "tools" / script), *map(str, args)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini") / "nuscenes"
    convert("nuscenes_keyframes_to_tables.py", need("data", "nuscenes_mini_val_keyframes", "keyframes.json.gz"), out)
    return out


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    out = tmp_path_factory.mktemp("kitti") / "root"
    convert("kitti_to_samples.py", need("data", "kitti_raw_2011_09_26_drive_0001"), out)
    return out


def test_devkit_loads_the_tables(mini, kitti):
    from nuscenes import NuScenes
    n = NuScenes("v1.0-mini", str(mini), verbose=False)
    assert (len(n.scene), len(n.sample), len(n.sample_annotation)) == (2, 81, 4514)
    assert len(NuScenes("v1.0-kitti", str(kitti), verbose=False).sample) == 22


def test_futures_and_boxes_equal_golden(mini):
    z = np.load(need("golden", "planning_openloop", "nuscenes_mini_cases.npz"))
    reader = NuScenesReader(mini, "v1.0-mini", split="mini_val")
    for i, token in enumerate(map(str, z["token"])):
        s = reader.sample(token, images=False)
        m = z["mask"][i].astype(bool)
        np.testing.assert_array_equal(s.future_valid, m)
        theirs = np.stack([z["gt"][i][:, 1], -z["gt"][i][:, 0]], -1)          # lidar axes (x right, y forward) to ours
        np.testing.assert_allclose(s.future[m, :2], theirs[m], atol=1e-3)
        for k in np.flatnonzero(m):
            g, b = z["boxes"][i, k], s.boxes[k + 1]
            g, b = g[~np.isnan(g[:, 0])], b[~np.isnan(b[:, 0])]
            turned = np.column_stack([g[:, 1], -g[:, 0], g[:, 2:4], g[:, 4] - np.pi / 2, g[:, 5]])
            d = b - turned
            d[:, 4] = (d[:, 4] + np.pi) % (2 * np.pi) - np.pi
            assert np.abs(d).max() < 1e-3


def test_box_projection_equals_golden(mini):
    with gzip.open(need("golden", "box_projection", "projected.json.gz"), "rt") as f: frames = json.load(f)
    reader = NuScenesReader(mini, "v1.0-mini")
    n = 0
    for k in frames:
        xyz = reader.boxes3d(k["token"])["xyz"]
        for channel, boxes in k["cams"].items():
            K, T = reader.camera(k["token"], channel)
            i = [b["box_index"] for b in boxes]
            c = xyz[i] @ T[:3, :3].T + T[:3, 3]
            uv = (c @ K.T)[:, :2] / c[:, 2:]
            np.testing.assert_allclose(c, np.reshape([b["center_cam_xyz"] for b in boxes], (-1, 3)), atol=1e-3)
            np.testing.assert_allclose(uv, np.reshape([b["center_uvd"][:2] for b in boxes], (-1, 2)), atol=0.01)
            n += len(i)
    assert n > 3000


def test_mini_table_and_rules(mini):
    reader = NuScenesReader(mini, "v1.0-mini")
    table = build_table(reader)
    assert len(table) == 61 and set(table["split"]) == {"mini_val"} and set(table["ego_source"]) == {"finite_differences"}
    assert not table["ego_valid"][:, 5].any() and set(table["command"]) == {0}
    plan = build("cv_yaw").plan(table.batch(np.arange(len(table))))[:, 0, :, :2].numpy()
    ade = np.linalg.norm(plan - table["future"][..., :2], axis=-1).mean(1)
    np.testing.assert_allclose(ade, table["cv_gap"], atol=1e-4)
    assert 1.0 < ade.mean() < 2.5
    everything = build_table(reader, complete=False)
    assert len(everything) == 81 and (everything["next_keyframe"][~everything["future_valid"]] == -1).all()


def test_rear_axle_and_lidar_paths_agree(mini):
    lidar, axle = NuScenesReader(mini, "v1.0-mini"), NuScenesReader(mini, "v1.0-mini", point="rear_axle")
    for token in lidar.anchors[::7]:
        a, b = lidar.sample(token, images=False), axle.sample(token, images=False)
        moved = a.future[:, :2] + a.point_x_m * (1 - np.cos(a.future[:, 2:])) * [1, 0] - a.point_x_m * np.sin(a.future[:, 2:]) * [0, 1]
        np.testing.assert_allclose(moved, b.future[:, :2], atol=0.25)         # the lidar, 1.84 m up, also moves as the car pitches


def test_pixels_are_missing_and_said_to_be(mini):
    reader = NuScenesReader(mini, "v1.0-mini")
    with pytest.raises(FileNotFoundError, match="CAM_FRONT_LEFT.*sample"): reader.sample(reader.tokens[0])


def test_kitti_samples(kitti):
    reader = NuScenesReader(kitti, "v1.0-kitti", split="val", image_size=(64, 128))
    assert len(reader.tokens) == 22 and len(reader.anchors) == 12
    batch = collate([reader.sample(t) for t in reader.anchors])
    assert batch.images.shape == (12, 1, 3, 3, 64, 128)
    assert batch.image_valid[:, 0].tolist() == [[False, True, False]] * 12 and not batch.images[:, :, [0, 2]].any()
    assert batch.images[:, :, 1].float().std() > 20 and batch.command.tolist() == [0] * 12
    assert reader.sample(reader.anchors[0]).ego_source == "can_bus" and not batch.ego_valid[:, 5].any()


def test_kitti_displacement_matches_speed(kitti):
    reader = NuScenesReader(kitti, "v1.0-kitti", point="rear_axle")
    samples = [reader.sample(t, images=False) for t in reader.tokens]
    speed = np.array([s.ego[0] for s in samples])
    step = np.array([np.linalg.norm(s.future[0, :2]) for s in samples[:-1]])
    dt = np.diff([s.timestamp_us for s in samples]) / 1e6
    np.testing.assert_allclose(step / dt, (speed[:-1] + speed[1:]) / 2, atol=0.25)
    differences = NuScenesReader(kitti, "v1.0-kitti", point="rear_axle", ego_status="finite_differences")
    v = np.array([differences.sample(t, images=False).ego[0] for t in reader.tokens[2:]])
    np.testing.assert_allclose(v, speed[2:], atol=0.5)


def test_adapter_refuses_to_overwrite(mini):
    script = root() / "tools" / "nuscenes_keyframes_to_tables.py"
    source = need("data", "nuscenes_mini_val_keyframes", "keyframes.json.gz")
    done = subprocess.run([sys.executable, str(script), str(source), str(mini)], capture_output=True, text=True)
    assert done.returncode != 0 and "exists already" in done.stderr
