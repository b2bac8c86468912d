"""How fast open-loop scoring is: plans per second against a per-sample loop that does the same the way the originals do.

    python benchmarks/openloop.py            # about half a minute on one core; writes benchmarks/results/openloop.json

The peer draws each sample's grids box by box and looks each step up on its own, in numpy, as UniAD's and ST-P3's `PlanningMetric` do (without their
tensors, so it is rather faster than they are). Both score the same plans and must agree, else nothing is reported. Times are processor seconds of one thread,
which other work on the machine disturbs least.
"""
# ruff: noqa: E402

import hashlib
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cv2
import numpy as np
import slow_openloop as slow

from vlarepro.core.deps import code_only, library_files
from vlarepro.core.paths import write_json
from vlarepro.core.provenance import provenance
from vlarepro.scoring.openloop import boxes_from_nuscenes, occupancies, score_openloop, xy_from_nuscenes

N, N_PEER, PLANS, AGENTS, REPEATS = 1000, 200, 4, 20, 3
ROWS, COLS = np.array(slow.OFFSETS).T


def peer(preds, gt, mask, boxes):
    "Box flags of every plan of every sample under both protocols, sample by sample."
    out = np.zeros((2, *preds.shape[:3]), bool)
    for i in range(len(gt)):
        for p, name in enumerate(("stp3", "uniad")):
            grids = [slow.grid(boxes[i, t], mask[i, t], name) for t in range(6)]
            side = -1 if name == "stp3" else 1
            excluded = hits(gt[i], grids, side)
            for k in range(len(preds)): out[p, k, i] = hits(preds[k, i], grids, side) & ~excluded
    return out


def hits(xy, grids, side):
    "The ego box of one path in the grids of its steps."
    r = np.clip((xy[:, 1:] / 0.5 + ROWS).astype(np.int32), 0, 199)
    c = np.clip((side * xy[:, :1] / 0.5 + COLS).astype(np.int32), 0, 199)
    return np.array([grids[t][r[t], c[t]].any() for t in range(6)])


def ours(preds, gt, mask, boxes):
    s = score_openloop(preds, gt, mask, occupancies(boxes, mask))
    s.table_row("drop")
    return np.stack([s.stp3.box, s.uniad.box])


def timed(f, *args):
    "Median processor seconds of several runs, and the result."
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        result = f(*args)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def main():
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    pred, gt, mask, boxes = slow.random_cases(rng, N, AGENTS)
    preds = pred + rng.normal(0, 0.5, (PLANS, *pred.shape)).astype(np.float32)
    turned = xy_from_nuscenes(preds), xy_from_nuscenes(gt), mask, boxes_from_nuscenes(boxes)
    fast_s, fast = timed(ours, *turned)
    slow_s, reference = timed(peer, preds[:, :N_PEER], gt[:N_PEER], mask[:N_PEER], boxes[:N_PEER])
    if not (fast[:, :, :N_PEER] == reference)[:, :, mask[:N_PEER]].all(): raise SystemExit("the two implementations disagree: nothing is reported")
    per_fast, per_slow = fast_s / (N * PLANS), slow_s / (N_PEER * PLANS)
    library = library_files("import vlarepro.scoring.openloop")
    code = hashlib.sha256("".join(code_only(f.read_text(encoding="utf-8")) for f in library).encode()).hexdigest()[:12]
    result = {"samples": N, "plans_per_sample": PLANS, "boxes_per_step": AGENTS, "processor_seconds": round(fast_s, 4), "us_per_plan": round(1e6 * per_fast, 1),
              "peer": "per-sample loop in numpy, grids drawn box by box", "peer_us_per_plan": round(1e6 * per_slow, 1), "ratio": round(per_slow / per_fast, 2),
              "provenance": provenance("benchmark", [0], code)}
    write_json(ROOT / "benchmarks" / "results" / "openloop.json", result)
    print(f"ours: {N} samples x {PLANS} plans, both protocols, in {fast_s:.2f} processor seconds ({1e6 * per_fast:.0f} us a plan)")
    print(f"loop: {1e6 * per_slow:.0f} us a plan; ratio {per_slow / per_fast:.1f}")


if __name__ == "__main__":
    main()
