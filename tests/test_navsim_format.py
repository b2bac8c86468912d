"""minidrive's NAVSIM side: key-by-key schema, splits, second stage, both readers alike, and NAVSIM's own loader where it is installed."""
import json
import os
import pickle
import subprocess
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlarepro.core.pickles import load_plain, loads_plain
from vlarepro.data.navsim import NavsimReader, SceneFilter, load_split, read_pcd, scene_filter, split_reader, write_toy_log
from vlarepro.data.nuscenes import NuScenesReader
from vlarepro.data.sample import collate
from vlarepro.world.generate import Unfinished, generate, verify
from vlarepro.world.navsim_writer import NAVSIM_CAMERAS, NUPLAN_MAP
from vlarepro.world.suboptimal import NEGATIVE_KINDS
from vlarepro.world.unpack import unpack

VERSION, SIZE, SEED = "v1.0-minidrive", dict(train=2, dev=1, val=1, test=7), 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "w"
    generate(out, SIZE, seed=SEED, workers=1)
    return out


@pytest.fixture(scope="module")
def members(root):
    "Names in the archives."
    return {n for z in (root / "blobs").glob("*.zip") for n in zipfile.ZipFile(z).namelist()}


@pytest.fixture(scope="module")
def logs(root): return {p: load_plain(p) for p in sorted((root / "navsim" / "navsim_logs").rglob("*.pkl"))}


def hexes(n): return lambda v: isinstance(v, str) and len(v) == n and set(v) <= set("0123456789abcdef")


def array(*shape, kind="f"):
    "An array of a kind of numbers and a shape (None: any length), finite."
    def good(v):
        if not isinstance(v, np.ndarray) or v.dtype.kind not in kind or v.ndim != len(shape): return False
        return all(s in (None, g) for s, g in zip(shape, v.shape)) and (kind == "U" or bool(np.isfinite(v).all()))
    return good


def plain(t): return lambda v: type(v) is t


def none(v): return v is None


def neighbour(v): return v is None or hexes(16)(v)


def blocks(v): return type(v) is list and len(v) > 0 and all(type(b) is str and b.isdigit() for b in v)


def lights(v): return type(v) is list and all(type(x) is tuple and [type(y) for y in x] == [int, bool] for x in v)


MAPS = ("us-nv-las-vegas-strip", "us-ma-boston", "us-pa-pittsburgh-hazelwood", "sg-one-north")
FRAME = {  # key -> what it must be (OpenScene's create_openscene_metadata, NAVSIM's loader)
    "token": hexes(16), "timestamp": lambda v: type(v) is int and v >= 0, "log_name": plain(str), "scene_token": hexes(16), "log_token": hexes(16),
    "scene_name": plain(str), "map_location": lambda v: v in MAPS, "vehicle_name": plain(str), "frame_idx": plain(int), "roadblock_ids": blocks,
    "can_bus": array(18), "ego2global_translation": array(3), "ego2global_rotation": lambda v: array(4)(v) and abs(np.linalg.norm(v) - 1) < 1e-5,
    "ego_dynamic_state": lambda v: type(v) is list and [type(x) for x in v] == [float] * 4,
    "driving_command": lambda v: array(4, kind="i")(v) and sorted(v) == [0, 0, 0, 1], "traffic_lights": lights,
    "lidar_path": lambda v: type(v) is str and v.endswith(".pcd"), "lidar2ego": array(4, 4), "lidar2ego_translation": array(3),
    "lidar2ego_rotation": lambda v: len(v) == 4, "ego2global": array(4, 4), "lidar2global": array(4, 4),
    "cams": lambda v: type(v) is dict and set(v) == set(NAVSIM_CAMERAS) and len(v) == 8, "anns": plain(dict), "occ_gt_final_path": none,
    "flow_gt_final_path": none, "sample_prev": neighbour, "sample_next": neighbour}
CAMERA = {"data_path": lambda v: type(v) is str and v.endswith(".jpg") and not v.startswith("/"),
          "sensor2lidar_rotation": lambda v: array(3, 3)(v) and abs(np.linalg.det(v) - 1) < 1e-4,
          "sensor2lidar_translation": array(3), "cam_intrinsic": array(3, 3), "distortion": array(5)}
ANNS = {"gt_boxes": array(None, 7), "gt_names": array(None, kind="U"), "gt_velocity_3d": array(None, 3), "instance_tokens": plain(list),
        "track_tokens": plain(list)}
