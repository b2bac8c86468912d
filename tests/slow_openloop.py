"""Open-loop metrics the slow way, one cell at a time, in nuScenes axes (x right, y forward): the yardstick of tests and benchmark.

Written from the metrics' descriptions, without using vlarepro; frames, loops and arithmetic differ on purpose.
"""

import math

import cv2
import numpy as np

CLASSES = {"uniad": (0,), "stp3": (0, 1), "vad": (0, 1)}


def grid(boxes, present, protocol):
    "Occupancy of one step: every box of a drawn class, its corners rounded to cells, filled with its border."
    out = np.zeros((200, 200), np.uint8)
    if protocol == "uniad" and not present: return out + 1
    for x, y, length, width, yaw, kind in boxes:
        if math.isnan(x) or int(kind) not in CLASSES[protocol]: continue
        polygon = []
        for along, across in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5)):
            cx = x + math.cos(yaw) * along * length - math.sin(yaw) * across * width
            cy = y + math.sin(yaw) * along * length + math.cos(yaw) * across * width
            column = {"uniad": cx, "stp3": -cx, "vad": cx}[protocol]
            row = {"uniad": cy, "stp3": cy, "vad": -cy}[protocol]
            polygon.append((round((column + 50) / 0.5), round((row + 50) / 0.5)))
        cv2.fillPoly(out, [np.array(polygon, np.int32)], 1)
    return out


def ego_offsets():
    "Rows and columns of the cells whose centre lies in the ego box at the origin."
    cells = []
    for row in range(200):
        for column in range(90, 110):
            forward, side = -49.75 + 0.5 * row, -49.75 + 0.5 * column
            if -4.084 / 2 + 0.5 <= forward <= 4.084 / 2 + 0.5 and -1.85 / 2 <= side <= 1.85 / 2: cells.append((row, column))
    return cells


OFFSETS = ego_offsets()


def box_hits(x, y, g, protocol):
    "Does the ego box at a point touch an occupied cell?"
    x, y = float(np.float32(x)), float(np.float32(y))
    for row, column in OFFSETS:
        r = y * 2 + row
        c = (-x if protocol == "stp3" else x) * 2 + column
        if protocol == "vad": r = 200 - r
        if g[min(max(int(r), 0), 199), min(max(int(c), 0), 199)]: return True
    return False


def point_hits(x, y, g, protocol):
    "Does the point lie in an occupied cell? (VAD looks with half the offset.)"
    x, y, half = np.float32(x), np.float32(y), np.float32(0.5)
    if protocol == "vad": r, c = (np.float32(24.875) - y) / half, (np.float32(24.875) + x) / half
    else: r, c = (y + np.float32(49.75)) / half, ((-x if protocol == "stp3" else x) + np.float32(49.75)) / half
    r, c = int(r), int(c)
    return 0 <= r < 200 and 0 <= c < 200 and bool(g[r, c])


def score_sample(pred, gt, mask, grids, protocol):
    "L2, point flag, box flag and the excluded steps of one sample, step by step."
    l2, point, box, excluded = [], [], [], []
    for t in range(len(pred)):
        l2.append(math.dist(pred[t], gt[t]) if mask[t] else 0.0)
        excluded.append(box_hits(*gt[t], grids[t], protocol))
        point.append(point_hits(*pred[t], grids[t], protocol) and not excluded[t])
        box.append(box_hits(*pred[t], grids[t], protocol) and not excluded[t])
    return l2, point, box, excluded


def golden_case(pred, gt, mask, boxes):
    "One case in the golden schema, and its three grids."
    whole, case, occ = bool(mask.all()), {}, {}
    for p in CLASSES:
        occ[p] = np.stack([grid(boxes[t], mask[t], p) for t in range(6)])
        l2, point, box, excluded = score_sample(pred, gt, mask, occ[p], p)
        steps = {"L2": l2, "obj_col": [float(v) for v in point], "obj_box_col": [float(v) for v in box]}
        up_to = {f"plan_{k}_{h}s": (sum(v[: 2 * h]) / (2 * h) if whole else 0.0) for k, v in steps.items() for h in (1, 2, 3)}
        if p == "uniad": case[p] = {**steps, "gt_box_col": excluded}
        if p == "stp3": case[p] = {**up_to, "gt_box_col": excluded, "per_step": steps} if whole else None
        if p == "vad": case[p] = {**up_to, "gt_box_col": excluded, "fut_valid_flag": whole}
    return case, occ


def dataset_means(cases, whole):
    "The means over a set, as the golden files have them."
    full = [c for c, w in zip(cases, whole) if w]
    mean = lambda rows: np.mean(rows, axis=0).tolist()
    keys = ("L2", "obj_col", "obj_box_col")
    return {"n": len(cases), "n_full_horizon": len(full),
            "uniad_all_samples": {k: mean([c["uniad"][k] for c in cases]) for k in keys},
            "uniad_full_horizon_samples": {k: mean([c["uniad"][k] for c in full]) for k in keys},
            **{f"{p}_full_horizon_samples": {
                q: mean([c[p][q] for c in full]) for q in (f"plan_{k}_{h}s" for k in keys for h in (1, 2, 3))
            } for p in ("stp3", "vad")}}


def random_cases(rng, n, agents=6):
    "Plans, logs and boxes in nuScenes axes: some near the path, some off the grid, some logs cut short."
    t_s = 0.5 * np.arange(1, 7)
    gt = np.stack([rng.normal(0, 0.4, (n, 1)) * t_s**2, rng.uniform(0, 16, (n, 1)) * t_s], -1)
    pred = gt + rng.normal(0, 1, (n, 6, 2)).cumsum(1)
    boxes = np.full((n, 6, agents, 6), np.nan)
    near = gt[:, :, None] + rng.normal(0, 6, (n, 1, agents, 2))
    far = rng.uniform(-60, 60, (n, 1, agents, 2)) + np.zeros((1, 6, 1, 1))
    boxes[..., :2] = np.where(rng.random((n, 1, agents, 1)) < 0.5, near, far)
    boxes[..., 2:4] = rng.uniform(0.5, 6, (n, 1, agents, 2))
    boxes[..., 4] = rng.uniform(-np.pi, np.pi, (n, 1, agents))
    boxes[..., 5] = rng.random((n, 1, agents)) < 0.3
    boxes[rng.random((n, 6, agents)) < 0.2] = np.nan
    mask = np.arange(6) < rng.choice([6, 6, 6, 6, 4, 1], (n, 1))
    boxes[~mask] = np.nan
    gt[~mask] = 0
    return pred.astype(np.float32), gt.astype(np.float32), mask, boxes.astype(np.float32)
