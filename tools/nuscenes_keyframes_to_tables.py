"""Turn `keyframes.json.gz` (annotated nuScenes keyframes without pixels) into a nuScenes v1.0 data root without pixels.

    python tools/nuscenes_keyframes_to_tables.py KEYFRAMES.json.gz OUT [--version v1.0-mini]

Sample and camera sample_data tokens stay the real ones, so that predictions keyed by them apply. What the source lacks is not
invented: every annotation is its own instance (no tracks), there is no visibility class, no CAN bus, no image, and the map mask is
an empty placeholder that the devkit needs to load. Detection classes become the plainest full category (car -> vehicle.car,
pedestrian -> human.pedestrian.adult). The output inherits the licence of the input (nuScenes: CC BY-NC-SA 4.0): keep it out of git.
"""
import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from nuscenes_tables import Tables, token
from pyquaternion import Quaternion

CATEGORY = {"car": "vehicle.car", "truck": "vehicle.truck", "bus": "vehicle.bus.rigid", "trailer": "vehicle.trailer",
            "construction_vehicle": "vehicle.construction", "motorcycle": "vehicle.motorcycle", "bicycle": "vehicle.bicycle",
            "pedestrian": "human.pedestrian.adult", "traffic_cone": "movable_object.trafficcone", "barrier": "movable_object.barrier"}
LOCATION = {"scene-0103": "boston-seaport", "scene-0916": "singapore-queenstown"}
README = """# nuScenes v1.0 tables without pixels
nuScenes data, CC BY-NC-SA 4.0 (non-commercial, attribution, share-alike) plus the nuScenes terms of use. Attribution: "nuScenes: A
multimodal dataset for autonomous driving", Caesar et al., CVPR 2020, Motional. Made by tools/nuscenes_keyframes_to_tables.py; see there
for what is missing.
"""


def annotations(t, key, boxes, sample, lidar2global):
    "Annotation rows of one keyframe, from the lidar frame to the world."
    centre, rotation = lidar2global
    for i, (xyz, wlh, yaw, name) in enumerate(zip(boxes["center_xyz"], boxes["size_wlh"], boxes["yaw"], boxes["name"])):
        full = CATEGORY.get(name, name)
        cat = t.add("category", token=token("category", full), name=full, description="")
        ann, inst = token("ann", sample, i), token("instance", sample, i)
        t.add("instance", token=inst, category_token=cat, nbr_annotations=1, first_annotation_token=ann, last_annotation_token=ann)
        q = rotation * Quaternion(axis=[0, 0, 1], radians=yaw)
        t.add("sample_annotation", token=ann, sample_token=sample, instance_token=inst, visibility_token="", attribute_tokens=[],
              translation=list(centre + rotation.rotate(np.array(xyz))), size=list(wlh), rotation=list(q.q), prev="", next="",
              num_lidar_pts=int(boxes["num_lidar_pts"][i]), num_radar_pts=int(boxes["num_radar_pts"][i]))


def keyframe(t, k, log, scene):
    "All rows of one keyframe."
    sample = t.chain("sample", scene, token=k["token"], timestamp=k["timestamp_us"], scene_token=scene)

    def data(channel, modality, tok, us, name, sensor2ego, ego2global, intrinsic=(), size=(0, 0)):
        pose = t.pose_of(f"{k['scene']} {channel}", us, *ego2global)
        cal = t.calibrated(k["log"], channel, modality, *sensor2ego, intrinsic)
        t.chain("sample_data", (scene, channel), token=tok, sample_token=sample, ego_pose_token=pose, calibrated_sensor_token=cal,
                timestamp=us, fileformat=name.rsplit(".", 1)[-1].replace("bin", "pcd"), is_key_frame=True, height=size[0], width=size[1],
                filename=f"samples/{channel}/{name}")

    pair = lambda d, what: (d[f"{what}_translation"], d[f"{what}_rotation_wxyz"])
    data("LIDAR_TOP", "lidar", token("lidar", k["token"]), k["timestamp_us"], k["lidar_file"], pair(k, "lidar2ego"), pair(k, "ego2global"))
    for channel, c in k["cams"].items():
        data(channel, "camera", c["sample_data_token"], c["timestamp_us"], c["file"], pair(c, "sensor2ego"), pair(c, "ego2global"),
             c["intrinsic"], (900, 1600))
    ego, lid = Quaternion(k["ego2global_rotation_wxyz"]), Quaternion(k["lidar2ego_rotation_wxyz"])
    centre = np.array(k["ego2global_translation"]) + ego.rotate(np.array(k["lidar2ego_translation"]))
    annotations(t, k, k["boxes"], sample, (centre, ego * lid))


def convert(source, out, version="v1.0-mini"):
    "Write the data root and return its path."
    with gzip.open(source, "rt", encoding="utf-8") as f: frames = json.load(f)
    t = Tables()
    for name in dict.fromkeys(k["scene"] for k in frames):
        ks = sorted((k for k in frames if k["scene"] == name), key=lambda k: k["timestamp_us"])
        if name not in LOCATION: raise SystemExit(f"{name}: its map location is not known to this script: add it to LOCATION")
        log = t.log(ks[0]["log"], LOCATION[name], f"maps/{token('map', LOCATION[name])}.png")
        scene = t.add("scene", token=token("scene", name), log_token=log, nbr_samples=len(ks), first_sample_token=ks[0]["token"],
                      last_sample_token=ks[-1]["token"], name=name, description="")
        for k in ks: keyframe(t, k, log, scene)
    t.write(out, version, README)
    return Path(out)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source"); p.add_argument("out"); p.add_argument("--version", default="v1.0-mini")
    a = p.parse_args()
    print(convert(a.source, a.out, a.version))
