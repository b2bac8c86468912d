"""The lean decoder against Hugging Face in three families, and proofs that speculation loses nothing."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vlarepro.decoding.acceptance import accepted, choose, replay
from vlarepro.decoding.decoder import LeanDecoder, prompt_of
from vlarepro.decoding.speculate import NGram, Oracle, PromptLookup, decode, uniforms
from vlarepro.models.backbones import seeded

VOCAB, ROPE = 96, {"rope_type": "default", "rope_theta": 1e4}
TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB, bos_token_id=None,
            eos_token_id=None, pad_token_id=None, initializer_range=0.15)
IMAGE = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**TEXT, rope_parameters=ROPE))


def qwen25vl(tie=False):
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, out_hidden_size=64, window_size=8, fullatt_block_indexes=[0])
    text = dict(TEXT, rope_parameters={**ROPE, "mrope_section": [2, 3, 3]})
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **IMAGE))


def qwen3vl():
    vision = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, out_hidden_size=64, num_position_embeddings=16,
                  deepstack_visual_indexes=[0, 1])
    text = dict(TEXT, head_dim=24, rope_parameters={**ROPE, "mrope_section": [4, 4, 4], "mrope_interleaved": True})
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **IMAGE))


FAMILIES = {"qwen2": qwen2, "qwen2.5-vl": qwen25vl, "qwen3-vl": qwen3vl}


def disturbed(build, seed):
    "A model whose norms and biases are not at their trivial start."
    model = seeded(build, seed).eval()
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 1: p.data += 0.3 * torch.randn(p.shape, generator=g)
    return model


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param, disturbed(FAMILIES[request.param], 1)


def ids_3d(length, images=2, rows=2, columns=3):
    "Two words, images, then text: 3-D ids whose rows really differ."
    parts, at = [torch.arange(2).expand(3, -1)], 2
    for _ in range(images):
        r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(torch.stack([torch.zeros_like(r), r, c]).reshape(3, -1) + at)
        at += max(rows, columns)
    rest = length - 2 - images * rows * columns
    return torch.cat([*parts, torch.arange(rest).expand(3, -1) + at], 1)


def positions_for(name, batch, length):
    p = torch.arange(length).expand(3, -1) if name == "qwen2" else ids_3d(length)
    return p[:, None].expand(3, batch, length)


def reference(name, model, ids, positions):
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions[0] if name == "qwen2" else positions).logits


def tokens(batch, length, seed=0):
    return torch.randint(0, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    assert float((a - b).abs().max()) < 1e-5


def test_equals_hugging_face(family):
    "Full, prefill, decode, verify and rollback, with explicit 3-D ids."
    name, model = family
    ids, positions = tokens(2, 48), positions_for(name, 2, 48)
    want = reference(name, model, ids, positions)
    decoder = LeanDecoder(model, 96, batch=2, taps=(0, -1))
    full = decoder.prefill(ids, positions, every=True)
    close(full.logits, want)
    assert full.features.shape == (2, 48, 128)
    close(decoder.prefill(ids[:, :24], positions[:, :, :24]).logits[:, 0], want[:, 23])
    for i in range(24, 27):
        close(decoder.step(ids[:, i:i + 1], positions[:, :, i:i + 1]).logits[:, 0], want[:, i])
    verify = decoder.step(torch.cat([ids[:, 27:30], torch.full((2, 5), 3)], 1))  # positions follow by themselves: text after text
    close(verify.logits[:, :3], want[:, 27:30])
    decoder.rollback(30)
    for q in (4, 8):
        at = decoder.longest
        close(decoder.step(ids[:, at:at + q]).logits, want[:, at:at + q])


def test_every_row_has_its_own_length(family):
    name, model = family
    ids, positions = tokens(3, 40), positions_for(name, 3, 40)
    want = reference(name, model, ids, positions)
    decoder = LeanDecoder(model, 64, batch=3)
    lengths = torch.tensor([20, 26, 33])
    out = decoder.prefill(ids[:, :33], positions[:, :, :33], lengths=lengths)
    close(out.logits[:, 0], want[torch.arange(3), lengths - 1])
    block = torch.stack([ids[i, n:n + 4] for i, n in enumerate(lengths.tolist())])
    close(decoder.step(block).logits, torch.stack([want[i, n:n + 4] for i, n in enumerate(lengths.tolist())]))
    lengths = lengths + torch.tensor([1, 4, 2])
    decoder.rollback(lengths)
    cut = lambda x: torch.stack([x[i, n:n + 3] for i, n in enumerate(lengths.tolist())])
    close(decoder.step(cut(ids)).logits, cut(want))


def test_three_dimensional_ids_matter(family):
    name, model = family
    if name == "qwen2": pytest.skip("has one position row")
    ids = tokens(1, 32)
    a, b = reference(name, model, ids, positions_for(name, 1, 32)), reference(name, model, ids, positions_for("qwen2", 1, 32))
    assert float((a - b).abs().max()) > 1e-3
    close(LeanDecoder(model, 64).prefill(ids, every=True).logits, b)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_a_prompt_with_pixels(name):
    "Images, 3-D positions and deep-stack features come out of the owner's own forward."
    model = disturbed(FAMILIES[name], 2)
    ids = torch.cat([torch.tensor([1, 92]), torch.full((6,), 90), torch.tensor([93]), torch.arange(9) + 20])[None]
    pixels = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    inputs = dict(input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 6]]), mm_token_type_ids=(ids == 90).long())
    with torch.no_grad(): want = model(**inputs).logits
    prompt = prompt_of(model, **inputs)
    assert (prompt["deepstack"] is None) == (name == "qwen2.5-vl") and not torch.equal(prompt["positions"][0], prompt["positions"][2])
    close(LeanDecoder(model, 64).prefill(**prompt, every=True).logits, want)
    theirs = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, ids.shape[1]:].tolist()
    lean = LeanDecoder(model, 64)
    assert decode(lean, prompt, 16).tokens[0] == theirs
    assert decode(lean, prompt, 16, draft=NGram([theirs[:9] + [5] + theirs[9:]], 3, 4)).tokens[0] == theirs


def test_refusals():
    sliding = Qwen2ForCausalLM(Qwen2Config(**TEXT, rope_parameters=ROPE, use_sliding_window=True, sliding_window=8, max_window_layers=0))
    with pytest.raises(NotImplementedError, match="sliding window"): LeanDecoder(sliding, 64)
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    yarn = Qwen2ForCausalLM(Qwen2Config(**TEXT, rope_parameters=scaled))
    with pytest.raises(NotImplementedError, match="rope type"): LeanDecoder(yarn, 64)
    d = LeanDecoder(qwen2(), 64)
    with pytest.raises(ValueError, match="batch=2"): d.prefill(tokens(2, 8))
    with pytest.raises(ValueError, match="raise max_len"): d.prefill(tokens(1, 80))
    with pytest.raises(ValueError, match="CUDA graphs"): LeanDecoder(qwen2(), 64, graphs=True)


# Losslessness

@pytest.fixture(scope="module")
def written():
    "208 prompts and what Hugging Face's greedy generate writes to them."
    model = disturbed(qwen2, 3)
    prompts = tokens(208, 20, seed=4)
    options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad(): out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    return model, prompts, out[:, 20:].tolist()


def spoiled(texts, every):
    "Texts with a wrong token now and then: a draft trained on them is right sometimes."
    return [[(t + 1) % 80 if i % every == every - 1 else t for i, t in enumerate(x)] for x in texts]


@pytest.mark.parametrize("block", [4, 8, 16])
def test_greedy_text_is_the_targets(written, block):
    "208 prompts, token by token, for drafts that are right always, sometimes and never."
    model, prompts, want = written
    decoder = LeanDecoder(model, 96, batch=208)
    plain = decode(decoder, dict(tokens=prompts), 24)
    assert plain.tokens == want and plain.tau == 1.0
    taus = []
    for draft in (Oracle(want, [block - 1], block), Oracle(want, [0, 2, 1, 3], block), Oracle(want, [0], block)):
        got = decode(decoder, dict(tokens=prompts), 24, draft=draft)
        assert got.tokens == want
        taus.append(got.tau)
    assert taus[0] > taus[1] > taus[2] == 1.0 and taus[0] > 0.7 * block
    if block == 4:
        for draft in (PromptLookup(block), NGram(spoiled(want, 4), 6, block)):
            got = decode(decoder, dict(tokens=prompts), 24, draft=draft)
            assert got.tokens == want and got.tau > 1.0


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampled_text_is_the_targets(written, temperature):
    "With random numbers tied to places the text is equal token by token, draft or not."
    model, prompts, want = written
    decoder, u = LeanDecoder(model, 96, batch=208), uniforms(7, 208, 40)
    plain = decode(decoder, dict(tokens=prompts), 24, temperature=temperature, u=u)
    got = decode(decoder, dict(tokens=prompts), 24, temperature=temperature, u=u, draft=Oracle(plain.tokens, [0, 4, 7, 2], 8))
    assert got.tokens == plain.tokens != want and got.tau > 2


def total_variation(a, b):
    p, q = (torch.bincount(x[:, 0] * VOCAB ** 2 + x[:, 1] * VOCAB + x[:, 2], minlength=VOCAB ** 3).double() / len(x) for x in (a, b))
    return float((p - q).abs().sum() / 2)


def test_distribution_at_a_temperature(written):
    "Three-token marginals at T = 0.6: as far from plain decoding as plain decoding is from itself; a lossy rule is not."
    prompts, n = written[1], 3000
    model = disturbed(qwen2, 3)
    model.lm_head.weight.data *= 2.5                                      # sharper: three tokens have few likely values
    want = decode(LeanDecoder(model, 64), dict(tokens=prompts[:1]), 4).tokens
    decoder, prompt = LeanDecoder(model, 64, batch=n), dict(tokens=prompts[:1].expand(n, -1))
    draw = lambda seed, draft=None: torch.tensor(decode(decoder, prompt, 4, temperature=0.6, u=uniforms(seed, n, 8), draft=draft).tokens)[:, 1:]
    a, b = draw(1), draw(2)
    draft = NGram([want[0], *a[:40].tolist()], 3, 4)
    c = draw(3, draft)
    floor = total_variation(a, b)
    assert floor < 0.3 and abs(total_variation(a, c) - floor) < 0.15 * floor
    lossy = c.clone()                                                     # "typical acceptance": guesses stand although the target drew others
    lossy[::3] = torch.tensor(want[0][1:4])
    assert total_variation(a, lossy) > 1.3 * floor


def test_no_token_is_special(written):
    "Relabelling tokens relabels the rounds: nothing depends on which token is a full stop."
    model, prompts, want = written
    perm = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    full = torch.cat([perm, torch.arange(80, VOCAB)])
    other = disturbed(qwen2, 3)
    with torch.no_grad():
        other.model.embed_tokens.weight[full] = model.model.embed_tokens.weight.clone()
        other.lm_head.weight[full] = model.lm_head.weight.clone()
    class Half:
        "Knows every other token."
        block = 8
        def __init__(self, texts): self.texts = texts
        def start(self, decoder, prompt, out): self.at = [0] * decoder.batch
        def propose(self, last): return torch.tensor([[x[i] if i < len(x) and i % 3 else 95 for i in range(a + 1, a + 8)] for x, a in zip(self.texts, self.at)])
        def observe(self, tokens, out, count): self.at = [a + c for a, c in zip(self.at, count.tolist())]

    a = decode(LeanDecoder(model, 96, batch=16), dict(tokens=prompts[:16]), 24, draft=Half(want))
    b = decode(LeanDecoder(other, 96, batch=16), dict(tokens=full[prompts[:16]]), 24, draft=Half([[int(full[t]) for t in x] for x in want]))
    assert [[int(full[t]) for t in x] for x in a.tokens] == b.tokens and a.rounds == b.rounds and a.tau > 1.3


def test_replay_counts_what_the_loop_does(written):
    "The rounds of a whole text, counted from a table of guesses, are those of the loop."
    model, prompts, want = written
    draft = NGram(spoiled(want, 4)[:32], 6, 8)
    loop = decode(LeanDecoder(model, 96, batch=32), dict(tokens=prompts[:32]), 24, draft=draft)
    for text, rounds in zip(loop.tokens, loop.rounds):
        right = torch.zeros(len(text), 7, dtype=torch.bool)
        for a in range(len(text)):
            for j, g in enumerate(draft.guess(text[:a + 1])): right[a, j] = a + 1 + j < len(text) and g == text[a + 1 + j]
        again = [n for _, n in replay(right, len(text), 8)]
        assert len(again) == len(rounds) and again[:-1] == rounds[:-1] and sum(again) + len(again) + 1 == len(text)


def test_choose_is_the_inverse_of_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(30000, -1)
    drawn = choose(logits, 0.7, torch.rand(30000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(drawn, minlength=3) / 30000
    assert torch.allclose(share, (logits[0] / 0.7).softmax(0), atol=0.01)
    assert accepted(torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])).tolist() == [2]
