"""What one (scene, plan) costs in NAVSIM's two scores, against a slow second implementation that must agree.

    python benchmarks/pdm_scorer.py                # a few minutes; writes benchmarks/results/pdm_scorer.json
    python benchmarks/pdm_scorer.py --json         # {machine, pdms_ms_k64, epdms_ms_k64, epdms_ms_k1, grpo_call_ms} of the dense scene, nothing is written
    python benchmarks/pdm_scorer.py --oracle DIR   # times scenes of a folder in the oracle schema too

Scenes are made here: 0 agents and 16 polygons (sparse), 47 and 21 (dense), 47 and 271 (a city block), about 174 corners a polygon. EPDMS has everything
on: human filter and two-frame comfort. Times of one thread are processor seconds, those of all cores and of the GRPO call wall-clock. What is kept with a scene
(polygons and boxes prepared, reference and human judged) is made before the clock starts and stated beside it; the GRPO call is measured on scenes never
scored before. The peer is `tests/slow_pdm.py`: numpy, scipy and shapely, one plan at a time, written from the scorers' description alone. Both must give the
same scores, else nothing is reported.
"""
# ruff: noqa: E402

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np
import slow_pdm as slow

from vlarepro.core.deps import code_only, library_files
from vlarepro.core.paths import write_json
from vlarepro.core.provenance import device_name, provenance
from vlarepro.core.seeds import rng
from vlarepro.scoring.pdm.schema import load_oracle_scene, oracle_paths
from vlarepro.scoring.pdm.score import navsim_v1_pdms, navsim_v2_epdms, score_batch

SCENES = {"sparse": (0, 0), "dense": (47, 5), "dense + 250 polygons": (47, 255)}  # agents, polygons beside the 16 of the road
COUNTS, REPEATS, BATCH, GRPO = (1, 16, 64), 5, 16, (8, 16)
LIMITS_MS = {"pdms_ms_k64": 0.15, "epdms_ms_k64": 0.25, "epdms_ms_k1": 2.0, "grpo_call_ms": 50.0}  # what the project set itself, for the dense scene
CROWDED = ("dense", "dense + 250 polygons")
LIBRARY = "import vlarepro.scoring.pdm.score"


def made(name, k, number=0):
    "A scene of this kind, k plans and the same agents' plans half a second earlier."
    agents, polygons = SCENES[name]
    draw = rng("pdm benchmark", name, number)
    cache = slow.made_scene(draw, agents=agents, extra_polygons=polygons, red_light=True, token=f"{name} {number}")
    return cache, *slow.made_plans(draw, cache, k)


def loaded(path, k):
    "An oracle scene, its plans repeated to k."
    s = load_oracle_scene(path)
    pick = np.arange(k) % len(s.candidates)
    return s.cache, s.candidates[pick], s.previous_candidates[pick]


def score(cache, plans, previous, version): return navsim_v1_pdms(cache, plans) if version == "v1" else navsim_v2_epdms(cache, plans, previous_plans=previous)


def batch(scenes, version, workers):
    "Many scenes in one call."
    if version == "v1": return score_batch([s[0] for s in scenes], [s[1] for s in scenes], version, workers)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool: return list(pool.map(lambda s: score(*s, version), scenes))


def ms(f, clock=time.process_time, at_least_s=0.3):
    "Median milliseconds of a call, each repeat as many calls as fill `at_least_s`."
    f()
    start, n = clock(), 0
    while n == 0 or clock() - start < at_least_s / 3: f(); n += 1
    per_repeat = max(1, 3 * n)
    out = []
    for _ in range(REPEATS):
        start = clock()
        for _ in range(per_repeat): f()
        out.append(1e3 * (clock() - start) / per_repeat)
    return statistics.median(out)


