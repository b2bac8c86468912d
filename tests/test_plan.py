"Estimates against executed steps: parameters, bytes, operations, living memory; and the arithmetic of a plan."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlarepro.evaluation.plan import METHODS, Assumed, Card, by_stage, card, lastvla_jobs, lay, memory_parts, plan, profile_jobs, ranks_for
from vlarepro.methods.ikvla.arms import RUNS
from vlarepro.methods.ikvla.model import CompactTokenizer, DrivingLLM
from vlarepro.methods.ikvla.tasks import LanguageTask, synthetic_drives
from vlarepro.methods.ikvla.visual_state import StateShape
from vlarepro.report.cli import main
from vlarepro.training.footprint import footprint, kv_bytes, weightless
from vlarepro.training.sft import sample_rows, sample_uniform

SIZE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
DATA = synthetic_drives(6)


def task(attention="auto", run="nsp"):
    model = DrivingLLM(StateShape(12, 8, 3, 2, (1, 2, 4), 64), CompactTokenizer(), SIZE, attention=attention)
    return LanguageTask(DATA, RUNS[run], model, CompactTokenizer(), p_unknown=0.2)


def ghost(**kw):
    with weightless(): return task(**kw)


@pytest.mark.parametrize("run", ["nsp", "text"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_weightless_step_counts_what_an_executed_one_does(run, bf16):
    assert footprint(ghost(run=run), 8, bf16) == footprint(task(run=run), 8, bf16)


def test_operations_and_parameters_are_those_that_pytorch_measures():
    "With attention written out as products, PyTorch's own counter sees all of it."
    t, f = task("eager"), footprint(ghost(attention="eager"), 8)
    rows, u = sample_rows(0, 0, 8, t.n), torch.as_tensor(sample_uniform(0, 0, 8, t.words), dtype=torch.float32)
    with FlopCounterMode(display=False) as c: loss = sum(t.loss(rows, u).values())
    assert f.forward_flops == c.get_total_flops() > 1e6
    with FlopCounterMode(display=False) as c: loss.backward()
    assert f.backward_flops == c.get_total_flops()
    params = list(t.module.parameters())
    numbers = sum(p.numel() for p in params)
    assert (f.parameters, f.trained, f.trained_bytes) == (numbers, numbers, sum(p.numel() * p.element_size() for p in params))


def test_fused_attention_is_counted_like_written_out():
    "Forward they are the same products; IK-VLA's fused path leaves out the last layer's unread queries, so it may only be a little less."
    fused, written = footprint(ghost(), 8), footprint(ghost(attention="eager"), 8)
    assert 0.7 * written.forward_flops < fused.forward_flops <= written.forward_flops


def test_living_bytes_are_those_of_the_allocator():
    "PyTorch's profiler reports each allocation and release of an executed step; the largest sum is what was counted."
    t = task()
    rows, u = sample_rows(0, 0, 32, t.n), torch.as_tensor(sample_uniform(0, 0, 32, t.words), dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p: sum(t.loss(rows, u).values()).backward()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    measured = int(np.cumsum([n for _, n in events]).max())
    f = footprint(ghost(), 32)
    assert abs(f.work_bytes / measured - 1) < 0.02, (f.work_bytes, measured)   # the peak lies before the first gradient


def test_work_grows_with_the_batch_and_operations_in_proportion():
    a, b = footprint(ghost(), 8), footprint(ghost(), 16)
    assert b.flops == pytest.approx(2 * a.flops, rel=1e-6) and 1.5 < b.work_bytes / a.work_bytes < 2.01


def test_recomputing_trades_memory_for_operations():
    a, b = footprint(ghost(), 32), footprint(ghost(), 32, checkpointed=True)
    assert b.work_bytes < a.work_bytes and b.backward_flops > a.backward_flops and b.forward_flops == a.forward_flops


def test_cache_bytes_are_those_of_a_cache():
    from transformers import DynamicCache
    t, cache = task(), DynamicCache()
    t.model.llm.model(inputs_embeds=torch.zeros(3, 7, 64), past_key_values=cache, use_cache=True)
    assert kv_bytes(t.model.llm.config, 7, 3, 4) == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


JOB = replace(next(j for j in METHODS["ikvla"]("smoke") if j.part == "nsp"), make=ghost, steps=10, batch=32)


def test_the_first_way_that_fits_is_taken():
    "Smaller and smaller cards: everything on each, divided, recomputed, in pieces, nothing."
    one = ghost()
    job, known = replace(JOB, make=lambda: one), {}
    def count(*a):
        if a[1:] not in known: known[a[1:]] = footprint(*a)
        return known[a[1:]]
    whole = lay(job, 4, card("h100-80"), count=count)
    assert (whole.how, whole.ranks, whole.micro, whole.accumulate) == ("each holds all", 4, 8, 1)
    seen, size = [whole.how], whole.memory
    for share in np.linspace(1.0, 0.05, 60):
        p = lay(job, 4, Card("small", whole.memory * share, 312e12, 19.5e12, 2e12, 3e11), Assumed(free=0.0), count)
        if p.how == "does not fit": break
        assert p.memory <= whole.memory * share and p.memory <= size * 1.0001 and p.micro * p.accumulate == 8
        size = p.memory
        if (p.how, p.micro) not in seen: seen.append((p.how, p.micro))
    hows = [s[0] for s in seen[1:]]
    assert p.how == "does not fit" and {"sharded", "sharded, recomputed"} <= set(hows) and any(m < 8 for _, m in seen[1:]), seen


def test_memory_of_a_copy_is_sixteen_bytes_a_parameter():
    f = footprint(ghost(), 4)
    parts = memory_parts(f, JOB, 1, False)
    assert parts["weights"] + parts["gradients"] + parts["optimiser"] == pytest.approx((16 + 4 * JOB.ema) * f.parameters, rel=0.01)
    divided = memory_parts(f, JOB, 4, True)
    assert divided["gradients"] == pytest.approx(f.trained_bytes - 0.75 * f.trained_layer_bytes) and 0 < f.trained_layer_bytes < f.trained_bytes


@pytest.mark.parametrize("batch, cards, ranks", [(64, 8, 8), (4, 8, 4), (6, 4, 3), (7, 4, 1), (1, 8, 1)])
def test_a_batch_divides_among_its_ranks(batch, cards, ranks): assert ranks_for(batch, cards) == ranks


def test_every_method_of_the_smallest_profile_is_planned():
    rows = plan("smoke", 2, "a100-80")
    stages = {"sft-ikvla", "sft-navsim-ikvla", "grpo-ikvla", "sft-spanvla", "rft-spanvla", "sft-specdec", "sft-lastvla", "grpo-lastvla"}
    assert {r["stage"].split("@")[0] for r in rows} == stages
    assert all(np.isfinite([r["hours"], r["memory_gb"]]).all() and r["hours"] > 0 for r in rows)
    assert sum(s["card_hours"] for s in by_stage(rows)) == pytest.approx(sum(r["card_hours"] for r in rows))


def test_a_true_size_stage_needs_to_be_divided():
    "LaST-VLA: 50 GB of states a card with 3B parameters, 140 GB with 8B; a step has more than six operations for each parameter and token."
    small, large = (next(j for j in lastvla_jobs("paper") if j.part == f"{n} stage1") for n in ("full", "full_large"))
    p, q = lay(small, 8, card("h100-80")), lay(large, 8, card("h100-80"))
    assert p.memory < 80e9 and q.memory < 80e9 and 3.0e9 < p.counted.parameters < 3.4e9 and 8.0e9 < q.counted.parameters < 9.2e9
    assert not p.how.startswith("sharded") and q.how.startswith("sharded")
    assert p.counted.flops > 6 * 2.7e9 * 196 * p.micro and q.counted.flops > 6 * 7.5e9 * 196 * q.micro


def test_settings_decide(monkeypatch):
    "More steps, longer; nothing stands in the plan itself."
    import vlarepro.evaluation.plan as module
    was, load = plan("smoke", 2, "a100-80", ["specdec"]), module.load_config
    def more(name, profile):
        c = json.loads(json.dumps(load(name, profile)))
        for g in c.values():
            if isinstance(g, dict) and "target" in g.get("settings", {}): g["settings"]["target"]["steps"] *= 3
        return c
    monkeypatch.setattr(module, "load_config", more)
    now = plan("smoke", 2, "a100-80", ["specdec"])
    for a, b in zip(was, now): assert b["hours"] == pytest.approx(a["hours"] * (3 if a["part"] == "target" else 1))


def test_command(capsys):
    assert main(["plan", "--profile", "smoke", "--method", "specdec", "--gpus", "2", "--card", "h200", "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["stages"][0]["fits"] and d["jobs"][0]["how"] == "each holds all" and d["not estimated"]
    assert main(["plan", "--card", "h100", "--profile", "smoke"]) == 2 and "h100-80" in capsys.readouterr().err
    assert main(["plan", "--profile", "real"]) == 2


def test_unknown_method_is_answered():
    with pytest.raises(KeyError, match="did you mean 'ikvla'"): profile_jobs("smoke", ["ikvlaa"])
