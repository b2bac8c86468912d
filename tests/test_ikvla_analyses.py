"The analyses of IK-VLA: projection against golden cases, GradCAM on real pixels, exact identities, paired noise."
import gzip
import json

import cv2
import numpy as np
import pytest
import torch

from vlarepro.core.seeds import rng, torch_rng
from vlarepro.data.nuscenes import rotations
from vlarepro.evaluation.alignment import alignment, alignment_scores, alignment_table, average_precision
from vlarepro.evaluation.beneficial import beneficial_groups, beneficial_table, characteristics
from vlarepro.evaluation.corruption import corrupt, corruption_curve, needed_quality
from vlarepro.evaluation.gradcam import pixel_maps, planning_loss, saliency, token_cam
from vlarepro.evaluation.nsp_quality import correlation_table, nsp_quality, plan_l2, quartile_table
from vlarepro.evaluation.object_mask import box_corners, box_outlines, object_mask, rectangle, road_users, to_image
from vlarepro.evaluation.stitching import PLACEMENTS, endpoint_changes, paired_control, place_sprite, stitching_table
from vlarepro.evaluation.variance_floor import Moments, variance_floor
from vlarepro.methods.ikvla.arms import build_head
from vlarepro.methods.ikvla.ik_network import ik_plan
from vlarepro.methods.ikvla.model import CompactTokenizer, DrivingLLM
from vlarepro.methods.ikvla.tasks import DriveData, cache_states, current_features, synthetic_drives
from vlarepro.methods.ikvla.visual_state import StateShape
from vlarepro.models.features import encode_images
from vlarepro.models.visual_encoder import EncoderConfig, VisualEncoder
from vlarepro.world.cameras import camera_rig

SHAPE = StateShape(n_tokens=24, feature_width=8, cameras=3, merge=2, horizons=(1, 2, 3, 4, 5, 6), width=32)
TOK = CompactTokenizer()


def tiny(sees=True): return DrivingLLM(SHAPE, TOK, "tiny", sees).requires_grad_(False)


def pose(translation, quaternion):
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotations(quaternion), translation
    return out


def test_box_projection_equals_the_golden_cases(shared_folder):
    "Centres to 0.01 px and 1 mm; rectangles as near as yaw-only boxes allow (median 1.7 px, IoU median 0.95)."
    with gzip.open(shared_folder / "golden/box_projection/projected.json.gz") as f: golden = json.load(f)
    with gzip.open(shared_folder / "data/nuscenes_mini_val_keyframes/keyframes.json.gz") as f: frames = {k["token"]: k for k in json.load(f)}
    uvd, cam, off, iou, missed, boxes = [], [], [], [], 0, 0
    for g in golden[::3]:
        k = frames[g["token"]]
        b, lidar = k["boxes"], pose(k["ego2global_translation"], k["ego2global_rotation_wxyz"]) @ pose(k["lidar2ego_translation"], k["lidar2ego_rotation_wxyz"])
        xyz = np.array(b["center_xyz"])
        corners = box_corners(xyz, np.array(b["size_wlh"])[:, [1, 0, 2]], np.array(b["yaw"]))
        for name, want in g["cams"].items():
            c = k["cams"][name]
            sensor = pose(c["ego2global_translation"], c["ego2global_rotation_wxyz"]) @ pose(c["sensor2ego_translation"], c["sensor2ego_rotation_wxyz"])
            view, K, rows = np.linalg.inv(sensor) @ lidar, np.array(c["intrinsic"]), [w["box_index"] for w in want]
            if not rows: continue
            uvd.append(np.abs(to_image(xyz[rows], K, view) - [w["center_uvd"] for w in want]))
            cam.append(np.abs(xyz[rows] @ view[:3, :3].T + view[:3, 3] - [w["center_cam_xyz"] for w in want]))
            for outline, w in zip(box_outlines(corners[rows], xyz[rows], K, view, (1600, 900)), want):
                boxes += 1
                if outline is None: missed += 1; continue
                a, (x, y, ww, hh) = rectangle(outline), w["bbox_xywh"]
                t = np.array([x, y, x + ww, y + hh])
                side = np.clip(np.minimum(a[2:], t[2:]) - np.maximum(a[:2], t[:2]), 0, None).prod()
                off.append(np.abs(a - t).max()); iou.append(side / ((a[2:] - a[:2]).prod() + ww * hh - side))
    assert boxes > 1000 and missed <= boxes // 100
    assert np.concatenate(uvd).max() < 0.01 and np.concatenate(cam).max() < 1e-3
    assert np.median(off) < 2.0 and np.quantile(off, 0.99) < 25 and np.median(iou) > 0.94 and np.quantile(iou, 0.01) > 0.75


