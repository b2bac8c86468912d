"The two teachers: geometry against the camera model, no look into the future, equal roads to the same features, resuming, damaged files."
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlarepro.core.params import load_config, strict
from vlarepro.core.seeds import rng
from vlarepro.data.keyframes import Keyframes
from vlarepro.models.dynamics_teacher import DynamicsConfig, DynamicsTeacher
from vlarepro.models.geometry_teacher import GeometryConfig, GeometryTeacher, depth_from_code, inv_log, ray_tables, signed_log
from vlarepro.models.teacher_training import (
    Fit,
    _overlap,
    coded_features,
    expected_features,
    fit_network,
    geometry_scores,
    make_teachers,
    teacher_inputs,
    train_dynamics,
    train_geometry,
    whole,
)
from vlarepro.models.teachers import (
    Teacher,
    TeacherFeatures,
    load_teacher,
    load_teacher_features,
    save_teacher,
    seen_features,
    teacher_hash,
    write_teacher_features,
)
from vlarepro.world.cameras import camera_rig, project
from vlarepro.world.files import decode_depth

CLASSES = ("sky", "road", "vehicle", "pedestrian", "cyclist", "obstacle")
FIT = dict(steps=10, batch=8, lr=4e-3, weight_decay=0.01, warmup=2, save_every=4)
SHAPE = dict(image_hw=(32, 64), views=3, channels=(8, 8, 8, 16), width=8, heads=2, paint_width=16)
CONFIG = dict(seed=0, cache=dict(splits=["train", "dev"], every=1), geometry=dict(model=dict(SHAPE, pairs=2), fit=FIT, alpha=0.2, p_mirror=0.5),
              dynamics=dict(model=dict(SHAPE, frames=4, horizons=(1, 2, 4), hidden=16, blocks=1), tokenizer=FIT, predictor=FIT, w_seg=0.3))


@pytest.fixture(scope="module")
def keys():
    "Bright cells are near; brightness drifts from keyframe to keyframe."
    g, k, n = rng("test-teachers"), 12, 7
    near = g.random((n, 3, 2, 4)) < 0.5
    shift = np.stack([np.roll(near, t, 3) for t in range(k)], 1).reshape(n * k, 3, 2, 4).repeat(4, 2).repeat(4, 3)
    images = np.where(shift, 220, 40).astype(np.uint8).repeat(4, 2).repeat(4, 3)[..., None].repeat(3, -1)
    scene = np.repeat(np.arange(n), k)
    split = np.array(["train", "train", "val", "train", "train", "dev", "test"])[scene]
    pose = np.stack([np.arange(n * k) * 1.0, np.zeros(n * k), np.zeros(n * k)], 1)
    seg, depth = np.where(shift, 2, 1).astype(np.uint8), np.where(shift, 90, 200).astype(np.uint8)
    return Keyframes(images, np.ones((n * k, 3), bool), scene, split, pose, np.full(n * k, 2.0), np.zeros(n * k), seg, depth)


@pytest.fixture(scope="module")
def train(keys): return np.flatnonzero(keys.split == "train")


@pytest.fixture(scope="module")
def made(keys, tmp_path_factory):
    d = tmp_path_factory.mktemp("teachers")
    return d / "out", make_teachers(keys, CONFIG, CLASSES, d / "out", d / "scratch", dict(source="test"))


def came(t, keys, rows): return seen_features(t, torch.from_numpy(keys.images[rows[:, None] + np.array(t.cfg.horizons)]))


def test_points_project_back_to_their_pixel():
    "The ray tables against the camera model's own projection."
    hw = (64, 128)
    rays, centres = ray_tables(hw, 3)
    depth = torch.from_numpy(rng("d").uniform(1, 80, (3, 16, 32))).float()
    points = (centres + depth[..., None] * rays).numpy()
    for i, cam in enumerate(camera_rig((hw[1], hw[0]))):
        uv, z = project(points[i], cam)
        assert np.abs(z - depth[i].numpy()).max() < 1e-3
        assert np.abs(uv[..., 0] - (np.arange(32) * 4 + 2.5)).max() < 1e-2 and np.abs(uv[..., 1] - (np.arange(16) * 4 + 2.5)[:, None]).max() < 1e-2


def test_depth_code_is_the_worlds():
    c = np.arange(256, dtype=np.uint8)
    assert np.allclose(depth_from_code(torch.from_numpy(c)).numpy(), decode_depth(c), rtol=1e-4)
    x = torch.linspace(-90, 90, 41)
    assert torch.allclose(inv_log(signed_log(x)), x, atol=1e-3)


