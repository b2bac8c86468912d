"""SpanVLA: what its notebooks do not show. Caches handed over, gradients, costs by count, log-probabilities, recipes, configurations, claims."""
from copy import deepcopy

import numpy as np
import pytest
import torch
import yaml

from vlarepro.core.params import load_config, strict
from vlarepro.core.paths import root
from vlarepro.core.seeds import rng, torch_rng
from vlarepro.data.windows import save_windows
from vlarepro.evaluation.spanvla_latency import Bench, LatencyConfig, count
from vlarepro.evaluation.spanvla_tables import SCORE_CLAIMS, scenario
from vlarepro.methods.spanvla.answers import HANDOVER, aligned, length_penalty, make_tokenizer, reasoning_text, says
from vlarepro.methods.spanvla.arms import ALIASES, ARMS, BRIDGES, arm
from vlarepro.methods.spanvla.bridge import Bridge, BridgeBlock, BridgeConfig
from vlarepro.methods.spanvla.codebook import contour, contour_distance, k_disk, segments, to_path, to_tokens
from vlarepro.methods.spanvla.model import (
    ModelConfig,
    SpanVLA,
    add_lora,
    answers_of,
    drives_of,
    load_lora,
    lora_state,
    make_codebook,
    sequence,
    synthetic_windows,
)
from vlarepro.methods.spanvla.planner import batch_of, load_bridge, load_model, plan_drives
from vlarepro.methods.spanvla.reward import BEST, RECIPES, Answer, RewardConfig, Samples, SpanReward, recipe_rows
from vlarepro.scoring.pdm.scene import straight_scene
from vlarepro.training.sft import sample_uniform
from vlarepro.training.spanvla import BridgeTask, SpanVLASettings, train_in_processes
from vlarepro.training.spanvla_rft import RFTSettings, SpanPolicy, join_drives

SIZE = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
BASE = dict(interval=2, head="flow", start="history", mode="action", width=16, waypoints=10, steps=5, noise=0.1, tau_mean=0.5, tau_std=0.25)


@pytest.fixture(scope="module")
def made():
    "A small model, its drives and a bridge."
    w, features, traces = synthetic_windows(16)
    config = ModelConfig(vlm={**SIZE, "num_hidden_layers": 4}, grids=[[1, 2, 4]] * 3, codebook=24, delta_m=0.3, vocab=400, max_reasoning=40)
    tok = make_tokenizer([reasoning_text(t) for t in traces.values()], 400, 24)
    drives = drives_of(w, features, traces, tok)
    model = SpanVLA(config, tok, make_codebook(config, drives.path, rng("test-book")), 16).eval()
    model.scale.fit(torch.as_tensor(drives.history))
    return model, drives


def test_the_cache_handed_over_is_the_models_own_attention_input(made, monkeypatch):
    model, drives = made
    rows, seen, sdpa = np.arange(3), [], torch.nn.functional.scaled_dot_product_attention
    reasons = [model.tokenizer(reasoning_text(drives.traces[i]), add_special_tokens=False).input_ids for i in rows]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, *a, **kw: (seen.append((k, v)), sdpa(q, k, v, *a, **kw))[1])
    cond = model.hand_over(*batch_of(model, drives, rows), reasons, [1, 3])
    for (k, v), layer in zip(cond.kv, (1, 3)):
        n = seen[layer][0].shape[1] // k.shape[1]
        assert torch.equal(seen[layer][0], k.repeat_interleave(n, 1)) and torch.equal(seen[layer][1], v.repeat_interleave(n, 1))
    assert not any(x.requires_grad for pair in cond.kv for x in pair)


