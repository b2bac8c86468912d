"""Damaged input ends in an error that names what is wrong: images, tables, poses, names."""
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from vlarepro.data.images import Blobs, decode
from vlarepro.data.nuscenes import NuScenesReader, TableError, write_toy_root
from vlarepro.data.planner import build, register
from vlarepro.data.sample import blank_sample, collate
from vlarepro.data.table import SampleTable, build_table, load_table, save_table

VERSION = "v1.0-toy"


@pytest.fixture
def root(tmp_path):
    write_toy_root(tmp_path / "toy")
    return tmp_path / "toy"


def edit(root, table, change):
    p = root / VERSION / f"{table}.json"
    rows = json.loads(p.read_text())
    change(rows)
    p.write_text(json.dumps(rows))


# ---- images

def test_missing_image(root):
    (root / "samples/CAM_FRONT/005.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"samples/CAM_FRONT/005\.png \(sample s5\)"): NuScenesReader(root, VERSION).sample("s5")
    assert NuScenesReader(root, VERSION).sample("s5", images=False).images is None


@pytest.mark.parametrize("keep", [0, 10, 60, -20])
def test_truncated_loose_image(root, keep):
    p = root / "samples/CAM_FRONT/005.png"
    p.write_bytes(p.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"005\.png \(sample s5\) cannot be decoded"): NuScenesReader(root, VERSION).sample("s5")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_truncated_jpeg(keep):
    import io

    from PIL import Image
    buf = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)).save(buf, "JPEG")
    data = buf.getvalue()
    assert decode(data, "a.jpg").shape == (3, 64, 128)
    with pytest.raises(ValueError, match=r"a\.jpg \(sample x\) cannot be decoded"): decode(data[:int(len(data) * keep)], "a.jpg", "x")


def test_flipped_bits_in_zip(root):
    p = root / "samples/CAM_FRONT/005.png"
    (root / "blobs").mkdir()
    with zipfile.ZipFile(root / "blobs/samples-0.zip", "w") as z: z.write(p, "samples/CAM_FRONT/005.png")
    p.unlink()
    assert NuScenesReader(root, VERSION).sample("s5").image_valid.tolist() == [[False, True, False]]
    raw = bytearray((root / "blobs/samples-0.zip").read_bytes())
    raw[100] ^= 0xFF
    (root / "blobs/samples-0.zip").write_bytes(raw)
    with pytest.raises(ValueError, match=r"005\.png \(sample s5\) is damaged inside .*samples-0\.zip"): NuScenesReader(root, VERSION).sample("s5")


def test_half_a_zip(root):
    (root / "blobs").mkdir()
    (root / "blobs/samples-0.zip").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ValueError, match="samples-0.zip is not a whole zip"): Blobs(root).read("samples/CAM_FRONT/none.png")


# ---- tables

@pytest.mark.parametrize("table, change, says", [
    ("sample_annotation", lambda r: r[3].update(instance_token="ghost"), r"sample_annotation\.json, record 3 .*'ghost', which is not in instance\.json"),
    ("sample_data", lambda r: r[4].update(ego_pose_token="ghost"), r"sample_data\.json, record 4 .*ego_pose"),
    ("ego_pose", lambda r: r[2].pop("rotation"), r"ego_pose\.json, record 2 .*lacks the field 'rotation'"),
    ("ego_pose", lambda r: r[2].update(translation=[1, 2]), r"ego_pose\.json, record 2 .*expected 3 finite numbers"),
    ("calibrated_sensor", lambda r: r[0].update(translation="x"), r"calibrated_sensor\.json, record 0 .*expected 3 finite numbers"),
    ("sample", lambda r: r.__setitem__(1, "oops"), r"sample\.json, record 1 .*is a str, not an object"),
    ("sample", lambda r: r.pop(), r"nbr_samples is 12, sample\.json has 11|sample_data\.json, record"),
    ("map", lambda r: r[0].update(log_tokens=[]), r"map\.json: log 'log' is in no map record"),
    ("map", lambda r: r[0].update(filename="maps/none.png"), r"map mask maps/none\.png"),
])
def test_malformed_record(root, table, change, says):
    edit(root, table, change)
    with pytest.raises(TableError, match=says): NuScenesReader(root, VERSION)