def test_the_whole_path_on_the_real_keyframe(shared_folder):
    "Real pixels through encoder, language model, GradCAM and masks of the real boxes."
    folder = shared_folder / "data/nuscenes_scene0061_keyframe0"
    info = json.loads((folder / "info.json").read_text())
    names, s = {v: k for k, v in info["metainfo"]["categories"].items()}, info["sample"]
    box = np.array([i["bbox_3d"] for i in s["instances"]])
    corners, images, masks, worst = box_corners(box[:, :3], box[:, 3:6], box[:, 6]), [], [], []
    vehicles = {"car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle"}
    full = [names.get(i["bbox_label"], "unlabelled") for i in s["instances"]]
    full = ["vehicle." + n if n in vehicles else "human.pedestrian.adult" if n == "pedestrian" else n for n in full]
    keep = road_users(full, np.array([i["num_lidar_pts"] for i in s["instances"]]))
    assert 0 < keep.sum() < len(keep)
    for cam in ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"):
        c = s["images"][cam]
        K, view = np.array(c["cam2img"]), np.array(c["lidar2cam"])
        outlines = box_outlines(corners, box[:, :3], K, view, (1600, 900))
        ours = np.array([rectangle(o) for o in outlines if o is not None])
        for w in s["cam_instances"][cam]: worst.append(np.abs(ours - w["bbox"]).max(1).min())
        masks.append(cv2.resize(object_mask(outlines, keep, (1600, 900)).astype(np.uint8), (64, 32), interpolation=cv2.INTER_AREA) > 0)
        images.append(cv2.resize(cv2.cvtColor(cv2.imread(str(folder / c["img_path"])), cv2.COLOR_BGR2RGB), (64, 32), interpolation=cv2.INTER_AREA))
    assert len(worst) > 20 and np.median(worst) < 3
    frames = np.stack([np.stack(images)] * 2)[None]
    encoder = VisualEncoder(EncoderConfig((32, 64), 3, (8, 8, 8, 16, 16), (1, 2), 8, 16)).eval()
    features = encode_images(encoder, frames, np.ones((1, 3), bool)).numpy()
    shape = StateShape(6, 8, 3, 1, (1, 2, 3, 4, 5, 6), 32)
    d = synthetic_drives(1).take(np.arange(1))
    data = DriveData(**{**d.__dict__, "features": features, "keyframe": np.zeros(1, int), "next_keyframe": np.zeros((1, 6), int)})
    cam = saliency(DrivingLLM(shape, TOK, "tiny"), build_head("ik", shape, 16, 2, 20), TOK, data)
    maps = pixel_maps(cam, (1, 2), 1, (32, 64))
    scores, rows = alignment_scores({"ikvla": maps[:, 1]}, masks[1][None])
    assert rows.tolist() == [0] and set(scores) == {"ikvla", "uniform", "centre"} and 0 < scores["uniform"]["PM"][0] < 1