NAMES = {"vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object"}


def check(d, schema, who):
    assert set(d) == set(schema), f"{who}: {set(d) ^ set(schema)}"
    for k, good in schema.items(): assert good(d[k]), f"{who}, {k}: {d[k]!r}"


def test_every_key_of_every_frame(logs, root, members):
    assert len(logs) == 10
    seen = set()
    for path, log in logs.items():
        assert type(log) is list and len(log) == 41 and log[0]["log_name"] == path.stem
        for k, f in enumerate(log):
            check(f, FRAME, f"{path.name} {k}")
            assert f["frame_idx"] == k and f["token"] not in seen
            seen.add(f["token"])
            for c, v in f["cams"].items():
                check(v, CAMERA, f"{path.name} {k} {c}")
                assert os.path.normpath(os.path.join("navsim/sensor_blobs", path.parent.name, v["data_path"])) in members
            assert f"navsim/sensor_blobs/{path.parent.name}/{f['lidar_path']}" in members
            a = f["anns"]
            check(a, ANNS, f"{path.name} {k} anns")
            assert len({len(v) for v in a.values()}) == 1 and set(a["gt_names"]) <= NAMES and len(set(a["track_tokens"])) == len(a["track_tokens"])
            np.testing.assert_array_equal(f["ego2global_translation"], f["can_bus"][:3])
            np.testing.assert_allclose(f["lidar2global"], f["ego2global"] @ f["lidar2ego"])
        assert [f["sample_next"] for f in log[:-1]] == [f["token"] for f in log[1:]] and log[0]["sample_prev"] is log[-1]["sample_next"] is None
        assert {b - a for a, b in zip([f["timestamp"] for f in log], [f["timestamp"] for f in log[1:]])} == {500_000}


def test_motion_in_the_log_is_consistent(logs):
    "Velocities agree with poses, boxes of what stands still stand still in the world."
    for log in logs.values():
        xy = np.array([f["ego2global_translation"][:2] for f in log])
        v = np.array([f["ego_dynamic_state"][0] for f in log])
        assert np.abs(np.hypot(*(xy[2:] - xy[:-2]).T) - v[1:-1]).max() < 1.2
        where = {}
        for f in log:
            for b, u, t in zip(f["anns"]["gt_boxes"], f["anns"]["gt_velocity_3d"], f["anns"]["track_tokens"]):
                if np.hypot(*u[:2]) == 0: where.setdefault(t, []).append(f["ego2global"][:2, :2] @ b[:2] + f["ego2global_translation"][:2])
        for places in where.values():
            d = np.diff(np.array(places), axis=0)
            assert not len(d) or np.median(np.hypot(*d.T)) < .05


def test_no_picture_is_stored_twice(members, root):
    n = 10 * 41 * 3
    stage, pairs = (sum(n.startswith(f"navsim/{k}/") for n in members) for k in ("navhard_two_stage", "suboptimal"))
    assert sum(n.endswith(".jpg") for n in members) == n + stage + pairs + 1 and stage > 0 and stage % 15 == 0 and pairs > 0 and pairs % 12 == 0


def test_point_clouds_are_those_of_nuscenes(logs, root):
    (path, log), = [(p, v) for p, v in logs.items() if p.stem == "minidrive-scene-2001"]
    both = [zipfile.ZipFile(root / "blobs" / f"{k}-000.zip") for k in ("navsim", "samples")]
    for k in (0, 20, 40):
        merged = read_pcd(both[0].read(f"navsim/sensor_blobs/{path.parent.name}/{log[k]['lidar_path']}"), "pcd")
        top = np.frombuffer(both[1].read(f"samples/LIDAR_TOP/minidrive-scene-2001__LIDAR_TOP__{log[k]['timestamp']}.pcd.bin"), np.float32).reshape(-1, 5)
        np.testing.assert_allclose(merged[0], top[:, 1] + .943713, atol=2e-3)
        np.testing.assert_allclose(merged[1], -top[:, 0], atol=2e-3)
        np.testing.assert_allclose(merged[2], top[:, 2] + 1.84023, atol=2e-3)
        assert merged.shape[0] == 6 and set(merged[5]) <= {0, 1, 2} and merged[4].max() <= 5
    with pytest.raises(ValueError, match="cut short"): read_pcd(both[0].read(f"navsim/sensor_blobs/{path.parent.name}/{log[0]['lidar_path']}")[:-5], "pcd")
    with pytest.raises(ValueError, match="no binary PCD"): read_pcd(b"VERSION 0.7\nDATA ascii\n1 2 3", "pcd")


