"""The gate's heads: a mirrored drive is a drive, and the sighted planner is the blind one plus what it sees."""

from dataclasses import replace

import numpy as np
import torch

from vlarepro.core.seeds import rng
from vlarepro.data.planner import arc_path
from vlarepro.data.sample import COMMANDS, DT_S
from vlarepro.evaluation.gate import GateData, HeadFit, _ego_inputs, converged, fit_head, gate_errors, held_out, plan_ade

FIT = HeadFit(
    steps=60,
    batch=64,
    lr=3e-3,
    weight_decay=0.01,
    warmup=5,
    dropout=0.1,
    width=32,
    token_code=4,
    attention_width=16,
    see_steps=120,
    see_dropout=0.1,
    see_code=4,
    see_noise=0.1,
    held_steps=40,
    ik_steps=20,
    ik_batch=32,
    ik_lr=1e-3,
)
COLUMNS = ("ego", "history", "command")


def drives(n, key):
    "Ego status, history and commands at random, as columns, with the history's difference from the extrapolation."
    g = rng("test-gate", key)
    ego = g.normal(0, 1, (n, 6)) * [3, 0.2, 1, 1, 0.2, 0.1] + [8, 0, 0, 0, 0, 0]
    table = dict(ego=ego, history=g.normal(0, 5, (n, 4, 3)), history_valid=np.ones((n, 4)), command=g.integers(0, 4, n))
    return table, table["history"] - arc_path(ego[:, 0], ego[:, 1], ego[:, 4], -DT_S * np.arange(4, 0, -1))


def test_a_mirrored_drive_has_the_mirrored_inputs():
    table, past = drives(50, "mirror")
    swap = np.array([COMMANDS.index({"left": "right", "right": "left"}.get(c, c)) for c in COMMANDS])
    other = dict(
        table, ego=table["ego"] * [1, -1, 1, -1, -1, -1], history=table["history"] * [1, -1, -1], command=swap[table["command"]]
    )
    e = other["ego"]
    past_of_other = other["history"] - arc_path(e[:, 0], e[:, 1], e[:, 4], -DT_S * np.arange(4, 0, -1))
    assert np.allclose(_ego_inputs(table, past, COLUMNS, True), _ego_inputs(other, past_of_other, COLUMNS, False))
    assert not np.allclose(_ego_inputs(table, past, COLUMNS, True), _ego_inputs(table, past, COLUMNS, False))


def world(tell):
    "The future brakes in half of the samples; tokens say in which (or, with tell=0, nothing)."
    g, k, n = rng("test-gate-world"), 12, 720
    speed, red = g.uniform(4, 12, n), g.random(n) < 0.5
    t = DT_S * np.arange(1, 7)
    future = np.stack([speed[:, None] * t - 0.6 * red[:, None] * t**2, np.zeros((n, 6))], -1)
    states = g.normal(0, 1, (n, 4, 6))
    states[:, 2, 0] += tell * 6 * red
    ego = torch.as_tensor(np.c_[(speed - 8) / 2.3, np.zeros(n)], dtype=torch.float32)
    f32 = lambda a: torch.as_tensor(a, dtype=torch.float32)
    base = np.stack([speed[:, None] * t, np.zeros((n, 6))], -1)
    split = np.repeat(np.array(["train", "dev", "val"])[np.digitize(np.arange(n // k), [40, 50])], k)
    now = torch.arange(n)
    return GateData(
        ego, f32(states).half(), now, now[:, None].expand(-1, 6), f32(future), f32(base), np.linalg.norm(base - future, axis=-1).mean(1), {},
        np.repeat(np.arange(n // k), k), split, ego,
    )


def test_the_sighted_planner_starts_as_the_blind_one():
    data = world(1.0)
    blind = fit_head("blind", data, data.rows("train"), FIT, 0)
    direct = fit_head("direct", data, data.rows("train"), replace(FIT, lr=0.0), 0, blind(np.arange(len(data.now))))
    assert torch.allclose(direct(data.rows("val")), blind(data.rows("val")), atol=1e-5)


def test_seeing_helps_only_if_the_tokens_tell():
    for tell in (1.0, 0.0):
        data = world(tell)
        errors, log = gate_errors(data, replace(FIT, steps=200, held_steps=200, see_steps=200), (0, 1), "val", arms=("blind", "direct"))
        gain = errors["blind"].mean() - errors["direct"].mean()
        assert gain > 0.5 * errors["blind"].mean() if tell else abs(gain) < 0.15 * errors["blind"].mean()
        assert {(x["arm"], x["seed"]) for x in log} == {(a, s) for a in ("blind", "direct") for s in (0, 1)}
        assert errors["direct"].shape == (2, len(data.rows("val")))


def test_left_out_scenes_are_left_out():
    data = world(0.0)
    rows = data.rows("train")
    parts = [held_out(data, rows, replace(FIT, held_steps=5), 0, p) for p in range(3)]
    places = np.concatenate([a for a, _ in parts])
    assert np.array_equal(np.sort(places), np.arange(len(rows)))
    own = [set(data.scene[rows[a]]) for a, _ in parts]
    assert not (own[0] & own[1] or own[0] & own[2] or own[1] & own[2])
    data.future[torch.as_tensor(rows[parts[1][0]])] += 50.0
    assert torch.equal(held_out(data, rows, replace(FIT, held_steps=5), 0, 1)[1], parts[1][1])


def test_a_second_run_gives_the_same_bits():
    data = world(1.0)
    one, two = (fit_head("direct", data, data.rows("train"), FIT, 3)(data.rows("val")) for _ in range(2))
    assert torch.equal(one, two)


def test_the_search_keeps_the_best_length():
    data = world(0.0)
    plan, tried = converged(data, replace(FIT, steps=10), 0)
    assert 2 <= len(tried) <= 3 and [x["steps"] for x in tried] == [10 * 2**i for i in range(len(tried))]
    assert np.isclose(plan_ade(plan, data, data.rows("dev")).mean(), min(x["dev_ade"] for x in tried))
