"The encoder, its training and its cache: shapes, view masks, determinism, resuming, damaged files."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from vlarepro.core.seeds import rng, torch_rng
from vlarepro.models.features import (
    EncoderFit,
    KeyframeSet,
    encode_images,
    encode_keyframes,
    encoder_loss,
    load_features,
    make_heads,
    motion_targets,
    neighbours,
    train_encoder,
)
from vlarepro.models.visual_encoder import EncoderConfig, VisualEncoder, drop_views, encoder_hash, load_encoder, mask_blocks, patches

CFG = EncoderConfig((32, 64), 3, (8, 8, 8, 16, 16), (1, 2), 8, 16)
FIT = EncoderFit(steps=10, batch=8, lr=3e-3, weight_decay=0.01, warmup=2, p_front_only=0.2, p_each_view=0.1,
                 p_mirror=0.5, w_seg=1.0, w_depth=1.0, w_motion=1.0, w_agents=1.0, light=0.1, mask_block=8, mask_share=0.5, save_every=4)


@pytest.fixture(scope="module")
def world():
    g, scene = rng("test-encoder"), np.repeat(np.arange(5), 8)
    previous, following = neighbours(scene)
    images = g.integers(0, 255, (40, 3, 32, 64, 3)).astype(np.uint8)
    seg = g.integers(0, 4, (40, 3, 8, 16)).astype(np.uint8)
    pose = np.stack([np.cumsum(g.uniform(0, 5, 40)), g.normal(size=40), g.normal(0, 0.1, 40)], 1)
    return KeyframeSet(images, previous, following, seg, seg * 50, motion_targets(pose, g.uniform(0, 10, 40), g.normal(size=40), previous))


@pytest.fixture(scope="module")
def rows(world): return np.arange(len(world))


def test_neighbours_stay_in_the_scene(world):
    assert (world.previous[::8] == np.arange(0, 40, 8)).all() and (world.following[7::8] == np.arange(7, 40, 8)).all()
    assert (np.delete(world.previous, np.arange(0, 40, 8)) == np.delete(np.arange(40), np.arange(0, 40, 8)) - 1).all()


@pytest.mark.parametrize("hw, grid", [((64, 128), (2, 4)), ((128, 256), (2, 4)), ((128, 256), (4, 8)), ((32, 64), (1, 2))])
def test_shapes(hw, grid):
    e = VisualEncoder(EncoderConfig(hw, 3, (4, 8, 8, 8, 8), grid, 8, 16))
    out = e(torch.zeros(2, 2, 3, *hw, 3, dtype=torch.uint8))
    assert out.shape == (2, 3 * grid[0] * grid[1], 8)