def test_splits(root, logs):
    folder = root / "navsim" / "train_test_split"
    assert sorted(p.stem for p in folder.glob("*.yaml")) == ["navhard_two_stage", "navtest", "navtrain", "navval", "suboptimal"]
    used = {}
    for name, n in dict(navtrain=2 * 10, navval=10, navtest=70).items():
        raw = yaml.safe_load((folder / "scene_filter" / f"{name}.yaml").read_text())
        assert raw["_target_"] == "navsim.common.dataclasses.SceneFilter" and raw["_convert_"] == "all" and all(hexes(16)(t) for t in raw["tokens"])
        where, f, mapping = load_split(folder, name)
        assert f.num_frames == 14 and f.frame_interval == 1 and len(f.tokens) == n and mapping == [] and where == ("test" if name == "navtest" else "trainval")
        used[name] = set(f.log_names)
        assert len(split_reader(root / "navsim", name)) == n
    assert not used["navtrain"] & used["navval"] and not (used["navtrain"] | used["navval"]) & used["navtest"]
    at = {p.stem: v[0]["map_location"] for p, v in logs.items()}
    assert not {at[x] for x in used["navtrain"]} & {at[x] for x in used["navtest"]}
    official = yaml.safe_load((root / "navsim" / "default_train_val_test_log_split.yaml").read_text())
    assert set(official["train_logs"]) | set(official["val_logs"]) == used["navtrain"] and set(official["test_logs"]) == used["navtest"]


SYNTHETIC = {"scene_metadata": plain(dict), "frames": plain(list), "extended_traffic_light_data": none, "extended_detections_tracks": none}
METADATA = {"log_name": plain(str), "scene_token": hexes(17), "map_name": lambda v: v in MAPS, "initial_token": hexes(17),
            "num_history_frames": lambda v: v == 4, "num_future_frames": lambda v: v == 8, "corresponding_original_scene": hexes(16),
            "corresponding_original_initial_token": hexes(16)}
SFRAME = {"token": hexes(17), "timestamp": plain(int), "roadblock_ids": blocks, "traffic_lights": lights, "annotations": plain(dict), "ego_status": plain(dict),
          "lidar_path": none, "camera_dict": lambda v: set(v) == {c.lower() for c in NAVSIM_CAMERAS}}
STATUS = {"ego_pose": array(3), "ego_velocity": array(2), "ego_acceleration": array(2), "driving_command": array(4, kind="i"),
          "in_global_frame": lambda v: v is True}


def test_second_stage(root, logs, members):
    stage = root / "navsim" / "navhard_two_stage"
    scenes = {p.stem: load_plain(p) for p in stage.glob("synthetic_scene_pickles/*.pkl")}
    frames = {f["token"]: (f, log, k) for log in logs.values() for k, f in enumerate(log)}
    _, f, mapping = load_split(root / "navsim" / "train_test_split", "navhard_two_stage")
    assert f.include_synthetic_scenes and f.num_future_frames == 8 and len(mapping) >= 1
    assert {t for g in mapping for p in g[2] for t in p} == set(scenes) == set(f.reactive_synthetic_initial_tokens)
    for now, before, pairs in mapping:
        (_, log, k), (_, same, j) = frames[now], frames[before]
        assert log is same and k - j == 1 and len(pairs) >= 2 and now in f.tokens and before in f.tokens
        for token, original, first in [(p[i], log[k + 8 - i]["token"], (now, before)[i]) for p in pairs for i in (0, 1)]:
            s = scenes[token]
            check(s, SYNTHETIC, token)
            check(s["scene_metadata"], METADATA, token)
            m = s["scene_metadata"]
            assert m["initial_token"] == m["scene_token"] == token
            assert (m["corresponding_original_scene"], m["corresponding_original_initial_token"]) == (original, first)
            assert len(s["frames"]) == 12 and s["frames"][3]["token"] == token and s["frames"][3]["timestamp"] == frames[original][0]["timestamp"]
            for i, x in enumerate(s["frames"]):
                check(x, SFRAME, token)
                check(x["ego_status"], STATUS, token)
                assert set(x["annotations"]) == {"boxes", "names", "velocity_3d", "instance_tokens", "track_tokens"}
                assert len({len(v) for v in x["annotations"].values()}) == 1
                path = os.path.normpath(os.path.join("navsim/navhard_two_stage/sensor_blobs", x["camera_dict"]["cam_f0"]["data_path"]))
                assert path in members and (path.startswith("navsim/") == (i < 4))
        start = np.array([scenes[p[0]]["frames"][3]["ego_status"]["ego_pose"][:2] for p in pairs])
        away = np.hypot(*(start - log[k + 8]["ego2global_translation"][:2]).T)
        assert away[0] < 1e-3 and away[1:].max() > .2 and away.max() < 8


