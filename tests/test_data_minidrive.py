"""minidrive through the nuScenes reader: what the world simulated is what the samples say."""
import numpy as np
import pytest

from vlarepro.data.images import Blobs
from vlarepro.data.nuscenes import NuScenesReader
from vlarepro.data.planner import build
from vlarepro.data.sample import collate
from vlarepro.data.table import build_table, event_strata, gap_strata
from vlarepro.world.generate import generate, plan_scenes
from vlarepro.world.scenarios import make_scene

VERSION, SEED = "v1.0-minidrive", 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "tiny"
    generate(out, dict(train=2, dev=1, val=1), seed=SEED, workers=1)
    return out


@pytest.fixture(scope="module")
def reader(world): return NuScenesReader(world, VERSION)


@pytest.fixture(scope="module")
def scenes():
    from vlarepro.world.generate import WorldSize
    return {j.name: make_scene(j.seed, j.name, j.split, j.map) for j in plan_scenes(WorldSize(2, 1, 1), SEED)}


def test_splits_and_sizes(world, reader):
    assert len(reader.scenes) == 3 and len(reader.tokens) == 3 * 41 and len(reader.anchors) == 3 * 31
    assert sorted(reader.scene_split.values()) == ["dev", "train", "val"]
    assert NuScenesReader(world, VERSION, split="val").scenes == [n for n, s in reader.scene_split.items() if s == "val"]


def test_samples_say_what_was_simulated(reader, scenes):
    for name in reader.scenes:
        scene, rows = scenes[name], [t for t in reader.tokens if reader._where[t][0] == name]
        for k in (4, 17, 34):
            s, e = reader.sample(rows[k], images=False), scene.ego[5 * k]
            assert s.ego_source == "can_bus" and s.ego_valid.all() and s.command == scene.command[5 * k]
            np.testing.assert_allclose(s.ego[[0, 2, 4]], [e[3], e[4], e[5]], atol=1e-3)
            xyh = scene.ego[5 * k:5 * k + 31:5, :3]
            c, n = np.cos(xyh[:, 2]), np.sin(xyh[:, 2])
            lidar = xyh[:, :2] + reader.point_x_m[0] * np.stack([c, n], -1)
            d = lidar[1:] - lidar[0]
            np.testing.assert_allclose(s.future[:, :2], np.stack([d @ [c[0], n[0]], d @ [-n[0], c[0]]], -1), atol=2e-3)


def test_boxes_are_where_the_agents_are(reader, scenes):
    token = reader.anchors[10]
    name, k = reader._where[token]
    scene, s = scenes[name], reader.sample(token, images=False)
    ego = scene.ego[5 * k]
    R = np.array([[np.cos(ego[2]), -np.sin(ego[2])], [np.sin(ego[2]), np.cos(ego[2])]])
    origin = ego[:2] + reader.point_x_m[0] * R[:, 0]
    for step in (0, 3, 6):
        got = s.boxes[step][~np.isnan(s.boxes[step][:, 0])]
        at = np.array([a.track[5 * (k + step), :2] for a in scene.agents if a.valid[5 * (k + step)]]).reshape(-1, 2)
        want = (at - origin) @ R
        for b in got: assert np.linalg.norm(want - b[:2], axis=1).min() < 5e-3


def test_images_come_from_the_zips(world, reader):
    images, valid = reader.scene_images(reader.scenes[0])
    assert images.shape == (41, 3, 3, 64, 128) and valid.all() and images.std() > 20
    assert len(reader.blobs._zips) >= 1 and reader.blobs._zips[0].fp is not None
    name = reader.nusc.get("sample_data", reader.nusc.get("sample", reader.tokens[0])["data"]["CAM_FRONT"])["filename"]
    assert name in Blobs(world) and not (world / name).exists()
    two = NuScenesReader(world, VERSION, n_frames=3)
    s = two.sample(two.tokens[1])
    assert s.images.shape[0] == 3 and s.image_valid.tolist() == [[False] * 3, [True] * 3, [True] * 3]
    np.testing.assert_array_equal(s.images[2], reader.images(reader.tokens[1])[0])


def test_table_strata_and_planners(reader):
    table = build_table(reader)
    assert len(table) == 93 and list(table["event_names"])
    strata = {**gap_strata(table["cv_gap"]), **event_strata(table)}
    assert strata["full"].all() and (strata["any_event"] ^ strata["no_event"]).all()
    row = 40
    s = reader.sample(str(table["token"][row]), images=False)
    np.testing.assert_allclose(table["history"][row], s.history, atol=1e-5)
    assert table["keyframe_token"][table["keyframe"][row]] == s.token
    ahead = table["keyframe_token"][table["next_keyframe"][row]]
    assert [reader._where[str(t)][1] for t in ahead] == [reader._where[s.token][1] + i for i in range(1, 7)]
    a, b = collate([s]), table.batch([row])
    for name in ("cv", "cv_yaw"): np.testing.assert_allclose(build(name).plan(a), build(name).plan(b), atol=1e-4)


def test_events_match_the_simulation(reader, scenes):
    table = build_table(reader)
    names = list(table["event_names"])
    for row in range(0, len(table), 9):
        name, k = reader._where[str(table["token"][row])]
        now = scenes[name].t[5 * k]
        want = {e.kind for e in scenes[name].events if e.t_start_s <= now + 3 + 1e-3 and e.t_end_s >= now - 1e-3}
        assert {n for n, on in zip(names, table["events"][row]) if on} == want


def test_differences_are_close_to_the_can_bus(world, reader):
    a, b = build_table(reader), build_table(NuScenesReader(world, VERSION, ego_status="finite_differences"))
    assert set(b["ego_source"]) == {"finite_differences"}
    assert np.quantile(np.abs(a["ego"] - b["ego"])[:, 0], 0.9) < 0.4 and np.quantile(np.abs(a["ego"] - b["ego"])[:, 4], 0.9) < 0.1


def test_future_command_is_an_option_by_name(world):
    leak = NuScenesReader(world, VERSION, command="future")
    s = leak.sample(leak.anchors[0], images=False)
    y = s.future[-1, 1]
    assert s.command == (1 if y >= 2 else 3 if y <= -2 else 2)
    assert NuScenesReader(world, VERSION, command="unknown").sample(leak.anchors[0], images=False).command == 0


def test_texts(reader):
    s = reader.sample(reader.anchors[0], images=False, texts=True)
    assert s.texts["caption"] and s.texts["coc"]["text"] and all({"question", "answer"} <= set(q) for q in s.texts["qa"])
    every = [reader.sample(t, images=False, texts=True).texts for t in reader.anchors]
    assert all(x["explanation"]["reasoning"] for x in every)
    spatial, motion = ([q for x in every for q in x.get(k, ())] for k in ("spatial", "motion"))
    assert spatial and motion and all(q["answer"] in q["options"] for q in motion)
    pairs = [q["pair"] for q in spatial if q["pair"]]
    assert len(pairs) == 2 * len(set(pairs)), "a pair's name belongs to two questions of the whole split"
    assert reader.sample(reader.anchors[0], images=False).texts == {}
