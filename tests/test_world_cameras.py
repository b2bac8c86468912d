"""Cameras, ground raster and rasteriser: geometry against slow references, and determinism."""
import hashlib
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest

from vlarepro.world.cameras import CAMERAS, calibration, camera_rig, ground_grid, project
from vlarepro.world.ground import CLASS_ID, CLASSES, demo_scene, ground_raster
from vlarepro.world.raster import Rendered, clip_near, render_scene, stitch_sprite
from vlarepro.world.scene import Agent, Beacon, Prop
from vlarepro.world.shapes import Shapes, lamp_diameter_m, scene_shapes


@pytest.fixture(scope="module")
def scene():
    return demo_scene(8.0)


@pytest.fixture(scope="module")
def rendered(scene) -> Rendered:
    return render_scene(scene, keyframes=np.arange(0, 41, 5))


def bare(scene, **kwargs):
    "The same drive with an empty road and other contents."
    road = replace(scene.road, props=[], signals=[], stop_lines=[])
    return replace(scene, road=road, agents=[], signal_state=np.zeros((len(scene.t), 0), np.int8), **kwargs)


@pytest.mark.parametrize("size", [(128, 64), (256, 128)])
def test_devkit_projects_alike(size):
    from nuscenes.utils.data_classes import Box
    from nuscenes.utils.geometry_utils import view_points
    from pyquaternion import Quaternion

    for camera in camera_rig(size):
        record = calibration(camera)
        ahead = camera.translation + camera.rotation @ [1.0, 0.3, 15.0]
        box = Box(list(ahead), [1.9, 4.6, 1.6], Quaternion(axis=[0, 0, 1], radians=0.4))
        mine = project(box.corners().T, camera)[0]
        box.translate(-np.array(record["translation"]))
        box.rotate(Quaternion(record["rotation"]).inverse)
        theirs = view_points(box.corners(), np.array(record["camera_intrinsic"]), normalize=True)[:2].T
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_shapes_and_types(rendered):
    assert rendered.images.shape == (9, 3, 64, 128, 3) and rendered.images.dtype == np.uint8
    assert rendered.depth.dtype == np.float16 and rendered.labels.dtype == np.uint8 and rendered.instances.dtype == np.int16
    assert rendered.labels.max() < len(CLASSES)
    assert ((rendered.depth == 0) == (rendered.labels == CLASS_ID["sky"])).all()
    agents = np.isin(rendered.labels, [CLASS_ID[c] for c in ("vehicle", "pedestrian", "cyclist", "obstacle")])
    assert (agents == (rendered.instances >= 0)).all()
    seen = {CLASSES[c] for c in np.unique(rendered.labels)}
    assert seen >= {"sky", "road", "offroad", "mark", "crosswalk", "vehicle", "pedestrian", "cyclist", "obstacle", "building", "vegetation"}


def _slow_wall(camera, polygon):
    "Depth of a polygon by intersecting the ray of every pixel with its plane; inf outside."
    poly = (polygon - camera.translation) @ camera.rotation
    n = np.cross(poly[1] - poly[0], poly[2] - poly[0])
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    ray = np.stack([(u - camera.intrinsic[0, 2]) / camera.intrinsic[0, 0], (v - camera.intrinsic[1, 2]) / camera.intrinsic[1, 1], np.ones_like(u)], -1)
    z = (n @ poly[0]) / (ray @ n)
    hit = ray * z[..., None]
    inside = z > 0.3
    for p, q in zip(poly, np.roll(poly, -1, 0)):
        inside &= np.cross(q - p, hit - p) @ n > 0
    return np.where(inside, z, np.inf)


