"Data-set scores: equal to the recorded results of the official aggregation scripts, and right on a case made by hand."

import json

import numpy as np
import pandas as pd
import pytest

from vlarepro.scoring.pdm.aggregate import COLUMNS, METRICS, adjacent_frames, one_stage, read_groups, stage_weights, two_stage

LONG = {"nc": "no_at_fault_collisions", "dac": "drivable_area_compliance", "ddc": "driving_direction_compliance", "tlc": "traffic_light_compliance",
        "ep": "ego_progress", "ttc": "time_to_collision_within_bound", "lk": "lane_keeping", "hc": "history_comfort",
        "ec": "two_frame_extended_comfort", "score": "score"}


@pytest.fixture(scope="module")
def recorded(shared_folder):
    "Rows, states, mapping and expected results of the official scripts."
    folder = shared_folder / "navsim" / "oracle"
    data = json.loads((folder / "aggregation.json").read_text())
    rows, states = data["rows"], np.zeros((len(data["rows"]), 41, 11))
    for i, (file, array, index) in enumerate(r["states"] for r in rows):
        with np.load(folder / file, allow_pickle=False) as z: s = z[array][index]
        states[i][:, [0, 1, 2, 3, 5, 7, 9, 10] if s.shape[1] == 8 else slice(None)] = s
    table = {"token": [r["token"] for r in rows], "log": [r["token"].split("_")[0] for r in rows], "start_time_s": np.array([r["start_time"] for r in rows]),
             "synthetic": np.array([r["stage"] == 1 for r in rows])}
    table |= {k: np.array([r["metrics"][LONG[k]] for r in rows]) for k in METRICS}
    points = {"endpoint": "endpoint", "start": "start_point"}
    table |= {f"{short}_{c}": np.array([r[long][i] for r in rows]) for short, long in points.items() for i, c in enumerate("xy")}
    return table, states, data["mapping"], data["expected"]


def close(got, want): np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_two_stages_equal_the_official_scripts(recorded):
    table, states, mapping, expected = recorded
    result = two_stage(table, states, mapping)
    for part in ("combined", "stage_one", "stage_two"):
        close([result[part][k] for k in COLUMNS], [expected[part][LONG[k]] for k in COLUMNS])
    per = result["per_token"]
    for name in ("weight", "ec", "score"):
        close(per[name], [expected["per_token"][t][LONG.get(name, name)] for t in per["token"]])
    assert result["n_groups"] == len(mapping) == 4


def test_one_stage_equals_the_official_script(recorded):
    table, states, _, expected = recorded
    rows, want = ~table["synthetic"], expected["one_stage"]
    result = one_stage({k: np.asarray(v)[rows] for k, v in table.items()}, states[rows])
    per = result["per_token"]
    assert {t: p for t, p in zip(per["token"], per["previous"]) if p} == want["adjacent"]
    close(per["score"], [want["per_token"][t]["score"] for t in per["token"]])
    assert [None if np.isnan(v) else v for v in per["ec"]] == [want["per_token"][t]["two_frame_extended_comfort"] for t in per["token"]]
    close(result["score"], want["mean_score"])


def test_a_data_frame_and_any_order_of_rows_give_the_same(recorded):
    table, states, mapping, _ = recorded
    order = np.random.default_rng(0).permutation(len(states))
    frame = pd.DataFrame(table).iloc[order].reset_index(drop=True)
    got, want = two_stage(frame, states[order], mapping[::-1]), two_stage(table, states, mapping)
    for part in ("combined", "stage_one", "stage_two"): close(list(got[part].values()), list(want[part].values()))