def test_written_cache_equals_one_pass(made):
    model, drives = made
    prompt = batch_of(model, drives, np.array([2]))
    prefix = model.prefill(*prompt)
    tokens, counts = model.vlm.generate(prefix, 12, (model.handover, model.end), None, model.allow, model.on_token(prompt[3]))
    said = [tokens[0][counts[0]].tolist()]
    if said[0][-1] != model.handover:
        model.vlm.step(prefix, model.on_token(prompt[3])(torch.tensor([model.handover])))
        said[0].append(model.handover)
    cond = model.hand_over(*prompt, said, [1, 3])
    for (k, v), (k2, v2) in zip(cond.kv, model.vlm.layer_kv(prefix, [1, 3])):
        torch.testing.assert_close(k, k2, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(v, v2, atol=2e-5, rtol=1e-4)
    assert int(cond.position) == int(prefix.position)


def test_no_gradient_reaches_the_language_model(made):
    model, drives = deepcopy(made[0]), made[1]
    bridges = {n: Bridge(BridgeConfig(**{**BASE, **c}), model.vlm.config) for n, c in BRIDGES.items() if c.get("interval") != 4}
    task = BridgeTask(model, drives, bridges)
    losses = task.loss(np.arange(4), torch.as_tensor(sample_uniform(0, 0, 4, task.words), dtype=torch.float32))
    assert set(losses) == set(bridges)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.parameters())
    for n in ("interval2", "full", "last", "l1", "sequential", "latent"): assert all(p.grad is not None for p in bridges[n].parameters()), n
    assert bridges["noise_start"].first[0].weight.grad is None and bridges["history"].blocks[0].q.weight.grad is None   # unused there


def test_the_prefix_is_projected_once_a_plan(made, monkeypatch):
    model, drives = made
    bridge, calls = Bridge(BridgeConfig(**BASE), model.vlm.config).eval(), []
    old = BridgeBlock.project
    monkeypatch.setattr(BridgeBlock, "project", lambda self, s: (calls.append(1), old(self, s))[1])
    plan_drives(model, drives.take(np.arange(2)), {"b": bridge})
    assert len(calls) == len(bridge.blocks) == 2


def test_expert_cost_is_flat_in_waypoints_and_linear_in_layers():
    c = LatencyConfig({**SIZE, "num_hidden_layers": 8}, 16, "float32", "cpu", 40, [10, 50], {"equal": [3, 3]}, 1, "test")
    bench = Bench(c)
    prefix = bench.prefill("eager")
    n = {(b, w): count(lambda b=b, w=w: bench.expert("eager", prefix, b, w)) for b, w in bench.experts}
    assert all(n[b, 10] == n[b, 50] for b in ("full", "interval2", "interval4", "last", "l1"))
    steps = [n[b, 10] for b in ("last", "interval4", "interval2", "full")]                     # 1, 2, 4, 8 layers
    assert (steps[1] - steps[0]) * 2 == steps[2] - steps[1] and (steps[2] - steps[1]) * 2 == steps[3] - steps[2]
    assert n["l1", 10] < n["interval2", 10] / 3


def test_codebook_is_a_poisson_disk_and_decoding_inverts():
    g = rng("test-codebook")
    pieces = np.stack([g.uniform(0, 5, 800), g.normal(0, 0.2, 800), g.normal(0, 0.05, 800)], 1)
    book = k_disk(pieces, 64, 0.25, rng("b"))
    c = contour(book.steps)
    assert (contour_distance(c[:, None], c[None]) + 9 * np.eye(len(c)) > 0.25).all() and not book.steps[0].any()
    tokens = g.integers(0, len(book), (20, 10))
    path = to_path(book, tokens, 10)
    assert np.allclose(to_path(book, to_tokens(book, path), 10), path, atol=1e-9)   # a path of prototypes is written without loss
    assert np.allclose(segments(path), book.steps[tokens], atol=1e-9)


def test_policy_log_probabilities_are_those_of_writing(made):
    model, drives = deepcopy(made[0]), made[1]
    params = add_lora(model, 4, 4, 0.1, seed=1)
    with torch.no_grad():
        for p in params: p.add_(0.05 * torch.randn(p.shape, generator=torch_rng("lora")))
    policy = SpanPolicy(model.eval(), params, drives, np.arange(16)[::-1].copy(), None, 0.7, 6)
    u = torch.as_tensor(sample_uniform(3, 0, 4, policy.words))
    r = policy.sample(model, torch.tensor([1, 4]), 2, u)
    lp = policy.logp(model, r)
    prompt = policy.prompts(model, r.rows, 2)
    prefix, told = model.prefill(*prompt), model.on_token(prompt[3])
    for i in range(r.path.shape[1]):
        logits = model.allow(model.vlm.logits(prefix.hidden)) / 0.7
        want = logits.log_softmax(-1).gather(-1, r.path[:, i:i + 1])[:, 0] * r.mask[:, i]
        torch.testing.assert_close(lp[:, i], want, atol=2e-4, rtol=1e-3)
        model.vlm.step(prefix, told(r.path[:, i]), r.mask[:, i])
    assert len(r.outputs) == 4 and all(o.plan.shape == (10, 3) for o in r.outputs)
    lp.sum().backward()
    assert all(p.grad is not None for p in params) and model.vlm.hf.lm_head.weight.grad is None


