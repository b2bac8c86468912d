"""IK-VLA's answers: packing, vocabulary, decoding, scores."""
import numpy as np
import pytest
import torch

from vlarepro.evaluation.language import Told, ask, frequent_answers, judge_language, language_tables, qa_parts
from vlarepro.methods.ikvla.language import (
    CAPTION,
    EXPLANATION,
    TalkTask,
    Turn,
    Wording,
    WordTokenizer,
    answer,
    answer_losses,
    corpus_words,
    grow_vocabulary,
    pack_turns,
    packed_hidden,
)
from vlarepro.methods.ikvla.model import CompactTokenizer, DrivingLLM
from vlarepro.methods.ikvla.tasks import current_features, ego_tensor, synthetic_drives
from vlarepro.methods.ikvla.visual_state import StateShape

SHAPE = StateShape(n_tokens=12, feature_width=8, cameras=3, merge=4, horizons=(2, 4, 6), width=32)
DATA = synthetic_drives(4)


def turns_of(i):
    asked = [Turn("qa", f"how many cars in row {i % 3}?", str(i % 4), "count", i % 2), Turn("qa", "any truck?", "no" if i % 2 else "yes", "exist", 0)]
    told = Turn("caption", CAPTION, f"The car drives. It sees {i % 4} cars at 35 km/h."), Turn("explanation", EXPLANATION, "It goes on, as the way is free.")
    return [*told, *asked[:1 + i % 2]]


TURNS = [turns_of(i) for i in range(len(DATA))]
TOKENIZER = WordTokenizer(corpus_words(TURNS))


@pytest.fixture
def model(): return grow_vocabulary(DrivingLLM(SHAPE, CompactTokenizer(), "tiny", seed=1), TOKENIZER)


def test_new_words_leave_the_old_rows_alone():
    plain = DrivingLLM(SHAPE, CompactTokenizer(), "tiny", seed=1)
    before = plain.llm.get_input_embeddings().weight.detach().clone()
    grown = grow_vocabulary(plain, TOKENIZER).llm
    assert grown.get_input_embeddings().weight.shape[0] == TOKENIZER.size == grown.lm_head.weight.shape[0]
    assert torch.equal(grown.get_input_embeddings().weight[:len(before)], before)
    assert grown.lm_head.weight.data_ptr() == grown.get_input_embeddings().weight.data_ptr()
    with pytest.raises(ValueError, match="rows"): grow_vocabulary(plain, CompactTokenizer())


@pytest.mark.parametrize("text", ["the car drives at 35 km/h.", "around it: two cars, one truck.", "it's in front-left of 3."])
def test_words_come_back(text):
    tokenizer = WordTokenizer(corpus_words([[Turn("qa", text, text)]]))
    said = tokenizer.decode_text(tokenizer.encode_text(text))
    assert said.replace(" ", "") == text.replace(" ", "") and tokenizer.encode_text(said) == tokenizer.encode_text(text)


@pytest.mark.parametrize("seed", range(4))
def test_a_turn_does_not_see_its_neighbours(model, seed):
    g, w = np.random.default_rng(seed), Wording(TOKENIZER)
    rows = g.integers(0, len(DATA), 3)
    prefixes = [w.prefix(DATA, i, SHAPE.n, SHAPE.h * SHAPE.n) for i in rows]
    chosen = [[(j, w.question(t.question), w.answer(t.answer)) for j, t in enumerate(TURNS[i])] for i in rows]
    def losses(rows, prefixes, turns):
        packed = pack_turns(prefixes, turns, TOKENIZER.id("<|endoftext|>"))
        hidden = packed_hidden(model, packed, ego_tensor(DATA, rows), model.projector(current_features(DATA, rows)))
        return {k: float(v.detach()) for k, v in answer_losses(model, packed, hidden, tuple("abcd")).items()}
    n = [sum(len(t[j][2]) for t in chosen if j < len(t)) for j in range(4)]
    alone = np.zeros(4)
    for r, p, ts in zip(rows, prefixes, chosen):
        for j, t in enumerate(ts): alone[j] += losses(np.array([r]), [p], [[t]])["abcd"[j]] * len(t[2])
    together = losses(rows, prefixes, chosen)
    for j, k in enumerate("abcd"):
        if n[j]: assert together[k] == pytest.approx(alone[j] / n[j], rel=1e-4)


