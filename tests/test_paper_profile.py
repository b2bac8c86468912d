"""The paper profile's models: published sizes to the last parameter, our classes at true size without memory, checkpoints by path."""

import numpy as np
import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlarepro.core.params import load_config, strict
from vlarepro.data.prompts import CHAT_TOKENS, DRIVE_TOKENS
from vlarepro.models.backbones import LLM_SIZES, build_llm, build_vit
from vlarepro.models.true_sizes import ALPAMAYO_VOCAB, WEIGHTS, build_empty, checkpoint_layers, count, has_storage, true_config, without_storage
from vlarepro.models.vlm import DrivingVLM, Grid, build_vlm, vlm_config

pytestmark = pytest.mark.xdist_group("paper_profile")
QWEN_WORDS, QWEN_TOKENS = 151_643, 151_665   # of Qwen2.5's tokenizer: the BPE, and with its own special tokens
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def qwen_like(words: int, tokens: int):
    "A byte-level tokenizer with as many entries as Qwen's: the entries beyond the bytes are never reached."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {w: i for i, w in enumerate([*alphabet, *(f"filler{i}" for i in range(words - len(alphabet)))])}
    t = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens([AddedToken(x, special=True) for x in (*CHAT_TOKENS, *(f"<|own_{i}|>" for i in range(tokens - words - len(CHAT_TOKENS))))])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    "Folders of saved tokenizers: one of Qwen's size, a small one."
    out = tmp_path_factory.mktemp("tokenizers")
    for name, sizes in {"qwen": (QWEN_WORDS, QWEN_TOKENS), "small": (300, 306)}.items():
        tok = qwen_like(*sizes)
        assert len(tok) == sizes[1]
        tok.save_pretrained(out / name)
    return out


def test_driving_tokens_are_added_to_a_pretrained_tokenizer(tokenizers):
    from vlarepro.data.tokenizer import add_driving_tokens, load_tokenizer
    tok = load_tokenizer(tokenizers / "small")
    n = len(tok)
    new = add_driving_tokens(tok, ("<one>",))
    assert new == len(tok) - n > len(DRIVE_TOKENS) and tok("<one>").input_ids == [len(tok) - 1] and add_driving_tokens(tok, ("<one>",)) == 0


# --- sizes ---

@pytest.mark.parametrize("name", [k for k, w in WEIGHTS.items() if w.parameters])
def test_count_is_the_published_one(name):
    assert count(build_empty(name)) == WEIGHTS[name].parameters


def test_every_name_of_the_paper_profile_is_in_the_table():
    "A model that the paper profile names has weights in the table, and the other way round for what our classes load."
    spanvla, lastvla, ikvla = (load_config(n, "paper") for n in ("spanvla", "lastvla", "ikvla"))
    last = lastvla["main"]["settings"]["model"]
    vit, llm = ikvla["latency"]["paper"]["vit"], ikvla["ik"]["settings"]["model"]["llm"]
    named = {spanvla["sft"]["settings"]["model"]["vlm"], last["backbone"], last["large"], llm, vit}
    assert named == {k for k, w in WEIGHTS.items() if w.loads}
    repos = {w.repo for w in WEIGHTS.values()}
    assert {spanvla["sft"]["settings"]["model"]["tokenizer"], ikvla["ik"]["settings"]["model"]["tokenizer"]} <= repos


def test_random_weight_configuration_of_the_large_model():
    "What latency stages build has the size of the checkpoint."
    with torch.device("meta"): ours = count(true_config("qwen3-vl-8b")[0](vlm_config("qwen3-vl-8b", 151_936, "qwen3-vl")))
    assert ours == WEIGHTS["qwen3-vl-8b"].parameters


# --- our classes at true size ---

