"LaST-VLA: masks by gradient, latents in both readings, training, malformed answers."
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlarepro.methods.lastvla.arms import arm, layout_of, phases
from vlarepro.methods.lastvla.model import LaSTConfig, LaSTVLA, make_tokenizer, plan_of
from vlarepro.methods.lastvla.sequence import ANSWER, GEO, IMAGE, TEXT, WM, attention_mask, find_segments, reachable, segment_table
from vlarepro.methods.lastvla.tasks import LaSTTask, derangement, fit_inputs, planning_prompts, synthetic_data, write_answers
from vlarepro.training.lastvla_grpo import LaSTReward, goal_reward


@pytest.fixture(scope="module")
def world():
    data = synthetic_data(24)
    return data, make_tokenizer(data.thoughts, 300)


def build(world, name="full", **more):
    data, tokenizer = world
    a = arm(name)
    teachers = {k: (s.shape[0], s.shape[2], data.teachers[k].values.shape[-1]) for k, s in data.slots.items() if k in a.teachers}
    cfg = LaSTConfig("tiny", layout_of(a, data.n_scene, 3, 2, 2), ((1, 2, 2),), 8, teachers, adapter_width=16, feedback=a.feedback)
    model = LaSTVLA(replace(cfg, **more), tokenizer)
    fit_inputs(model, data)
    return model.eval(), planning_prompts(data, tokenizer, model.layout, a.reasoning, False)


def test_masks_are_the_papers():
    s1, s2 = segment_table("structured"), segment_table("causal")
    assert not s1[TEXT, IMAGE] and not s1[ANSWER, IMAGE] and not s1[GEO, WM] and s1[ANSWER, WM] and s1[ANSWER, GEO] and s1[WM, IMAGE] and s1[GEO, IMAGE]
    assert bool((s2 >= s1).all()) and s2[ANSWER].all() and s2[GEO, WM]


@pytest.mark.parametrize("mask, direct", [("structured", False), ("causal", True)])
def test_image_reaches_the_answer_only_through_latents_in_stage_1(world, mask, direct):
    data, _ = world
    model, prompts = build(world)
    ids, _ = prompts.batch(np.arange(3))
    seg = find_segments(ids, model.special)
    latents = (seg == WM) | (seg == GEO)
    for cut in (False, True):
        v = data.visual(np.arange(3)).requires_grad_()
        allowed = attention_mask(seg, mask)
        if cut: allowed = allowed & ~(latents[:, None, None, :] & (seg == ANSWER)[:, None, :, None])
        h = model.vlm.run(model.embed(ids, v, data.ego(np.arange(3))), model.vlm.positions(ids, seg >= 0)[0], allowed)
        h[seg == ANSWER].square().sum().backward()
        assert (float(v.grad.abs().max()) > 0) == (direct or not cut)


def test_text_and_latents_never_learn_of_each_other_wrongly(world):
    model, prompts = build(world)
    seg = find_segments(prompts.batch(np.arange(1))[0], model.special)[0]
    known = reachable(attention_mask(seg[None], "structured")[0, 0], 20)
    for a, b in ((TEXT, IMAGE), (GEO, WM), (WM, GEO)): assert not known[seg == a][:, seg == b].any()


@pytest.mark.parametrize("name", ["full", "latent_sequential"])
def test_decoding_equals_reading_at_once(world, name):
    data, _ = world
    model, prompts = build(world, name)
    ids, _ = prompts.batch(np.arange(3))
    n = prompts.prompt.shape[1]
    with torch.no_grad():
        whole = model.vlm.logits(model.hidden(ids, data.visual(np.arange(3)), data.ego(np.arange(3))))[:, n - 1:]
        parts = model.answer_logits(model.read(ids[:, :n], data.visual(np.arange(3)), data.ego(np.arange(3))), ids[:, n:])
    assert torch.allclose(whole, parts, atol=1e-4)


def test_frozen_backbone_keeps_its_weights(world):
    data, _ = world
    model, prompts = build(world, "frozen_backbone")
    task = LaSTTask(model, data, prompts, *phases(arm("frozen_backbone"), dict(stage1=(1, 1, .1), stage2=(.1, .1, 1), joint=(1, 1, 1)))[0][1:], frozen=True)
    assert not any(p.requires_grad for p in model.vlm.parameters()) and model.slots.requires_grad
    sum(task.loss(np.arange(4), torch.zeros(4, 1)).values()).backward()
    assert model.slots.grad is not None and all(p.grad is None for p in model.vlm.parameters())


def test_malformed_answers_are_no_plans_and_get_no_reward(world):
    data, tokenizer = world
    good = planning_prompts(data, tokenizer, layout_of(arm("direct"), data.n_scene, 3, 2, 2), "none", False).answer[0].tolist()
    assert plan_of(good, tokenizer).shape == (8, 3)
    for bad in (good[:-1], good[1:], good[:5] + good[6:], [], [tokenizer.size - 1] * 4): assert plan_of(bad, tokenizer) is None
    reward = LaSTReward(lambda rows, plans: {"reward": np.ones(len(rows))}, tokenizer, data.windows.future[:, -1, :2])
    got = reward(np.zeros(2, int), [(np.array(x), np.ones(len(x), bool)) for x in (good, good[:-1])])
    assert got["reward"].tolist() == [3.0, 0.0]
    assert goal_reward(np.array([1.9, 3.9, 14.0, 99.0])).tolist() == [1.0, 0.8, 0.2, 0.0]


def test_writing_is_repeatable_and_shuffling_moves_everyone(world):
    data, tokenizer = world
    model, prompts = build(world)
    a, b = (write_answers(model, data, prompts, tokenizer, batch=8, max_new=5) for _ in range(2))
    assert a == b and len(a) == len(prompts)
    for n in (2, 3, 9): assert not (derangement(n, np.random.default_rng(n)) == np.arange(n)).any()
    with pytest.raises(ValueError, match="cannot change places"): derangement(1, np.random.default_rng(0))


def test_contradicting_arms_are_refused(world):
    with pytest.raises(KeyError, match="did you mean 'align_wm'"): arm("align_vm")
    with pytest.raises(ValueError, match="no latents to supervise"): replace(arm("direct"), teachers=("wm",))
