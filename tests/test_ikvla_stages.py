"The stages of IK-VLA's analyses on a tiny written world: objects, pixels, cameras, hardware file, results on disk."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlarepro.core.hardware import hardware, write_hardware
from vlarepro.data.images import fit_map
from vlarepro.data.nuscenes import NuScenesReader
from vlarepro.data.table import build_table
from vlarepro.evaluation.analyses_file import Analyses
from vlarepro.evaluation.gradcam import feature_gradients, planning_loss
from vlarepro.evaluation.ikvla_analyses import (
    Checkpoints,
    Crew,
    compact,
    frame_pairs,
    front_camera,
    front_masks,
    front_views,
    lidar_points,
    masked,
    run_states,
    run_stitching,
    scene_facts,
    spread,
    stitched_features,
)
from vlarepro.evaluation.ikvla_latency import milliseconds
from vlarepro.evaluation.ikvla_tables import correlation, effects, gain, seed_l2, spearman, table5_stitching, table8, table12, table16, yaw_separation
from vlarepro.evaluation.results import with_command, write_results
from vlarepro.methods.ikvla.arms import build_head
from vlarepro.methods.ikvla.model import CompactTokenizer, DrivingLLM
from vlarepro.methods.ikvla.planner import IKVLAConfig, make_head, make_llm, save_part
from vlarepro.methods.ikvla.tasks import current_features, synthetic_drives
from vlarepro.methods.ikvla.visual_state import StateShape
from vlarepro.models.eyes import Eyes
from vlarepro.models.visual_encoder import EncoderConfig, VisualEncoder, save_encoder
from vlarepro.report.ikvla import in_image
from vlarepro.report.tables import load_results
from vlarepro.world.cameras import camera_rig, project
from vlarepro.world.generate import generate

CONFIG = IKVLAConfig(3, 4, (1, 2, 3, 4, 5, 6), "tiny", 32, 16, 2, 20, 4, 1.0, 2)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "tiny"
    generate(out, dict(train=1, dev=1, val=2), seed=5, workers=1)
    return NuScenesReader(out, "v1.0-minidrive")


@pytest.fixture(scope="module")
def table(reader): return build_table(reader)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Checkpoints with random weights: three seeds of the full model, one of the text baseline."
    folder, drives = tmp_path_factory.mktemp("sft"), synthetic_drives(4, tokens=24)
    shape, path = CONFIG.shape(24, 8), torch.as_tensor(drives.future[..., :2], dtype=torch.float32)
    for group, seeds, runs in (("ik", (0, 1, 2), {"nsp": ("ik",)}), ("text", (0,), {"text": (), "nsp_blind": ("ik",)})):
        for s in seeds:
            for run, kinds in runs.items():
                save_part(folder / group / f"seed-{s}" / run / "llm", make_llm(CONFIG, shape, run, s), CONFIG, shape, run=run)
                for k in kinds: save_part(folder / group / f"seed-{s}" / run / k, make_head(CONFIG, shape, k, s).fit(path), CONFIG, shape, kind=k)
    config = {"ik": {"features": "multitask", "arms": ["ikvla"], "seeds": [0, 1, 2]},
              "text": {"features": "multitask", "arms": ["opendrivevla", "blind_nsp"], "seeds": [0]},
              "selfsup": {"features": "selfsup", "arms": ["direct_sighted"], "seeds": [0]}, "analyses": {"features": "multitask"}}
    return Checkpoints.of(folder, config, "multitask"), drives


def test_the_front_camera_is_the_one_that_rendered(reader, table):
    camera, rig = front_camera(reader, str(table["token"][0])), camera_rig((128, 64))[1]
    assert camera.size == rig.size and np.allclose(camera.intrinsic, rig.intrinsic)
    assert np.allclose(camera.rotation, rig.rotation, atol=1e-6) and np.allclose(camera.translation, rig.translation)


def test_pictures_and_plans_meet_on_the_road(reader, table):
    "A point of the plan on the ground falls where the renderer's camera puts it."
    token = str(table["token"][3])
    v, rig = front_views(reader, [token]), camera_rig((128, 64))[1]
    x = float(table["point_x_m"][3])
    got = in_image(np.array([[12.0, 1.0]]), v["intrinsic"], v["to_camera"][0], float(v["ground_m"]), dense=2)[-1]
    want = project(np.array([[12.0 + x, 1.0, 0.0]]), rig)[0][0]
    assert np.abs(got - want).max() < 1.5  # the camera fires a little after the lidar