def test_ikvla_at_true_size(tokenizers):
    from vlarepro.methods.ikvla.ik_network import IKNetwork, ik_loss, ik_plan, random_steps
    from vlarepro.methods.ikvla.model import EGO_WIDTH, DrivingLLM, HFTokenizer, ego_text, next_block, prompt_text
    from vlarepro.methods.ikvla.planner import IKVLAConfig
    config = strict(IKVLAConfig, load_config("ikvla", "paper")["ik"]["settings"]["model"])
    shape = config.shape(3 * 14 * 14, 384)
    tok = HFTokenizer(AutoTokenizer.from_pretrained(tokenizers / "qwen"))
    text = prompt_text(ego_text(np.ones(6), np.ones(6, bool), np.zeros((4, 3)), np.ones(4, bool), 2, "paper"), shape.n, next_block(shape.h * shape.n), "paper")
    ids = torch.tensor([tok.encode(text)] * 2)
    with without_storage():
        llm = DrivingLLM(shape, tok, LLM_SIZES[config.llm])
        now = llm.projector(torch.randn(2, shape.n_tokens, 384))
        hidden = llm.hidden(ids, torch.randn(2, EGO_WIDTH), now, tail=shape.h * shape.n + 1)
        states = llm.next_states(ids, hidden)
        assert states.shape == (2, 3, 147, 896) and not has_storage(states)
        words = llm.text_loss(ids, llm.hidden(ids, torch.randn(2, EGO_WIDTH), now), 20)
        ik = IKNetwork(shape, config.head_width, config.head_heads, points=config.points, diffusion_steps=config.diffusion_steps)
        loss = ik_loss(ik, now, states, torch.randn(2, 6, 2), *random_steps(2, 1, ik, torch.Generator().manual_seed(0)))
        (loss + words).backward()
        plan = ik_plan(ik, now, states, 1, torch.Generator().manual_seed(0), steps=2)
    assert loss.shape == () and plan.shape == (2, 1, 6, 3)
    assert tok.size == 151_936 and count(llm.llm) == WEIGHTS["qwen2.5-0.5b"].parameters
    assert llm.llm.model.layers[23].mlp.down_proj.weight.grad.shape == (896, 4864)


def test_dinov3_at_true_size():
    from vlarepro.models.backbones import patch_tokens
    with without_storage():
        vit = build_vit("dinov3-vits16")
        tokens = patch_tokens(vit, torch.randn(2, 3, 3, 224, 224))
    assert tokens.shape == (2, 3 * 14 * 14, 384) and count(vit) == WEIGHTS["dinov3-vits16"].parameters


def test_spanvla_at_true_size(tokenizers):
    from vlarepro.methods.spanvla.answers import pretrained_tokenizer
    from vlarepro.methods.spanvla.bridge import Bridge
    from vlarepro.methods.spanvla.codebook import Codebook
    from vlarepro.methods.spanvla.model import SpanVLA, add_lora, answers_of, drives_of, sequence, synthetic_windows
    from vlarepro.training.spanvla import SpanVLASettings
    paper = load_config("spanvla", "paper")
    changed = paper["sft"]["settings"]["model"] | {"pretrained": False, "tokenizer": str(tokenizers / "qwen")}
    settings = SpanVLASettings.read(paper["sft"]["settings"] | {"model": changed})
    tok = pretrained_tokenizer(settings.model.tokenizer, settings.model.codebook)
    w, features, traces = synthetic_windows(2, n_tokens=588, width=384)
    drives = drives_of(w, features, traces, tok, settings.model.waypoints, settings.model.style, settings.model.ego_token)
    book = Codebook(np.random.default_rng(0).normal(size=(settings.model.codebook, 3)))
    with without_storage():
        model = SpanVLA(settings.model, tok, book, 384)
        history = torch.as_tensor(drives.history)
        answers = [a[:settings.model.max_reasoning] for a in answers_of(_roomy(model), drives)]
        ids, mask, target = sequence(drives.ids, drives.mask, answers, tok.pad_token_id)
        losses = model.language_loss(ids, mask, target, drives.looks([0, 1]), history, torch.tensor([True, False]))
        sum(losses.values()).backward()
        bridge = Bridge(settings.bridge_config("interval2"), model.vlm.config)
        said = [[5, model.handover], [7, model.handover]]
        cond = model.hand_over(torch.as_tensor(drives.ids), torch.as_tensor(drives.mask), drives.looks([0, 1]), history, said, bridge.layers)
        plan = bridge.flow(bridge.prepare(cond, history, model.vlm.decoder.rotary_emb))
        own = count(model.vlm.hf)
        trained = add_lora(model, **paper["rft"]["lora"])
    assert set(losses) == {"language", "action"} and plan.shape == (2, 10, 3) and not has_storage(plan)
    assert cond.kv[0][0].shape[1::2] == (2, 128) and len(cond.kv) == len(bridge.layers) == 18      # every second of 36 layers, two key/value heads
    rows = model.vlm.hf.get_input_embeddings().num_embeddings
    look = count(build_empty("qwen2.5-vl-3b").model.visual)   # pixels come as encoder tokens: the vision tower is not kept
    assert rows > 151_936 and own == WEIGHTS["qwen2.5-vl-3b"].parameters - look + (rows - 151_936) * 2048
    assert sum(p.numel() for p in trained) == 36 * 8 * 2 * (2048 + 2048 + 2048 + 256)   # rank 8 on q and o, k and v


