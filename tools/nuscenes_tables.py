"""Write nuScenes v1.0 tables (the 13 json files) from plain records; shared by the adapters in this folder."""
import hashlib
import json
import shutil
from pathlib import Path

TABLES = ("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene", "sample",
          "sample_data", "sample_annotation", "map")


def token(*parts) -> str:
    "A stable 32-digit token from the things it stands for."
    return hashlib.md5("\x1f".join(map(str, parts)).encode()).hexdigest()


class Tables:
    "Rows of the 13 tables under construction; `add` links sample_data of one channel and samples of one scene."

    def __init__(self):
        self.rows = {t: [] for t in TABLES}
        self.seen = {t: {} for t in TABLES}
        self.last = {}

    def add(self, table, **row):
        "Add a row once (by token) and return its token."
        if row["token"] not in self.seen[table]:
            self.seen[table][row["token"]] = row
            self.rows[table].append(row)
        return row["token"]

    def chain(self, table, key, **row):
        "Add a row with prev/next links to the row added before under the same key."
        before = self.last.get((table, key))
        row |= {"prev": before["token"] if before else "", "next": ""}
        added = self.add(table, **row)
        if before and before["token"] != added: before["next"] = added
        self.last[(table, key)] = self.seen[table][added]   # the row that is kept, not the arguments' copy
        return added

    def log(self, name, location, mask_name):
        "A log and the map it was driven on; returns the log token."
        t = self.add("log", token=token("log", name), logfile=name, vehicle=name.split("-")[0], date_captured="", location=location)
        m = token("map", location)
        self.add("map", token=m, category="semantic_prior", filename=mask_name, log_tokens=[])
        if t not in self.seen["map"][m]["log_tokens"]: self.seen["map"][m]["log_tokens"].append(t)
        return t

    def pose_of(self, name, timestamp_us, translation, rotation):
        "An ego pose; returns its token."
        return self.add("ego_pose", token=token("ego_pose", name, timestamp_us), timestamp=int(timestamp_us),
                        rotation=list(map(float, rotation)), translation=list(map(float, translation)))

    def calibrated(self, log, channel, modality, translation, rotation, intrinsic=()):
        "A calibrated sensor; returns its token."
        s = self.add("sensor", token=token("sensor", channel), channel=channel, modality=modality)
        return self.add("calibrated_sensor", token=token("calibrated", log, channel, translation, rotation), sensor_token=s,
                        translation=list(map(float, translation)), rotation=list(map(float, rotation)),
                        camera_intrinsic=[list(map(float, r)) for r in intrinsic])

    def write(self, root, version, readme, splits=None):
        "Write the tables, the placeholder map mask, our split file and a README that says where the data come from."
        import numpy as np
        from PIL import Image
        root = Path(root)
        if (root / version).exists(): raise SystemExit(f"{root / version} exists already: give a new folder or delete it")
        tmp = root / f".{version}.part"                       # renamed at the end: no half-written version folder
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        for m in self.rows["map"]:
            p = root / m["filename"]
            p.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(p)
        for t, rows in self.rows.items(): (tmp / f"{t}.json").write_text(json.dumps(rows), encoding="utf-8")
        if splits: (tmp / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
        (root / "README.md").write_text(readme, encoding="utf-8")
        tmp.rename(root / version)
