"""Plans of vlarepro scored by the official NAVSIM scripts. Runs in YOUR OWN navsim environment (v1.1 or v2); needs numpy and navsim only.

1. Export plans in vlarepro: `vlarepro.evaluation.official_bridge.write_plans` makes plans.npz, with one check scene inside.
2. Check this environment first (a numpy or BLAS that computes wrongly gives wrong scores without a word):

    python navsim_agent.py check plans.npz

3. Put this file on the path and score, with the scripts and options of your navsim branch, for example

    export PYTHONPATH=$PYTHONPATH:<folder of this file> VLAREPRO_PLANS=plans.npz
    python $NAVSIM_DEVKIT_ROOT/navsim/planning/script/run_pdm_score.py train_test_split=navtest experiment_name=vlarepro \\
        agent._target_=navsim_agent.RecordedAgent +agent.plans=plans.npz metric_cache_path=<your cache>

4. Write down what was scored, beside the csv that the script made:

    python navsim_agent.py provenance scores.csv --traffic non_reactive --human-filter on

5. Read both back in vlarepro: `vlarepro.evaluation.official_bridge.read_official("scores.csv")`.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

FORMAT = "vlarepro-plans-1"
TOLERANCE_M = 1e-6
TRAP = ("This environment simulates a known drive wrongly. Known cause: numpy 1.23 with its OpenBLAS on newer processors. Scores from it are "
        "wrong, with no error anywhere. Try OPENBLAS_CORETYPE=Haswell, or a numpy with a newer OpenBLAS, until this check passes.")


def read_plans(path) -> dict:
    "Tokens and plans of a file of `write_plans`."
    with np.load(path, allow_pickle=False) as z: a = {k: z[k] for k in z.files}
    if str(a.get("format", "")) != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {a.get('format')!r}: write it with vlarepro's write_plans")
    return a


def simulate(reference: np.ndarray, ego: np.ndarray, time_us: int) -> np.ndarray:
    "The official simulator on one reference: (41, 3) reference poses, 11 numbers of the ego state -> (41, 11)."
    from navsim.planning.simulation.planner.pdm_planner.simulation.pdm_simulator import PDMSimulator
    from nuplan.common.actor_state.ego_state import EgoState
    from nuplan.common.actor_state.state_representation import StateSE2, StateVector2D, TimePoint
    from nuplan.common.actor_state.vehicle_parameters import get_pacifica_parameters
    from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling
    e = [float(x) for x in ego]
    start = EgoState.build_from_rear_axle(
        rear_axle_pose=StateSE2(*e[:3]), rear_axle_velocity_2d=StateVector2D(*e[3:5]), rear_axle_acceleration_2d=StateVector2D(*e[5:7]),
        tire_steering_angle=e[7], time_point=TimePoint(int(time_us)), vehicle_parameters=get_pacifica_parameters(), is_in_auto_mode=True,
        angular_vel=e[9], angular_accel=e[10], tire_steering_rate=e[8])
    states = np.zeros((1, len(reference), 11))
    states[0, :, :3] = reference
    return PDMSimulator(TrajectorySampling(num_poses=40, interval_length=0.1)).simulate_proposals(states, start)[0]


def check(path) -> int:
    "Simulate the check scene and compare with what it must give."
    a = read_plans(path)
    got = simulate(a["check.reference"], a["check.ego"], int(a["check.time_us"]))
    off = float(np.abs(got[:, :2] - a["check.simulated"][:, :2]).max())
    if not off <= TOLERANCE_M:
        where = f"numpy {np.__version__}, {platform.processor() or platform.machine()}"
        print(f"largest difference {off:.3g} m, at most {TOLERANCE_M:g} m expected. {TRAP} {where}", file=sys.stderr)
        return 1
    print(f"numpy {np.__version__} simulates the check scene as it should ({off:.1e} m); {len(a['token'])} plans of {a['planner']}")
    return 0


def commit_of_navsim() -> dict:
    "Branch and commit of the navsim that is imported."
    import navsim
    folder = Path(navsim.__file__).resolve().parent.parent

    def git(*args): return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True).stdout.strip() or None
    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"branch": git("rev-parse", "--abbrev-ref", "HEAD"), "commit": git("rev-parse", "HEAD"), "changed": changed}


def provenance(csv: Path, traffic: str, human_filter: str, plans: str) -> int:
    "Write scores.csv's companion."
    a = read_plans(plans)
    import scipy
    about = {**commit_of_navsim(), "traffic": traffic, "human_filter": human_filter, "numpy": np.__version__, "scipy": scipy.__version__,
             "python": platform.python_version(), "planner": str(a["planner"]), "plans": len(a["token"]), "check_passed": check(plans) == 0}
    out = csv.with_suffix(".provenance.json")
    out.write_text(json.dumps(about, indent=1) + "\n")
    print(out)
    return 0 if about["check_passed"] else 1


try:
    from navsim.agents.abstract_agent import AbstractAgent
    from navsim.common.dataclasses import SensorConfig, Trajectory
except ImportError:   # reading the help needs no navsim
    AbstractAgent = object


class RecordedAgent(AbstractAgent):
    "Answers with the plan that was recorded for a scene."
    requires_scene = True   # only the scene names its token

    def __init__(self, plans: str = ""):
        if AbstractAgent is object:
            raise ImportError("navsim is not installed here (the registry's package of this name is another project): run in your navsim environment")
        try: super().__init__(requires_scene=True)
        except TypeError:   # v2 asks for the sampling of the trajectory
            from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling
            super().__init__(TrajectorySampling(time_horizon=4, interval_length=0.5), requires_scene=True)
        a = read_plans(plans or os.environ["VLAREPRO_PLANS"])
        self._plans = dict(zip(a["token"].tolist(), a["plan"]))

    def name(self): return "vlarepro"

    def initialize(self): pass

    def get_sensor_config(self): return SensorConfig.build_no_sensors()

    def compute_trajectory(self, agent_input, scene=None):
        token = scene.scene_metadata.initial_token
        if token not in self._plans: raise KeyError(f"no plan for scene {token}: export plans for every token of the split")
        return Trajectory(np.asarray(self._plans[token], np.float32))


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="what", required=True)
    c = sub.add_parser("check")
    c.add_argument("plans")
    c = sub.add_parser("provenance")
    c.add_argument("csv", type=Path)
    c.add_argument("--plans", default=os.environ.get("VLAREPRO_PLANS", "plans.npz"))
    c.add_argument("--traffic", choices=("non_reactive", "reactive"), required=True, help="policy of the other road users")
    c.add_argument("--human-filter", choices=("on", "off", "none"), required=True, help="v2: on or off; v1 has none")
    a = p.parse_args(argv)
    return check(a.plans) if a.what == "check" else provenance(a.csv, a.traffic, a.human_filter, a.plans)


if __name__ == "__main__":
    sys.exit(main())
