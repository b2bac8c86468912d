"IK-VLA's training in several processes, and in one that is killed."
import os
import signal
import subprocess
import sys
import time

import torch
from test_ikvla import SETTINGS, weights

from vlarepro.training.ikvla import IKVLASettings, train_arms


def test_number_of_workers_changes_nothing(tmp_path):
    s = IKVLASettings.read(SETTINGS)
    for w in (1, 2):
        threads = torch.get_num_threads()
        train_arms(s, {"synthetic": {"scenes": 4}}, ["ikvla_flat", "ego_text_only"], [0], tmp_path / str(w), tmp_path / f"s{w}", workers=w)
        torch.set_num_threads(threads)
    assert weights(tmp_path / "1") == weights(tmp_path / "2")


def test_kill_9_and_continue_bit_equal(tmp_path):
    "A process killed in the middle of training continues to the weights of an undisturbed run."
    code = ("import sys, numpy as np, torch; torch.set_num_threads(1)\n"
            "from vlarepro.methods.ikvla.tasks import *; from vlarepro.methods.ikvla.arms import *; from vlarepro.methods.ikvla.model import *\n"
            "from vlarepro.methods.ikvla.visual_state import StateShape; from vlarepro.training.sft import *; from vlarepro.models.checkpoints import *\n"
            "shape = StateShape(12, 8, 3, 2, (1, 2, 3, 4, 5, 6), 32); model = DrivingLLM(shape, CompactTokenizer(), 'tiny')\n"
            "task = LanguageTask(synthetic_drives(4), RUNS['nsp'], model, CompactTokenizer(), p_unknown=0.2)\n"
            "sft(task, SFTConfig(60, 8, {'llm': 1e-3}, 0.01, 0.1, 1.0, 0, 0.9), sys.argv[1] or None, save_every_s=0.0)\n"
            "save_checkpoint(sys.argv[2], model, {})\n")
    run = lambda resume, out: [sys.executable, "-c", code, str(resume), str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(run("", tmp_path / "whole"), check=True, env=env)
    p = subprocess.Popen(run(tmp_path / "resume", tmp_path / "killed"), env=env)
    for _ in range(6000):
        if (tmp_path / "resume").exists() or p.poll() is not None: break
        time.sleep(0.01)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path / "killed").exists(), "the kill came too late to test anything"
    subprocess.run(run(tmp_path / "resume", tmp_path / "killed"), check=True, env=env)
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")
