"""The printed numbers and the claims: complete, well-formed, and equal to the shared transcript where it is at hand."""
import collections
import copy

import pytest
import yaml

from vlarepro.core.paths import root, shared
from vlarepro.report.reference import (
    PAPERS,
    cells_ours,
    check_claim,
    check_table,
    load_claims,
    load_tables,
    row_key,
    slug,
)


def test_counts():
    tables = load_tables()
    assert len(tables) == 66
    assert sum(t["role"] == "ours" for t in tables) == 42
    counts = collections.Counter(t["paper"] for t in tables if t["role"] == "ours")
    assert counts == {"spanvla": 11, "specdec": 5, "ikvla": 17, "lastvla": 9}


def test_claim_ids_are_complete():
    want = {f"{letter}-C{i}" for letter, n in (("A", 14), ("B", 10), ("C", 15), ("D", 12)) for i in range(1, n + 1)}
    claims = load_claims()
    assert {c["id"] for c in claims} == want and len(claims) == 51
    by_letter = dict(zip("ABCD", PAPERS, strict=True))
    assert all(c["paper"] == by_letter[c["id"][0]] for c in claims)


def test_every_claim_has_a_line_drawn_beforehand():
    for c in load_claims():
        assert c["threshold"] is not None and len(c["reason"]) > 8, c["id"]
        assert c["statistic"]["key"] and c["statistic"]["unit"], c["id"]


def test_every_table_of_ours_has_something_to_fill_and_unique_slugs():
    tables = [t for t in load_tables() if t["role"] == "ours"]
    assert all(cells_ours(t) for t in tables)
    for p in PAPERS:
        slugs = [slug(t["table"]) for t in tables if t["paper"] == p]
        assert len(set(slugs)) == len(slugs)


def test_reference_only_rows_have_no_arm():
    for t in load_tables():
        if t["role"] == "reference-only": assert cells_ours(t) == []


def test_numbers_equal_the_shared_transcript():
    if shared() is None or not (shared() / "papers/tables.yaml").is_file():
        pytest.skip("shared folder not found: set VLAREPRO_SHARED")
    text = (shared() / "papers/tables.yaml").read_text(encoding="utf-8")
    theirs = {(t["paper"], t["table"]): t for t in yaml.safe_load(text)}
    ours = {(t["paper"], t["table"]): t for t in load_tables()}
    assert set(ours) == set(theirs)
    n = 0
    for key, t in theirs.items():
        o = ours[key]
        assert (o["role"], o["status"], o["columns"]) == (t["role"], t["status"], t["columns"]), key
        assert [r["name"] for r in o["rows"]] == [r["name"] for r in t["rows"]], key
        for a, b in zip(o["rows"], t["rows"], strict=True):
            assert a["values"] == b["values"], (key, a["name"])
            assert a.get("delta_vs_baseline") == b.get("delta_vs_baseline"), (key, a["name"])
            n += sum(v is not None for v in (*b["values"].values(), *b.get("delta_vs_baseline", {}).values()))
    assert n >= 1286


def test_arms_of_claims_stand_in_a_table_or_are_named_controls():
    arms = collections.defaultdict(set)
    for t in load_tables():
        for r in t["rows"]: arms[t["paper"]] |= set((r["arm"] or "").split("+"))
        arms[t["paper"]] |= set(t.get("column_arms", {}).values())
    controls = {"blind_nsp", "replica", "one_stage", "frozen_backbone", "latents_12_4", "latents_72_24", "sft"}
    for c in load_claims():
        assert set(c["arms"]) <= arms[c["paper"]] | controls, (c["id"], set(c["arms"]) - arms[c["paper"]] - controls)


@pytest.mark.parametrize("break_it, says", [
    (lambda t: t.pop("source"), "lacks"),
    (lambda t: t.update(role="our"), "did you mean"),
    (lambda t: t.update(stauts="x"), "unknown key"),
    (lambda t: t["rows"][0]["values"].pop(t["columns"][0]), "exactly the columns"),
    (lambda t: t["rows"].append(copy.deepcopy(t["rows"][0])), "repeat"),
])
def test_a_malformed_table_is_refused(break_it, says):
    t = copy.deepcopy(next(t for t in load_tables() if t["table"] == "5-ablation"))
    break_it(t)
    with pytest.raises(ValueError, match=says): check_table(t, "reference/x.yaml")


def test_a_malformed_claim_is_refused():
    c = {k: v for k, v in load_claims()[0].items() if k != "paper"}
    for bad, says in (({"kind": "grater"}, "did you mean"), ({"id": "C3"}, "looks like"),
                      ({"threshold": None}, "needs a threshold"),
                      ({"kind": "equivalent", "margin": None}, "positive margin")):
        with pytest.raises(ValueError, match=says): check_claim(c | bad, "x")


def test_row_keys_are_unique_within_a_table():
    for t in load_tables():
        keys = [row_key(r) for r in t["rows"]]
        assert len(set(keys)) == len(keys)
    assert (root() / "reference").is_dir()