def agree(cache, plans, previous, every):
    "Do the fast and the slow scorer give the same scores?"
    for version in ("v1", "v2"):
        fast, other = score(cache, plans, previous, version), slow.SlowScorer(cache, version)
        for i in range(0, len(plans), every):
            theirs = other.score(plans[i], previous[i])
            names = ("nc", "dac", "ddc", "ep", "ttc", "score") + (("comfort",) if version == "v1" else ("tlc", "lk", "hc", "ec", "unfiltered"))
            wrong = [n for n in names if abs(getattr(fast, n)[i] - theirs[n]) > 1e-9]
            if wrong: raise SystemExit(f"{cache.token}: the two implementations disagree on {', '.join(wrong)} of plan {i} ({version}): nothing is reported")


def peer_ms(cache, plans, previous, version, n=6):
    "Milliseconds a plan of the slow scorer; what it keeps with a scene is made before."
    other = slow.SlowScorer(cache, version)
    other.prepare()
    def run():
        for i in range(n): other.score(plans[i], previous[i])
    run()
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start) / n


def forgotten(cache):
    "The scene as if it had never been scored."
    cache.prepared.clear()
    return cache


def scene_row(cache, plans, previous):
    "Milliseconds per (scene, plan) on one thread for every number of candidates, the scene's preparation, and the peer."
    agree(cache, plans, previous, 8)
    row = {"agents": len(cache.tracks_v2.state), "polygons": len(cache.polygons), "corners_per_polygon": round(len(cache.polygons.xy) / len(cache.polygons), 1)}
    for version, name in (("v1", "pdms"), ("v2", "epdms")):
        for k in COUNTS: row[f"{name}_ms_k{k}"] = ms(lambda version=version, k=k: score(cache, plans[:k], previous[:k], version)) / k
        fresh = ms(lambda version=version: score(forgotten(cache), plans[:1], previous[:1], version))
        row[f"{name}_prepare_ms"] = max(fresh - row[f"{name}_ms_k1"], 0.0)
        row[f"{name}_peer_ms"] = peer_ms(cache, plans, previous, version)
        row[f"{name}_ratio_k64"] = row[f"{name}_peer_ms"] / row[f"{name}_ms_k64"]
    return row


def batches(name):
    "Scenes x 64 plans in one call: wall-clock milliseconds a plan, one thread and all cores."
    scenes, out = [made(name, 64, i) for i in range(BATCH)], {}
    for version, label in (("v1", "pdms"), ("v2", "epdms")):
        for workers, cores in ((1, "one_thread"), (None, "all_cores")):
            out[f"{label}_{cores}_ms"] = ms(lambda v=version, w=workers: batch(scenes, v, w), time.perf_counter) / (64 * BATCH)
        out[f"{label}_speedup"] = out[f"{label}_one_thread_ms"] / out[f"{label}_all_cores_ms"]
    return out


def grpo_call(name):
    "One reward call of GRPO, 8 scenes x 16 samples: wall-clock milliseconds of the whole call; `new`: on scenes that were never scored before."
    scenes = [made(name, GRPO[1], i) for i in range(GRPO[0])]
    fresh, out = lambda: [(forgotten(c), p, q) for c, p, q in scenes], {}
    for version, label in (("v1", "pdms"), ("v2", "epdms")):
        for workers, cores in ((1, "one_thread"), (None, "all_cores")):
            out[f"{label}_{cores}_ms"] = ms(lambda v=version, w=workers: batch(scenes, v, w), time.perf_counter)
            out[f"{label}_{cores}_new_ms"] = ms(lambda v=version, w=workers: batch(fresh(), v, w), time.perf_counter)
    return out


def compile_s():
    "Seconds until the first score of both versions: compilation, or loading what an earlier process compiled."
    start = time.perf_counter()
    scene = made("sparse", 2)
    for version in ("v1", "v2"): score(*scene, version)
    return time.perf_counter() - start


def machine(): return f"{device_name().rpartition(', ')[0]}, {len(os.sched_getaffinity(0))} cores"


