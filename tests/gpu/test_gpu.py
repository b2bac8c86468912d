"""What a card must compute as a processor does: decoding, attention, the training of every method, reinforcement, resuming, memory."""
import importlib.util

import numpy as np
import pytest
import torch
from test_decoding import FAMILIES, disturbed, positions_for, reference, tokens

from vlarepro.decoding.decoder import LeanDecoder
from vlarepro.decoding.speculate import NGram, decode
from vlarepro.methods.ikvla.planner import IKVLAConfig, make_head, make_llm, save_part
from vlarepro.methods.ikvla.tasks import synthetic_drives
from vlarepro.methods.spanvla.model import synthetic_windows
from vlarepro.methods.spanvla.planner import load_bridge, load_model
from vlarepro.models.backbones import attention_implementation, build_llm
from vlarepro.scoring.pdm.scene import save_cache, straight_scene
from vlarepro.training import ikvla, lastvla, spanvla, specdec
from vlarepro.training.ikvla_grpo import GRPOSettings, reinforce_arms

PHASE = dict(steps=4, batch=8, lr=1e-3, weight_decay=0.0, warmup=0.25, clip=1.0, ema=0.0)


def histories(logs) -> dict:
    "name -> losses of a training log, wherever in it they lie."
    out = {}
    def walk(name, x):
        if isinstance(x, dict):
            for k, v in x.items(): walk(f"{name}/{k}", v)
        elif isinstance(x, list) and x and isinstance(x[0], dict) and "loss" in x[0]: out[name] = np.array([r["loss"] for r in x])
    walk("", logs)
    return out


def same_curves(train, device, tmp_path):
    "The same seed on a processor and on the card: the same losses but for rounding."
    here, there = (histories(train(d, tmp_path / f"{i}-{d}")) for i, d in enumerate(("cpu", device)))
    assert here and list(here) == list(there)
    for k in here: np.testing.assert_allclose(there[k], here[k], rtol=2e-2, atol=2e-3, err_msg=k)


def test_attention_is_the_best_there_is(device):
    flash = device.startswith("cuda") and importlib.util.find_spec("flash_attn") is not None
    assert attention_implementation("auto", device) == ("flash_attention_2" if flash else "sdpa")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_lean_decoder_equals_hugging_face(name, device):
    model = disturbed(FAMILIES[name], 1).to(device)
    ids, positions = tokens(2, 40).to(device), positions_for(name, 2, 40).to(device)
    want, decoder = reference(name, model, ids, positions), LeanDecoder(model, 64, batch=2)
    assert float((decoder.prefill(ids, positions, every=True).logits - want).abs().max()) < 1e-4
    decoder.prefill(ids[:, :20], positions[:, :, :20])
    for i in range(20, 24): assert float((decoder.step(ids[:, i:i + 1], positions[:, :, i:i + 1]).logits[:, 0] - want[:, i]).abs().max()) < 1e-4


def test_a_draft_changes_nothing(device):
    model, prompt = disturbed(FAMILIES["qwen2"], 3).to(device), dict(tokens=tokens(1, 24).to(device))
    plain = decode(LeanDecoder(model, 128), prompt, 48).tokens[0]
    wrong = [plain[:9] + [5] + plain[9:]]
    assert decode(LeanDecoder(model, 128), prompt, 48, draft=NGram(wrong, 3, 4)).tokens[0] == plain


def test_ikvla_trains_alike(device, tmp_path):
    model = dict(cameras=3, merge=2, horizons=[1, 2, 3, 4, 5, 6], llm="tiny", llm_width=32, head_width=16, head_heads=2,
                 diffusion_steps=20, sample_steps=4, sample_eta=0.0, samples=2)
    settings = ikvla.IKVLASettings.read(dict(model=model, language=PHASE, heads=PHASE, direct=PHASE, head_lr=1e-3, p_front=0.0, p_unknown=0.1, levels=2))
    arms = ["ikvla", "ikvla_wo_nsp", "ikvla_wo_ik", "opendrivevla", "direct_blind"]
    train = lambda d, at: ikvla.train_arms(settings, {"synthetic": {"scenes": 4}}, arms, [0], at / "out", at / "scratch", workers=1, device=d)
    same_curves(train, device, tmp_path)


def spanvla_settings(bridges):
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    expert = dict(interval=2, head="flow", start="history", mode="action", width=16, steps=5, noise=0.1, tau_mean=0.5, tau_std=0.25)
    model = dict(vlm=size, grids=[[1, 2, 4]] * 3, codebook=16, delta_m=0.3, vocab=400)
    return spanvla.SpanVLASettings.read(dict(model=model, language=PHASE, bridge=PHASE, expert=expert, bridges=bridges, action_weight=1.0, cot_weight=1.0,
                                             language_windows=1))


def test_spanvla_trains_alike(device, tmp_path):
    settings = spanvla_settings(["interval2", "history"])
    w, features, traces = synthetic_windows(24)
    same_curves(lambda d, at: spanvla.train_spanvla(settings, w, features, traces, 0, at / "out", at / "scratch", d), device, tmp_path)