def test_lora_starts_as_the_supervised_model_and_travels(made):
    model, drives = deepcopy(made[0]), made[1]
    before = plan_drives(model, drives.take(np.arange(3)), {}, "a").plans["a"]
    add_lora(model, 4, 4, 0.1, seed=0)
    assert np.array_equal(plan_drives(model.eval(), drives.take(np.arange(3)), {}, "a").plans["a"], before)
    state = {k: x + 0.1 for k, x in lora_state(model).items()}
    other = deepcopy(made[0])
    add_lora(other, 4, 4, 0.1, seed=5)
    load_lora(other, state)
    assert all(torch.equal(a, b) for a, b in zip(lora_state(other).values(), state.values()))


def test_placeholders_are_never_written(made):
    model, drives = made
    logits = model.allow(torch.zeros(2, len(model.closed)))
    assert torch.isinf(logits[:, [model.scene, model.ego, model.tokenizer.pad_token_id]]).all()
    assert int(model.closed.sum()) == 3


def test_reward_terms_and_signs():
    street, plan = straight_scene([], speed_mps=5.0, token="t"), np.stack([np.arange(1, 9) * 2.5, np.zeros(8), np.zeros(8)], 1)
    samples = Samples(np.array(["positive", "negative", "recovery"]), [street] * 3, np.stack([plan] * 3), np.full(3, 5.0))
    c = RewardConfig("v1", 5.0, 1.7, 1.0, 1.0, 1.0, 400.0, 0.002)
    def r(i, text="This is a straightforward scenario.", **change):
        return SpanReward(samples, RewardConfig(**{**c.__dict__, **change}))(np.array([i]), [Answer(plan, text, 5)])["reward"][0]
    assert r(1) == pytest.approx(r(0) - 5) and r(2) == pytest.approx(r(0) + 5)                  # on the reference
    assert r(1, weight=0.0) == pytest.approx(r(0))
    assert r(0, scale=10.0) == pytest.approx(10 * r(0))
    slow = "This is a complex scenario. " + "x" * 372
    assert r(0) - r(0, slow) == pytest.approx(length_penalty(slow)) == pytest.approx(0.15)
    assert r(0) - r(0, "This is a complex scenario. The car should stop and stay in its lane.") == pytest.approx(1.0)  # says stop, drives on
    with pytest.raises(ValueError, match="expected one of"): Samples(np.array(["good"]), [street], plan[None], np.zeros(1))


