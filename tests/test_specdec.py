"""Two reasoners: the draft's switch, losslessness with every arm, and what each arm may and may not see."""

import numpy as np
import pytest
import torch

from vlarepro.decoding.speculate import uniforms
from vlarepro.methods.specdec.arms import ARMS, ReplicaDraft, draft_config, feature_pass, write_texts
from vlarepro.methods.specdec.draft import BlockDrafter, DraftConfig, RoutineDraft, block_logits
from vlarepro.methods.specdec.prompt import Layout, toy_traces
from vlarepro.methods.specdec.target import Target, TargetConfig, lean, prompt_inputs, sequences, write

LAYOUT, N = Layout(1, 2, 2, 2), 24
MAIN = DraftConfig(2, 2, 1, 64, 8, "flat", (0, 1))


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3-vl"])
def world(request):
    "A target with random weights, its texts, and the features of whole sequences."
    toy, features, tokenizer = toy_traces(N, layout=LAYOUT)
    target = Target(TargetConfig(request.param, "tiny", LAYOUT, 8, -(-len(tokenizer) // 64) * 64), tokenizer).eval().requires_grad_(False)
    text, length, plans = write_texts(target, toy, features, np.arange(N), 24)
    decoder = lean(target, N, 24, (0, 1))
    s = sequences(toy, np.arange(N), features, LAYOUT, tokenizer, text, length)
    return target, toy, features, text, length, plans, decoder, s


def make(world, arm, seed=0):
    decoder = world[6]
    return RoutineDraft(draft_config(arm, MAIN, 64), decoder.embedding, decoder.head, LAYOUT, seed, frequent=torch.arange(decoder.head.shape[0]))


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_leaves_text_and_plan_as_they_are(world, arm):
    target, toy, features, text, length, plans, decoder, _ = world
    out, paths = write(target, decoder, toy, np.arange(N), features, 24, BlockDrafter(make(world, arm), decoder))
    assert out.tokens == [t[:n].tolist() for t, n in zip(text, length)]
    assert np.abs(paths.numpy() - plans).max() < 1e-3


def test_sampled_text_and_plan_too(world):
    target, toy, features, *_, decoder, _ = world
    u = uniforms(1, N, 64)
    plain, a = write(target, decoder, toy, np.arange(N), features, 24, None, 0.6, u)
    got, b = write(target, decoder, toy, np.arange(N), features, 24, BlockDrafter(make(world, "flatrope"), decoder), 0.6, u)
    assert got.tokens == plain.tokens and float((a - b).abs().max()) < 1e-3


def test_positions_are_the_only_difference(world):
    "Same weights, same inputs: flat and M-RoPE drafts differ in ids alone, and those matter."
    target, *_, decoder, s = world
    flat, mrope = make(world, "flatrope"), make(world, "mrope")
    assert all(torch.equal(a, b) for a, b in zip(flat.state_dict().values(), mrope.state_dict().values()))
    features, positions = feature_pass(target, decoder, s)
    anchors = torch.full((N, 1), s.start + 3)
    a, b = (block_logits(d, features, s.ids, positions, anchors).detach() for d in (flat, mrope))
    assert float((a - b).abs().max()) > 1e-4
    same = torch.arange(positions.shape[2]).expand(3, N, -1)                      # ids that agree: nothing differs
    a, b = (block_logits(d, features, s.ids, same, anchors).detach() for d in (flat, mrope))
    assert float((a - b).abs().max()) < 1e-5


@pytest.mark.parametrize("arm", ["flatrope", "mrope", "stateless"])
def test_a_guess_never_sees_what_is_not_committed(world, arm):
    "Features and tokens from the anchor on do not reach the guesses."
    target, *_, decoder, s = world
    draft = make(world, arm)
    features, positions = feature_pass(target, decoder, s)
    anchors = torch.full((N, 1), s.start + 3)
    before = block_logits(draft, features, s.ids, positions, anchors)
    later, ids = features.clone(), s.ids.clone()
    later[:, s.start + 3:] = 7.0
    ids[:, s.start + 4:] = 1
    assert torch.equal(before, block_logits(draft, later, ids, positions, anchors))
    later = features.clone()
    later[:, s.start + 2] += 1.0
    assert not torch.equal(before, block_logits(draft, later, s.ids, positions, anchors))
    later = features.clone()
    later[:, :LAYOUT.visual] += 1.0
    assert torch.equal(before, block_logits(draft, later, s.ids, positions, anchors)) == (arm == "stateless")


def test_the_draft_trains_the_target_never(world):
    target, *_, decoder, s = world
    draft = make(world, "flatrope")
    features, positions = feature_pass(target, decoder, s)
    block_logits(draft, features, s.ids, positions, torch.full((N, 1), s.start)).sum().backward()
    assert all(p.grad is None for p in target.parameters()) and draft.fuse.weight.grad is not None
    assert not any(k.startswith(("embedding", "head")) for k in draft.state_dict())


def test_replica_is_a_lossless_draft(world):
    target, toy, features, text, length, plans, decoder, _ = world
    replica = Target(target.config, target.tokenizer, seed=9).eval()
    draft = ReplicaDraft(replica, prompt_inputs(replica, toy, np.arange(N), features), N, 24, guesses=2)
    out, _ = write(target, decoder, toy, np.arange(N), features, 24, draft)
    assert out.tokens == [t[:n].tolist() for t, n in zip(text, length)] and draft.block == 3
    same = ReplicaDraft(target, prompt_inputs(target, toy, np.arange(N), features), N, 24, guesses=2)     # a copy of the target is always right
    out, _ = write(target, decoder, toy, np.arange(N), features, 24, same)
    assert all(r == 2 for rounds in out.rounds for r in rounds[:-1])