def test_second_stage_is_read(root):
    r = split_reader(root / "navsim", "navhard_two_stage", n_frames=4)
    synthetic = [t for t in r.tokens if len(t) == 17]
    assert set(r.tokens_stage_one) == {t for t in r.tokens if len(t) == 16} and len(synthetic) >= 4
    for t in (synthetic[0], synthetic[-1]):
        s = r.sample(t)
        assert s.images.shape == (4, 3, 3, 64, 128) and s.image_valid.all() and s.images.std() > 10
        assert s.future_valid.all() and np.isfinite(s.future).all() and s.history_valid.tolist() == [False, True, True, True]


def test_negative_drives_and_recoveries(root, logs):
    "The negative starts from the log's own view and goes elsewhere; the recovery is seen from where the negative has led."
    rows = json.loads((root / "navsim" / "suboptimal" / "pairs.json").read_text())
    r, log = split_reader(root / "navsim", "suboptimal", n_frames=4), split_reader(root / "navsim", "navtrain", n_frames=4)
    assert rows and {t for row in rows for t in (row["negative"], row["recovery"])} == set(r.tokens) and not r.tokens_stage_one
    original = {f["token"]: k for frames in logs.values() for k, f in enumerate(frames)}
    for row in rows:
        assert row["kind"] in NEGATIVE_KINDS and row["split"] in ("train", "dev") and row["log"] in log.filter.log_names
        assert row["negative_time_s"] <= row["recovery_time_s"]
        bad, back, k = r.sample(row["negative"]), r.sample(row["recovery"]), original[row["expert"]]
        expert = NavsimReader(root / "navsim" / "navsim_logs" / "trainval", root / "navsim" / "sensor_blobs" / "trainval",
                              SceneFilter(num_future_frames=8, log_names=(row["log"],), tokens=(row["expert"],)), n_frames=4).sample(row["expert"])
        np.testing.assert_array_equal(bad.images, expert.images)
        np.testing.assert_allclose(bad.ego, expert.ego, atol=1e-3)
        assert k * .5 == row["negative_time_s"] and np.hypot(*(bad.future - expert.future)[:, :2].T).max() > .3
        assert back.image_valid.all() and back.images.std() > 10 and back.future_valid.all()
        steps = round((row["recovery_time_s"] - row["negative_time_s"]) / .5)
        if not 1 <= steps <= 7: continue
        last = bad.future[steps - 1] - (bad.future[steps - 2] if steps > 1 else 0)      # the half second before the recovery is the negative's
        np.testing.assert_allclose(-back.history[-1, 0], np.hypot(*last[:2]), atol=.3)