def test_depth_of_walls_equals_ray_casting(scene):
    "A long building beside the ego, partly behind the cameras: near-plane clipping and perspective depth."
    house = Prop("building", np.array([8.0, 9.0, 0.0]), np.array([30.0, 6.0, 8.0]), 0.1, np.array([120, 90, 80], np.uint8))
    s = bare(scene)
    s = replace(s, road=replace(s.road, props=[house]))
    r = render_scene(s, keyframes=np.array([0]))
    shapes: Shapes = scene_shapes(s)
    for c, camera in enumerate(CAMERAS):
        best = np.full((64, 128), np.inf)
        for n in np.flatnonzero(shapes.label >= 0):
            i = shapes.item[n]
            co, si = np.cos(shapes.yaw[i]), np.sin(shapes.yaw[i])
            poly = shapes.local[:, :4, n].T.astype(float) @ np.array([[co, si, 0], [-si, co, 0], [0, 0, 1]]) + shapes.xyz[i]
            best = np.minimum(best, _slow_wall(camera, poly))
        mine = r.labels[0, c] == CLASS_ID["building"]
        slow = np.isfinite(best)
        eroded = cv2.erode(slow.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        dilated = cv2.dilate(slow.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert mine[eroded].all() and not mine[~dilated].any()          # borders agree to a pixel
        both = mine & eroded
        ratio = r.depth[0, c][both].astype(float) / best[both]
        assert not both.any() or np.mean(np.abs(ratio - 1) < 0.01) > 0.97  # panels that touch may differ by one pixel at their seam
    assert (r.labels[0, 0] == CLASS_ID["building"]).mean() > 0.3 and (r.labels[0, 2] == CLASS_ID["building"]).sum() == 0


def test_vehicle_beside_and_behind(scene):
    "Boxes across the near plane neither vanish, nor explode over the image, nor raise."
    for x in np.linspace(-3, 6, 13):
        for y in (-2.2, 2.2, 3.5):
            track = np.tile([x, y, 0.0, 0.0], (201, 1))
            a = Agent(3, "vehicle.truck", np.array([8.0, 2.5, 3.2]), track, np.ones(201, bool), np.array([9, 9, 9], np.uint8), np.zeros(201, bool))
            r = render_scene(replace(bare(scene), agents=[a]), keyframes=np.array([0]))
            share = (r.instances[0] == 3).mean((1, 2))
            near_end = x + 4.0
            assert share[1] < 0.75 and share[2 if y > 0 else 0] < 0.35
            if near_end > 4: assert share[0 if y > 0 else 2] > 0.02


def test_occlusion_order(scene):
    def at(i, x):
        track = np.tile([x, 0.0, 0.0, 0.0], (201, 1))
        return Agent(i, "vehicle.car", np.array([4.6, 1.9, 1.6]), track, np.ones(201, bool), np.array([90, 90, 200], np.uint8), np.zeros(201, bool))
    for agents in ([at(1, 15), at(2, 30)], [at(2, 30), at(1, 15)]):
        r = render_scene(replace(bare(scene), agents=agents), keyframes=np.array([0]))
        u, v = (int(x) for x in project(np.array([12.8, 0, 0.8]), CAMERAS[1])[0])
        assert r.instances[0, 1, v, u] == 1


def test_brake_lights_change_pixels(scene):
    def at(braking):
        track = np.tile([42.0, 0.0, 0.0, 0.0], (201, 1))
        return Agent(1, "vehicle.car", np.array([4.6, 1.9, 1.6]), track, np.ones(201, bool), np.array([200, 200, 205], np.uint8), np.full(201, braking))
    on, off = (render_scene(replace(bare(scene), agents=[at(b)]), keyframes=np.array([0])).images[0, 1].astype(int) for b in (True, False))
    redder = (on[..., 0] - on[..., 1:].max(-1)) - (off[..., 0] - off[..., 1:].max(-1))
    assert redder.max() > 50 and (redder > 25).sum() >= 3


def test_indicator_is_amber_on_its_side(scene):
    "20 m ahead in the next lane: the lamp is several pixels, left or right of the car's middle."
    def shown(turning):
        track = np.tile([20.0, 3.5, 0.0, 8.0], (201, 1))
        on, grey = np.ones(201, bool), np.array([90, 90, 100], np.uint8)
        a = Agent(1, "vehicle.car", np.array([4.6, 1.9, 1.6]), track, on, grey, ~on, np.full(201, turning, np.int8))
        r = render_scene(replace(bare(scene), agents=[a]), keyframes=np.array([0]))
        return r.images[0, 1].astype(int), np.argwhere(r.instances[0, 1] == 1)[:, 1].mean()
    (off, middle), *on = (shown(x) for x in (0, 1, -1))
    for (image, _), left in zip(on, (True, False)):
        amber = np.argwhere((image[..., 0] - image[..., 2] > 90) & (np.abs(image - off).max(-1) > 40))
        assert len(amber) >= 5 and (amber[:, 1].mean() < middle) == left


def test_beacon_is_a_yellow_light_when_on(scene):
    for lit in (False, True):
        b = Beacon(np.array([40.0, 4.0, 2.7]), np.pi, np.full(201, lit))
        r = render_scene(replace(bare(scene), beacons=[b]), keyframes=np.array([0]))
        assert ((r.labels[0, 1] == CLASS_ID["signal_yellow"]).sum() >= 4) == lit


def test_signal_faces_only_its_traffic(scene):
    r = render_scene(scene, keyframes=np.array([2]))
    assert (r.labels[0, 1] == CLASS_ID["signal_red"]).sum() > 0
    turned = replace(scene, road=replace(scene.road, signals=[replace(scene.road.signals[0], heading_rad=0.0)]))
    r = render_scene(turned, keyframes=np.array([2]))
    assert not np.isin(r.labels, [CLASS_ID[f"signal_{c}"] for c in ("red", "yellow", "green")]).any()
    assert 91.4 * lamp_diameter_m(40.0) / 40 >= 3


def test_ground_labels_follow_the_pose(scene):
    "A pixel's class equals the class at its ground point, moved by a turned and shifted ego pose."
    s = bare(demo_scene(6.0, yaw_rate_radps=0.2))
    k = 6
    r, g = render_scene(s, keyframes=np.array([k])), ground_raster(s)
    x, y, yaw = s.ego[5 * k, :3]
    for c, camera in enumerate(CAMERAS):
        xy, depth = ground_grid(camera)
        use = depth < 40
        world = xy[use] @ np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]]) + [x, y]
        px = np.rint(world @ g.affine()[:, :2].T + g.affine()[:, 2]).astype(int)
        agree = g.labels[px[:, 1], px[:, 0]] == r.labels[0, c][use]
        assert agree.mean() > 0.99


