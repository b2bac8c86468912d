"""Turn exported plans into the submission.pkl that NAVSIM's own scripts score.

    python npz_to_navsim_submission.py plans.npz submission.pkl --team NAME --authors A B --email a@b.c --institution X --country Y

Run it in YOUR OWN navsim environment: a submission is a pickle of navsim's Trajectory objects, so it has to be written where those classes
exist. plans.npz is what `vlarepro export` wrote: plain arrays, read here without pickles. With --version v1 the file has the one list
`predictions` that branch v1.1 expects; with v2 (main, the default) it has `first_stage_predictions` and `second_stage_predictions`.
Then, in that environment, with the metric cache of the same split:

    python $NAVSIM_DEVKIT_ROOT/navsim/planning/script/run_pdm_score_from_submission.py train_test_split=navtest submission_file_path=submission.pkl

This file needs numpy, navsim and nuplan, and nothing of vlarepro. Before you trust a score made with it, let the same environment score
one scene whose result you know: numpy 1.23, which navsim pins, gives wrong scores on some newer processors without saying so.
"""
import argparse
import pickle
import sys
from pathlib import Path

import numpy as np

FORMAT = "vlarepro-navsim-predictions-1"
STEPS = 8


def read(path) -> dict:
    "The arrays of an export, checked."
    with np.load(path, allow_pickle=False) as z:
        a = {k: z[k] for k in z.files}
    if str(a.get("format", "")) != FORMAT: raise ValueError(f"{path}: expected format {FORMAT}, got {a.get('format')}: write it with `vlarepro export`")
    n, poses = len(a["token"]), a["poses"]
    if poses.shape != (n, STEPS, 3): raise ValueError(f"{path}: expected poses ({n}, {STEPS}, 3), got {poses.shape}")
    if not np.isfinite(poses).all(): raise ValueError(f"{path}: {int((~np.isfinite(poses)).any((1, 2)).sum())} plans are not finite")
    if len(set(a["token"].tolist())) != n: raise ValueError(f"{path}: a token occurs twice")
    if not set(a["stage"].tolist()) <= {1, 2}: raise ValueError(f"{path}: stages must be 1 or 2")
    return a


def submission(a: dict, about: dict, version: str, trajectory) -> dict:
    "The dictionary that is pickled; `trajectory` makes navsim's object from poses (8, 3) float32."
    stages = [{t: trajectory(np.asarray(p, np.float32)) for t, p, s in zip(a["token"].tolist(), a["poses"], a["stage"]) if s == k} for k in (1, 2)]
    if version == "v1":
        if stages[1]: raise ValueError(f"v1 has one stage, the export has {len(stages[1])} plans of a second: use --version v2")
        return {**about, "predictions": [stages[0]]}
    return {**about, "first_stage_predictions": [stages[0]], "second_stage_predictions": [stages[1]]}


def navsim_trajectory():
    "A function from poses to navsim's Trajectory at 4 s, 0.5 s."
    from navsim.common.dataclasses import Trajectory
    from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling
    sampling = TrajectorySampling(time_horizon=STEPS / 2, interval_length=0.5)
    return lambda poses: Trajectory(poses, sampling)


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("plans", type=Path, help="what `vlarepro export` wrote")
    p.add_argument("out", type=Path, help="the submission, e.g. submission.pkl")
    p.add_argument("--version", choices=("v1", "v2"), default="v2", help="v1: branch v1.1; v2: main, with two stages (default)")
    for name in ("team", "email", "institution", "country"): p.add_argument(f"--{name}", required=True)
    p.add_argument("--authors", required=True, nargs="+")
    a = p.parse_args(argv)
    try: data = read(a.plans)
    except (OSError, ValueError) as e: print(f"error: {e}", file=sys.stderr); return 2
    try: trajectory = navsim_trajectory()
    except ImportError as e:
        print(f"error: {e}: run this in the environment where navsim and nuplan are installed from their repositories "
              "(the package index's `navsim` is another project)", file=sys.stderr)
        return 2
    about = {"team_name": a.team, "authors": a.authors, "email": a.email, "institution": a.institution, "country / region": a.country}
    try: content = submission(data, about, a.version, trajectory)
    except ValueError as e: print(f"error: {e}", file=sys.stderr); return 2
    part = a.out.with_name(a.out.name + ".part")
    with open(part, "wb") as f: pickle.dump(content, f)
    part.replace(a.out)
    print(f"{a.out}: " + ", ".join(f"{len(v[0])} {k}" for k, v in content.items() if k.endswith("predictions")))
    return 0


if __name__ == "__main__": sys.exit(main())
