"IK-VLA's second stage: policies, exact resume of both arms, scene caches that do not fit, scores of many arms."
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlarepro.core.seeds import torch_rng
from vlarepro.data.windows import load_windows
from vlarepro.evaluation.navsim_arms import NavsimScores, load_scores, save_scores, score_log
from vlarepro.methods.ikvla.arms import ARMS, RUNS
from vlarepro.methods.ikvla.ik_network import IKNetwork, ik_plan
from vlarepro.methods.ikvla.model import CompactTokenizer, DrivingLLM
from vlarepro.methods.ikvla.planner import IKVLAConfig, load_part, make_head, make_llm, run_config, save_part
from vlarepro.methods.ikvla.tasks import HeadTask, LanguageTask, cache_states, synthetic_drives
from vlarepro.scoring.pdm.scene import save_cache, straight_scene
from vlarepro.training.grpo import TIMES, grpo
from vlarepro.training.ikvla import plan_arms
from vlarepro.training.ikvla_grpo import GRPOSettings, IKPolicy, TextPolicy, reinforce, scenes_of
from vlarepro.training.policies import ChainConfig
from vlarepro.training.sft import SFTConfig, sample_uniform, sft

SOURCE = dict(scenes=2, keyframes=14, points=8)
CONFIG = IKVLAConfig(cameras=3, merge=4, horizons=(2, 4, 6, 8), llm="tiny", llm_width=32, head_width=16, head_heads=2, diffusion_steps=20, sample_steps=4,
                     sample_eta=1.0, samples=2, points=8)
RECIPE = dict(steps=6, batch=2, group=4, lr=3e-3, warmup=0.1, clip=1.0, beta=0.01, imitate=0.01, updates=2, epsilon=[0.2, 0.2], chunk=1)
CHAIN = dict(steps=4, sigma_min=0.02, logp_floor=0.1, discount=0.6, logp_clamp=[-5.0, 2.0])
SETTINGS = GRPOSettings.read(dict(ik=RECIPE, text=RECIPE, chain=CHAIN, temperature=1.0, version="v1"))


@pytest.fixture(scope="module")
def data(): return synthetic_drives(**SOURCE)


@pytest.fixture(scope="module")
def world(tmp_path_factory, data):
    "Supervised checkpoints (untrained) and a scene cache a sample."
    d, shape = tmp_path_factory.mktemp("ikvla-grpo"), CONFIG.shape(12, 8)
    for i, t in enumerate(data.token.tolist()):
        v = float(data.ego[i, 0])
        ahead = [(8 + v, 0.0, 0.0, 4.5, 1.9, v / 2, 0.0, 0)] if i % 2 else []
        save_cache(straight_scene(ahead, speed_mps=v, token=t), d / "caches" / f"{t}.npz")
    for run in ("nsp", "text"): save_part(d / f"sft/seed-0/{run}/llm", make_llm(CONFIG, shape, run, 0), CONFIG, shape, run=run)
    ik = make_head(CONFIG, shape, "ik", 0).fit(torch.as_tensor(data.future[..., :2], dtype=torch.float32))
    save_part(d / "sft/seed-0/nsp/ik", ik, CONFIG, shape, kind="ik")
    return d


def weights(module): return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture(scope="module")
def policies(world, data):
    model = load_part(str(world / "sft/seed-0/nsp/llm"))[0]
    states = cache_states(model, data, CompactTokenizer())
    taught = make_head(CONFIG, CONFIG.shape(12, 8), "ik", 0)
    sft(HeadTask(taught, states, "predicted", data.future[..., :2], 4),
        SFTConfig(steps=150, batch=12, lr={"head": 1e-2}, weight_decay=0.0, warmup=0.1, clip=1.0, seed=0))
    chain = ChainConfig(steps=4, sigma_min=0.02, logp_floor=0.1, discount=0.6, logp_clamp=(-5.0, 2.0))
    def make(kind):
        shape = CONFIG.shape(12, 8)
        if kind == "text": return TextPolicy(make_llm(CONFIG, shape, "text", 0).eval(), data, CompactTokenizer(), points=8)
        return IKPolicy(copy.deepcopy(taught).eval(), states, chain)
    return make