@pytest.mark.parametrize("kind", ["ik", "pool", "flat", "hidden", "text"])
def test_gradcam_is_the_gradient_of_the_loss(kind):
    "The map's gradient predicts how the loss changes when a visual token is nudged; other samples do not matter; checkpoints stay untouched."
    torch.manual_seed(0)
    model, data = tiny(), synthetic_drives(2, tokens=24)
    head = None if kind == "text" else build_head(kind, SHAPE, 16, 2, 20)
    if head is not None: head.fit(torch.as_tensor(data.future[..., :2], dtype=torch.float32))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a, b = saliency(model, head, TOK, data), saliency(model, head, TOK, data, batch=1)
    assert a.shape == (len(data), 3, 4) and a.max() <= 1 and a.min() >= 0 and a.max() > 0
    assert np.allclose(a, b, atol=2e-3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.llm.model.layers[0]._forward_pre_hooks
    rows, kept = np.arange(1), {}
    def watch(m, args, kw):
        x = (args[0] if args else kw["hidden_states"])
        if "push" in kept: x = x + kept["push"]
        else: x = x.detach().requires_grad_(); kept["x"] = x
        return ((x, *args[1:]), kw) if args else (args, {**kw, "hidden_states": x})
    handle = model.llm.model.layers[0].register_forward_pre_hook(watch, with_kwargs=True)
    current = model.projector(current_features(data, rows))
    loss = planning_loss(model, head, TOK, data, rows, current)
    g = torch.autograd.grad(loss, kept["x"])[0]
    push = 1e-2 * g / g.norm()
    kept["push"] = push
    up = planning_loss(model, head, TOK, data, rows, current)
    kept["push"] = -push
    down = planning_loss(model, head, TOK, data, rows, current)
    handle.remove()
    assert float((up - down).detach()) == pytest.approx(2 * float((g * push).sum()), rel=0.05)


def test_gradcam_refuses_what_has_no_map():
    with pytest.raises(ValueError, match="blind"): saliency(tiny(False), build_head("ik", SHAPE, 16, 2, 20), TOK, synthetic_drives(1, tokens=24))
    with pytest.raises(TypeError, match="no planning loss"): saliency(tiny(), build_head("direct", SHAPE, 16, 2, 20), TOK, synthetic_drives(1, tokens=24))
    with pytest.raises(ValueError, match="token_grid"): pixel_maps(np.zeros((1, 3, 4)), (2, 3), 2, (32, 64))
    assert token_cam(torch.ones(1, 1, 4, 3), torch.zeros(1, 1, 4, 3)).sum() == 0


def test_alignment_against_brute_force():
    g = rng("alignment-test")
    for _ in range(20):
        x, y = g.integers(0, 5, 60) / 4, g.random(60) < 0.3
        if not y.any(): continue
        levels, ap, old = np.unique(x)[::-1], 0.0, 0.0
        for t in levels:
            recall = y[x >= t].sum() / y.sum()
            ap, old = ap + (recall - old) * y[x >= t].mean(), recall
        assert average_precision(x, y) == pytest.approx(ap)
        s = alignment(x.reshape(6, 10), y.reshape(6, 10))
        perm = g.permutation(60)
        assert alignment(x[perm].reshape(6, 10), y[perm].reshape(6, 10)) == pytest.approx(s), "pixel order must not matter, ties included"
        assert alignment(7 * x.reshape(6, 10), y.reshape(6, 10)) == pytest.approx(s), "scale must not matter"
        assert s["F1_20"] == pytest.approx(2 * s["IoU20"] / (1 + s["IoU20"]))
    masks = g.random((8, 6, 10)) < 0.2
    masks[3] = False
    scores, rows = alignment_scores({"a": g.random((8, 6, 10))}, masks)
    assert rows.tolist() == [0, 1, 2, 4, 5, 6, 7]
    table = alignment_table(scores, np.arange(7) // 2, rng("t"))
    assert len(table) == 12 and all(r["low"] <= r["value"] + 1e-9 and r["value"] <= r["high"] + 1e-9 for r in table)


def test_variance_floor_is_exact_in_any_chunks():
    g = rng("floor-test")
    x, k = (100 + g.normal(size=(301, 4, 3))).astype(np.float32), g.integers(0, 4, 301)
    a, b = variance_floor(x, k, chunk=7), variance_floor(x, k, chunk=1000)
    assert a["marginal"] == pytest.approx(x.astype(float).var(0).mean()) and a["within"] == pytest.approx(b["within"])
    assert a["within"] == pytest.approx(sum(x[k == j].astype(float).var(0).mean() * (k == j).sum() for j in range(4)) / 301)
    assert a["between"] >= 0 and sum(a["count"].values()) == 301
    with pytest.raises(ValueError, match="two samples"): _ = Moments().variance


def test_beneficial_groups_and_table():
    delta = np.array([0., 1, 2, 3, 4, 5, 6, 7])
    top, bottom = beneficial_groups(delta)
    assert np.flatnonzero(top).tolist() == [6, 7] and np.flatnonzero(bottom).tolist() == [0, 1]
    c = characteristics(5, -0.2, [[10, 1], [3, 9]], ["a", "b"], [[2, 1], [3, 4]], ["a", "b"], 0.0)
    assert c["front_objects"] == 1 and c["turnover"] == 1 and c["yaw_rate_radps"] == 0.2
    empty = characteristics(5, 0.0, np.zeros((0, 2)), [], np.zeros((0, 2)), [], 0.0)
    assert empty["front_objects"] == 0 and np.isnan(empty["front_distance_m"]) and np.isnan(empty["turnover"])
    g = rng("beneficial-test")
    v = g.normal(size=200)
    v[:5] = np.nan
    row = beneficial_table({"x": v}, np.nan_to_num(v) + 0.1 * g.normal(size=200), np.arange(200) // 10, rng("b"), draws=100)[0]
    assert row["stars"] == "***" and row["low"] > 0 and row["n_next"] + row["n_current"] <= 100


def test_nsp_quality_and_corruption_with_a_real_network():
    model, data = tiny(), synthetic_drives(6, tokens=24)
    states = cache_states(model, data, TOK, true=True)
    quality = nsp_quality(states["predicted"], states["true"])
    ik = build_head("ik", SHAPE, 16, 2, 20).fit(torch.as_tensor(data.future[..., :2], dtype=torch.float32))
    plan = lambda c, f: ik_plan(ik, c, f, 2, torch_rng("plan"), steps=4).numpy()
    l2 = plan_l2(plan(states["current"].float(), states["predicted"].float())[:, 0], data.future)
    rows = correlation_table(quality, l2, data.scene, rng("c"), draws=20)
    assert len(rows) == 8 and all(abs(r["spearman"]) <= 1 and r["low"] <= r["high"] for r in rows)
    q = quartile_table(quality["mse"], l2)
    assert sum(r["n"] for r in q) == len(data) and np.all(np.diff([r["mse"] for r in q]) >= 0)
    for kind in ("noise", "other", "current", "predicted"):
        curve = corruption_curve(plan, states["current"], states["true"], data.future[..., :2], [0, 0.5, 1], kind, states["predicted"])
        assert curve[0]["mse"] == 0 and curve[2]["mse"] > curve[1]["mse"] > 0 and np.isfinite(curve[2]["ade"]).all()
    assert torch.equal(corrupt(states["true"], 1, "predicted", predicted=states["predicted"]), states["predicted"].float())
    line = [{"mse": m, "ade": np.array([a])} for m, a in ((0, 0.5), (1, 1.0), (2, 2.0))]
    assert needed_quality(line, 1.5) == pytest.approx(1.5) and needed_quality(line, 9) is None
    with pytest.raises(ValueError, match="nothing to spoil"): needed_quality(line, 0.4)


def test_stitching_is_paired_end_to_end():
    "Images through encoder, language model and sampler: the same noise before and after, and a blind model's change is exactly zero."
    torch.manual_seed(0)
    n, size = 4, (64, 32)
    camera, images = camera_rig(size)[1], rng("stitch-test").integers(60, 200, (4, 2, 3, 32, 64, 3)).astype(np.uint8)
    encoder = VisualEncoder(EncoderConfig((32, 64), 3, (8, 8, 8, 16, 16), (1, 2), 8, 16)).eval()
    shape, drives = StateShape(6, 8, 3, 1, (1, 2, 3, 4, 5, 6), 32), synthetic_drives(2).take(np.arange(n))
    head = build_head("ik", shape, 16, 2, 20).fit(torch.as_tensor(drives.future[..., :2], dtype=torch.float32))
    def planner(sees):
        model = DrivingLLM(shape, TOK, "tiny", sees)
        def plan(x):
            f = encode_images(encoder, x, np.ones((n, 3), bool)).numpy()
            d = DriveData(**{**drives.__dict__, "features": f, "keyframe": np.arange(n), "next_keyframe": np.zeros((n, 6), int)})
            s = cache_states(model, d, TOK)
            current = s["current"] if sees else torch.zeros_like(s["current"])
            return ik_plan(head, current.float(), s["predicted"].float(), 3, torch_rng("paired"), steps=4).numpy()
        return plan
    placements = {k: PLACEMENTS[k] for k in ("Near", "Far", "SkyFar")}
    seen, blind = (endpoint_changes(planner(s), images, camera, 1, np.full(n, 5.0), placements) for s in (True, False))
    assert all((v == 0).all() for v in blind.values()) and all((v != 0).any() for v in seen.values())
    change = {k: v[None] for k, v in seen.items()}
    assert len(stitching_table(change, drives.scene, rng("s"))) == 3 and 0 <= paired_control(change, drives.scene, rng("p"))["larger_pct"] <= 100
    with pytest.raises(KeyError, match="SkyFar"): paired_control({"Far": change["Far"]}, drives.scene, rng("p"))


@pytest.mark.parametrize("size", [(128, 64), (256, 128)])
def test_sprites_stand_where_they_should(size):
    camera = camera_rig(size)[1]
    image = np.full((size[1], size[0], 3), 120, np.uint8)
    made = {k: place_sprite(image, camera, p) for k, p in PLACEMENTS.items()}
    rows = {k: np.flatnonzero(b.any(1)) for k, (_, b) in made.items()}
    horizon = camera.intrinsic[1, 2]
    assert rows["Near"][-1] > rows["Far"][-1] > rows["VeryFar"][-1] >= horizon - 1
    assert rows["Sky"][-1] < horizon and rows["SkyFar"][-1] < horizon and rows["Sky"][0] >= 0
    assert made["Far"][1].sum() == made["SkyFar"][1].sum() and (image == 120).all()
