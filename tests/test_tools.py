"""The tables that the adapters in tools/ write."""
import importlib.util

import pytest

from vlarepro.core.paths import root


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("nuscenes_tables", root() / "tools" / "nuscenes_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tables


def test_links_run_both_ways(tables):
    t = tables()
    for i in range(4): assert t.chain("sample", "scene", token=f"s{i}", timestamp=i) == f"s{i}"
    t.chain("sample", "other scene", token="o0", timestamp=0)
    rows = {r["token"]: r for r in t.rows["sample"]}
    assert [rows[f"s{i}"]["next"] for i in range(4)] == ["s1", "s2", "s3", ""]
    assert [rows[f"s{i}"]["prev"] for i in range(4)] == ["", "s0", "s1", "s2"]
    assert rows["o0"]["prev"] == rows["o0"]["next"] == ""


def test_a_row_given_twice_does_not_break_its_chain(tables):
    t = tables()
    for name in ("s0", "s1", "s1", "s2"): t.chain("sample", "scene", token=name)
    rows = t.rows["sample"]
    assert [(r["token"], r["prev"], r["next"]) for r in rows] == [("s0", "", "s1"), ("s1", "s0", "s2"), ("s2", "s1", "")]
