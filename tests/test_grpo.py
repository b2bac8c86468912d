"""The GRPO trainer: its gradient, exact resume after kills, both kinds of policy, order of groups, bad rewards."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vlarepro.training.grpo import TIMES, GRPOConfig, advantages, grpo, surrogate
from vlarepro.training.policies import ChainConfig, FlowPolicy, TokenPolicy

CONFIG = GRPOConfig(steps=8, batch=3, group=4, lr={"all": 0.02}, weight_decay=0.01, warmup=0.1, grad_clip=1.0, seed=0, beta=0.1, advantage="std", chunk=2)


class Words(TokenPolicy):
    n = 5

    def __init__(self):
        super().__init__(length=5, end=0, temperature=0.8)
        torch.manual_seed(0)
        self.module = nn.Embedding(25, 4)
        self.groups = {"all": list(self.module.parameters())}

    def condition(self, module, rows): return rows

    def logits(self, module, cond, tokens):
        last = torch.cat([torch.full((len(cond), 1), 4), tokens], 1)
        return module(cond[:, None] * 5 + last)


class Flow(FlowPolicy):
    n = 5

    def __init__(self):
        super().__init__((3, 1), ChainConfig(steps=3, sigma_min=0.2, logp_floor=0.1, discount=0.6))
        torch.manual_seed(0)
        self.module = nn.Linear(4, 3)
        self.groups = {"all": list(self.module.parameters())}

    def predict(self, module, x, t, cond): return module(torch.cat([x.flatten(1), t[:, None]], 1)).reshape(x.shape)


def words_reward(rows, y): return (y == 2).mean(1) + 0.1 * rows
def flow_reward(rows, y): return -np.abs(y[:, :, 0] - 1).mean(1)


KINDS = {"tokens": (Words, words_reward), "flow": (Flow, flow_reward)}
both = pytest.mark.parametrize("kind", KINDS)


def weights(p): return torch.cat([x.detach().flatten() for x in p.module.parameters()])
def plain(curves): return [{k: v for k, v in c.items() if k not in TIMES} for c in curves]


def test_surrogate_gradient_is_the_hand_written_one():
    g = torch.Generator().manual_seed(0)
    logp, old, ref = (torch.randn(6, 3, generator=g, dtype=torch.float64) * 0.3 - 1 for _ in range(3))
    a, w = torch.randn(6, generator=g, dtype=torch.float64), torch.tensor([0.36, 0.6, 1.0], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]] * 2, dtype=torch.bool)
    x = logp.clone().requires_grad_(True)
    loss, _, share = surrogate(x, old, a, mask, w, ref, 0.3, (0.1, 0.2), "sample")
    loss.backward()
    want, clipped = np.zeros((6, 3)), 0
    for i in range(6):
        n = int(mask[i].sum())
        for k in range(n):
            ratio = float((logp[i, k] - old[i, k]).exp())
            out = (a[i] > 0 and ratio > 1.2) or (a[i] < 0 and ratio < 0.9)
            clipped += out
            slope = 0.0 if out else -float(w[k] * a[i]) * ratio
            slope += 0.3 * (1 - float((ref[i, k] - logp[i, k]).exp()))
            want[i, k] = slope / n / 6
    assert clipped > 0
    np.testing.assert_allclose(x.grad.numpy(), want, atol=1e-12)
    assert float(share) == pytest.approx(clipped / int(mask.sum()))


@both
def test_logp_repeats_what_was_drawn(kind):
    p = KINDS[kind][0]()
    u = torch.as_tensor(np.random.default_rng(0).random((12, p.words)))
    r = p.sample(p.module, torch.arange(3), 4, u)
    if kind == "flow":
        step, sigma = p.step(p.module, r.path[:, 1], torch.ones(12), None)
        want = torch.distributions.Normal(step, 0.2).log_prob(r.path[:, 2]).flatten(1).sum(1)
        torch.testing.assert_close(p.logp(p.module, r)[:, 1], want)
    else:
        lp = (p.module(torch.arange(3).repeat_interleave(4) * 5 + 4) / 0.8).log_softmax(-1)
        torch.testing.assert_close(p.logp(p.module, r)[:, 0], lp[torch.arange(12), r.path[:, 0]])
        ended = (r.path == 0).cumsum(1) > 1
        assert ended.any() and not r.mask[ended].any() and (p.logp(p.module, r)[ended] == 0).all()


@both
def test_improves(kind):
    make, reward = KINDS[kind]
    curves = grpo(make(), reward, replace(CONFIG, steps=40, group=8, lr={"all": 0.05}, beta=0.0))
    assert curves[-1]["reward"] > curves[0]["reward"] + 0.15


@both
@pytest.mark.parametrize("extra", [{}, {"updates": 2, "epsilon": (0.2, 0.28), "imitate": 0.1}])
def test_interrupted_at_any_step_equals_uninterrupted(kind, extra, tmp_path):
    make, reward = KINDS[kind]
    config, whole, calls = replace(CONFIG, **extra), make(), [0]
    curves = grpo(whole, reward, config)

    def stops(rows, y):
        calls[0] += 1
        if calls[0] in (4, 11): raise KeyboardInterrupt
        return reward(rows, y)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): grpo(make(), stops, config, tmp_path / "r.safetensors", save_every_s=0)
    last = make()
    again = grpo(last, stops, config, tmp_path / "r.safetensors", save_every_s=0)
    assert torch.equal(weights(whole), weights(last))
    assert plain(curves) == plain(again)


def test_killed_process_continues_to_the_same_bits(tmp_path):
    code = (f"import sys, os, signal; sys.path.insert(0, {str(os.path.dirname(__file__))!r})\n"
            "import test_grpo as t\ncalls = [0]\n"
            "def reward(rows, y):\n    calls[0] += 1\n    if calls[0] == 9: os.kill(os.getpid(), signal.SIGKILL)\n    return t.words_reward(rows, y)\n"
            f"t.grpo(t.Words(), reward, t.CONFIG, {str(tmp_path / 'r')!r}, save_every_s=0)\n")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    whole, last = Words(), Words()
    grpo(whole, words_reward, CONFIG)
    grpo(last, words_reward, CONFIG, tmp_path / "r")
    assert torch.equal(weights(whole), weights(last))


def test_another_start_is_not_resumed(tmp_path):
    grpo(Words(), words_reward, CONFIG, tmp_path / "r", stop_at=2)
    other, fresh = Words(), Words()
    with torch.no_grad(): other.module.weight[0, 0] += 1; fresh.module.weight[0, 0] += 1
    with pytest.warns(UserWarning, match="other settings"): grpo(other, words_reward, CONFIG, tmp_path / "r")
    grpo(fresh, words_reward, CONFIG)
    assert torch.equal(weights(other), weights(fresh))


@both
def test_chunks_change_nothing_but_rounding(kind):
    make, reward = KINDS[kind]
    a, b = make(), make()
    grpo(a, reward, replace(CONFIG, chunk=0, steps=4)), grpo(b, reward, replace(CONFIG, chunk=1, steps=4))
    torch.testing.assert_close(weights(a), weights(b), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["std", "mean", "loo", "batch"])
def test_advantages_follow_permutations(kind):
    g = torch.Generator().manual_seed(1)
    r, rows, cols = torch.rand(5, 6, generator=g), torch.randperm(5, generator=g), torch.randperm(6, generator=g)
    torch.testing.assert_close(advantages(r, kind)[rows][:, cols], advantages(r[rows][:, cols], kind))
    torch.testing.assert_close(advantages(r, kind).sum(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages(r + torch.arange(5)[:, None], kind), advantages(r, kind), atol=1e-4, rtol=1e-3)


def test_reward_errors_name_the_sample():
    def breaks(rows, y):
        if 3 in rows: raise ZeroDivisionError("no progress")
        return words_reward(rows, y)
    with pytest.raises(RuntimeError, match=r"row 3, answer \d+ of the run: ZeroDivisionError: no progress"): grpo(Words(), breaks, CONFIG)
    with pytest.raises(FloatingPointError, match=r"nan for row 2, answer \d+"): grpo(Words(), lambda rows, y: np.where(rows == 2, np.nan, 0.0), CONFIG)
    with pytest.raises(ValueError, match="one number an answer"): grpo(Words(), lambda rows, y: [1.0], CONFIG)
    with pytest.raises(KeyError, match="'reward'"): grpo(Words(), lambda rows, y: {"score": rows}, CONFIG)


@pytest.mark.parametrize("bad", [{"group": 1}, {"advantage": "z"}, {"aggregate": "max"}, {"updates": 0}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError): replace(CONFIG, **bad)
