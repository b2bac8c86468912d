"""NAVSIM's submission form, written with stand-ins for the classes of navsim and nuplan that have their fields and places."""
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from vlarepro.core.paths import root

TOOL = root() / "tools" / "npz_to_navsim_submission.py"
WHO = ["--team", "t", "--authors", "A", "B", "--email", "a@b.c", "--institution", "i", "--country", "c"]
STAND_INS = {
    "navsim/common/dataclasses.py": """
from dataclasses import dataclass
import numpy as np
from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling

@dataclass
class Trajectory:
    poses: np.ndarray
    trajectory_sampling: TrajectorySampling = TrajectorySampling(time_horizon=4, interval_length=0.5)
    def __post_init__(self):
        assert self.poses.ndim == 2 and self.poses.shape == (self.trajectory_sampling.num_poses, 3)
""",
    "nuplan/planning/simulation/trajectory/trajectory_sampling.py": """
from dataclasses import dataclass

@dataclass(frozen=True)
class TrajectorySampling:
    num_poses: int = None
    time_horizon: float = None
    interval_length: float = None
    def __post_init__(self):
        object.__setattr__(self, 'num_poses', int(self.time_horizon / self.interval_length))
"""}


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    "A folder where `import navsim` finds the stand-ins."
    d = tmp_path_factory.mktemp("navsim")
    for name, text in STAND_INS.items():
        (d / name).parent.mkdir(parents=True, exist_ok=True)
        (d / name).write_text(text)
    return d


def export(path, n=3, **change):
    a = dict(format="vlarepro-navsim-predictions-1", split="navhard_two_stage", token=np.array([f"{k:016x}" for k in range(n - 1)] + ["f" * 17]),
             stage=np.array([1] * (n - 1) + [2], np.int8), poses=np.arange(n * 24, dtype=np.float32).reshape(n, 8, 3), interval_s=0.5)
    np.savez(path, **{**a, **change})
    return path


def run(env, *argv):
    return subprocess.run([sys.executable, str(TOOL), *map(str, argv)], env={"PYTHONPATH": str(env), "PATH": ""}, capture_output=True, text=True)


def test_two_stage_submission(env, tmp_path):
    p = run(env, export(tmp_path / "plans.npz"), tmp_path / "s.pkl", *WHO)
    assert p.returncode == 0, p.stderr
    look = """
import pickle, json, sys
s = pickle.load(open(sys.argv[1], 'rb'))
t = s['first_stage_predictions'][0]['0' * 15 + '1']
first, second = (sorted(s[f'{k}_stage_predictions'][0]) for k in ('first', 'second'))
g = t.trajectory_sampling
print(json.dumps(dict(keys=list(s), first=first, second=second, kind=type(t).__module__ + '.' + type(t).__name__,
                      poses=t.poses.tolist(), dtype=str(t.poses.dtype), sampling=[g.num_poses, g.time_horizon, g.interval_length])))
"""
    q = subprocess.run([sys.executable, "-c", look, str(tmp_path / "s.pkl")], env={"PYTHONPATH": str(env)}, capture_output=True, text=True)
    s = json.loads(q.stdout)
    assert s["keys"] == ["team_name", "authors", "email", "institution", "country / region", "first_stage_predictions", "second_stage_predictions"]
    assert s["first"] == ["0" * 16, "0" * 15 + "1"] and s["second"] == ["f" * 17]
    assert s["kind"] == "navsim.common.dataclasses.Trajectory" and s["dtype"] == "float32" and s["sampling"] == [8, 4.0, 0.5]
    assert s["poses"] == np.arange(24, 48).reshape(8, 3).tolist()


def test_one_stage_submission_of_v1(env, tmp_path):
    one = export(tmp_path / "plans.npz", stage=np.ones(3, np.int8))
    assert run(env, one, tmp_path / "s.pkl", "--version", "v1", *WHO).returncode == 0
    sys.path.insert(0, str(env))
    try: s = pickle.loads((tmp_path / "s.pkl").read_bytes())   # our own file
    finally:
        sys.path.remove(str(env))
        for m in [m for m in sys.modules if m.split(".")[0] in ("navsim", "nuplan")]: del sys.modules[m]
    assert len(s["predictions"]) == 1 and len(s["predictions"][0]) == 3 and "first_stage_predictions" not in s
    p = run(env, export(tmp_path / "two.npz"), tmp_path / "s2.pkl", "--version", "v1", *WHO)
    assert p.returncode == 2 and "use --version v2" in p.stderr


@pytest.mark.parametrize("change, says", [
    (dict(format="other"), "expected format"), (dict(poses=np.zeros((3, 6, 3))), "expected poses (3, 8, 3)"),
    (dict(poses=np.full((3, 8, 3), np.nan)), "3 plans are not finite"), (dict(token=np.array(["a", "a", "b"])), "occurs twice")])
def test_what_is_refused(env, tmp_path, change, says):
    p = run(env, export(tmp_path / "plans.npz", **change), tmp_path / "s.pkl", *WHO)
    assert p.returncode == 2 and says in p.stderr and not (tmp_path / "s.pkl").exists()


def test_outside_navsims_environment(tmp_path):
    p = run(tmp_path, export(tmp_path / "plans.npz"), tmp_path / "s.pkl", *WHO)
    assert p.returncode == 2 and "another project" in p.stderr