def test_subset_and_repeat_are_bit_equal(scene, rendered):
    again = render_scene(scene, keyframes=np.array([35, 10]))
    for name in ("images", "depth", "labels", "instances"):
        assert (getattr(again, name) == getattr(rendered, name)[[7, 2]]).all()


def test_another_process_draws_the_same_bytes(scene, rendered):
    "No state of a process, and no number of threads, is in an image."
    code = ("import cv2, hashlib, numpy as np; cv2.setNumThreads(2)\n"
            "from vlarepro.world.ground import demo_scene; from vlarepro.world.raster import render_scene\n"
            "render_scene(demo_scene(3.0, seed=5), keyframes=np.array([1]))\n"
            "r = render_scene(demo_scene(8.0), keyframes=np.arange(0, 41, 5))\n"
            "print(hashlib.sha256(r.images.tobytes() + r.depth.tobytes() + r.labels.tobytes()).hexdigest())")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == hashlib.sha256(rendered.images.tobytes() + rendered.depth.tobytes() + rendered.labels.tobytes()).hexdigest()


def test_light_darkens_all_but_lamps(scene):
    dark = render_scene(replace(scene, light=0.5), keyframes=np.array([2])).images[0, 1]
    day = render_scene(scene, keyframes=np.array([2])).images[0, 1]
    assert dark.mean() < 0.7 * day.mean() and dark[..., 0].max() > 200


def test_clip_near_keeps_points_in_front():
    gen = np.random.default_rng(0)
    for _ in range(50):
        quad = gen.normal(0, 2, (4, 3))
        out = clip_near(quad)
        assert (out[:, 2] >= 0.3 - 1e-9).all() and (len(out) == 0) == (quad[:, 2] < 0.3).all()


def test_sprite_respects_depth(scene):
    r = render_scene(scene, keyframes=np.array([2]))
    far, body_far = stitch_sprite(r.images[0, 1], CAMERAS[1], (40.0, 0.0), depth=r.depth[0, 1])
    _, body_free = stitch_sprite(r.images[0, 1], CAMERAS[1], (40.0, 0.0))
    assert 0 < body_free.sum() and body_far.sum() < body_free.sum()     # the leader hides it
    assert far.shape == r.images[0, 1].shape


def test_refusals(scene):
    with pytest.raises(ValueError, match="width = 2"): camera_rig((100, 50))
    with pytest.raises(ValueError, match="0..40"): render_scene(scene, keyframes=np.array([50]))
    animal = replace(scene, agents=[replace(scene.agents[0], category="animal")])
    with pytest.raises(ValueError, match="no shape"): render_scene(animal, keyframes=np.array([0]))
    cloud = replace(scene, road=replace(scene.road, props=[replace(scene.road.props[0], kind="cloud")]))
    with pytest.raises(ValueError, match="prop of kind"): render_scene(cloud, keyframes=np.array([0]))