@pytest.mark.parametrize("kind", ["ik", "text"])
def test_interrupted_equals_uninterrupted(kind, policies, tmp_path):
    near = lambda rows, y: -np.linalg.norm(y[:, -1, :2] - [10.0, 0.0], axis=-1)
    config = SETTINGS.ik.config(0, "cpu", "head" if kind == "ik" else "llm")
    one, two, half = policies(kind), policies(kind), policies(kind)
    start = weights(one.module)
    first = grpo(one, near, config)
    grpo(half, near, config, tmp_path / "resume", stop_at=3)
    second = grpo(two, near, config, tmp_path / "resume")
    assert torch.equal(weights(one.module), weights(two.module)) and not torch.equal(weights(one.module), start)
    plain = lambda curves: [{k: v for k, v in c.items() if k not in TIMES} for c in curves]
    assert plain(first) == plain(second)


@pytest.mark.parametrize("kind", ["ik", "text"])
def test_reward_rises(kind, policies):
    policy = policies(kind)
    slow = lambda rows, y: -y[:, -1, 0]
    group = "head" if kind == "ik" else "llm"
    config = replace(SETTINGS.ik.config(0, "cpu", group), steps=25, batch=4, group=16, lr={group: 1e-2}, beta=0.0, imitate=0.0, updates=1,
                     epsilon=None, chunk=0)
    curves = grpo(policy, slow, config)
    first, last = (np.array([c["reward"] for c in part]) for part in (curves[:5], curves[-5:]))
    assert last.mean() > first.mean() + 1.0, (first, last)


def test_ik_chain_is_the_planner_s_sampler(policies):
    "From the same start, a chain without noise is DDIM; the planner's draws from the same network have the same mean."
    policy = policies("ik")
    u = torch.as_tensor(sample_uniform(0, 0, policy.n * 64, policy.words))
    chain = policy.sample(policy.module, torch.arange(policy.n), 64, u).outputs.reshape(policy.n, 64, 8, 3)[..., :2].mean(1)
    drawn = ik_plan(policy.module, policy.current.float(), policy.following.float(), 256, torch_rng("t"), steps=4, eta=1.0)[..., :2].mean(1).numpy()
    spread = float(policy.module.normaliser.std.max())
    assert np.abs(chain - drawn).max() < 8 * spread * 3 / 8   # eight steps, each a mean of 64 draws


def test_cached_logits_are_those_of_a_full_pass(policies):
    policy, rows = policies("text"), torch.arange(3)
    cond = policy.condition(policy.module, rows)
    tokens = policy.sample(policy.module, rows, 1, torch.as_tensor(sample_uniform(0, 0, 3, 32))).path
    full, state = policy.logits(policy.module, cond, tokens), None
    for i in range(5):
        step, state = policy.next_logits(policy.module, cond, tokens[:, :i], state)
        torch.testing.assert_close(step, full[:, i], atol=1e-4, rtol=1e-4)
    assert bool(torch.isinf(full[:, 0, policy.ids[0]]).any()), "the grammar must close what is no number"


@pytest.mark.parametrize("arm", ["ikvla", "opendrivevla"])
def test_reinforced_folder_is_planned_like_a_supervised_one(arm, world, data, tmp_path):
    reinforce(SETTINGS, data, world / "caches", arm, 0, world / "sft/seed-0", tmp_path / "out/seed-0", tmp_path / "scratch")
    before = plan_arms({"synthetic": SOURCE}, world / "sft", [arm], [0], workers=1)[arm]
    after = plan_arms({"synthetic": SOURCE}, tmp_path / "out", [arm], [0], workers=1)[arm]
    assert before.shape == after.shape == (1, len(data), 8, 3) and np.isfinite(after).all()
    run, key = {"ikvla": ("nsp", "ik"), "opendrivevla": ("text", "llm")}[arm]
    old, new = (load_part(str(f / f"seed-0/{run}/{key}"))[0] for f in (world / "sft", tmp_path / "out"))
    assert not torch.equal(weights(old), weights(new)), "training must not touch the supervised checkpoint, and must change its own"
    if arm == "ikvla":
        kept = [weights(load_part(str(f / "seed-0/nsp/llm"))[0]) for f in (world / "sft", tmp_path / "out")]
        assert torch.equal(*kept), "the language model stays as it is"


