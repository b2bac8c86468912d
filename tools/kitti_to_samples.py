"""Turn one KITTI raw drive (`image_02/*.jpg` and `oxts.npz`) into a nuScenes v1.0 data root with a front camera and a CAN bus.

    python tools/kitti_to_samples.py DRIVE_FOLDER OUT [--version v1.0-kitti] [--phases 1]

Keyframes are every fifth frame (2 Hz); with `--phases 5` five scenes start one frame apart (they overlap, so they are not independent).
CAM_FRONT is the left colour camera, loose files copied byte for byte; there are no other cameras, no boxes, no route and no map (the mask
is an empty placeholder). LIDAR_TOP rows carry the poses and have no file. Nominal values, because the source has no calibration: ego
frame = GPS/IMU unit; velodyne 0.81 m ahead and 0.80 m above it, camera 1.08 m ahead and 0.72 m above, IMU 0.93 m above ground; focal length
721.5 px and centre (609.6, 172.9) at 1242x375, scaled to the size of the images (KITTI's published set-up). The lateral acceleration is
speed x yaw rate. KITTI is CC BY-NC-SA 3.0: keep the output out of git.
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from nuscenes_tables import Tables, token
from PIL import Image
from pyquaternion import Quaternion

STEP = 5  # 10 Hz -> 2 Hz
LIDAR2EGO = ([0.81, 0.0, 1.73], list(Quaternion(axis=[0, 0, 1], radians=-np.pi / 2).q))    # x right, y forward, z up
CAMERA2EGO = ([1.08, 0.0, 1.65], [0.5, -0.5, 0.5, -0.5])                                   # x right, y down, z forward
INTRINSIC = np.array([[721.5, 0, 609.6], [0, 721.5, 172.9], [0, 0, 1]]), (375, 1242)
README = """# One KITTI raw drive as nuScenes v1.0 tables
KITTI data, CC BY-NC-SA 3.0 (non-commercial, share-alike). Attribution: Geiger, Lenz, Stiller, Urtasun, "Vision meets Robotics: The KITTI
Dataset", IJRR 2013. Made by tools/kitti_to_samples.py; see there for what is nominal and what is missing.
"""


def can_bus(o, us, rows, folder, name):
    "CAN messages in the layout of the nuScenes CAN bus expansion, every frame of the drive."
    w = np.radians(o["yaw_rate_deg"])
    pose = [{"utime": int(us[i]), "pos": [float(o["xy"][i, 0]), float(o["xy"][i, 1]), 0.0],
             "orientation": [float(np.cos(o["yaw"][i] / 2)), 0.0, 0.0, float(np.sin(o["yaw"][i] / 2))],
             "vel": [float(o["speed"][i]), 0.0, 0.0], "accel": [float(o["accel"][i]), float(o["speed"][i] * w[i]), 0.0],
             "rotation_rate": [0.0, 0.0, float(w[i])]} for i in rows]
    (folder / f"{name}_pose.json").write_text(json.dumps(pose), encoding="utf-8")


def scene_rows(t, o, us, images, rows, name, out):
    "All rows of one scene: keyframes with LIDAR_TOP and CAM_FRONT."
    log = t.log("kitti-2011-09-26-drive-0001", "karlsruhe", f"maps/{token('map', 'karlsruhe')}.png")
    tok = lambda i: token("kitti", name, int(i))
    scene = t.add("scene", token=token("scene", name), log_token=log, nbr_samples=len(rows), first_sample_token=tok(rows[0]),
                  last_sample_token=tok(rows[-1]), name=name, description="KITTI raw 2011_09_26_drive_0001")
    h, w = np.asarray(Image.open(images[0])).shape[:2]
    K, (h0, w0) = INTRINSIC
    K = np.diag([w / w0, h / h0, 1]) @ K
    for i in rows:
        sample = t.chain("sample", scene, token=tok(i), timestamp=int(us[i]), scene_token=scene)
        q = Quaternion(axis=[0, 0, 1], radians=float(o["yaw"][i])).q
        pose = t.pose_of(name, int(us[i]), [*o["xy"][i], 0.0], q)
        target = out / "samples" / "CAM_FRONT" / f"{name}-{images[i].name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images[i], target)
        for channel, modality, cal, size, f in (("LIDAR_TOP", "lidar", (*LIDAR2EGO, ()), (0, 0), f"samples/LIDAR_TOP/{name}-{i:06d}.pcd.bin"),
                                                ("CAM_FRONT", "camera", (*CAMERA2EGO, K), (h, w), str(target.relative_to(out)))):
            t.chain("sample_data", (scene, channel), token=token(channel, name, int(i)), sample_token=sample, ego_pose_token=pose,
                    calibrated_sensor_token=t.calibrated("kitti", channel, modality, *cal), timestamp=int(us[i]),
                    fileformat=f.rsplit(".", 1)[-1].replace("bin", "pcd"), is_key_frame=True, height=size[0], width=size[1], filename=f)


def convert(drive, out, version="v1.0-kitti", phases=1):
    "Write the data root and return its path."
    drive, out = Path(drive), Path(out)
    o = dict(np.load(drive / "oxts.npz"))
    images = sorted((drive / "image_02").glob("*.jpg"))
    n = len(o["timestamp"])
    if len(images) != n: raise SystemExit(f"{drive}: {len(images)} images but {n} rows of oxts.npz: the drive is incomplete")
    if not 1 <= phases <= STEP: raise SystemExit(f"--phases: expected 1 to {STEP}, got {phases}")
    us = np.round(o["timestamp"] * 1e6).astype(np.int64)
    (out / "can_bus").mkdir(parents=True, exist_ok=True)
    t, names = Tables(), []
    for phase in range(phases):
        names.append(f"scene-{phase + 1:04d}")
        scene_rows(t, o, us, images, np.arange(phase, n, STEP), names[-1], out)
        can_bus(o, us, range(n), out / "can_bus", names[-1])
    t.write(out, version, README, splits={"val": names})
    return out


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("drive"); p.add_argument("out"); p.add_argument("--version", default="v1.0-kitti")
    p.add_argument("--phases", type=int, default=1)
    a = p.parse_args()
    print(convert(a.drive, a.out, a.version, a.phases))