def rounded(x):
    if isinstance(x, dict): return {k: rounded(v) for k, v in x.items()}
    return float(f"{x:.4g}") if isinstance(x, float) else x


def show(rows, batched, grpo, first_s):
    print(f"{machine()}; first scores after {first_s:.1f} s (compilation, or loading what was compiled), not part of any figure below")
    print(f"{'ms per (scene, plan), one thread':<34}" + "".join(f"{f'K = {k}':>9}" for k in COUNTS) + f"{'prepare':>10}{'slow peer':>11}{'ratio':>8}")
    for scene, row in rows.items():
        for n in ("pdms", "epdms"):
            cells = "".join(f"{row[f'{n}_ms_k{k}']:>9.3f}" for k in COUNTS)
            print(f"{n.upper() + ', ' + scene:<34}{cells}{row[f'{n}_prepare_ms']:>10.2f}{row[f'{n}_peer_ms']:>11.1f}{row[f'{n}_ratio_k64']:>8.0f}")
    for scene, b in batched.items():
        for n in ("pdms", "epdms"):
            one, all_cores, gain = (b[f"{n}_{k}"] for k in ("one_thread_ms", "all_cores_ms", "speedup"))
            print(f"{BATCH} scenes x 64 plans, {scene}, {n.upper()}: {one:.3f} ms a plan on one thread, {all_cores:.3f} on all cores (x {gain:.2f})")
    for scene, g in grpo.items():
        for n in ("pdms", "epdms"):
            new, new_one, seen, seen_one = (g[f"{n}_{k}_ms"] for k in ("all_cores_new", "one_thread_new", "all_cores", "one_thread"))
            print(f"GRPO reward call, {GRPO[0]} scenes x {GRPO[1]} samples, {scene}, {n.upper()}: {new:.1f} ms on all cores, {new_one:.1f} on one thread; "
                  f"scenes seen before: {seen:.1f} and {seen_one:.1f}")


def headline(row, grpo):
    "The figures of the dense scene that others ask for."
    return {k: row[k] for k in ("pdms_ms_k64", "epdms_ms_k64", "epdms_ms_k1")} | {"grpo_call_ms": grpo["epdms_all_cores_new_ms"]}


def code_version(): return hashlib.sha256("".join(code_only(f.read_text(encoding="utf-8")) for f in library_files(LIBRARY)).encode()).hexdigest()[:12]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the five headline figures of the dense scene as JSON, write nothing")
    parser.add_argument("--oracle", metavar="DIR", help="time the scenes of a folder in the oracle schema too")
    args = parser.parse_args()
    first_s, load = compile_s(), os.getloadavg()[0]
    if args.json:
        row, grpo = scene_row(*made("dense", 64)), grpo_call("dense")
        return print(json.dumps({"machine": machine()} | rounded(headline(row, grpo))))
    rows = {name: scene_row(*made(name, 64)) for name in SCENES}
    for path in oracle_paths(args.oracle) if args.oracle else (): rows[path.stem] = scene_row(*loaded(path, 64))
    batched, grpo = {n: batches(n) for n in CROWDED}, {n: grpo_call(n) for n in CROWDED}
    show(rows, batched, grpo, first_s)
    figures = headline(rows["dense"], grpo["dense"])
    for name, limit in LIMITS_MS.items(): print(f"{name}: {figures[name]:.3f}, goal {limit:g} {'met' if figures[name] <= limit else 'MISSED'}")
    result = {"machine": machine(), **figures, "limits_ms": LIMITS_MS, "scenes": rows, "batches": batched, "grpo_call": grpo, "first_score_s": first_s,
              "load_average": load, "peer": "tests/slow_pdm.py: numpy, scipy, shapely, one plan at a time",
              "provenance": provenance("benchmark", [0], code_version())}
    write_json(ROOT / "benchmarks" / "results" / "pdm_scorer.json", rounded(result))


if __name__ == "__main__":
    main()
