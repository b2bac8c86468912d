"""Open-loop metrics: equal to the originals on the golden set, and to slow loops on random cases; the oracle's error paths."""

import json
import time

import numpy as np
import pytest
import slow_openloop as slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapely.geometry import Point, Polygon

from vlarepro.scoring.collision import collisions, ego_stamp
from vlarepro.scoring.displacement import ade, fde, l2_per_step
from vlarepro.scoring.occupancy import PROTOCOLS, box_corners, pack, rasterise, to_cells
from vlarepro.scoring.openloop import TABLE_COLUMNS, boxes_from_nuscenes, occupancies, score_openloop, uniad_all_samples, xy_from_nuscenes
from vlarepro.scoring.oracle import load_golden, main_openloop, oracle_openloop


@pytest.fixture
def unchecked(request):
    "For tests of our own messages: with --jaxtyping-packages the type checker refuses a wrong shape first."
    if request.config.getoption("jaxtyping_packages", None): pytest.skip("the type checker refuses first")


# the originals ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def golden(shared_folder):
    return shared_folder / "golden" / "planning_openloop"


def test_golden_has_no_mismatch_at_all(golden, capsys):
    assert main_openloop(golden, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert {s["set"] for s in report["sets"]} >= {"random"}
    assert report["mismatches"] == 0, [c for s in report["sets"] for c in s["checks"] if c["mismatches"]]
    l2 = [c["largest"] for s in report["sets"] for c in s["checks"] if "L2" in c["quantity"]]
    assert max(l2) < 1e-5


def test_real_keyframes_give_the_reference_row(golden):
    "nuScenes mini-val with Agent-Driver's plans: the sixteen columns from boxes, in our frame, through the public call."
    if not (golden / "nuscenes_mini_cases.npz").is_file(): pytest.skip("no nuscenes_mini cases in the golden folder")
    (g,) = [g for g in load_golden(golden) if g.name == "nuscenes_mini"]
    scores = score_openloop(g.pred, g.gt, g.valid, g.boxes)
    row, d = scores.table_row("drop"), g.expected["dataset"]
    assert (row["STP3_L2m_1s"].n_scored, row["STP3_L2m_1s"].n_expected) == (d["n_full_horizon"], d["n"])
    for h in (1, 2, 3):
        assert row[f"STP3_L2m_{h}s"].value == pytest.approx(d["stp3_full_horizon_samples"][f"plan_L2_{h}s"], abs=1e-4)
        assert row[f"STP3_Coll%_{h}s"].value == pytest.approx(100 * d["stp3_full_horizon_samples"][f"plan_obj_box_col_{h}s"], abs=1e-4)
        assert row[f"UniAD_L2m_{h}s"].value == pytest.approx(d["uniad_full_horizon_samples"]["L2"][2 * h - 1], abs=1e-4)
        assert row[f"UniAD_Coll%_{h}s"].value == pytest.approx(100 * d["uniad_full_horizon_samples"]["obj_box_col"][2 * h - 1], abs=1e-4)
    for k, v in uniad_all_samples(scores).items(): np.testing.assert_allclose(v, d["uniad_all_samples"][k], atol=1e-4)


# slow loops ---------------------------------------------------------------------------------------------------------
def ours(xy): return xy_from_nuscenes(np.asarray(xy))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_equal_to_slow_loops(protocol):
    pred, gt, mask, boxes = slow.random_cases(np.random.default_rng(3), 60)
    occ = rasterise(boxes_from_nuscenes(boxes), mask, protocol)
    c, l2 = collisions(ours(pred), ours(gt), mask, occ), l2_per_step(ours(pred), ours(gt), mask)
    grids, hits = occ.unpack(), 0
    for i in range(len(pred)):
        theirs = np.stack([slow.grid(boxes[i, t], mask[i, t], protocol) for t in range(6)])
        np.testing.assert_array_equal(grids[i], theirs)
        d, point, box, excluded = slow.score_sample(pred[i], gt[i], mask[i], theirs, protocol)
        m = mask[i]
        np.testing.assert_allclose(np.nan_to_num(l2.value[i]), d, atol=1e-5)
        for fast, ref in ((c.point, point), (c.box, box), (c.gt_box, excluded)): np.testing.assert_array_equal(fast[i][m], np.array(ref)[m])
        hits += sum(box)
    assert hits > 5, "the cases are too tame to test anything"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(points=st.lists(st.tuples(st.integers(-260, 260), st.integers(-260, 260)), min_size=12, max_size=12),
       fill=st.floats(0.001, 0.2), seed=st.integers(0, 2**31), protocol=st.sampled_from(sorted(PROTOCOLS)))
def test_flags_on_cell_edges(points, fill, seed, protocol):
    "Points on multiples of a quarter metre, on and off the grid: where truncation can go wrong."
    xy = np.array(points, np.float32).reshape(2, 1, 6, 2) / 4
    g = (np.random.default_rng(seed).random((1, 6, 200, 200)) < fill).astype(np.uint8)
    mask = np.ones((1, 6), bool)
    c = collisions(ours(xy[0]), ours(xy[1]), mask, pack(g, protocol))
    _, point, box, excluded = slow.score_sample(xy[0, 0], xy[1, 0], mask[0], g[0], protocol)
    assert c.point[0].tolist() == point and c.box[0].tolist() == box and c.gt_box[0].tolist() == excluded


@settings(max_examples=40, deadline=None)
@given(x=st.floats(-42, 42), y=st.floats(-42, 42), length=st.floats(0.3, 14), width=st.floats(0.3, 4), yaw=st.floats(-4, 4),
       protocol=st.sampled_from(sorted(PROTOCOLS)))
def test_drawing_lies_between_inner_and_outer_shape(x, y, length, width, yaw, protocol):
    """Against geometry, not OpenCV: every cell well inside the rounded polygon is set, no cell further than one cell away is.

    Boxes lie inside the grid: where a polygon leaves it, OpenCV's clipping (in the originals too) may move an edge by more than a cell."""
    box = np.array([x, y, length, width, yaw, 0])
    g = rasterise(np.broadcast_to(box, (1, 1, 1, 6)), np.ones((1, 1), bool), protocol).unpack()[0, 0]
    corners = to_cells(box_corners(box), PROTOCOLS[protocol]).astype(float)
    shape = Polygon(corners).buffer(0)
    low, high = np.clip(corners.min(0) - 3, 0, 199).astype(int), np.clip(corners.max(0) + 3, 0, 199).astype(int)
    hull = Polygon(corners).convex_hull
    for r in range(low[1], high[1] + 1):
        for c in range(low[0], high[0] + 1):
            if shape.contains(Point(c, r).buffer(0.5)): assert g[r, c]
            if hull.distance(Point(c, r)) > 1: assert not g[r, c]
    g[low[1]:high[1] + 1, low[0]:high[0] + 1] = False
    assert not g.any()


def test_ego_stamp_is_that_of_the_slow_loop():
    assert sorted(zip(*(a.tolist() for a in ego_stamp()))) == slow.OFFSETS


# the table ----------------------------------------------------------------------------------------------------------
def test_columns_are_those_of_ikvla_table_3():
    assert TABLE_COLUMNS == (
        "STP3_L2m_1s", "STP3_L2m_2s", "STP3_L2m_3s", "STP3_L2m_Avg", "STP3_Coll%_1s", "STP3_Coll%_2s", "STP3_Coll%_3s", "STP3_Coll%_Avg",
        "UniAD_L2m_1s", "UniAD_L2m_2s", "UniAD_L2m_3s", "UniAD_L2m_Avg", "UniAD_Coll%_1s", "UniAD_Coll%_2s", "UniAD_Coll%_3s", "UniAD_Coll%_Avg")


def test_rows_from_slow_cases_and_leading_axes():
    pred, gt, mask, boxes = slow.random_cases(np.random.default_rng(5), 30)
    cases = [slow.golden_case(pred[i], gt[i], mask[i], boxes[i])[0] for i in range(30)]
    d = slow.dataset_means(cases, mask.all(1))
    occ = occupancies(boxes_from_nuscenes(boxes), mask)
    both = np.stack([ours(pred), ours(gt)])[None]
    scores = score_openloop(both, ours(gt), mask, occ)
    assert scores.l2.value.shape == (1, 2, 30, 6)
    cols = {k: np.nanmean(v.value[0, 0]) for k, v in scores.columns().items()}
    for h in (1, 2, 3):
        assert cols[f"STP3_L2m_{h}s"] == pytest.approx(d["stp3_full_horizon_samples"][f"plan_L2_{h}s"], abs=1e-5)
        assert cols[f"STP3_Coll%_{h}s"] == pytest.approx(100 * d["stp3_full_horizon_samples"][f"plan_obj_box_col_{h}s"])
        assert cols[f"UniAD_L2m_{h}s"] == pytest.approx(d["uniad_full_horizon_samples"]["L2"][2 * h - 1], abs=1e-5)
        assert cols[f"UniAD_Coll%_{h}s"] == pytest.approx(100 * d["uniad_full_horizon_samples"]["obj_box_col"][2 * h - 1])
    assert np.nanmax(scores.l2.value[0, 1]) == 0 and not scores.uniad.box[0, 1].any(), "the log itself never errs and never collides"


def test_ade_fde_with_short_logs():
    pred, gt, mask, _ = slow.random_cases(np.random.default_rng(6), 40)
    a, f = ade(pred, gt, mask), fde(pred, gt, mask)
    d = np.linalg.norm(pred - gt, axis=-1)
    np.testing.assert_allclose(a.value, [d[i, mask[i]].mean() for i in range(40)], rtol=1e-5)
    np.testing.assert_array_equal(f.valid, mask[:, 5])
    assert np.isnan(f.value[~mask[:, 5]]).all()


def test_what_is_refused(unchecked):
    pred, gt, mask, boxes = slow.random_cases(np.random.default_rng(7), 4)
    boxes = boxes_from_nuscenes(boxes)
    mask[:] = True
    nan = pred.copy()
    nan[1, 2] = np.nan
    def with_column(i, v): return np.where((np.arange(6) == i) & ~np.isnan(boxes), v, boxes)
    with pytest.raises(ValueError, match=r"pred: 1 valid steps are NaN"): score_openloop(nan, gt, mask, boxes)
    with pytest.raises(ValueError, match="same samples"): score_openloop(pred[:3], gt, mask, boxes)
    with pytest.raises(ValueError, match="valid: expected bool"): score_openloop(pred, gt, mask.astype(int), boxes)
    with pytest.raises(ValueError, match="class must be"): score_openloop(pred, gt, mask, with_column(5, 7.0))
    with pytest.raises(ValueError, match="positive"): score_openloop(pred, gt, mask, with_column(2, -1.0))
    nan[1, 2:], mask[1, 2:] = np.nan, False
    assert np.isfinite(score_openloop(nan, gt, mask, boxes).l2.value[mask]).all(), "an invalid step may hold anything"


# the oracle on a folder made by the slow loops -------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    pred, gt, mask, boxes = slow.random_cases(np.random.default_rng(11), 16)
    made = [slow.golden_case(pred[i], gt[i], mask[i], boxes[i]) for i in range(16)]
    occ = {f"occ_{p}": np.stack([np.packbits(o[p].reshape(-1)) for _, o in made]) for p in PROTOCOLS}
    np.savez_compressed(tmp_path / "random_cases.npz", pred=pred, gt=gt, mask=mask.astype(np.uint8), boxes=boxes, kind=np.array(["plain"] * 16), **occ)
    cases = [c for c, _ in made]
    (tmp_path / "random_expected.json").write_text(json.dumps({"cases": cases, "dataset": slow.dataset_means(cases, mask.all(1))}))
    return tmp_path


def edit_json(folder, change):
    e = json.loads((folder / "random_expected.json").read_text())
    change(e)
    (folder / "random_expected.json").write_text(json.dumps(e))


def edit_cases(folder, change):
    with np.load(folder / "random_cases.npz") as z: a = dict(z)
    change(a)
    np.savez_compressed(folder / "random_cases.npz", **a)


def wrong(folder): return [c["quantity"] for s in oracle_openloop(folder)["sets"] for c in s["checks"] if not c["ok"]]


def test_oracle_accepts_what_slow_loops_made(folder, capsys):
    assert main_openloop(folder) == 0
    text = capsys.readouterr().out
    assert "equal to the originals" in text and oracle_openloop(folder)["mismatches"] == 0


def test_oracle_finds_each_kind_of_mismatch(folder, capsys):
    def l2(e): e["cases"][0]["uniad"]["L2"][0] += 2e-4
    def flag(e): e["cases"][1]["uniad"]["gt_box_col"][2] ^= True
    def rate(e): next(c for c in e["cases"] if c["stp3"])["stp3"]["plan_obj_box_col_3s"] += 1 / 6
    def mean(e): e["dataset"]["vad_full_horizon_samples"]["plan_L2_2s"] *= 1.01
    def nan(e): e["cases"][0]["uniad"]["L2"][1] = float("nan")
    before = (folder / "random_expected.json").read_text()
    for change, name in ((l2, "uniad.L2 [m]"), (flag, "uniad.gt_box_col, given grid"), (rate, "stp3.plan_obj_box_col_3s, given grid"),
                         (mean, "dataset.vad_full_horizon_samples.plan_L2_2s"), (nan, "uniad.L2 [m]")):
        (folder / "random_expected.json").write_text(before)
        edit_json(folder, change)
        assert wrong(folder) == [name]
        assert main_openloop(folder) == 1
        assert "MISMATCH" in capsys.readouterr().out


def test_oracle_finds_boxes_that_do_not_make_the_grid(folder):
    edit_cases(folder, lambda a: a["boxes"].__setitem__((..., 0), a["boxes"][..., 0] + np.float32(2)))
    assert any("away from a border" in q for q in wrong(folder))


def test_oracle_finds_a_sample_scored_by_mistake(folder):
    edit_cases(folder, lambda a: a["mask"].__setitem__(slice(None), 1))
    assert "stp3: sample is scored" in wrong(folder)


@pytest.mark.parametrize("break_it, message", [
    (lambda d: (d / "random_expected.json").unlink(), "random_expected.json is missing"),
    (lambda d: (d / "random_cases.npz").unlink(), "random_cases.npz is missing"),
    (lambda d: [p.unlink() for p in list(d.iterdir())], "no *_cases.npz found"),
    (lambda d: (d / "random_cases.npz").write_bytes((d / "random_cases.npz").read_bytes()[:2000]), "not a readable npz"),
    (lambda d: (d / "random_expected.json").write_text('{"cases": ['), "not readable as JSON"),
    (lambda d: edit_cases(d, lambda a: a.pop("occ_vad")), "lacks occ_vad"),
    (lambda d: edit_cases(d, lambda a: a.__setitem__("boxes", a["boxes"][:, :5])), "boxes have shape"),
    (lambda d: edit_json(d, lambda e: e["cases"].pop()), "15 cases, but random_cases.npz has 16"),
    (lambda d: edit_json(d, lambda e: e["cases"][3].pop("uniad")), "case 3 lacks uniad.L2"),
    (lambda d: edit_json(d, lambda e: e["dataset"].pop("uniad_all_samples")), "dataset lacks uniad_all_samples"),
])
def test_oracle_says_what_is_wrong_with_a_folder(folder, capsys, break_it, message):
    break_it(folder)
    assert main_openloop(folder) == 2
    assert message in capsys.readouterr().err
    assert main_openloop(folder, as_json=True) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]


def test_oracle_reads_no_pickle(folder, capsys):
    edit_cases(folder, lambda a: a.__setitem__("pred", a["pred"].astype(object)))
    assert main_openloop(folder) == 2 and "Object arrays" in capsys.readouterr().err


def test_a_thousand_samples_in_two_seconds():
    "Four planners against one log of 1,000 samples with 20 boxes a step, both protocols: processor seconds of one thread."
    pred, gt, mask, boxes = slow.random_cases(np.random.default_rng(12), 1000, agents=20)
    boxes = boxes_from_nuscenes(boxes)
    start = time.process_time()
    score_openloop(ours(np.stack([pred] * 4)), ours(gt), mask, occupancies(boxes, mask)).table_row("drop")
    assert time.process_time() - start < 2