def test_object_masks_hold_the_objects(reader, table):
    "Masked pixels are few, and cover the boxes that the lidar sees; a box without a point leaves no pixel."
    rows = np.arange(0, len(table), 10)
    masks = front_masks(reader, table, rows, (128, 64))
    points = lidar_points(reader)
    assert masks.shape == (len(rows), 64, 128) and masks.any() and masks.mean() < 0.5
    assert len(points) == len(reader.nusc.sample_annotation)
    bare = [i for i, r in enumerate(rows) if not any(points[str(table["token"][r]), j] for j in reader.boxes3d(str(table["token"][r]))["instance"])]
    assert not masks[bare].any()


def test_frame_pairs_are_consecutive(reader, table):
    rows = np.array([0, 5])
    pairs = frame_pairs(reader, table, rows)
    assert pairs.shape == (2, 2, 3, 64, 128, 3) and pairs.dtype == np.uint8
    again = frame_pairs(reader, table, rows + 1)
    assert np.array_equal(again[:, 0], pairs[:, 1]) and not np.array_equal(pairs[:, 0], pairs[:, 1])


def test_scene_facts_follow_the_boxes(reader, table):
    facts = scene_facts(reader, table)
    assert np.allclose(facts["speed_mps"], table["ego"][:, 0]) and (facts["yaw_rate_radps"] >= 0).all()
    front = facts["front_objects"] > 0
    assert np.isfinite(facts["front_distance_m"][front]).all() and np.isnan(facts["front_distance_m"][~front]).all()
    assert facts["front_distance_m"][front].max() <= np.hypot(50, 4) and set(facts["turnover"][np.isfinite(facts["turnover"])]) <= {0.0, 1.0}


def test_feature_gradients_equal_a_finite_difference():
    "The gradient at the encoder's tokens is the loss's own slope, with the IK network's direct view of the image held still."
    torch.manual_seed(0)
    data, tok = synthetic_drives(2, tokens=24).take(np.arange(3)), CompactTokenizer()
    shape = StateShape(24, 8, 3, 4, (1, 2, 3, 4, 5, 6), 32)
    model = DrivingLLM(shape, tok, "tiny").requires_grad_(False)
    text = lambda d: planning_loss(model, None, tok, d, np.array([0]), model.projector(current_features(d, np.array([0]))))
    g = feature_gradients(model, None, tok, data)
    direction, step = torch.randn(g[0].shape, generator=torch.Generator().manual_seed(1)), 1e-2
    moved = []
    for sign in (1, -1):
        f = np.array(data.features, np.float32)
        f[data.keyframe[0]] += sign * step * direction.numpy()
        moved.append(float(text(type(data)(**{**data.__dict__, "features": f}))))
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float((g[0] * direction).sum()), rel=0.05, abs=1e-3)
    head = build_head("ik", shape, 16, 2, 20).fit(torch.as_tensor(data.future[..., :2], dtype=torch.float32))
    assert torch.allclose(feature_gradients(model, head, tok, data, batch=1), feature_gradients(model, head, tok, data), atol=1e-5)


def test_checkpoints_know_their_groups_and_seeds(trained):
    c, _ = trained
    assert c.seeds["ikvla"] == [0, 1, 2] and "direct_sighted" not in c and c.folder("opendrivevla", 0).parts[-2:] == ("text", "seed-0")
    with pytest.raises(KeyError, match="ikvla"): c.folder("ikvl", 0)
    nowhere = {"ik": {"features": "multitask", "arms": [], "seeds": []}}
    with pytest.raises(FileNotFoundError, match="sft"): Checkpoints.of(c.sft / "nowhere", nowhere, "multitask")


def test_states_are_measured_per_seed_and_repeatable(trained):
    c, drives = trained
    a, b = (run_states(c, ["ikvla", "blind_nsp"], drives) for _ in range(2))
    assert all(np.array_equal(a[k], b[k]) for k in a) and a["ikvla/mse"].shape[0] == 3 and a["blind_nsp/mse"].shape[0] == 1
    assert "ikvla/masked" in a and "blind_nsp/masked" not in a
    assert a["ikvla/within"].mean() <= a["ikvla/marginal"].mean() + 1e-9
    assert not np.asarray(masked(drives).features[5]).any() and masked(drives).features.shape == drives.features.shape