def test_truncated_and_missing_table(root):
    p = root / VERSION / "sample_data.json"
    p.write_text(p.read_text()[:500])
    with pytest.raises(TableError, match=r"sample_data\.json is not valid JSON"): NuScenesReader(root, VERSION)
    p.unlink()
    with pytest.raises(TableError, match=r"sample_data\.json is missing"): NuScenesReader(root, VERSION)
    with pytest.raises(TableError, match="no tables at"): NuScenesReader(root, "v1.0-tpy")


def test_nan_pose(root):
    edit(root, "ego_pose", lambda r: r[7].update(translation=[1.0, float("nan"), 0.0]))
    with pytest.raises(TableError, match=r"ego_pose\.json, record 'p7': translation is not finite"): NuScenesReader(root, VERSION)


def test_nan_box(root):
    edit(root, "sample_annotation", lambda r: r[1].update(size=[1.0, float("inf"), 1.0]))
    with pytest.raises(TableError, match=r"sample_annotation\.json, record 'a1': size is not finite"): NuScenesReader(root, VERSION)


def test_broken_can_bus(root):
    (root / "can_bus").mkdir()
    (root / "can_bus/scene-0001_pose.json").write_text('[{"utime": 1, "vel": [1, 0, 0]}]')
    read = lambda: NuScenesReader(root, VERSION).sample("s5", images=False)
    with pytest.raises(TableError, match=r"scene-0001_pose\.json: every message needs utime, vel, accel"): read()
    (root / "can_bus/scene-0001_pose.json").write_text("[{")
    with pytest.raises(TableError, match=r"scene-0001_pose\.json cannot be read"): read()


def test_names_are_corrected(root):
    with pytest.raises(TableError, match="did you mean 'val'"): NuScenesReader(root, VERSION, split="vall")
    with pytest.raises(ValueError, match="did you mean 'lidar'"): NuScenesReader(root, VERSION, point="lidr")
    with pytest.raises(KeyError, match="did you mean 'CAM_FRONT'"): NuScenesReader(root, VERSION).camera("s0", "CAM_FRNT")
    with pytest.raises(KeyError, match="did you mean 'cv_yaw'"): build("cv_yaww")
    with pytest.raises(KeyError, match="did you mean 'dt_s'"): build("cv", dt=0.5)


def test_planner_name_taken():
    with pytest.raises(ValueError, match="already vlarepro.data.planner.ConstantVelocity"):
        @register("cv")
        class Mine: pass


# ---- samples and tables of samples

def test_nan_in_samples():
    s = blank_sample()
    for field in ("history", "future"):
        bad = getattr(s, field).copy()
        bad[1, 0] = np.nan
        with pytest.raises(ValueError, match=f"{field} of sample blank: 1 of"): replace(s, **{field: bad})
    with pytest.raises(ValueError, match="images and image_valid come together"): replace(s, images=np.zeros((1, 1, 3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="different points"): collate([s, replace(s, point="rear_axle")])
    with pytest.raises(ValueError, match="empty list"): collate([])


def test_sample_table_files(root, tmp_path):
    table = build_table(NuScenesReader(root, VERSION))
    save_table(table, tmp_path / "t.npz")
    raw = (tmp_path / "t.npz").read_bytes()
    save_table(table, tmp_path / "u.npz")
    assert raw == (tmp_path / "u.npz").read_bytes()
    for keep in (0, 100, len(raw) // 2, len(raw) - 10):
        (tmp_path / "half.npz").write_bytes(raw[:keep])
        with pytest.raises(ValueError, match=r"half\.npz"): load_table(tmp_path / "half.npz")
    with pytest.raises(FileNotFoundError, match="run the prepare stage"): load_table(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="column 'future' should be"): SampleTable({**table.columns, "future": table["future"][:, :5]})
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match=r"pickle\.npz"): load_table(tmp_path / "pickle.npz")


def test_no_event_column_without_events(root):
    table = build_table(NuScenesReader(root, VERSION))
    assert table["events"].shape == (2, 0) and len(table["event_names"]) == 0


def test_gap_in_time_ends_the_path(root):
    edit(root, "sample", lambda r: [x.update(timestamp=x["timestamp"] + 1_000_000) for x in r[8:]])
    s = NuScenesReader(root, VERSION).sample("s5", images=False)
    assert s.future_valid.tolist() == [True, True, False, False, False, False]
    assert np.isnan(s.boxes[3:]).all()
