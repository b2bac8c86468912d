"Training on several ranks: the same curve, checkpoints that continue on another number of ranks, entries under torchrun, footprints."
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vlarepro.data.tokenizer import load_tokenizer
from vlarepro.methods.ikvla.arms import RUNS
from vlarepro.methods.ikvla.model import CompactTokenizer, DrivingLLM, HFTokenizer
from vlarepro.methods.ikvla.tasks import LanguageTask, synthetic_drives
from vlarepro.methods.ikvla.visual_state import StateShape
from vlarepro.training.lastvla import load_model
from vlarepro.training.launch import Launch, launch
from vlarepro.training.sft import SFTConfig, sft
from vlarepro.training.sharded import called_layers, sft_sharded

ROOT = Path(__file__).resolve().parent.parent
SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)
CONFIG = SFTConfig(steps=8, batch=8, lr={"llm": 1e-3}, weight_decay=0.01, warmup=0.1, clip=1.0, seed=0, ema=0.9)


def task():
    model = DrivingLLM(StateShape(12, 8, 3, 2, (1, 2), 32), CompactTokenizer(), SIZE)
    return LanguageTask(synthetic_drives(6), RUNS["nsp"], model, CompactTokenizer(), p_unknown=0.2)


def run(how, out):
    "One training run; the first rank writes its curve and weights."
    t = task()
    curve = sft_sharded(t, CONFIG, **how)
    whole = all(type(p) is torch.nn.Parameter and p.numel() for p in t.module.parameters())
    assert whole and type(t.model.llm.model.layers[0]).__name__ == "Qwen2DecoderLayer", "the module is not whole again"
    t.loss(list(range(2)), torch.rand(2, t.words))                   # and works
    if dist.is_initialized() and dist.get_rank(): return
    torch.save({"curve": curve, "weights": {k: v.clone() for k, v in t.module.state_dict().items()}}, out)