def test_rig_is_its_own_mirror_image():
    "Mirrored batches keep their targets: a mirrored cell's ray is the mirrored ray, to within the pixel that a cell's sample is off its centre."
    rays, centres = ray_tables((64, 128), 3)
    mirror = rays.flip(0, 2) * torch.tensor([1.0, -1.0, 1.0])
    pixel = 2 * np.tan(np.deg2rad(35)) / 128
    assert (mirror - rays).abs().max() < 1.01 * pixel and torch.allclose(centres.flip(0) * torch.tensor([1.0, -1.0, 1.0]), centres)


@pytest.mark.parametrize("hw, channels, tokens", [((64, 128), (4,) * 5, 24), ((64, 128), (4,) * 4, 96), ((128, 256), (4,) * 6, 24), ((32, 64), (4, 4), 384)])
def test_shapes(hw, channels, tokens):
    shape = dict(SHAPE, image_hw=hw, channels=channels)
    g = Teacher("geometry", GeometryTeacher(GeometryConfig(**shape, pairs=1))).eval()
    d = Teacher("dynamics", DynamicsTeacher(DynamicsConfig(**shape, classes=3, frames=2, horizons=(1, 5), hidden=8, blocks=1))).eval()
    x = torch.zeros(2, 2, 3, *hw, 3, dtype=torch.uint8)
    assert g.features(x[:, 0]).shape == (2, tokens, 16) == (2, g.tokens, g.width)
    assert d.features(x).shape == (2, 2 * tokens, 8) == (2, d.tokens, d.width) and d.horizons_s == (0.5, 2.5)
    y, z = g.decode(g.features(x[:, 0])), d.decode(d.features(x))
    assert y["points_m"].shape == (2, 1, 3, hw[0] // 4, hw[1] // 4, 3) and z["classes"].shape == (2, 2, 3, hw[0] // 4, hw[1] // 4, 3)
    assert torch.allclose(z["classes"].sum(-1), torch.ones(1)) and (y["depth_m"] > 0).all() and (y["depth_confidence"] >= 1).all()


def test_bad_input(keys):
    g = Teacher("geometry", GeometryTeacher(GeometryConfig(**SHAPE, pairs=1)))
    with pytest.raises(ValueError, match="expected \\(n, 3, 32, 64, 3\\)"): g.features(torch.zeros(1, 3, 30, 64, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"): g.features(torch.zeros(1, 3, 32, 64, 3))
    with pytest.raises(ValueError, match="no images"): g.features(torch.zeros(0, 3, 32, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected features"): g.decode(torch.zeros(1, 3, 3))
    with pytest.raises(TypeError, match="DynamicsTeacher"): Teacher("dynamics", g.net)
    with pytest.raises(ValueError, match="single frame"): DynamicsConfig(**SHAPE, classes=3, frames=1, horizons=(1,), hidden=8, blocks=1)
    with pytest.raises(ValueError, match="rising"): DynamicsConfig(**SHAPE, classes=3, frames=2, horizons=(2, 2), hidden=8, blocks=1)
    bare, cfg = replace(keys, seg=None, depth=None), strict(GeometryConfig, CONFIG["geometry"]["model"])
    with pytest.raises(ValueError, match="needs depth labels"): train_geometry(bare, np.arange(20), cfg, Fit(**FIT), 0.2, 0.5)


@pytest.mark.parametrize("frames, ahead", [(1, 0), (4, 0), (4, 8), (2, 3)])
def test_whole_against_a_loop(frames, ahead):
    scene = np.repeat(np.arange(6), [1, 3, 12, 5, 13, 4])
    fits = lambda i, j: 0 <= j < len(scene) and scene[j] == scene[i]
    slow = [all(fits(i, j) for j in range(i - frames + 1, i + ahead + 1)) for i in range(len(scene))]
    assert whole(scene, frames, ahead).tolist() == slow


def test_overlap_against_a_loop():
    p, s = (torch.from_numpy(rng("o", i).integers(0, 4, (3, 5, 7))) for i in (0, 1))
    slow = torch.tensor([[f(p == c, s == c).sum() for c in range(5)] for f in (torch.logical_and, torch.logical_or)]).double()
    assert torch.equal(_overlap(p, s, 5), slow)


def test_caches_hold_what_the_teacher_says_of_the_images(keys, made):
    "Features from codes, through disk, equal those of a loaded teacher that looks at the images; only train and dev, only whole pasts and futures."
    out, _ = made
    for name in ("geometry", "dynamics", "dynamics_seen"):
        cache, t = load_teacher_features(out / name.split("_")[0], name), load_teacher(out / name.split("_")[0])
        want = np.isin(keys.split, ["train", "dev"])
        if name != "geometry": want &= whole(keys.scene, 4, 4 if name == "dynamics_seen" else 0)
        assert np.array_equal(cache.rows, np.flatnonzero(want)) and cache.values.dtype == np.float16
        r = cache.rows[[0, 5, -1]]
        live = came(t, keys, r) if name == "dynamics_seen" else t.features(teacher_inputs(t, keys, r))
        assert np.abs(cache.at(r) - live.numpy()).max() < 1e-2
        train = np.isin(cache.rows, np.flatnonzero(keys.split == "train"))
        if name == "geometry": assert np.abs(cache.values[train].astype(float).mean(0)).max() < 2e-2


def test_no_look_into_the_future_or_another_scene(keys, made):
    out, _ = made
    t, rows = load_teacher(out / "dynamics"), np.array([3, 15])                      # the first keyframes with a whole past
    changed = replace(keys, images=keys.images.copy())
    other = np.setdiff1d(np.arange(len(keys)), np.r_[0:4, 12:16])
    changed.images[other] = 255 - changed.images[other]                              # all later frames, and all of the other scenes
    assert torch.equal(t.features(teacher_inputs(t, keys, rows)), t.features(teacher_inputs(t, changed, rows)))
    changed.images[0] = 255 - changed.images[0]                                      # ... but the oldest past frame counts
    assert not torch.equal(t.features(teacher_inputs(t, keys, rows[:1])), t.features(teacher_inputs(t, changed, rows[:1])))


def test_same_again_and_old_results_survive_a_failure(keys, made, tmp_path):
    out, report = made
    again = make_teachers(keys, CONFIG, CLASSES, tmp_path / "out", tmp_path / "scratch", dict(source="test"))
    assert json.dumps(again, sort_keys=True) == json.dumps(report, sort_keys=True)
    files = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert all((out / f).read_bytes() == (tmp_path / "out" / f).read_bytes() for f in files)
    assert not list((tmp_path / "scratch").glob("*.pt"))
    bad = {**CONFIG, "cache": dict(splits=["trian"], every=1)}
    with pytest.raises(ValueError, match="rows must be there"): make_teachers(keys, bad, CLASSES, tmp_path / "out", tmp_path / "scratch", {})
    assert teacher_hash(load_teacher(tmp_path / "out" / "geometry")) == teacher_hash(load_teacher(out / "geometry"))


def test_dynamics_resumes_bit_for_bit(keys, train, tmp_path):
    cfg = strict(DynamicsConfig, dict(CONFIG["dynamics"]["model"], classes=len(CLASSES)))
    run = lambda **k: train_dynamics(keys, train, cfg, (Fit(**FIT), Fit(**FIT)), 0.3, **k)
    files = (tmp_path / "t.pt", tmp_path / "p.pt")
    run(resume=files, stop_at=6)
    saved = torch.load(files[1], weights_only=True)
    assert saved["step"] == 4
    teacher, _, codes = run()
    assert teacher_hash(run(resume=files)[0]) == teacher_hash(teacher)
    assert teacher_hash(run(resume=files, seed=1)[0]) == teacher_hash(run(seed=1)[0])   # a resume file of another seed is not taken
    other = replace(keys, images=255 - keys.images)
    fresh = train_dynamics(other, train, cfg, (Fit(**FIT), Fit(**FIT)), 0.3)[0]
    run(resume=files, stop_at=6)
    assert teacher_hash(train_dynamics(other, train, cfg, (Fit(**FIT), Fit(**FIT)), 0.3, resume=files)[0]) == teacher_hash(fresh)  # ... nor of another world
    rows = train[whole(keys.scene, 4, 4)[train]][:5]
    assert torch.allclose(expected_features(teacher, codes, rows), teacher.features(teacher_inputs(teacher, keys, rows)), atol=1e-4)
    assert torch.allclose(coded_features(teacher, codes, rows), came(teacher, keys, rows), atol=1e-4)
    with pytest.raises(KeyError, match="not coded"): codes.at(np.flatnonzero(keys.split == "val"))


def test_training_teaches(keys, train):
    "On images that show the depth, the teacher beats the training median by far, on scenes it has not seen; an untrained one does not."
    cfg, dev = strict(GeometryConfig, CONFIG["geometry"]["model"]), np.flatnonzero(keys.split == "dev")
    fitted = lambda steps: train_geometry(keys, train, cfg, Fit(**{**FIT, "steps": steps, "lr": 6e-3}), 0.2, 0.5)[0]
    score = lambda steps: geometry_scores(fitted(steps), keys, train, dev, CLASSES)["all"]
    before, after = score(2), score(120)
    assert after["teacher"]["depth_log"] < 0.6 * after["constant"]["depth_log"] < before["teacher"]["depth_log"]
    assert after["teacher"]["within_25"] > after["constant"]["within_25"]


def test_divergence_is_an_error():
    net = torch.nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match="at step 0"): fit_network("toy", net, lambda s: (net.weight.sum() * float("nan"), {}), Fit(**FIT), "k")


def test_damaged_folders(made, tmp_path):
    out, _ = made
    d = tmp_path / "t"
    shutil.copytree(out, d)
    weights = d / "geometry" / "teacher" / "teacher.safetensors"
    whole_file = weights.read_bytes()
    weights.write_bytes(whole_file[:-100])
    with pytest.raises(ValueError, match="rerun the stage"): load_teacher(d / "geometry")
    weights.write_bytes(whole_file[:-4] + bytes([whole_file[-4] ^ 1]) + whole_file[-3:])
    with pytest.raises(ValueError, match="hash"): load_teacher(d / "geometry")
    with pytest.raises(FileNotFoundError, match="teachers@profile"): load_teacher(d / "nowhere")
    rows = np.load(d / "dynamics" / "dynamics.rows.npy")
    np.save(d / "dynamics" / "dynamics.rows.npy", rows[:-1])
    with pytest.raises(ValueError, match="again"): load_teacher_features(d / "dynamics", "dynamics")
    (d / "geometry" / "geometry.json").unlink()
    with pytest.raises(FileNotFoundError, match="no complete cache"): load_teacher_features(d / "geometry", "geometry")


def test_cache_writer_refuses_nonsense(tmp_path):
    x, put = np.zeros((3, 2, 2)), lambda *a: write_teacher_features(tmp_path, "geometry", *a, {})
    bad = (([1, 2], x, "at least 3"), ([1, 2, 3, 4], x, "but 3 features"), ([1, 3, 2], x, "rise"), ([], x, "rise"), ([1, 2, 3], x * np.nan, "NaN"))
    for rows, values, why in bad:
        with pytest.raises(ValueError, match=why): put(rows, values)
        assert not (tmp_path / "geometry.json").exists()
    put([1, 2, 5], iter([x[:2] + 1, x[2:] + 2]))
    cache = load_teacher_features(tmp_path, "geometry")
    assert isinstance(cache, TeacherFeatures) and cache.at([5, 1])[:, 0, 0].tolist() == [2.0, 1.0]
    with pytest.raises(KeyError, match="row 9"): cache.at([9])
    with pytest.raises(KeyError, match="row 0"): cache.at([0])


def test_saved_teacher_is_the_same_teacher(made, tmp_path, keys):
    t = load_teacher(made[0] / "dynamics")
    save_teacher(tmp_path / "t", t, {})
    x = teacher_inputs(t, keys, np.array([5]))
    assert torch.equal(load_teacher(tmp_path / "t").features(x), t.features(x)) and not any(p.requires_grad for p in t.parameters())


def test_gradient_reaches_features_through_decode(made):
    "An adapter's output can be drawn and differentiated, though the teacher is frozen."
    for name, key in (("geometry", "depth_m"), ("dynamics", "classes")):
        t = load_teacher(made[0] / name)
        f = torch.zeros(1, t.tokens, t.width, requires_grad=True)
        (t.decode(f)[key] ** 2).sum().backward()
        assert f.grad.abs().sum() > 0


def test_profiles_of_the_config():
    shapes = {}
    for profile in ("smoke", "laptop", "gpu"):
        c = load_config("teachers", profile)
        g = Teacher("geometry", GeometryTeacher(strict(GeometryConfig, c["geometry"]["model"])))
        d = Teacher("dynamics", DynamicsTeacher(strict(DynamicsConfig, dict(c["dynamics"]["model"], classes=15))))
        for fit in (c["geometry"]["fit"], c["dynamics"]["tokenizer"], c["dynamics"]["predictor"]): strict(Fit, fit)
        shapes[profile] = (g.tokens, g.width, d.tokens, d.width, d.horizons_s)
    assert shapes["smoke"] == shapes["laptop"] and shapes["gpu"][0::2] == shapes["laptop"][0::2] and shapes["laptop"][4] == (1.0, 2.0, 4.0)
    assert {v["model"] for v in load_config("teachers", "paper")["external"].values()} == {"VGGT", "Cosmos"}


@pytest.mark.gpu
def test_on_a_gpu(keys, tmp_path):
    if not torch.cuda.is_available(): pytest.skip("no CUDA device")
    report = make_teachers(keys, CONFIG, CLASSES, tmp_path / "out", tmp_path / "scratch", {}, device="cuda")
    assert np.isfinite(report["geometry"]["all"]["teacher"]["depth_m"])
    t = load_teacher(tmp_path / "out" / "geometry")
    assert np.abs(load_teacher_features(tmp_path / "out" / "geometry", "geometry").at([0]) - t.features(torch.from_numpy(keys.images[:1])).numpy()).max() < 5e-2