def test_who_computes_changes_nothing(trained):
    "Two processes give the same bits as one, in the order of the list; a failure in one of them is told."
    c, drives = trained
    here, crew = Crew(1, 1), Crew(2, 1)
    try:
        a, b = (run_states(c, ["ikvla", "blind_nsp"], drives, each) for each in (here, crew))
        assert list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)
        with pytest.raises(KeyError, match="unknown arm"): run_states(replace(c, seeds={"nobody": [0]}), ["nobody"], drives, crew)
    finally: here.close(), crew.close()
    with pytest.raises(ValueError, match="processor"): Crew(1, 1, "cuda")


def test_compact_drives_read_the_same(trained):
    c, drives = trained
    some = drives.take(np.array([5, 2]))
    light, rows = compact(some), np.arange(2)
    assert len(light.features) < len(some.features) and np.array_equal(current_features(light, rows), current_features(some, rows))
    assert np.array_equal(light.features[light.next_keyframe], some.features[some.next_keyframe])


def test_a_sprite_moves_only_who_sees(trained, tmp_path):
    c, drives = trained
    n, g = 3, np.random.default_rng(0)
    save_encoder(tmp_path / "encoder", VisualEncoder(EncoderConfig((64, 128), 3, (4, 8, 8, 8, 8), (2, 4), 8, 16)), {})
    images = g.integers(60, 200, (n, 2, 3, 64, 128, 3)).astype(np.uint8)
    some = drives.take(np.arange(n))
    tokens = stitched_features(Eyes(tmp_path / "encoder"), images, camera_rig((128, 64))[1], 1, some.ego[:, 0])
    change = run_stitching(c, ["ikvla", "opendrivevla"], some, tokens, 2)
    assert {k: v.shape for k, v in change.items() if k.endswith("Near")} == {"standing/ikvla/Near": (3, n), "appears/ikvla/Near": (1, n),
                                                                              "standing/opendrivevla/Near": (1, n), "appears/opendrivevla/Near": (1, n)}
    assert np.abs(change["standing/ikvla/Near"]).max() > 0