def test_words_of_the_world_are_understood():
    "Every action that the traces can word is read as something, unless it decides nothing."
    from vlarepro.world.traces import DOING
    plain = {"set speed tracking", "lead obstacle following", "gap-searching", "yield"}
    for (longitudinal, act), forms in DOING.items():
        for f in forms:
            text = f"The car should {f.replace('‹', '').replace('›', '')} and stay in its lane."
            assert says(text) or act == "hold speed" or longitudinal in plain, text
    assert aligned("The car should stop at the line and keep the lane.", np.zeros((8, 3)), 6.0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_add_up(recipe):
    assert sum(RECIPES[recipe]) == 6
    kind = np.repeat(["positive", "negative", "recovery"], [50, 20, 20])
    first, mix = recipe_rows(RECIPES[recipe], kind, 16, rng("r"))
    w, p, n, r = RECIPES[recipe]
    assert (len(first), len(mix)) == (16 * w, 16 * (p + n + r)) and set(kind[first]) <= {"positive"}
    assert [(kind[mix] == k).sum() for k in ("positive", "negative", "recovery")] == [16 * p, 16 * n, 16 * r]
    if w:  # arms that share a warm-up must really share it
        other, _ = recipe_rows(RECIPES[BEST], kind, 16, rng("r"))
        assert np.array_equal(first, other)


@pytest.mark.parametrize("profile", ["smoke", "laptop", "gpu", "paper"])
def test_configuration_reads_in_every_profile(profile):
    c = load_config("spanvla", profile)
    s, r = SpanVLASettings.read(c["sft"]["settings"]), RFTSettings.read(c["rft"])
    strict(LatencyConfig, c["latency"])
    assert set(c["evaluate"]) - {"traffic"} == {"frames_per_log", "most_frames", "navhard", "sweep"}
    assert {arm(a).bridge for a in r.arms if arm(a).bridge} <= set(s.bridges)
    for a in r.arms:
        for n in (RECIPES[arm(a).recipe][0], sum(RECIPES[arm(a).recipe][1:])):
            if n: r.grpo_config(round(n * r.per_thousand), 0, "cpu")
    for b in s.bridges: s.bridge_config(b)


def test_every_row_and_claim_of_the_paper_has_an_arm():
    tables = yaml.safe_load((root() / "reference/spanvla/tables.yaml").read_text())
    named = {r["arm"] for t in tables for r in t["rows"] if r["arm"]} - {"world"}
    assert named <= set(ARMS) | set(ALIASES)
    claims = yaml.safe_load((root() / "reference/spanvla/claims.yaml").read_text())
    assert {c["id"] for c in claims} == set(SCORE_CLAIMS) | {"A-C4", "A-C5", "A-C13", "A-C14"}
    for c in claims:
        if c["id"] in SCORE_CLAIMS: assert set(c["arms"]) == set(SCORE_CLAIMS[c["id"]][0]), c["id"]
    laptop = {ALIASES.get(a, a) for a in load_config("spanvla", "laptop")["rft"]["arms"]} | {"sft"}
    assert {ALIASES.get(a, a) for c in claims for a in c["arms"]} <= laptop | {"autovla"}


def test_prompts_of_two_files_join(made):
    model, drives = made
    short = drives.take(np.arange(4))
    left = ((0, 0), (3, 0))
    longer = deepcopy(short.__dict__) | {"ids": np.pad(short.ids, left, constant_values=model.tokenizer.pad_token_id), "mask": np.pad(short.mask, left)}
    both = join_drives([type(short)(**longer), short], np.concatenate([np.asarray(short.features[short.keyframe])] * 2))
    p = plan_drives(model, both, {}, "a").plans["a"]
    assert np.allclose(p[:4], p[4:], atol=1e-4)


def test_scenarios_are_labelled():
    base = dict(lateral="lane keeping", side="", components=[])
    assert scenario(base) == "others"
    assert scenario({**base, "components": [dict(kind="walker", what="pedestrian", state="crossing")]}) == "VRU"
    assert scenario({**base, "side": "left"}) == "lane bias" and scenario({**base, "lateral": "lane change"}) == "ego lane change"


def test_sequences_keep_prompt_and_answer_apart(made):
    model, drives = made
    answers = answers_of(model, drives)
    ids, mask, target = sequence(drives.ids[:4], drives.mask[:4], answers[:4], model.tokenizer.pad_token_id)
    for i in range(4): assert ids[i][target[i]].tolist() == answers[i]
    assert (answers[0].count(model.handover), answers[0][-1]) == (1, model.end) and HANDOVER in model.tokenizer.decode(answers[0])
    assert bool((mask | ~target).all())


def test_two_processes_share_a_batch(tmp_path):
    phase = dict(steps=3, batch=8, lr=1e-3, weight_decay=0.0, warmup=0.1, clip=1.0, ema=0.0)
    settings = SpanVLASettings.read(dict(
        model=dict(vlm={**SIZE, "num_hidden_layers": 3}, grids=[[1, 2, 4]] * 3, codebook=16, delta_m=0.3, vocab=400), language=phase, bridge=phase,
        expert={k: v for k, v in BASE.items() if k != "waypoints"}, bridges=["interval2"], action_weight=1.0, cot_weight=1.0, language_windows=1))
    w, features, traces = synthetic_windows(24)
    save_windows(w, tmp_path / "windows.npz")
    np.save(tmp_path / "features.npy", features)
    files = (tmp_path / "windows.npz", tmp_path / "features.npy", traces)
    logs = {n: train_in_processes(settings, *files, 0, tmp_path / f"{n}", tmp_path / f"scratch{n}", workers=n) for n in (1, 2)}
    for part in ("language", "bridges"):
        # rank 0 reports its own half of the batch, so the two runs agree in size, not in digits
        assert [r["step"] for r in logs[1][part]] == [r["step"] for r in logs[2][part]]
        assert logs[2][part][-1]["loss"] == pytest.approx(logs[1][part][-1]["loss"], rel=0.3)
    assert load_bridge(tmp_path / "2/bridges/interval2", load_model(tmp_path / "2/model")).layers == [0, 2]
    with pytest.raises(ValueError, match="torchrun"):
        train_in_processes(settings, "w", "f", {}, 0, tmp_path, tmp_path, workers=2, device="cuda")