def _roomy(model):
    "The byte-level test tokenizer needs more tokens for a reasoning than Qwen's: lift the limit for the shapes' sake."
    from dataclasses import replace
    model.config = replace(model.config, max_reasoning=4096)
    return model


def test_lastvla_at_true_size(tokenizers):
    from vlarepro.methods.ikvla.model import EGO_WIDTH
    from vlarepro.methods.lastvla.model import LaSTConfig, LaSTVLA
    from vlarepro.methods.lastvla.sequence import Layout
    from vlarepro.training.lastvla import pretrained_tokenizer
    m = load_config("lastvla", "paper")["main"]["settings"]["model"]
    tok = pretrained_tokenizer(tokenizers / "qwen")
    layout = Layout(int(np.prod(m["grid"])), 3, m["n_dyn"], m["n_geo"])
    teachers = {"wm": (3, 256, 1024), "geo": (1, 256, 2048)}   # VGGT's features are 2048 wide; Cosmos' are not printed
    prompt = tok.encode("<scene_start>" + "<SCENE>" * layout.n_scene + "<scene_end><EGO>left" + layout.block())
    ids = torch.tensor([prompt + tok.encode("<trajectory>+3.5-0.2<|im_end|>")] * 2)
    with without_storage():
        model = LaSTVLA(LaSTConfig(m["backbone"], layout, (tuple(m["grid"]),), 384, teachers, m["adapter_width"], m["adapter_layers"]), tok)
        look, ego = torch.randn(2, layout.n_scene, 384), torch.randn(2, EGO_WIDTH)
        hidden = model.hidden(ids, look, ego, "structured")
        latents = model.latents(ids, hidden)
        losses = model.align(ids, hidden, {"wm": torch.randn(2, 3, 256, 1024), "geo": torch.randn(2, 1, 256, 2048)})
        target = torch.zeros_like(ids, dtype=torch.bool)
        target[:, -6:] = True
        losses["answer"] = model.answer_loss(ids, hidden, target)
        sum(losses.values()).backward()
        prefix = model.read(torch.tensor([prompt] * 2), look, ego)
    assert latents["wm"].shape == (2, 3, 12, 2048) and latents["geo"].shape == (2, 1, 12, 2048)
    assert set(losses) == {"wm", "geo", "answer"} and prefix.cache.layers[35].keys.shape == (2, 2, len(prompt), 128)
    assert model.slots.grad.shape == (48, 2048)


def test_specdec_at_true_size(monkeypatch):
    from vlarepro.methods.specdec.draft import DraftConfig, RoutineDraft, block_logits, pick_anchors
    from vlarepro.methods.specdec.prompt import Layout, toy_traces
    from vlarepro.methods.specdec.target import Target, TargetConfig, sequences, target_loss
    layout = Layout(4, 4, 10, 16)      # Alpamayo: four cameras, four frames, 160 visual tokens an image
    data, _, tok = toy_traces(2, layout=Layout(4, 4, 1, 1))
    data = type(data)(**{**data.__dict__, "frames": np.zeros((2, 4), np.int64)})
    features = np.zeros((1, 4 * 160, 384), np.float32)
    monkeypatch.setattr(Target, "smooth_history", lambda self, seed: None)   # initial numbers, which nothing here has
    with without_storage():
        target = Target(TargetConfig("qwen3-vl", "qwen3-vl-8b", layout, 384, ALPAMAYO_VOCAB), tok)
        s = sequences(data, np.arange(2), features, layout, tok)
        losses = target_loss(target, s, torch.as_tensor(data.future), 0.3)
        embedding = target.vlm.hf.get_input_embeddings().weight
        draft = RoutineDraft(DraftConfig(5, 32, 8, 12288, 16, "flat", (1, 9, 17, 25, 33), head_rows=0, theta=1e6), embedding, embedding, layout)
        anchors = pick_anchors(torch.rand(2, 3), s.start, s.length)
        logits = block_logits(draft, torch.randn(2, s.ids.shape[1], 5 * 4096), s.ids, target.positions(s.ids.shape[1], 2), anchors)
    assert layout.visual == 2560 and s.ids.shape[1] > 2610 and set(losses) == {"text", "path"}
    assert logits.shape == (2, 3, 15, ALPAMAYO_VOCAB) and not has_storage(logits)
    body = build_empty("alpamayo-r1").model.language_model
    assert count(target.vlm.decoder) == count(body)
    assert 1.0e9 < count(draft) < 1.2e9   # DFlash's draft for this target: five layers of the target's width