def test_both_readers_say_the_same(root):
    ours = NuScenesReader(root, VERSION, point="rear_axle", n_frames=4)
    lidar = NuScenesReader(root, VERSION, point="lidar")
    navsim = split_reader(root / "navsim", "navtest", n_frames=4, ego_status="can_bus")
    by_time = {int(us): t for us, t in zip(ours.timestamp_us, ours.tokens)}
    for token in navsim.tokens[::7]:
        s = navsim.sample(token)
        a, b = ours.sample(by_time[s.timestamp_us]), lidar.sample(by_time[s.timestamp_us])
        assert a.scene == s.scene.removeprefix("minidrive-") and s.point == a.point == "rear_axle" and s.future.shape == (8, 3) and NUPLAN_MAP[a.map] == s.map
        np.testing.assert_array_equal(s.images, a.images)
        np.testing.assert_array_equal(s.image_valid, a.image_valid)
        np.testing.assert_allclose(s.ego[:5], a.ego[:5], atol=1e-9)
        assert s.ego_valid[:5].all() and not s.ego_valid[5]
        np.testing.assert_allclose(s.history[1:], a.history[1:], atol=5e-5)
        assert s.history_valid.tolist() == [False, True, True, True]      # what happened 2 s ago is outside NAVSIM's window
        np.testing.assert_allclose(s.future[:6], a.future, atol=5e-5)
        d = b.point_x_m * (np.stack([np.cos(s.future[:6, 2]), np.sin(s.future[:6, 2])], -1) - [1, 0])
        np.testing.assert_allclose(s.future[:6, :2] + d, b.future[:, :2], atol=1e-4)
        for mine, theirs in zip(s.boxes, a.boxes):
            mine, theirs = (x[~np.isnan(x[:, 0])] for x in (mine, theirs))
            assert len(mine) == len(theirs)
            apart = np.abs(mine[:, None] - theirs[None])
            apart[..., 4] = np.abs(np.sin(apart[..., 4] / 2)) * 2          # headings: half a turn from half a turn is nothing
            assert not len(mine) or (apart.max(-1).min(1) < 2e-3).all()
        K, T = navsim.camera(token, "CAM_F0")
        L, U = ours.camera(by_time[s.timestamp_us], "CAM_FRONT")
        np.testing.assert_allclose(K, L)
        np.testing.assert_allclose(T, U, atol=5e-5)
    assert len(collate([navsim.sample(t) for t in navsim.tokens[:3]])) == 3


def test_an_agent_gets_no_more_than_navsim_gives(root):
    r = split_reader(root / "navsim", "navtest")
    s = r.sample(r.tokens[0], images=False)
    assert s.ego_valid.tolist() == [True] * 4 + [False] * 2 and s.ego[4:].tolist() == [0, 0] and not s.history_valid[0]