def test_misfits_are_refused(world, data, tmp_path):
    with pytest.raises(KeyError, match="cannot be reinforced"):
        reinforce(SETTINGS, data, world / "caches", "ikvl", 0, world / "sft/seed-0", tmp_path / "o", tmp_path / "s")
    with pytest.raises(ValueError, match="have no training window"): scenes_of(data.take(np.arange(2)), world / "caches")
    with pytest.raises(KeyError): GRPOSettings.read(dict(ik=RECIPE, text=RECIPE, chain=CHAIN, temperature=1.0))
    with pytest.raises(ValueError, match="predicts 6 keyframes"): run_config(replace(CONFIG, points=4), "nsp_3s")
    with pytest.raises(FileNotFoundError, match="run the windows stage"): load_windows(tmp_path / "none.npz")


@pytest.mark.parametrize("name", ["nsp_3s", "nsp_1s", "nsp_target", "nsp_narrow"])
def test_readings_differ_where_they_should(name, data):
    cfg = run_config(replace(CONFIG, points=8), name)
    model = make_llm(cfg, cfg.shape(12, 8), name, 0)
    LanguageTask(data, RUNS[name], model, CompactTokenizer()).loss(np.arange(4), torch.rand(4, 2))["nsp"].backward()
    assert cfg.horizons == (RUNS[name].horizons or CONFIG.horizons)
    rank = int(torch.linalg.matrix_rank(model.read[1].weight.detach())) if name == "nsp_narrow" else 32
    assert rank == (4 if name == "nsp_narrow" else 32)
    assert all(p.grad is not None for p in model.projector.parameters()), "the projector learns from its input in every sighted run"
    if name == "nsp_target":
        blind = DrivingLLM(cfg.shape(12, 8), CompactTokenizer(), "tiny", sees=False)
        LanguageTask(data, replace(RUNS[name], sees=False), blind, CompactTokenizer()).loss(np.arange(4), torch.rand(4, 2))["nsp"].backward()
        assert all(p.grad is not None for p in blind.projector.parameters()), "not detached: the gradient reaches the target's projector"


def test_every_arm_has_a_run_and_a_head():
    assert {a.run for a in ARMS.values() if a.run} == set(RUNS)
    assert isinstance(make_head(CONFIG, CONFIG.shape(12, 8), "ik", 0), IKNetwork)


def test_scores_of_many_arms_join(tmp_path):
    scene = straight_scene([], speed_mps=6.0, token="a")
    with pytest.raises(ValueError, match="finite plans"): score_log([scene], np.full((1, 1, 8, 3), np.nan))
    one = NavsimScores(np.array(["a"]), np.array(["log"]), {"x": (0,)}, {"v1": {"x": {"score": np.ones((1, 1))}}, "v2": {}})
    save_scores(tmp_path / "one.npz", one)
    save_scores(tmp_path / "other.npz", replace(one, token=np.array(["b"])))
    assert load_scores([tmp_path / "one.npz"]).of("v1", "x", "score").shape == (1, 1)
    with pytest.raises(ValueError, match="already read"): load_scores([tmp_path / "one.npz"] * 2)
    with pytest.raises(ValueError, match="other frames"): load_scores([tmp_path / "one.npz", tmp_path / "other.npz"])
    assert Path(tmp_path / "one.npz").exists()