def rank_main(rank, world, folder, jobs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    try:
        for name, how in jobs.items(): run(how, Path(folder) / f"{name}.pt")
    finally: dist.destroy_process_group()


def ranks(world, folder, jobs, method="spawn"):
    torch.multiprocessing.start_processes(rank_main, (world, str(folder), jobs), nprocs=world, start_method=method)


def all_runs(folder, method="spawn"):
    "Every run that the tests compare, two starts of two ranks and one of four in all."
    run({}, folder / "one.pt")
    run({"resume": folder / "from1", "stop_at": 3}, folder / "unused.pt")
    shutil.copytree(folder / "from1", folder / "from1-four")
    ranks(2, folder, {"two": {}, "stopped": {"resume": folder / "from2", "stop_at": 3}, "one-two": {"resume": folder / "from1"},
                      "pieces": {"accumulate": 2, "recompute": True}, "copies": {"shard": False}}, method)
    for to in ("two", "one"): shutil.copytree(folder / "from2", folder / f"from2-{to}")
    ranks(4, folder, {"one-four": {"resume": folder / "from1-four"}, "two-four": {"resume": folder / "from2"}}, method)
    run({"resume": folder / "from2-one"}, folder / "two-one.pt")
    return {p.stem: torch.load(p, weights_only=True) for p in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory): return all_runs(tmp_path_factory.mktemp("scale"))


def apart(a, b):
    "Largest difference of two runs: losses, weights."
    assert [x["step"] for x in a["curve"]] == [x["step"] for x in b["curve"]]
    losses = max(abs(x[k] - y[k]) for x, y in zip(a["curve"], b["curve"]) for k in x)
    return losses, max(float((v.double() - b["weights"][k].double()).abs().max()) for k, v in a["weights"].items())


def test_one_rank_is_sft_bit_for_bit(runs):
    t = task()
    assert sft(t, CONFIG) == runs["one"]["curve"]
    assert all(torch.equal(v, runs["one"]["weights"][k]) for k, v in t.module.state_dict().items())


def test_layers_that_the_loss_calls_are_divided():
    t = task()
    assert called_layers(t) == list(t.model.llm.model.layers[:-1]), "IK-VLA reaches into its last layer: it must stay whole"


@pytest.mark.parametrize("name", ["two", "copies", "pieces"])
def test_two_ranks_have_the_curve_of_one(runs, name):
    losses, weights = apart(runs["one"], runs[name])
    assert losses < 1e-5 and weights < 2e-4, (losses, weights)
    assert runs["one"]["curve"][-1]["loss"] < 0.98 * runs["one"]["curve"][0]["loss"], "nothing was learned: the comparison says nothing"


@pytest.mark.parametrize("name", ["one-two", "two-one", "one-four", "two-four"])
def test_a_checkpoint_continues_on_another_number_of_ranks(runs, name):
    "Against the run that was never stopped, from the first step to the last."
    losses, weights = apart(runs["one"], runs[name])
    assert losses < 1e-5 and weights < 2e-4, (losses, weights)


def test_stopping_without_a_checkpoint_would_be_seen(runs):
    "The comparison above can fail: a run that starts its last steps from fresh weights is far away."
    fresh = {"curve": runs["one"]["curve"], "weights": {k: v.clone() for k, v in task().module.state_dict().items()}}
    assert apart(runs["one"], fresh)[1] > 1e-3


SETTINGS = dict(model=dict(backbone=SIZE, large="tiny", family="qwen2.5-vl", views=3, cameras=[1], grid=[1, 2, 2], n_dyn=1, n_geo=1, adapter_width=16,
                           adapter_layers=1, vocab=300, numbers=False),
                weights=dict(stage1=[1, 1, .1], stage2=[.1, .1, 1], joint=[1, 1, 1]), see=0.7,
                **{k: dict(steps=3, batch=8, lr=1e-3, weight_decay=0.0, warmup=0.1, clip=1.0, ema=0.0) for k in ("base", "stage1", "stage2", "questions")})


def test_lastvla_entry_trains_the_same_alone_and_with_two_ranks(tmp_path, monkeypatch):
    "By `sft` and by `sft_sharded`, each under torchrun, against one process."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    weights = {}
    for name, nproc in (("alone", 1), ("two", 2), ("divided", 2)):
        config = dict(stage="sft", settings=SETTINGS, source={"synthetic": {"n": 24}}, arms=["full"], questions=[], seeds=[0], out=str(tmp_path / name),
                      scratch=str(tmp_path / f"scratch-{name}"), workers=1, device="cpu", threads=1)
        how = Launch() if nproc == 1 else Launch("torchrun", nproc)
        module = "vlarepro.training.lastvla_entry"
        if name == "divided":
            (tmp_path / "inner.json").write_text(json.dumps(config))
            module = "vlarepro.training.scale_entry"
            config = dict(entry="lastvla_entry", config=str(tmp_path / "inner.json"), accumulate=2, recompute=True, shard=True, save_every_s=600)
        launch(module, config, how, tmp_path / f"launch-{name}")
        assert {p.parent.name for p in (tmp_path / name).rglob("config.json")} >= {"base", "full", "full@stage1"}
        tokenizer = HFTokenizer(load_tokenizer(tmp_path / name / "tokenizer"))
        weights[name] = load_model(tmp_path / name / "seed-0" / "full", tokenizer).state_dict()
    # halves of a batch are averaged half by half, so a mean over tokens weighs them a little differently: near, not equal
    for name in ("two", "divided"):
        far = max(float((weights["alone"][k].float() - weights[name][k].float()).abs().max()) for k in weights["alone"])
        assert far < 1e-2, (name, far)


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed (extra scale)")
def test_a_job_goes_through_submitit_and_is_waited_for(tmp_path):
    "With submitit's local executor, as there is no SLURM here; the module writes the hardware over its argument."
    job = launch("vlarepro.core.hardware", {}, Launch("slurm", slurm={"cluster": "local", "timeout_min": 5}), tmp_path)
    assert job and "processor" in json.loads((tmp_path / "config.json").read_text())
