"IK-VLA: what the notebooks do not show because it is slower or nastier."
import inspect

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Every arm, trained by one call, as a stage does: arms that share a run share its training."
    folder = tmp_path_factory.mktemp("arms")
    train_arms(IKVLASettings.read(SETTINGS), {"synthetic": {"scenes": 4}}, list(ARMS), [0], folder / "out", folder / "scratch", workers=1)
    return folder / "out"


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_and_plans(name, trained, data):
    plans = plan_table(trained / "seed-0", [name], data)[name]
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


@pytest.mark.parametrize("name", ["ikvla_wo_diffusion", "direct_blind"])
def test_shared_run_equals_separate_runs(name, trained, tmp_path):
    "An arm that shares a language-model run gets the same weights as when trained alone: sharing is exact."
    train_arms(IKVLASettings.read(SETTINGS), {"synthetic": {"scenes": 4}}, [name], [0], tmp_path / "one", tmp_path / "scratch", workers=1)
    a, b = weights(trained), weights(tmp_path / "one")
    assert b and set(b) < set(a) and all(a[k] == b[k] for k in b)


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