def test_specdec_trains_alike(device, tmp_path):
    settings = specdec.SpecdecSettings.read(dict(
        layout=dict(cameras=1, frames=2, rows=2, columns=2), family="qwen2.5-vl", size="tiny", vocab=420, longest=48, target=PHASE, path_weight=0.1, written=16,
        draft=dict(layers=1, heads=2, kv_heads=1, ffn=64, block=8, positions="flat", taps=[0, 1]), head_rows=64, drafts=PHASE, anchors=4, gamma=3.0,
        replica_size=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1), replica=PHASE))
    arms = {"flatrope": [0], "mrope": [0], "replica": [0]}
    train = lambda d, at: specdec.train_group(settings, {"toy": dict(n=32)}, arms, at / "out", at / "scratch", device=d)
    here, there = (histories(train(d, tmp_path / f"{i}-{d}")) for i, d in enumerate(("cpu", device)))
    np.testing.assert_allclose(there["/target"], here["/target"], rtol=2e-2)
    assert list(here) == list(there) and all(np.isfinite(x).all() for x in there.values())  # drafts learn from what each target wrote: a near tie may differ


def test_lastvla_trains_alike(device, tmp_path):
    model = dict(backbone="tiny", large="tiny", family="qwen2.5-vl", views=3, cameras=[1], grid=[1, 2, 2], n_dyn=1, n_geo=1,
                 adapter_width=16, adapter_layers=1, vocab=300, numbers=False)
    settings = lastvla.LaSTSettings.read(dict(model=model, base=PHASE, stage1=PHASE, stage2=PHASE, questions=PHASE, see=0.7,
                                              weights=dict(stage1=[1, 1, .1], stage2=[.1, .1, 1], joint=[1, 1, 1])))
    arms = ["full", "textual_cot"]
    train = lambda d, at: lastvla.train_arms(settings, {"synthetic": {"n": 24}}, arms, [], [0], at / "out", at / "scratch", workers=1, device=d)
    same_curves(train, device, tmp_path)


def test_reinforcement_runs_on_the_card(device, tmp_path):
    source = dict(scenes=1, keyframes=14, points=8)
    for t in synthetic_drives(**source).token.tolist(): save_cache(straight_scene([], speed_mps=5.0, token=t), tmp_path / "caches" / f"{t}.npz")
    model = IKVLAConfig(cameras=3, merge=4, horizons=(2, 4), llm="tiny", llm_width=32, head_width=16, head_heads=2,
                        diffusion_steps=10, sample_steps=2, sample_eta=1.0, samples=1, points=8)
    shape = model.shape(12, 8)
    save_part(tmp_path / "sft/seed-0/nsp/llm", make_llm(model, shape, "nsp", 0), model, shape, run="nsp")
    save_part(tmp_path / "sft/seed-0/nsp/ik", make_head(model, shape, "ik", 0), model, shape, kind="ik")
    recipe = dict(steps=2, batch=2, group=4, lr=1e-3, warmup=0.1, clip=1.0, beta=0.0, imitate=0.01, updates=1, epsilon=None)
    chain = dict(steps=3, sigma_min=0.02, logp_floor=0.1, discount=0.6, logp_clamp=[-5.0, 2.0])
    settings = GRPOSettings.read(dict(ik=recipe, text=recipe, chain=chain, temperature=1.0, version="v1"))
    caches, sft, out, scratch = (tmp_path / n for n in ("caches", "sft", "out", "scratch"))
    curves = reinforce_arms(settings, {"synthetic": source}, caches, ["ikvla"], [0], sft, out, scratch, workers=1, device=device)
    rewards = [r["reward"] for r in curves["ikvla"][0]]
    assert len(rewards) == 2 and all(0 <= r <= 1 for r in rewards)


def test_bridges_are_read_back_from_a_card(device, tmp_path):
    "What a card wrote, a processor reads."
    w, features, traces = synthetic_windows(24)
    spanvla.train_spanvla(spanvla_settings(["interval2"]), w, features, traces, 0, tmp_path / "out", tmp_path / "scratch", device)
    model = load_model(tmp_path / "out/model")
    bridge = load_bridge(tmp_path / "out/bridges/interval2", model)
    assert bridge.layers == [0, 2] and {p.device.type for p in [*model.parameters(), *bridge.parameters()]} == {"cpu"}


def test_true_size_fits_as_counted(device):
    "Qwen2.5-0.5B in bfloat16: its weights take two bytes a parameter, and a pass leaves nothing behind."
    if not device.startswith("cuda"): pytest.skip("a card's memory is asked for")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    size = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
    model = build_llm(size, 151936, device=device).bfloat16()
    held = torch.cuda.memory_allocated() - before
    n = sum(p.numel() for p in model.parameters())
    assert n == 494_032_768 and abs(held / (2 * n) - 1) < 0.02
    with torch.inference_mode(): model(torch.zeros(1, 256, dtype=torch.long, device=device))
    assert torch.cuda.memory_allocated() - before - held < 64 * 2**20