# --- checkpoints by path ---

def saved(tmp_path, family="qwen2.5-vl"):
    "A small Qwen-VL checkpoint as the hub has them: configuration, safetensors, tokenizer."
    model, folder = build_vlm(SMALL, 320, seed=3, family=family), tmp_path / family
    model.save_pretrained(folder)
    qwen_like(300, 306).save_pretrained(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    return model, folder


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_vlm_comes_back_by_path(tmp_path, family):
    model, folder = saved(tmp_path, family)
    back = build_vlm(str(folder), 320, family=family, pretrained=True)
    own = back.state_dict()
    assert all(torch.equal(x, own[k]) for k, x in model.state_dict().items())
    half = build_vlm(str(folder), 400, family=family, pretrained=True, dtype=torch.bfloat16)   # more tokens than the checkpoint has
    e = half.get_input_embeddings().weight
    assert e.shape == (400, 64) and e.dtype == torch.bfloat16 and torch.equal(e[:320], model.get_input_embeddings().weight.bfloat16())
    assert half.lm_head.weight.data_ptr() == e.data_ptr()      # still tied
    x = torch.rand(1, 2, 1, 3, 56, 56) if family == "qwen2.5-vl" else torch.rand(1, 2, 1, 3, 64, 64)
    patch = model.config.vision_config.patch_size
    grid = Grid(1, x.shape[-1] // patch // 2, x.shape[-1] // patch // 2)
    driving = DrivingVLM(str(folder), 320, scene_id=7, grids=[grid], visual="patches", family=family, pretrained=True)
    x = torch.rand(1, 2, 1, 3, 2 * patch * grid.h, 2 * patch * grid.w)
    ids = torch.tensor([[1, *[7] * grid.n, 2, 3]])
    assert driving(ids, torch.ones_like(ids, dtype=torch.bool), x).shape == (1, grid.n + 3, 320)


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    _, folder = saved(tmp_path)
    with pytest.raises(ValueError, match="qwen2_5_vl"): build_vlm(str(folder), 320, family="qwen3-vl", pretrained=True)


def test_language_model_and_encoder_come_back_by_path(tmp_path):
    llm, vit = build_llm(SMALL, 300, seed=1), build_vit("tiny", seed=2)
    llm.save_pretrained(tmp_path / "llm")
    vit.save_pretrained(tmp_path / "vit")
    back, grown = build_llm(str(tmp_path / "llm"), 300), build_llm(str(tmp_path / "llm"), 384, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(llm.parameters(), back.parameters()))
    assert grown.get_input_embeddings().num_embeddings == 384 and torch.equal(grown.get_input_embeddings().weight[:300], llm.get_input_embeddings().weight)
    assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), build_vit(str(tmp_path / "vit")).parameters()))