def made(n_second=2, **changes):
    "One group: perfect scores, plans that go on where the earlier ones left off."
    tokens = ["now", "before", *(f"{k}{j}" for j in range(n_second) for k in ("n", "b"))]
    n = len(tokens)
    t = np.array([0.5, 0.0] + [4.5, 4.0] * n_second)
    table = {"token": tokens, "log": ["x"] * n, "start_time_s": t, **{k: np.ones(n) for k in METRICS}}
    table |= {"endpoint_x": np.array([20.0, 18.0] + [0.0] * (n - 2)), "endpoint_y": np.zeros(n),
              "start_x": np.array([0.0, 0.0] + [20.0, 18.0] * n_second), "start_y": np.repeat([0.0, *np.arange(n_second)], 2).astype(float)}
    states = np.zeros((n, 41, 11)); states[:, :, 3] = 5.0
    return table | changes, states, [["now", "before", [[f"n{j}", f"b{j}"] for j in range(n_second)]]]


def test_by_hand():
    table, states, mapping = made()
    table["nc"][2:4] = 0.5                                     # the nearer pair is half as good
    w = 1 / (1 + np.exp(-1 / 0.2))
    result = two_stage(table, states, mapping)
    close(result["combined"]["score"], 1 - w / 2)
    table["dac"][0] = 0.0                                      # the later branch of the first stage fails: half of the group is lost
    result = two_stage(table, states, mapping)
    close(result["combined"]["score"], (1 - w / 2) / 2)
    close([result["stage_one"]["score"], result["stage_two"]["score"]], [0.5, 1 - w / 2])


def test_weights_fall_back_to_uniform_where_the_official_ones_do():
    starts = np.array([[1.8, 0.0], [5.0, 5.0]])
    assert stage_weights(np.zeros(2), starts)[0] > 0.99        # exp(-16.2) = 9e-8 counts
    close(stage_weights(np.zeros(2), starts + [0.2, 0]), [0.5, 0.5])  # exp(-20) = 2e-9 does not


def test_neighbours_stay_inside_their_log():
    t, log = np.array([0.0, 0.5, 1.0, 1.5, 9.0]), ["a", "a", "b", "b", "b"]
    assert adjacent_frames(log, t).tolist() == [-1, 0, -1, 2, -1]
    assert adjacent_frames(log[::-1], t[::-1]).tolist() == [-1, 2, -1, 4, -1]


@pytest.mark.parametrize("change, says", [
    (dict(valid=[True, False, True, True, True, True]), "failed on before"),
    (dict(token=["now", "before", "n0", "b0", "n1", "n1"]), "occur twice: n1"),
    (dict(ttc=[1, 1, 1, np.nan, 1, 1]), "'ttc' is not finite for b0"),
    (dict(endpoint_x=[np.inf, 0, 0, 0, 0, 0]), "'endpoint_x' is not finite for now"),
    (dict(start_time_s=[0.5, 0.5, 4.5, 4, 4.5, 4]), "now must start 0 to 0.55 s after before, got 0.000 s"),
    (dict(token=["now", "before", "n0", "b0", "n1", "other"]), "1 frames of the mapping were not scored: b1"),
])
def test_a_bad_table_is_refused_by_name(change, says):
    table, states, mapping = made(**change)
    with pytest.raises(ValueError, match=says): two_stage(table, states, mapping)


def test_a_missing_column_and_wrong_states_are_refused():
    table, states, mapping = made()
    with pytest.raises(KeyError, match="lacks the column 'lk'"): two_stage({k: v for k, v in table.items() if k != "lk"}, states, mapping)
    with pytest.raises(ValueError, match=r"expected shape \(6, 41, 11\)"): two_stage(table, states[:, :40], mapping)
    with pytest.raises(ValueError, match="not finite for n0"): two_stage(table, np.where(np.arange(6)[:, None, None] == 2, np.nan, states), mapping)


def test_bad_mappings_are_refused():
    with pytest.raises(ValueError, match="group 0.*no second-stage frames"): read_groups([["a", "b", []]])
    with pytest.raises(ValueError, match="group 1: expected"): read_groups([["a", "b", [["c", "d"]]], ["e", "f"]])
    with pytest.raises(ValueError, match="more than once: a"): read_groups([["a", "b", [["c", "d"]]], ["e", "a", [["f", "g"]]]])
    with pytest.raises(ValueError, match="no groups"): two_stage(*made()[:2], [])
