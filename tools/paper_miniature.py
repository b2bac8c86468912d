"""Lay a minidrive world out as nuScenes and NAVSIM lie on a user's disk, with small checkpoints in the place of the published ones.

usage: python tools/paper_miniature.py WORLD OUT

WORLD is a minidrive data set, such as data/smoke. OUT gets
  nuscenes/     v1.0-trainval tables without minidrive's card, loose images, maps, CAN bus (no route command: real nuScenes has none), language/
  openscene/    navsim_logs, sensor_blobs with images of their own, train_test_split, navhard_two_stage, suboptimal (negative and recovery drives)
  caches/       navtrain/, navtest/, navhard_two_stage/ and pairs/ as tools/navsim_cache_to_npz.py writes them
  teachers/     geometry/ and dynamics/: random numbers in the layout of vlarepro.models.external_teachers
  models/       qwen2.5-0.5b, dinov3-vits16, qwen2.5-vl-3b, qwen3-vl-8b: tiny models saved as the hub has them, named like the published ones
It is how the paper profile's stages are tried without the real data: nothing of it is real, and no result of it means anything.
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from vlarepro.core.pickles import dump_plain, load_plain
from vlarepro.world.generate import VERSION, WorldSize, plan_scenes
from vlarepro.world.navsim_writer import NO_CAMERA
from vlarepro.world.unpack import unpack

TABLES = "v1.0-trainval"
NOT_REAL = ("_command.json",)   # CAN messages that only minidrive has


def lay_out_nuscenes(world: Path, loose: Path, out: Path) -> None:
    "Tables, maps, CAN bus, texts and loose images."
    shutil.copytree(world / VERSION, out / TABLES, ignore=lambda *_: ["minidrive.json"])
    shutil.copytree(world / "can_bus", out / "can_bus", ignore=lambda _, names: [n for n in names if n.endswith(NOT_REAL)])
    for part in ("maps", "language"): shutil.copytree(world / part, out / part)
    shutil.copytree(loose / "samples", out / "samples")


def lay_out_openscene(world: Path, loose: Path, out: Path) -> dict:
    "Logs whose pictures are files of their own; returns the time stamp of every frame."
    times = {}
    for folder in ("trainval", "test"):
        for path in sorted((world / "navsim" / "navsim_logs" / folder).glob("*.pkl")):
            frames = load_plain(path)
            for f in frames:
                times[f["token"]] = int(f["timestamp"])
                for camera, entry in f["cams"].items():
                    if entry["data_path"].endswith(NO_CAMERA):
                        f["cams"][camera] = {}
                        continue
                    name = f"{path.stem}/{camera}/{f['token']}.jpg"
                    source = (loose / "navsim" / "sensor_blobs" / folder / entry["data_path"]).resolve()
                    target = out / "sensor_blobs" / folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
                    f["cams"][camera] = {**entry, "data_path": name}
            (out / "navsim_logs" / folder).mkdir(parents=True, exist_ok=True)
            dump_plain(frames, out / "navsim_logs" / folder / path.name)
    shutil.copytree(world / "navsim" / "train_test_split", out / "train_test_split")
    for p in (out / "train_test_split").rglob("navval.yaml"): p.unlink()
    for extra in ("navhard_two_stage", "suboptimal"):
        for base in (world, loose):
            if (base / "navsim" / extra).is_dir(): shutil.copytree(base / "navsim" / extra, out / extra, dirs_exist_ok=True)
        for path in sorted((out / extra / "synthetic_scene_pickles").glob("*.pkl")):
            _own_pictures(path, loose / "navsim" / extra / "sensor_blobs", out / extra / "sensor_blobs")
    return times


def _own_pictures(path: Path, source: Path, target: Path) -> None:
    "Pictures that a synthetic scene shares with the tables become files below its own folder."
    scene = load_plain(path)
    for k, frame in enumerate(scene["frames"]):
        for camera, entry in (frame.get("camera_dict") or frame["cams"]).items():
            old = str(entry.get("data_path") or "")
            if not old.startswith(".."): continue
            new = f"{path.stem}/{camera}/{k}.jpg"
            (target / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile((source / old).resolve(), target / new)
            entry["data_path"] = new
    dump_plain(scene, path)


def _rings(pieces) -> dict:
    "Rings as the converter writes them: one polygon a ring, none with a hole."
    rings = [pieces.xy[pieces.start[i]:pieces.start[i + 1]] for i in range(len(pieces.start) - 1)]
    n = len(rings)
    return {"start": np.asarray(pieces.start, np.int64), "owner": np.arange(n, dtype=np.int64), "hole": np.zeros(n, bool)}


def official_arrays(cache, version: str) -> dict:
    "What tools/navsim_cache_to_npz.py would have written for a scene: world coordinates, one version."
    def world(a):
        a = np.array(a, float)
        a[..., :2] += cache.origin
        return a
    p, red, t, r = cache.polygons, cache.red_lights, cache.tracks(version), cache.reference(version)
    out = {"format": np.array("vlarepro-navsim-1"), "version": np.array(version), "token": np.array(cache.token), "log": np.array(cache.log),
           "synthetic": np.array(cache.synthetic),
           "time_us": np.array(cache.time_us, np.int64), "ego": world(cache.ego),
           "past_time_us": cache.past_time_us if version == "v2" else np.zeros(0, np.int64),
           "past": world(cache.past) if version == "v2" else np.zeros((0, 11)),
           "polygons.xy": world(p.xy), **{f"polygons.{k}": v for k, v in _rings(p).items()}, "polygons.type": np.asarray(p.type, np.int8),
           "polygons.id": np.array(p.id, str), "polygons.on_route": np.asarray(p.on_route, bool), "centerline": world(cache.centerline),
           "reference.time_us": np.asarray(r.time_us, np.int64), "reference.states": world(r.states), "tracks.state": world(t.state),
           "tracks.valid": np.asarray(t.valid, bool), "tracks.type": np.asarray(t.type, np.int8), "tracks.id": np.array(t.id, str)}
    lights = red if version == "v2" else type(red).none()
    out |= {"red.xy": world(lights.xy), **{f"red.{k}": v for k, v in _rings(lights).items()}, "red.active": np.asarray(lights.active, bool)}
    return out if version == "v1" or cache.human is None else out | {"human": np.asarray(cache.human, float)}


def write_cache(folder: Path, cache, versions: tuple = ("v1", "v2")) -> None:
    "One scene, a file a version."
    for v in versions: np.savez_compressed(folder / f"{cache.token}.{v}.npz", **official_arrays(cache, v))


def write_caches(world: Path, out: Path, splits: tuple, folder: str, per_scene: int = 2) -> int:
    "Scene caches of some frames of every scene of some splits."
    from vlarepro.evaluation.navsim import frame_caches
    card, n = json.loads((world / VERSION / "minidrive.json").read_text()), 0
    many = {s: sum(a["split"] == s for a in card["scenes"].values()) for s in ("train", "dev", "val", "test")}
    (out / folder).mkdir(parents=True)
    for job in plan_scenes(WorldSize(**many | {"train": many["train"] + many["dev"]}), card["seed"]):   # dev is a part of train
        if job.split not in splits: continue
        for c in frame_caches(job, card["seed"], per_scene):
            write_cache(out / folder, c)
            n += 1
    return n


def write_more_caches(world: Path, out: Path) -> None:
    "Those of navhard's groups, which only version 2 scores, and of the negative and recovery drives."
    from vlarepro.methods.spanvla.pairs import pair_caches
    from vlarepro.scoring.pdm.navhard import navhard_groups
    for folder in ("navhard_two_stage", "pairs"): (out / folder).mkdir(parents=True)
    for group in navhard_groups(world):
        for c in group.caches(): write_cache(out / "navhard_two_stage", c, ("v2",))
    card = json.loads((world / VERSION / "minidrive.json").read_text())
    for log in sorted({p["log"] for p in json.loads((world / "navsim" / "suboptimal" / "pairs.json").read_text())}):
        name = log.removeprefix("minidrive-")
        for c in pair_caches(name, card["scenes"][name], card["seed"]): write_cache(out / "pairs", c)


def write_teachers(out: Path, tokens: list) -> None:
    "Random numbers in the place of the published teachers' features."
    from vlarepro.models.external_teachers import write_external
    draw = np.random.default_rng(0)
    for name, horizons in (("geometry", 1), ("dynamics", 3)):
        slots = (horizons, 3, 8)
        write_external(out / name, tokens, draw.normal(size=(len(tokens), horizons * 3 * 8, 16)).astype(np.float16), slots, "random numbers")


def keep_scored(openscene: Path, caches: Path) -> None:
    "Let the filters ask for the frames that have caches."
    import yaml
    for split in ("navtrain", "navtest"):
        path = openscene / "train_test_split" / "scene_filter" / f"{split}.yaml"
        f = yaml.safe_load(path.read_text())
        have = {p.name.split(".")[0] for p in (caches / split).glob("*.v1.npz")}
        f["tokens"] = [t for t in f["tokens"] if t in have]
        path.write_text(yaml.safe_dump(f))


def write_models(out: Path) -> None:
    "Tiny models and tokenizers under the published names."
    from vlarepro.data.tokenizer import base_corpus, train_tokenizer
    from vlarepro.models.backbones import build_llm, build_vit
    from vlarepro.models.vlm import build_vlm
    layers = 5   # bridges read every second and every fourth
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1)
    tokenizer = train_tokenizer([*base_corpus(), "The road is free, so keep the speed and stay in the lane."] * 4, 600)
    models = {"qwen2.5-0.5b": build_llm(small, 1024, seed=0), "qwen2.5-vl-3b": build_vlm(small, 1024, seed=0),
              "qwen3-vl-8b": build_vlm({**small, "head_dim": 16}, 1024, seed=0, family="qwen3-vl")}
    for name, model in models.items():
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    build_vit("tiny", seed=0).save_pretrained(out / "dinov3-vits16")


def texts_for_logs(language: Path, tables: Path, times: dict) -> None:
    "Reasoning of NAVSIM's frames, taken from the keyframe of the same moment: what a user would have to write."
    samples = {int(s["timestamp"]): s["token"] for s in json.loads((tables / "sample.json").read_text())}
    for name in ("coc", "captions", "explanations"):
        texts = json.loads((language / f"{name}.json").read_text())
        texts |= {token: texts[samples[us]] for token, us in times.items() if samples.get(us) in texts}
        (language / f"{name}.json").write_text(json.dumps(texts))


def build(world: Path, out: Path) -> dict:
    "The whole miniature; returns where its parts lie."
    world, out = Path(world).resolve(), Path(out)
    if out.exists(): raise FileExistsError(f"{out} exists: remove it to build the miniature again")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    loose = part / "loose"
    unpack(world, loose)
    lay_out_nuscenes(world, loose, part / "nuscenes")
    times = lay_out_openscene(world, loose, part / "openscene")
    texts_for_logs(part / "nuscenes" / "language", part / "nuscenes" / TABLES, times)
    for splits, folder in ((("train", "dev"), "navtrain"), (("test",), "navtest")): write_caches(world, part / "caches", splits, folder)
    keep_scored(part / "openscene", part / "caches")
    write_more_caches(world, part / "caches")
    write_teachers(part / "teachers", sorted(times))
    write_models(part / "models")
    shutil.rmtree(loose)
    part.replace(out)
    return {k: out / k for k in ("nuscenes", "openscene", "caches", "teachers", "models")}


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    for name, path in build(Path(sys.argv[1]), Path(sys.argv[2])).items(): print(f"{name}: {path}")