def test_the_task_is_a_function_of_its_numbers(model):
    task = TalkTask(DATA, TURNS, model, TOKENIZER, keep_states=True)
    u = torch.rand(4, task.words, generator=torch.Generator().manual_seed(0))
    a, b = (task.loss(np.arange(4), u) for _ in range(2))
    assert set(a) == {"caption", "explanation", "qa", "nsp"} and all(torch.equal(a[k], b[k]) for k in a)
    sum(a.values()).backward()
    assert all(p.grad is None for p in model.projector.parameters()) and model.llm.get_input_embeddings().weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="samples"): TalkTask(DATA, TURNS[:-1], model, TOKENIZER)


def test_answers_do_not_depend_on_the_batch(model):
    asked = [(i, t.question) for i in range(6) for t in TURNS[i]]
    one = answer(model, TOKENIZER, DATA, asked, batch=1, max_new=5)
    for batch in (3, 4, 64): assert answer(model, TOKENIZER, DATA, asked, batch=batch, max_new=5) == one


def test_rows_that_stand_for_no_word_are_never_written(model):
    assert TOKENIZER.size > len(TOKENIZER.tokens)
    with torch.no_grad(): model.llm.get_input_embeddings().weight[len(TOKENIZER.tokens):] = 30 * model.llm.get_input_embeddings().weight[:1]
    assert all(isinstance(a, str) for a in answer(model, TOKENIZER, DATA, [(i, "any truck?") for i in range(4)], max_new=4))


def told(**answers):
    asked = ask(TURNS, np.arange(len(TURNS)), DATA.token, DATA.scene)
    return Told(asked, {a: [f(asked)] for a, f in answers.items()})


def right(asked): return [t.answer.lower() for t in asked.turn]


def test_right_answers_score_full_and_the_rule_does_not():
    t = told(ikvla=right, opendrivevla_bev=right, frequent=lambda a: frequent_answers(TURNS, a))
    tables = language_tables(t, {"ikvla": [0], "opendrivevla_bev": [0], "frequent": []}, ["s"])
    row = {r["arm"]: r["values"] for r in tables["15"]}
    assert row["ikvla"]["Acc"]["value"] == 100 and row["ikvla"]["Acc"]["low"] == 100 and row["frequent"]["Acc"]["value"] < 100
    assert {r["arm"]: r["values"]["BL-4"]["value"] for r in tables["13"]}["ikvla"] == pytest.approx(100, abs=1e-3)
    assert "BERT-S" not in tables["13"][0]["values"] and "not run" in tables["13"][0]["note"] and "METEOR" in tables["14"][0]["note"]
    assert sum(m.sum() for c, (_, m) in qa_parts(right(t.asked), t.asked).items() if c in ("H0", "H1")) == len(t.asked.of("qa"))


def test_the_claim_needs_both_halves():
    claim = {"id": "C-C15", "kind": "greater", "arms": ["ikvla", "opendrivevla_bev"], "threshold": 0, "margin": None}
    seeds = {"ikvla": [0], "opendrivevla_bev": [0]}
    questions = [Turn("qa", "what?", "car", "object", 0), Turn("qa", "how?", "parked", "status", 0), Turn("qa", "how many?", "2", "count", 0)]
    turns = [[*ts[:2], *questions] for ts in TURNS]
    asked = ask(turns, np.arange(len(turns)), DATA.token, DATA.scene)
    captions_good = [t.answer.lower() if t.kind != "qa" else "x" for t in asked.turn]
    questions_good = [t.answer.lower() if t.kind == "qa" else "no car drives here at all" for t in asked.turn]
    holds = judge_language(Told(asked, {"ikvla": [captions_good], "opendrivevla_bev": [questions_good]}), claim, seeds, "laptop")
    assert holds["verdict"] == "reproduced" and holds["effect"] > 50
    fails = judge_language(Told(asked, {"ikvla": [right(asked)], "opendrivevla_bev": [questions_good]}), claim, seeds, "laptop")
    assert fails["effect"] == 0 and fails["verdict"] != "reproduced"
    assert judge_language(Told(asked, {"ikvla": [captions_good]}), claim, seeds, "laptop") is None