def test_workers_and_restarts_change_nothing(root, tmp_path, monkeypatch):
    g = import_module("vlarepro.world.generate")   # `import … as` would give the function of that name
    generate(tmp_path / "two", SIZE, seed=SEED, workers=2)
    monkeypatch.setattr(g, "SHARD", 3)
    with pytest.raises(Unfinished, match="1 of 4 shards"): generate(tmp_path / "parts", SIZE, seed=SEED, workers=1, minutes=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".parts.parts", "two"]
    generate(tmp_path / "parts", SIZE, seed=SEED, workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "two"]
    files = {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert {p: (tmp_path / "two" / p).read_bytes() for p in files} == files
    def content(w): return {n: z.read(n) for p in sorted((w / "blobs").glob("*.zip")) for z in [zipfile.ZipFile(p)] for n in z.namelist()}
    assert content(tmp_path / "parts") == content(root)
    for p, data in files.items():
        if p.parts[0] != "blobs": assert (tmp_path / "parts" / p).read_bytes() == data, p


def test_command_line(root, tmp_path, monkeypatch, capsys):
    g = import_module("vlarepro.world.generate")   # `import … as` would give the function of that name
    from vlarepro.report.cli import main
    assert main(["world", "check", str(root), "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["ok"] and d["navtest"]["windows"] == 70 and d["nuscenes"]["scenes"] == 10 and d["navhard_two_stage"]["first images"] == [4, 3, 3, 64, 128]
    assert main(["world", "show", str(root)]) == 0
    text = capsys.readouterr().out
    assert d["hash"] in text and "What it is not" in text and "Licence" in text and "| test | 7 | boston-seaport | 70 |" in text
    assert main(["world", "show", str(root), "--scene", "scene-2003", "--out", str(tmp_path / "s.png")]) == 0 and (tmp_path / "s.png").stat().st_size > 10_000
    assert main(["world", "show", str(root), "--scene", "scene-1"]) == 2
    monkeypatch.setattr(g, "SHARD", 1)
    assert main(["world", "make", str(tmp_path / "new"), "--profile", "smoke", "--workers", "1", "--minutes", "0"]) == 3
    assert "1 of 26 shards are ready" in capsys.readouterr().out and not (tmp_path / "new").exists()


def test_verify_covers_the_logs(root, tmp_path):
    import shutil
    w = tmp_path / "w"
    shutil.copytree(root, w)
    p = next((w / "navsim" / "navsim_logs" / "test").glob("*.pkl"))
    log = load_plain(p)
    log[7]["ego_dynamic_state"][0] += .01
    p.write_bytes(pickle.dumps(log, 5))
    assert verify(w)["first"] == str(p.relative_to(w))
    p.write_bytes(p.read_bytes()[:-100])
    assert verify(w)["first"] == str(p.relative_to(w))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    d = tmp_path_factory.mktemp("toy")
    write_toy_log(d)
    return d


def test_windows_and_filters(toy):
    def read(**f): return NavsimReader(toy / "navsim_logs" / "mini", toy / "sensor_blobs" / "mini", SceneFilter(**f))
    assert len(read()) == 3 and len(read(num_future_frames=8)) == 5 and len(read(frame_interval=None)) == 1 and len(read(max_scenes=2)) == 2
    assert read(tokens=(f"{4:016x}",)).tokens == [f"{4:016x}"]
    with pytest.raises(ValueError, match="no window in 1 logs"): read(num_future_frames=20)
    with pytest.raises(ValueError, match="frame_interval"): SceneFilter(frame_interval=0)
    with pytest.raises(KeyError, match="did you mean 'has_route'"): scene_filter(dict(has_rout=True))
    with pytest.raises(FileNotFoundError, match="no split 'navtes'"): load_split(toy, "navtes")
    with pytest.raises(ValueError, match="did you mean 'CAM_F0'"): NavsimReader(toy, toy, cameras=("CAM_FO",))


@pytest.mark.parametrize("change, says", [
    (lambda f: f.pop("cams"), "lacks the key 'cams'"),
    (lambda f: f.update(driving_command=[0, 0, 0, 0]), "one-hot"),
    (lambda f: f.update(ego2global_translation=[np.nan, 0, 0]), "3 finite numbers"),
    (lambda f: f.update(ego_dynamic_state="fast"), "expected 4 numbers"),
    (lambda f: f["anns"].update(gt_names=["vehicle", "vehicle"]), "1 boxes but 2 names"),
    (lambda f: f.update(timestamp=0), "must ascend")])
def test_damaged_frames_are_named(toy, tmp_path, change, says):
    log = load_plain(toy / "navsim_logs" / "mini" / "toy.pkl")
    change(log[6])
    (tmp_path / "toy.pkl").write_bytes(pickle.dumps(log))
    with pytest.raises(ValueError, match=says) as e: NavsimReader(tmp_path, toy)
    assert "log toy" in str(e.value) and "frame 6" in str(e.value)


def test_a_gap_in_the_log_is_no_motion(toy, tmp_path):
    log = load_plain(toy / "navsim_logs" / "mini" / "toy.pkl")
    for f in log[6:]: f["timestamp"] += 3_000_000
    (tmp_path / "toy.pkl").write_bytes(pickle.dumps(log))
    s = NavsimReader(tmp_path, toy / "sensor_blobs" / "mini").sample(f"{4:016x}", images=False)
    assert s.future_valid.tolist() == [True] + [False] * 7 and np.isnan(s.boxes[2:]).all()


@given(st.data())
@settings(max_examples=150)
def test_a_mutated_pickle_is_read_or_refused(data):
    raw = bytearray(pickle.dumps([dict(token="ab", x=np.arange(3.), n=np.array(["a"]), t=[(1, True)])], data.draw(st.sampled_from([2, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 4))): raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try: loads_plain(bytes(raw))
    except ValueError: pass


class _Run:
    def __init__(self, what, *args): self.what, self.args = what, args
    def __reduce__(self): return self.what, self.args


def test_paths_are_plain_values(): assert str(loads_plain(pickle.dumps(Path("a/b")))) == "a/b"


@pytest.mark.parametrize("what, args", [(os.system, ("true",)), (eval, ("1",)), (getattr, ("a", "upper")), (np.load, ("x",)), (subprocess.run, (["true"],))])
def test_foreign_code_is_refused(what, args):
    with pytest.raises(ValueError, match="asks for"): loads_plain(pickle.dumps(_Run(what, *args)))


OFFICIAL = '''
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, yaml
import navsim.common.dataclasses as data
from navsim.common.dataloader import SceneLoader
from navsim.planning.scenario_builder.navsim_scenario import NavSimScenario
data.get_maps_api = lambda *a: None                  # agents' input needs no map, and there is none; scenes and the second stage ask for one
root, name, splits = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[1]) / "train_test_split"
where = yaml.safe_load((splits / f"{name}.yaml").read_text())["data_split"]
c = {k: v for k, v in yaml.safe_load((splits / "scene_filter" / f"{name}.yaml").read_text()).items() if not k.startswith("_")}
second, stage = c.get("include_synthetic_scenes", False), root / "navhard_two_stage"
sensors = replace(data.SensorConfig.build_all_sensors(), lidar_pc=not second)   # synthetic scenes have no point clouds
loader = SceneLoader(root / "navsim_logs" / where, root / "sensor_blobs" / where, data.SceneFilter(**c),
                     stage / "sensor_blobs", stage / "synthetic_scene_pickles", sensors)
out = {}
for token in [*loader.tokens_stage_one, *(loader.reactive_tokens_stage_two or ())]:
    a, scene = loader.get_agent_input_from_token(token), loader.get_scene_from_token(token)
    assert len(a.ego_statuses) == len(a.cameras) == len(a.lidars) == 4
    e, cloud = a.ego_statuses, a.lidars[-1].lidar_pc
    scenario = NavSimScenario(scene, map_root="", map_version="")
    objects = [scenario.get_tracked_objects_at_iteration(i).tracked_objects for i in range(-3, 9)]
    centers = [[o.center.x, o.center.y] for o in objects[3]]
    lights = [(s.lane_connector_id, s.status.name) for s in scenario.get_traffic_light_status_at_iteration(0)]
    out[token] = dict(pose=[s.ego_pose.tolist() for s in e], velocity=e[-1].ego_velocity.tolist(), acceleration=e[-1].ego_acceleration.tolist(),
                      command=np.asarray(e[-1].driving_command).tolist(), future=scene.get_future_trajectory(8).poses.tolist(), objects=centers,
                      lidar=None if cloud is None else list(cloud.shape), points=None if cloud is None else float(np.abs(cloud).sum()), lights=lights,
                      ego=scenario.initial_ego_state.rear_axle.serialize(), route=scenario.get_route_roadblock_ids(),
                      images={k: [list(v.image.shape), int(v.image.astype(int).sum())] for k, v in vars(a.cameras[-1]).items()})
print(json.dumps(out))
'''


@pytest.mark.skipif(not os.environ.get("VLAREPRO_NAVSIM_PYTHON"), reason="name a Python that has navsim and nuplan-devkit in VLAREPRO_NAVSIM_PYTHON")
@pytest.mark.parametrize("name", ["navtest", "navhard_two_stage"])
def test_official_loader(root, tmp_path, name):
    "NAVSIM's SceneLoader gives its agents what our reader gives."
    unpack(root)
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OPENSCENE_DATA_ROOT": str(root / "navsim"), "NUPLAN_MAPS_ROOT": str(tmp_path)}
    run = subprocess.run([os.environ["VLAREPRO_NAVSIM_PYTHON"], "-c", OFFICIAL, str(root / "navsim"), name], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    theirs, ours = json.loads(run.stdout.splitlines()[-1]), split_reader(root / "navsim", name)
    assert set(theirs) == set(ours.tokens) and (name == "navtest") == (set(ours.tokens) == set(ours.tokens_stage_one))
    for token, t in theirs.items():
        s = ours.sample(token)
        np.testing.assert_allclose(t["pose"][:3], s.history[1:], atol=1e-4)
        np.testing.assert_allclose(t["future"], s.future, atol=1e-4)
        np.testing.assert_allclose(t["velocity"] + t["acceleration"], s.ego[:4], atol=5e-5)
        assert {1: 0, 2: 1, 3: 2, 0: 3}[s.command] == t["command"].index(1)
        assert [t["images"][c] for c in ("cam_l0", "cam_f0", "cam_r0")] == [[[*im.shape[1:], 3], int(im.astype(int).sum())] for im in s.images[-1]]
        assert t["images"]["cam_b0"][0] == [64, 128, 3] and t["images"]["cam_b0"][1] < 64 * 128 * 3
        x, y, yaw = t["ego"]
        d = np.array(t["objects"]).reshape(-1, 2) - [x, y]
        d = np.stack([np.cos(yaw) * d[:, 0] + np.sin(yaw) * d[:, 1], np.cos(yaw) * d[:, 1] - np.sin(yaw) * d[:, 0]], -1)
        for b in s.boxes[0][~np.isnan(s.boxes[0, :, 0])]: assert np.hypot(*(d - b[:2]).T).min() < 1e-3
        assert t["route"] and all(state in ("RED", "GREEN") for _, state in t["lights"])
        if t["lidar"]:
            lidar = ours.lidar(token)
            assert t["lidar"] == list(lidar.shape) and abs(t["points"] - np.abs(lidar).sum()) < 1e-3 * t["points"]
