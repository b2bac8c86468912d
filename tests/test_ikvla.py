"IK-VLA: what the notebooks do not show because it is slower, nastier or needs a second process."
import inspect
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from vlarepro.core.seeds import torch_rng
from vlarepro.methods.ikvla.arms import ARMS, RUNS, arm, build_head
from vlarepro.methods.ikvla.ik_network import ik_loss, ik_plan, random_steps, to_path, to_steps
from vlarepro.methods.ikvla.model import CompactTokenizer, DrivingLLM, number, parse_trajectory, trajectory_text
from vlarepro.methods.ikvla.planner import plan_table
from vlarepro.methods.ikvla.tasks import HeadTask, LanguageTask, cache_states, current_features, synthetic_drives
from vlarepro.methods.ikvla.visual_state import StateShape
from vlarepro.training.ikvla import IKVLASettings, train_arms
from vlarepro.training.sft import SFTConfig, sft

SHAPE = StateShape(n_tokens=12, feature_width=8, cameras=3, merge=2, horizons=(1, 2, 3, 4, 5, 6), width=32)
PHASE = dict(steps=6, batch=4, lr=1e-3, weight_decay=0.01, warmup=0.2, clip=1.0, ema=0.9)
MODEL = dict(cameras=3, merge=2, horizons=[1, 2, 3, 4, 5, 6], llm="tiny", llm_width=32, head_width=16, head_heads=2, diffusion_steps=20,
             sample_steps=4, sample_eta=0.0, samples=2)
SETTINGS = dict(model=MODEL, language=PHASE, heads=PHASE, direct=PHASE, head_lr=1e-3, p_front=0.0, p_unknown=0.1, levels=2)


@pytest.fixture(scope="module")
def data(): return synthetic_drives(4)


@pytest.fixture(scope="module")
def model(): return DrivingLLM(SHAPE, CompactTokenizer(), "tiny")