def test_bad_input(world):
    e = VisualEncoder(CFG)
    with pytest.raises(ValueError, match="expected \\(b, 2, 3, 32, 64, 3\\)"): e(torch.zeros(1, 2, 3, 30, 64, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"): e(torch.zeros(1, 2, 3, 32, 64, 3))
    with pytest.raises(ValueError, match="does not divide"): EncoderConfig((64, 128), 3, (8,) * 5, (2, 3), 8, 16)
    with pytest.raises(ValueError, match="without any camera"): encode_images(e, world.pairs(np.arange(1)).numpy(), np.zeros((1, 3), bool))
    nan = world.motion.copy(); nan[3, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"): KeyframeSet(world.images, world.previous, world.following, motion=nan)
    with pytest.raises(ValueError, match="seg: expected 40 rows"): KeyframeSet(world.images, world.previous, world.following, seg=world.seg[:3])


def test_view_dropout_masks():
    m = drop_views(4000, 3, 1, 0.25, 0.0, torch_rng("m"))
    assert m[:, 1].all() and (m[:, 0] == m[:, 2]).all() and abs(1 - m[:, 0].float().mean() - 0.25) < 0.03
    assert drop_views(100, 3, 1, 0.0, 0.0, torch_rng("m")).all()
    assert (drop_views(50, 3, 1, 0.3, 0.3, torch_rng("a")) == drop_views(50, 3, 1, 0.3, 0.3, torch_rng("a"))).all()


def test_absent_views_do_not_leak(world):
    e, pairs = VisualEncoder(CFG).eval(), world.pairs(np.arange(1, 5))
    torch.nn.init.normal_(e.missing)
    valid = torch.tensor([[False, True, False]]).expand(4, 3)
    noise = pairs.clone(); noise[:, :, [0, 2]] = 255 - noise[:, :, [0, 2]]
    with torch.no_grad():
        assert torch.allclose(e(pairs, valid), e(noise, valid), atol=1e-5)
        assert not torch.allclose(e(pairs), e(noise), atol=1e-3)


def test_losses_ignore_absent_views(world, rows):
    heads = make_heads("multitask", CFG, world, rows, 4).eval()
    tokens, valid = torch.randn(4, 6, 8, generator=torch_rng("t")), torch.tensor([[False, True, False]]).expand(4, 3)
    seg, depth, motion = (torch.from_numpy(a[1:5]) for a in (world.seg, world.depth, world.motion))
    a = heads.losses(tokens, seg, depth, motion, valid)
    changed = seg.clone(); changed[:, 0] = 3 - changed[:, 0]
    assert a["seg"] == heads.losses(tokens, changed, depth, motion, valid)["seg"]


def test_patches_follow_the_token_order():
    maps = torch.arange(2 * 8 * 16).view(1, 2, 8, 16)
    p = patches(maps, (2, 4))
    assert p.shape == (1, 16, 16) and p[0, 5].min() == maps[0, 0, 4:8, 4:8].min() and p[0, 8].min() == maps[0, 1, 0, 0]


def test_masks_leave_the_earlier_frame(world):
    pairs = world.pairs(np.arange(1, 9))
    m = mask_blocks(pairs, 8, 0.5, torch_rng("b"))
    assert (m[:, 0] == pairs[:, 0]).all()
    assert 0.35 < (m[:, 1] == 110).all(-1).float().mean() < 0.65


@pytest.mark.parametrize("objective", ["multitask", "selfsup"])
def test_deterministic_and_resumable(world, rows, objective, tmp_path):
    a, *_ = train_encoder(world, rows, CFG, FIT, objective, 4, seed=1)
    torch.manual_seed(123)  # a foreign draw must not matter
    train_encoder(world, rows, CFG, FIT, objective, 4, seed=1, resume=tmp_path / "r.pt", stop_at=6)
    b, *_ = train_encoder(world, rows, CFG, FIT, objective, 4, seed=1, resume=tmp_path / "r.pt")
    assert encoder_hash(a) == encoder_hash(b)
    c, *_ = train_encoder(world, rows, CFG, FIT, objective, 4, seed=2, resume=tmp_path / "r.pt")  # another run's resume file is not used
    assert encoder_hash(c) != encoder_hash(a)


def test_both_objectives_share_the_initial_encoder(world, rows):
    from dataclasses import replace
    one = replace(FIT, steps=1, lr=0.0)
    assert encoder_hash(train_encoder(world, rows, CFG, one, "multitask", 4)[0]) == encoder_hash(train_encoder(world, rows, CFG, one, "selfsup", 4)[0])


def test_last_keyframe_has_no_next(world, rows):
    e, heads = VisualEncoder(CFG), make_heads("selfsup", CFG, world, rows, 4)
    total, losses = encoder_loss(e, heads, world, np.array([6, 7, 15, 20]), FIT, torch_rng("x"))
    assert torch.isfinite(total) and set(losses) == {"now", "next"}


def test_cache_is_whole_or_refused(world, rows, tmp_path):
    e, *_ = train_encoder(world, rows, CFG, FIT, "multitask", 4)
    meta = encode_keyframes(e, world, rows[:24], tmp_path, dict(objective="multitask"))
    f = load_features(tmp_path)
    assert f.dtype == np.float16 and f.shape == (40, 6, 8) and abs(float(f[:24].astype(float).mean())) < 1e-2
    assert meta["encoder"] == encoder_hash(load_encoder(tmp_path / "encoder"))
    again = encode_images(load_encoder(tmp_path / "encoder"), world.pairs(np.arange(4)).numpy(), np.ones((4, 3), bool))
    assert np.allclose(again.numpy(), f[:4].astype(np.float32), atol=0.05)
    (tmp_path / "features.json").rename(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match="did not finish"): load_features(tmp_path)
    meta["shape"][0] = 41
    (tmp_path / "features.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="says \\[41"): load_features(tmp_path)


def test_tampered_weights_are_refused(tmp_path):
    from vlarepro.models.visual_encoder import save_encoder
    save_encoder(tmp_path / "e", VisualEncoder(CFG), {})
    meta = json.loads((tmp_path / "e" / "encoder.json").read_text()); meta["hash"] = "0" * 16
    (tmp_path / "e" / "encoder.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="rerun the encoder stage"): load_encoder(tmp_path / "e")


KILLED = """
import sys, numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import test_encoder as t
w = t.world.__wrapped__() if hasattr(t.world, '__wrapped__') else t.world.__pytest_wrapped__.obj()
from dataclasses import replace
print('ready', flush=True)
e, *_ = t.train_encoder(w, np.arange(len(w)), t.CFG, replace(t.FIT, steps=150, save_every=5), 'multitask', 4, resume={resume!r})
print(t.encoder_hash(e))
"""


def test_kill_9_then_resume(tmp_path):
    resume = tmp_path / "r.pt"
    code = KILLED.format(here=os.path.dirname(__file__), resume=str(resume))
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    end = time.time() + 60
    while not resume.exists() and time.time() < end: time.sleep(0.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert resume.exists() and p.returncode == -signal.SIGKILL
    saved = torch.load(resume, weights_only=True)
    assert 0 < saved["step"] < 150
    codes = (code, code.replace(str(resume), str(tmp_path / "other.pt")))
    runs = [subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True) for c in codes]
    out, whole = (r.stdout.split() for r in runs)
    assert out[-1] == whole[-1]


def carpet_view(cells, x, y, yaw):
    "A flat random texture (0.5 m cells) seen by the rig from a pose of the rear axle."
    from vlarepro.world.cameras import camera_rig, ground_points
    out, c, s = np.full((3, 64, 128, 3), 128, np.uint8), np.cos(yaw), np.sin(yaw)
    for i, cam in enumerate(camera_rig((128, 64))):
        xy, _ = ground_points(cam, *np.meshgrid(np.arange(128) + 0.5, np.arange(30, 64) + 0.5))
        world = np.stack([c * xy[..., 0] - s * xy[..., 1] + x, s * xy[..., 0] + c * xy[..., 1] + y], -1)
        cell = np.floor(world * 2 + 200).astype(int).clip(0, 399)
        out[i, 30:] = cells[cell[..., 0], cell[..., 1]][..., None]
    return out


@pytest.mark.parametrize("forward, turn", [(0.0, 0.0), (3.0, 0.0), (6.0, 0.12), (4.0, -0.24)])
def test_plane_sweep_finds_the_motion(forward, turn):
    from vlarepro.models.visual_encoder import FORWARD_M, TURN_RAD, PlaneSweep
    cells = rng("carpet").integers(0, 256, (400, 400)).astype(np.uint8)
    now = (forward * np.cos(turn / 2), forward * np.sin(turn / 2), turn)
    pair = torch.from_numpy(np.stack([carpet_view(cells, 0, 0, 0), carpet_view(cells, *now)])[None])
    cost = PlaneSweep(3)(pair)[0, :, : 8 * len(FORWARD_M) * len(TURN_RAD)].reshape(24, len(FORWARD_M), len(TURN_RAD)).mean(0)
    f, t = np.unravel_index(int(cost.argmin()), cost.shape)
    assert abs(FORWARD_M[f] - forward) < 0.51 and abs(TURN_RAD[t] - turn) < 0.061


def test_plane_sweep_is_constant_for_equal_frames_of_one_colour():
    from vlarepro.models.visual_encoder import PlaneSweep
    assert PlaneSweep(3)(torch.full((2, 2, 3, 64, 128, 3), 90, dtype=torch.uint8)).abs().max() == 0
    with pytest.raises(ValueError, match="3 cameras"): PlaneSweep(2)


def test_mirror_turns_everything_round(world):
    from vlarepro.models.features import mirrored
    a, b = mirrored(world, np.array([3, 9]), False), mirrored(world, np.array([3, 9]), True)
    assert (b[0][:, :, 0] == a[0][:, :, 2].flip(3)).all() and (b[2][:, 2] == a[2][:, 0].flip(2)).all()
    assert torch.allclose(b[4], a[4] * torch.tensor([1.0, -1, -1, 1, -1]))


def test_two_processes_give_what_one_gives(world, rows, tmp_path):
    "Each objective has one thread, whether in this process or in its own; kept sweeps are those that are computed on the way."
    from dataclasses import replace

    from vlarepro.models.features import fit_encoders, keyframe_sweeps
    kept = replace(world, sweep=keyframe_sweeps(world))
    assert np.allclose(kept.sweeps(np.arange(3)), VisualEncoder(CFG).sweep(world.pairs(np.arange(3))), atol=2e-3)
    fit = lambda data, w: fit_encoders(data, rows, CFG, FIT, ("multitask", "selfsup"), 4, tmp_path / str(w), tmp_path / "s", dict(source="test"), workers=w)
    found = [fit(kept, 1), fit(world, 2)]
    for o in ("multitask", "selfsup"):
        one, two = (f[0][o][-1]["total"] for f in found)
        assert abs(one - two) < 1e-3 * one and np.allclose(*(load_features(tmp_path / w / o).astype(float) for w in "12"), atol=0.05)
    assert fit(world, 2)[1] == found[1][1] and not list((tmp_path / "s").iterdir())  # bit-equal again, and nothing is left


def test_agents_are_a_label_like_the_others(world, rows):
    "With boxes the supervised objective has four more losses; they change the tokens, and the self-supervised objective does not see them."
    from dataclasses import replace

    from vlarepro.models.agent_facts import Boxes, agent_facts
    g, n = rng("boxes"), len(world)
    who = np.tile(np.arange(3), n)
    boxes = Boxes(np.repeat(np.arange(n), 3), g.uniform(-10, 30, (3 * n, 2)), g.uniform(-3, 3, 3 * n), np.full((3 * n, 2), 2.0), who, who)
    make = lambda k, seg, depth, columns: agent_facts(boxes, np.zeros((k, 3)), np.full(k, 5.0), np.zeros(k), seg, depth, (1,), (2,), columns)
    facts = make(n, world.seg, world.depth, 2)
    assert facts.R.shape == (40, 24, 3) and np.isfinite(facts.R).any() and np.isfinite(facts.L).any()
    seen = replace(world, agents=facts)
    a, heads, history = train_encoder(seen, rows, CFG, FIT, "multitask", 4)
    assert {"seen", "range", "moves", "corridor"} < set(history[-1]) and all(np.isfinite(v) for v in history[-1].values())
    assert encoder_hash(a) != encoder_hash(train_encoder(world, rows, CFG, FIT, "multitask", 4)[0])
    assert encoder_hash(train_encoder(seen, rows, CFG, FIT, "selfsup", 4)[0]) == encoder_hash(train_encoder(world, rows, CFG, FIT, "selfsup", 4)[0])
    more = np.zeros((120, 3, 8, 16), np.uint8)
    with pytest.raises(ValueError, match="agents: expected 40 rows"): replace(world, agents=make(120, more, more, 2))


def test_the_mirror_shows_the_agents_mirrored():
    "Facts of mirrored boxes are the mirrored facts."
    from vlarepro.models.agent_facts import Boxes, agent_facts
    g, n = rng("mirror-boxes"), 200
    row, xy, yaw = np.arange(n), np.stack([g.uniform(4, 40, n), g.uniform(-12, 12, n)], 1), g.uniform(-3, 3, n)
    dark = np.zeros((n, 3, 16, 32), np.uint8)
    boxes = lambda s: Boxes(row, xy * [1, s], yaw * s, np.full((n, 2), 1.5), np.arange(n) % 3, np.arange(n))
    make = lambda s: agent_facts(boxes(s), np.zeros((n, 3)), np.full(n, 6.0), np.full(n, 0.1 * s), dark, dark, (1,), (2,))
    a, b = make(1).batch(row, True), make(-1).batch(row, False)
    assert torch.allclose(torch.nan_to_num(a[3], -99), torch.nan_to_num(b[3], -99), atol=1e-4)
    assert (torch.isfinite(a[0]) == torch.isfinite(b[0])).float().mean() > 0.999


def test_light_and_dropout_are_for_training_alone(world):
    e = VisualEncoder(EncoderConfig((32, 64), 3, (8, 8, 8, 16, 16), (1, 2), 8, 16, 0.3))
    pairs, light = world.pairs(np.arange(1, 4)), torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.1, -0.1]])
    e.train()
    assert not torch.equal(e(pairs), e(pairs))
    e.eval()
    assert torch.equal(e(pairs), e(pairs)) and torch.equal(e(pairs)[0], e(pairs, light=light)[0]) and not torch.equal(e(pairs)[1], e(pairs, light=light)[1])