def made_up(seeds=3, n=120):
    g, m = np.random.default_rng(1), n // 2
    rows, a = np.arange(0, n, 2), {}
    for k in ("gradcam", "states", "stitching"): a[f"rows/{k}"] = rows
    a |= {"gradcam/rows": np.arange(m), "floor/marginal": np.ones(n), "floor/within": np.full(n, .9), "floor/elements": np.array(4)}
    a |= {f"stitching/features/{p}": g.random(m) for p in ("Near", "Far", "VeryFar", "Sky", "SkyFar")}
    a |= {f"facts/{k}": g.gamma(2, 1, n) for k in ("yaw_rate_radps", "speed_mps", "front_objects", "front_distance_m", "nearest_speed_mps", "turnover")}
    for arm, s in (("ikvla", seeds), ("opendrivevla", 1)):
        for p in ("Near", "Far", "VeryFar", "Sky", "SkyFar"):
            a |= {f"stitching/{mode}/{arm}/{p}": g.normal(-.5, .1, (s, m)) for mode in ("standing", "appears")}
        a |= {f"gradcam/tokens/{arm}/{k}": g.random((s, m)) for k in ("PM", "AP", "IoU20", "F1_20")}
    for arm, s in (("ikvla", seeds), ("blind_nsp", 1)): a |= {f"states/{arm}/{k}": g.gamma(9, .1, (s, m)) for k in ("mse", "cosine", "marginal", "within")}
    return Analyses(a), np.repeat(np.arange(12), n // 12), g.normal(size=(n, 6, 2)).cumsum(1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_effect_takes_one_seed_or_three(seeds):
    a, scenes, future = made_up(seeds)
    plans = future + np.random.default_rng(2).normal(0, .2, (seeds, *future.shape))
    rows = a["rows/states"]
    found = effects(a, scenes, gain(plans, plans + .1, future), seed_l2(plans[:, rows], future[rows]))
    assert set(found) == {"C-C5", "C-C9", "C-C10", "C-C11", "C-C12", "C-C13"}
    assert all(i.low <= i.value <= i.high for i, *_ in found.values())
    assert found["C-C13"][3] == seeds and found["C-C9"][3] == 1  # the baseline has one seed
    assert table5_stitching(a, scenes)[1]["values"]["decel_pct"]["seeds"] == seeds and len(table12(a, scenes)) == 10
    assert [r["row"] for r in table8(a, scenes)][:3] == ["Marginal", "Conditional (command proxy)", "Between-command variance"]


def test_yaw_separation_knows_the_answer():
    g, n = np.random.default_rng(0), 400
    facts = {"yaw": g.random(n), "speed": g.random(n), "front": g.integers(0, 3, n).astype(float)}
    assert yaw_separation(facts, facts["yaw"][None]) > 0.8 and yaw_separation(facts, facts["speed"][None]) < -0.8


def test_a_perfect_rank_correlation_is_one_within_every_seed():
    q = np.random.default_rng(0).random((3, 50))
    i = correlation(q, np.exp(q) + np.arange(3)[:, None] * 10, np.arange(50) // 5, spearman, "test")
    assert i == pytest.approx((1, 1, 1))


def test_latency_table_inverts_milliseconds_and_names_the_device():
    t = {"value": 20.0, "low": 10.0, "high": 40.0, "n": 3}
    parts = dict.fromkeys(("vision", "language", "ik 5 steps", "language and ik", "end to end", "text", "text end to end"), t)
    rows = table16({"device": "a card", "precision": "bfloat16", "times": {"paper": parts, "profile": parts}})
    assert [r["row"] for r in rows[:4]][0].startswith("Vision encoder") and "a card" in rows[0]["note"]
    assert rows[0]["values"]["fps"] == {"value": 50.0, "low": 25.0, "high": 100.0, "n": 3}
    assert milliseconds(lambda: None, 5)["n"] == 5


def test_hardware_file_is_stable(tmp_path):
    write_hardware(tmp_path / "h.json")
    first = (tmp_path / "h.json").read_bytes()
    (tmp_path / "h.json").write_text(json.dumps({"processor": "another", "cores": 1, "cards": []}))
    write_hardware(tmp_path / "h.json")
    assert (tmp_path / "h.json").read_bytes() == first and json.loads(first) == hardware()


def test_milliseconds_lie_apart_and_are_read_back(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x-ikvla.json").write_text(json.dumps({"notebook": "a.ipynb", "code": "0" * 12, "minutes": 1.0, "peak_memory_mb": 2}))
    own = {"title": "Ours", "columns": ["b", "a"], "note": "why", "rows": [{"row": "r", "values": {"a": {"value": 1.0}, "b": {"value": 2.0}}}]}
    write_results(tmp_path / "results/laptop/ikvla", "ikvla", "laptop", {"own": own}, [], [0], tmp_path / "records", ["x-ikvla"],
                  latency={"16": [{"row": "End-to-end, A6000 fp16", "values": {}}]}, figures={"f.svg": ("<svg/>", {"alt": "a", "caption": "b"})})
    res = load_results(tmp_path / "results")["laptop", "ikvla"]
    assert set(res["tables"]) == {"16", "own"} and res["tables"]["own"]["columns"] == ["b", "a"] and set(res["figures"]) == {"f.svg"}
    assert not (tmp_path / "results/laptop/ikvla/tables/16.json").exists()
    assert with_command({"stages": ["sft-ikvla-ik", "grpo-ikvla"]}, "laptop") == {"stages": ["sft-ikvla-ik", "grpo-ikvla"]}


def test_spread_takes_every_scene_evenly():
    scene = np.repeat(np.array(["a", "b", "c"]), [31, 31, 4])
    rows = spread(scene, 3)
    assert [int((scene[rows] == s).sum()) for s in "abc"] == [3, 3, 3] and len(spread(scene, 0)) == 66


def test_the_front_camera_of_fitted_images(reader, table):
    "A point of the stored image lies where `fit` puts it."
    small = NuScenesReader(reader.root, reader.version, split=reader.split, image_size=(96, 96))
    token = str(table["token"][0])
    whole, fitted = front_camera(reader, token), front_camera(small, token)
    assert fitted.size == (96, 96)
    K = fit_map((whole.height, whole.width), (96, 96)) @ whole.intrinsic
    np.testing.assert_allclose(fitted.intrinsic, K)
    assert K[0, 2] == whole.intrinsic[0, 2] * .75 and K[1, 2] == whole.intrinsic[1, 2] * .75 + 24