def weights(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_and_plans(name, tmp_path, data):
    train_arms(IKVLASettings.read(SETTINGS), {"synthetic": {"scenes": 4}}, [name], [0], tmp_path / "out", tmp_path / "scratch", workers=1)
    plans = plan_table(tmp_path / "out/seed-0", [name], data)[name]
    assert plans.shape == (len(data), 1, 6, 3) and np.isfinite(plans).all()


def test_stop_gradient_is_proven_by_autograd(model, data):
    "With the stop no parameter of the language model gets a gradient from the path loss; without it every kind of parameter does."
    task = LanguageTask(data, RUNS["nsp_joint"], model, CompactTokenizer(), build_head("ik", SHAPE, 16, 2, 20), levels=2)
    u = torch.rand(4, task.words, generator=torch_rng("u"))
    task.loss(np.arange(4), u)["path"].backward()
    got = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(k.startswith("llm.") for k in got) and any(k.startswith("projector") for k in got) and any(k.startswith("ego") for k in got)
    model.zero_grad()
    states = cache_states(model, data, CompactTokenizer())
    HeadTask(build_head("ik", SHAPE, 16, 2, 20), states, "predicted", data.future[..., :2], 2).loss(np.arange(4), torch.rand(4, 26))["path"].backward()
    assert all(p.grad is None for p in model.parameters())
    now, nxt = torch.randn(2, SHAPE.n, 32, requires_grad=True), torch.randn(2, 6, SHAPE.n, 32, requires_grad=True)
    ik = build_head("ik", SHAPE, 16, 2, 20)
    ik_loss(ik, now, nxt, torch.randn(2, 6, 2), *random_steps(2, 3, ik, torch_rng("n"))).backward()
    assert now.grad is None and nxt.grad is None and all(p.grad is not None for p in ik.parameters())


def test_next_state_target_gets_no_gradient(data):
    m = DrivingLLM(SHAPE, CompactTokenizer(), "tiny", sees=False)
    LanguageTask(data, RUNS["nsp_blind"], m, CompactTokenizer()).loss(np.arange(4), torch.rand(4, 2))["nsp"].backward()
    assert all(p.grad is None for p in m.projector.parameters()), "a blind model's projector only makes targets: it must stay as it is"


def test_ik_cannot_see_ego(model, data):
    "Given the visual tokens, ego status and command change nothing; and no IK-like head has a parameter they could come in by."
    for kind in ("ik", "pool", "flat"):
        head = build_head(kind, SHAPE, 16, 2, 20)
        assert not {"ego", "command", "hidden", "ids"} & set(inspect.signature(head.forward).parameters)
    states, ik = cache_states(model, data, CompactTokenizer()), build_head("ik", SHAPE, 16, 2, 20)
    other = data.take(np.arange(len(data)))
    other.ego, other.command = data.ego + 3, 3 - data.command
    changed = cache_states(model, other, CompactTokenizer())
    assert torch.equal(states["current"], changed["current"]) and not torch.equal(states["predicted"], changed["predicted"])
    plan = lambda s, nxt: ik_plan(ik, s["current"].float(), nxt.float(), 2, torch_rng("plan"))
    assert torch.equal(plan(states, states["predicted"]), plan(changed, states["predicted"]))


def test_shared_run_equals_separate_runs(tmp_path):
    "Heads that share a language-model run get the same weights as when trained alone: sharing is exact."
    s = IKVLASettings.read(SETTINGS)
    for where, arms in (("all", ["ikvla", "ikvla_wo_diffusion", "ikvla_flat", "oracle_next"]), ("one", ["ikvla_wo_diffusion"])):
        train_arms(s, {"synthetic": {"scenes": 4}}, arms, [0], tmp_path / where, tmp_path / f"scratch-{where}", workers=1)
    a, b = weights(tmp_path / "all"), weights(tmp_path / "one")
    assert set(b) < set(a) and all(a[k] == b[k] for k in b)


def test_number_of_workers_changes_nothing(tmp_path):
    s = IKVLASettings.read(SETTINGS)
    for w in (1, 2):
        threads = torch.get_num_threads()
        train_arms(s, {"synthetic": {"scenes": 4}}, ["ikvla_flat", "ego_text_only"], [0], tmp_path / str(w), tmp_path / f"s{w}", workers=w)
        torch.set_num_threads(threads)
    assert weights(tmp_path / "1") == weights(tmp_path / "2")


def test_kill_9_and_continue_bit_equal(tmp_path):
    "A process killed in the middle of training continues to the weights of an undisturbed run."
    code = ("import sys, numpy as np, torch; torch.set_num_threads(1)\n"
            "from vlarepro.methods.ikvla.tasks import *; from vlarepro.methods.ikvla.arms import *; from vlarepro.methods.ikvla.model import *\n"
            "from vlarepro.methods.ikvla.visual_state import StateShape; from vlarepro.training.sft import *; from vlarepro.models.checkpoints import *\n"
            "shape = StateShape(12, 8, 3, 2, (1, 2, 3, 4, 5, 6), 32); model = DrivingLLM(shape, CompactTokenizer(), 'tiny')\n"
            "task = LanguageTask(synthetic_drives(4), RUNS['nsp'], model, CompactTokenizer(), p_unknown=0.2)\n"
            "sft(task, SFTConfig(60, 8, {'llm': 1e-3}, 0.01, 0.1, 1.0, 0, 0.9), sys.argv[1] or None, save_every_s=0.0)\n"
            "save_checkpoint(sys.argv[2], model, {})\n")
    run = lambda resume, out: [sys.executable, "-c", code, str(resume), str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(run("", tmp_path / "whole"), check=True, env=env)
    p = subprocess.Popen(run(tmp_path / "resume", tmp_path / "killed"), env=env)
    for _ in range(6000):
        if (tmp_path / "resume").exists() or p.poll() is not None: break
        time.sleep(0.01)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path / "killed").exists(), "the kill came too late to test anything"
    subprocess.run(run(tmp_path / "resume", tmp_path / "killed"), check=True, env=env)
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")


def test_sampler_is_deterministic_and_uses_only_its_generator(model, data):
    ik, s = build_head("ik", SHAPE, 16, 2, 20), cache_states(model, data, CompactTokenizer())
    plan = lambda key, eta: ik_plan(ik, s["current"].float(), s["predicted"].float(), 3, torch_rng(key), steps=20, eta=eta)
    for eta in (0.0, 1.0):
        a = plan("a", eta)
        torch.manual_seed(123)
        assert torch.equal(a, plan("a", eta)) and not torch.equal(a, plan("b", eta))


def test_text_round_trip_and_steps():
    tok, g = CompactTokenizer(), np.random.default_rng(0)
    path = np.round(g.normal(size=(6, 2)) * [20, 5], 1)
    assert np.allclose(parse_trajectory([tok.tokens[i] for i in tok.encode(trajectory_text(path))[1:]]), path)
    assert len(tok.encode(number(123.4))) == 2
    with pytest.raises(ValueError, match="not a trajectory"): parse_trajectory(["+1", ".0", "left", ".0"])
    x = torch.as_tensor(path)[None]
    assert torch.allclose(to_path(to_steps(x))[..., :2], x)


def test_blind_runs_ignore_images(data):
    m = DrivingLLM(SHAPE, CompactTokenizer(), "tiny", sees=False)
    other = synthetic_drives(4, seed=0)
    other.features = np.zeros_like(other.features)
    a, b = (cache_states(m, d, CompactTokenizer())["predicted"] for d in (data, other))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="blind"): m.hidden(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 28), torch.zeros(1, SHAPE.n, 32))


def test_wrong_features_and_names_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="was built for"): DrivingLLM(SHAPE, CompactTokenizer(), "tiny").projector(torch.zeros(1, 10, 8))
    with pytest.raises(KeyError, match="did you mean 'ikvla_wo_ik'"): arm("ikvla_wo_ki")
    with pytest.raises(FileNotFoundError): plan_table(tmp_path, ["ikvla"], data)
    with pytest.raises(ValueError, match="front-only"): current_features(data, np.arange(2), np.array([True, False]))


def test_nan_features_stop_training(tmp_path, data):
    bad = synthetic_drives(4)
    bad.features = bad.features.copy(); bad.features[:] = np.nan
    m = DrivingLLM(SHAPE, CompactTokenizer(), "tiny")
    with pytest.raises(FloatingPointError, match="loss 'nsp' is nan at step 0"):
        sft(LanguageTask(bad, RUNS["nsp"], m, CompactTokenizer()), SFTConfig(5, 4, {"llm": 1e-3}, 0.0, 0.1, 1.0, 0))
