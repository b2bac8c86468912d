"""Language scores against the original implementations' outputs, and rules that a plausible implementation gets wrong."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlarepro.scoring.captions import bleu, caption_scores, cider, rouge_l, tokenize
from vlarepro.scoring.qa import drivelm, match_points, nuscenes_qa, points, qa_row
from vlarepro.scoring.spatial import centerness, extract_answer, future_motion, normalise, read_pixel, surds


@pytest.fixture(scope="module")
def captions(shared_folder):
    return json.loads((shared_folder / "golden" / "captions" / "captions.json").read_text())


def test_caption_metrics_equal_the_original(captions):
    "pycocoevalcap's numbers from its own tokens: corpus and every item, to the last bits."
    items = captions["items"]
    hyps, refs = [i["hyp_tokenized"] for i in items], [i["refs_tokenized"] for i in items]
    b, r, c = bleu(hyps, refs), rouge_l(hyps, refs), cider(hyps, refs)
    want = np.array([[i[f"Bleu_{k}"] for k in range(1, 5)] for i in items])
    np.testing.assert_allclose(b.items, want, atol=1e-12)
    np.testing.assert_allclose(b.corpus, [captions["corpus"][f"Bleu_{k}"] for k in range(1, 5)], atol=1e-12)
    np.testing.assert_allclose(r.items, [i["ROUGE_L"] for i in items], atol=1e-12)
    np.testing.assert_allclose(c.items, [i["CIDEr"] for i in items], atol=1e-9)
    assert abs(r.corpus - captions["corpus"]["ROUGE_L"]) < 1e-12 and abs(c.corpus - captions["corpus"]["CIDEr"]) < 1e-9


def test_tokenizer_equals_the_original_on_every_golden_string(captions):
    pairs = [p for i in captions["items"] for p in [(i["hyp"], i["hyp_tokenized"]), *zip(i["refs"], i["refs_tokenized"])]]
    assert len(pairs) == 243 and [(a, tokenize(a), w) for a, w in pairs if tokenize(a) != w] == []


def test_from_plain_text_to_the_published_columns(captions):
    "The same corpus without the Java tokenizer; what needs Java or weights stays empty."
    items = captions["items"]
    got = caption_scores([i["hyp"] for i in items], [i["refs"] for i in items])
    for name, key in (("BLEU-4", "Bleu_4"), ("ROUGE-L", "ROUGE_L"), ("CIDEr", "CIDEr")):
        assert got[name] == pytest.approx(100 * captions["corpus"][key], abs=1e-7)
    assert got["METEOR"] is None and got["BERT-Score"] is None and got["n"] == 96


words = st.lists(st.sampled_from("the car light stops is red left".split()), min_size=1, max_size=12).map(" ".join)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=2, max_size=6))
def test_metrics_are_bounded_and_perfect_on_copies(pairs):
    hyps, refs = [h for h, _ in pairs], [r for _, r in pairs]
    assert (bleu(hyps, refs).items <= 1 + 1e-6).all() and (0 <= rouge_l(hyps, refs).items).all() and (rouge_l(hyps, refs).items <= 1 + 1e-9).all()
    copies = [r[0] for r in refs]
    assert rouge_l(copies, refs).corpus == pytest.approx(1) and bleu(copies, refs).items[:, 0] == pytest.approx(1, abs=1e-6)
    assert (cider(hyps, refs).items >= -1e-12).all() and (cider(hyps, refs).items <= 10 + 1e-9).all()


def test_an_empty_answer_scores_zero_and_does_not_fail():
    assert caption_scores(["", "the car stops"], [["the light is red"], ["the car stops"]])["BLEU-1"] < 60
    assert rouge_l([""], [["a b"]]).corpus == 0 and cider(["", "a b"], [["a b"], ["c d"]]).items[0] == 0


def test_nuscenes_qa_equals_the_original(shared_folder):
    case = json.loads((shared_folder / "golden" / "nuscenes_qa_eval" / "cases.json").read_text())
    table = nuscenes_qa(case["questions"], case["predicted_answers"])
    assert {k: v for k, v in table.items() if k not in ("H0", "H1")} == case["expected"]
    hops = [sum(v["total"] for k, v in case["expected"].items() if k.endswith(f"_{h}")) for h in (0, 1)]
    assert [table[f"H{h}"]["total"] for h in (0, 1)] == hops and qa_row(table)["Acc"] == 61.73


def test_drivelm_equals_the_original(shared_folder):
    "Accuracy, point match, language and the rule that skips questions, for six answer sheets."
    folder = shared_folder / "golden" / "drivelm_eval"
    test, variants = (json.loads((folder / f"{n}.json").read_text()) for n in ("test_eval", "variants"))
    assert len(variants) == 6
    for v in variants:
        got, want = drivelm(test, {a["id"]: a["answer"] for a in v["answers"]}), v["expected"]
        assert (got.n_accuracy, got.n_match, got.n_language, got.n_chatgpt) == tuple(want[k] for k in ("n_accuracy", "n_match", "n_language", "n_chatgpt"))
        assert got.accuracy == pytest.approx(want["accuracy"], abs=1e-12) and got.match_f1 == pytest.approx(want["match_f1"], abs=1e-9)
        assert got.used == {u["id"]: u["used"] for u in want["used"]}
        for k, x in want["language"].items():
            assert got.language[k.removeprefix("val/")] == pytest.approx(x, abs=1e-9), (v["variant"], k)


def test_points_are_matched_once():
    "Two predictions near one reference: one hits, one is a false alarm."
    f1, hit = match_points(points("1.0,1.0 2.0,2.0"), points("1.0,2.0 300.0,300.0"))
    assert len(hit) == 1 and f1 == pytest.approx(.5)
    assert match_points(points(""), points("1.0,1.0"))[0] == 0 and len(points("3.5 and nothing")) == 0
    assert match_points(points("8.0,8.0"), points("0.0,0.0"))[0] == 0, "16 px is outside"
    assert match_points(points("8.0,7.9"), points("0.0,0.0"))[0] == pytest.approx(1)


def test_surds_pairs_pixels_and_validity():
    pair = lambda a, b, k: [dict(task="lateral", options=["the car", "the van", "almost the same"], answer=x, pair=k) for x in (a, b)]
    records = pair("the car", "the van", 0) + pair("the van", "the car", 1) + pair("almost the same", "almost the same", 2)
    tag = lambda xs: [f"hm <answer>{x}</answer>" for x in xs]
    got = surds(records, tag(["so: The car", "The van.", "the van", "no idea", "almost the same", "almost the same"]))["lateral"]
    assert got == dict(score=pytest.approx(100 / 3), valid=pytest.approx(200 / 3), n=3), "more words than the option are valid but wrong"
    always = surds(records, tag(["the car"] * 6))["lateral"]
    assert always["score"] == 0 and always["valid"] == 100, "a fixed answer must earn nothing"
    assert surds(records, ["the car"] * 6)["lateral"]["valid"] == 0, "without tags nothing is an answer"
    assert surds(records, ["the car"] * 6, tags=False)["lateral"]["valid"] == 100
    with pytest.raises(ValueError, match="has 1 questions, expected 2"):
        surds(records[:5], ["x"] * 5)
    with pytest.raises(ValueError, match="come in pairs"):
        surds([dict(task="pixel", box_px=[0, 0, 9, 9], size_px=[128, 64], pair=1)], ["x"])
    with pytest.raises(ValueError, match="expected"):
        surds([dict(task="colour", pair=None)], ["x"])


def test_pixel_score_follows_the_box():
    assert centerness((5, 5), (0, 0, 10, 10)) == 1 and centerness((0, 5), (0, 0, 10, 10)) == 0 and centerness((11, 5), (0, 0, 10, 10)) == 0
    assert centerness((2.5, 5), (0, 0, 10, 10)) == pytest.approx((1 / 3) ** .5)
    assert read_pixel("[1, 2, 3]", (128, 64)) is None and read_pixel("[-3, 2]", (128, 64)) is None and read_pixel("[1..2, 3]", (128, 64)) is None
    assert read_pixel("<b>[10, 20, 30, 40]</b>", (128, 64)) == (20, 30)
    assert extract_answer("<answer>\n[3, 4]\n</answer>") == "[3, 4]" and normalise("An Apple, a day!") == "apple day"


def test_future_motion_cells_and_majority():
    cells = (("bearing", 1, "left"), ("bearing", 1, "left"), ("bearing", 2, "right"), ("state", 1, "left"))
    ask = [dict(task=t, horizon_s=h, options=["left", "right"], answer=a, pair=None) for t, h, a in cells]
    got = future_motion(ask, ["left"] * 4, tags=False)
    assert got[("bearing", 1)] == dict(accuracy=100, majority=100, n=2) and got[("bearing", 2)]["accuracy"] == 0
    assert got["bearing"]["accuracy"] == 50 and got["overall"]["accuracy"] == pytest.approx(200 / 3)