def test_methods_come_back_by_path(tmp_path):
    "SpanVLA, LaST-VLA and IK-VLA start from a checkpoint's folder through the settings that the paper profile uses."
    from vlarepro.methods.ikvla.planner import IKVLAConfig, make_llm, make_tokenizer
    from vlarepro.methods.lastvla.model import LaSTConfig, LaSTVLA
    from vlarepro.methods.lastvla.sequence import Layout
    from vlarepro.methods.spanvla.answers import pretrained_tokenizer as span_tokenizer
    from vlarepro.methods.spanvla.codebook import Codebook
    from vlarepro.methods.spanvla.model import ModelConfig, SpanVLA
    from vlarepro.training.lastvla import pretrained_tokenizer as last_tokenizer
    model, folder = saved(tmp_path)
    word = model.get_input_embeddings().weight[65]
    tok = span_tokenizer(str(folder), 8)
    config = ModelConfig(str(folder), [[1, 2, 2]], 8, 0.05, 0, pretrained=True, tokenizer=str(folder))
    span = SpanVLA(config, tok, Codebook(np.zeros((8, 3))), 16, dtype=torch.bfloat16)
    assert torch.equal(span.vlm.hf.get_input_embeddings().weight[65], word.bfloat16()) and span.vlm.dtype == torch.bfloat16
    last = LaSTVLA(LaSTConfig(str(folder), Layout(4, 3, 2, 2), ((1, 2, 2),), 16, {"geo": (1, 4, 8)}, pretrained=True), last_tokenizer(folder))
    assert torch.equal(last.vlm.hf.get_input_embeddings().weight[65], word)
    build_llm(SMALL, 300, seed=1).save_pretrained(tmp_path / "llm")
    qwen_like(280, 290).save_pretrained(tmp_path / "llm")
    config = IKVLAConfig(3, 2, (2, 4), str(tmp_path / "llm"), 64, 32, 2, 20, 4, 1.0, 1, style="paper", tokenizer=str(tmp_path / "llm"))
    ik = make_llm(config, config.shape(12, 8), "nsp", 0, make_tokenizer(config))
    assert torch.equal(ik.llm.get_input_embeddings().weight[65], build_llm(SMALL, 300, seed=1).get_input_embeddings().weight[65])


def test_lora_checkpointing_and_bf16_by_path(tmp_path):
    "One step of reinforcement's shape: LoRA on a loaded bfloat16 checkpoint, layers recomputed; the same gradients as without."
    from vlarepro.methods.spanvla.answers import pretrained_tokenizer
    from vlarepro.methods.spanvla.codebook import Codebook
    from vlarepro.methods.spanvla.model import ModelConfig, SpanVLA, add_lora, drives_of, lora_state, sequence, synthetic_windows
    _, folder = saved(tmp_path)
    tok = pretrained_tokenizer(str(folder), 8)
    w, features, traces = synthetic_windows(2, n_tokens=6, width=16)
    drives = drives_of(w, features, traces, tok, 10, "compact", True)
    config = ModelConfig(str(folder), [[1, 2, 3]], 8, 0.05, 0, pretrained=True, tokenizer=str(folder))
    model = SpanVLA(config, tok, Codebook(np.zeros((8, 3))), 16, dtype=torch.bfloat16).train()
    trained = add_lora(model, 4, 8, 0.0)
    for p in trained: torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(0))
    answer = [[tok.convert_tokens_to_ids("<think>"), model.handover, model.first_action + 3, model.end]] * 2
    ids, mask, target = sequence(drives.ids, drives.mask, answer, tok.pad_token_id)

    def gradients():
        model.zero_grad()
        sum(model.language_loss(ids, mask, target, drives.looks([0, 1]), torch.as_tensor(drives.history), torch.tensor([True, False])).values()).backward()
        return torch.cat([p.grad.float().flatten() for p in trained])
    plain = gradients()
    assert checkpoint_layers(model) == 1 and model.vlm.decoder.gradient_checkpointing
    assert torch.equal(gradients(), plain) and plain.abs().max() > 0
    checkpoint_layers(model, on=False)
    assert not model.vlm.decoder.gradient_checkpointing and torch.equal(gradients(), plain)
    assert len(lora_state(model)) == len(trained) == 2 * 4 * 2 and not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_nothing_to_checkpoint_is_said():
    with pytest.raises(ValueError, match="no trainable Hugging Face model"): checkpoint_layers(torch.nn.Linear(2, 2))


def test_paper_blocks_read():
    "The settings of the paper profile are readable mappings: YAML anchors resolve."
    names = ("spanvla", "specdec", "ikvla", "lastvla", "navsim", "teachers")
    assert all(isinstance(yaml.safe_load(yaml.safe_dump(load_config(n, "paper"))), dict) for n in names)
