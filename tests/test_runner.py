"""The strict runner as a stage uses it: exit codes, atomic outputs, a killed run, a full disk."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from vlarepro.core.paths import atomic_write, write_json

KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


def notebook(path, *cells):
    "A notebook whose first cell is the parameters cell."
    d = [dict(cell_type="code", source=s, metadata={"tags": ["parameters"]} if i == 0 else {}, outputs=[], execution_count=None, id=f"c{i}")
         for i, s in enumerate(cells)]
    path.write_text(json.dumps({"cells": d, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}))
    return path


def run(*args, **kw):
    return subprocess.run([sys.executable, "-m", "vlarepro.core.runner", *map(str, args)], capture_output=True, text=True, **kw)


def test_two_runs_are_byte_equal(tmp_path):
    nb = notebook(tmp_path / "a.ipynb", "seed = 0", "import time; print(seed)", "seed")
    for i in (1, 2):
        r = run(nb, tmp_path / f"out{i}.ipynb", tmp_path / f"rec{i}.json", "seed=3")
        assert r.returncode == 0, r.stderr
    assert (tmp_path / "out1.ipynb").read_bytes() == (tmp_path / "out2.ipynb").read_bytes()
    rec = json.loads((tmp_path / "rec1.json").read_text())
    assert rec["parameters"] == {"seed": 3} and rec["peak_memory_mb"] > 0 and len(rec["code"]) == 12


def test_a_typo_is_refused_before_anything_runs(tmp_path):
    nb = notebook(tmp_path / "a.ipynb", "seed = 0", "open('ran', 'w')")
    r = run(nb, tmp_path / "o.ipynb", tmp_path / "r.json", "sed=3", cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert r.returncode == 2 and "did you mean 'seed'" in r.stderr and not (tmp_path / "ran").exists() and not (tmp_path / "o.ipynb").exists()


def test_a_failing_cell_fails_the_stage_and_leaves_no_output(tmp_path):
    nb = notebook(tmp_path / "a.ipynb", "seed = 0", "1 / 0")
    r = run(nb, tmp_path / "o.ipynb", tmp_path / "r.json", "seed=3")
    assert r.returncode == 1 and "ZeroDivisionError" in r.stderr
    assert not (tmp_path / "o.ipynb").exists() and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_output(tmp_path, sig):
    nb = notebook(tmp_path / "a.ipynb", "mark = ''", "open(mark, 'w').write('x')\nimport time\ntime.sleep(60)")
    mark = tmp_path / "started"
    p = subprocess.Popen([sys.executable, "-m", "vlarepro.core.runner", str(nb), str(tmp_path / "o.ipynb"), str(tmp_path / "r.json"), f"mark={mark}"],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job would ignore Ctrl-C
    for _ in range(300):
        if mark.exists():
            break
        time.sleep(0.1)
    assert mark.exists()
    os.killpg(p.pid, sig)
    assert p.wait(timeout=30) != 0
    assert not (tmp_path / "o.ipynb").exists() and not (tmp_path / "r.json").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    "A file-size limit stands in for the full disk: the write fails half-way."
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})
    code = ("import resource, signal, sys\nfrom vlarepro.core.paths import atomic_write\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "with atomic_write(sys.argv[1]) as f: f.write(b'x' * 5000)\n")
    r = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
    assert r.returncode != 0 and "File too large" in r.stderr
    assert json.loads(target.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_atomic_write_refuses_to_half_write(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "x", "w") as f:
        f.write("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
