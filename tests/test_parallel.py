"A worker is killed in the middle of a map: nothing is lost, and every backend gives the same table."
import importlib.util
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vlarepro.core.parallel import parallel_map

RAY = importlib.util.find_spec("ray") is not None
ray_only = pytest.mark.skipif(not RAY, reason="ray is not installed (extra scale)")


def row(folder, i, dies_at=5):
    "A table's row; the process that first computes row `dies_at` is killed, as for want of memory."
    marker = Path(folder) / "killed"
    if i == dies_at and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return {"item": i, "value": float(np.random.default_rng(i).normal()), "pid": os.getpid()}


def always_dies(i):
    if i == 3: os.kill(os.getpid(), signal.SIGKILL)
    return i


def table(rows): return [(r["item"], r["value"]) for r in rows]


@pytest.mark.parametrize("backend", ["processes", pytest.param("ray", marks=ray_only)])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_killed_worker_loses_nothing(backend, chunk, tmp_path):
    want = table(row(tmp_path, i, None) for i in range(24))
    rows = parallel_map(partial(row, str(tmp_path)), range(24), backend, workers=2, chunk=chunk)
    assert (tmp_path / "killed").exists(), "nobody was killed: the test tested nothing"
    assert table(rows) == want and os.getpid() not in {r["pid"] for r in rows}


@pytest.mark.parametrize("backend", ["processes", pytest.param("ray", marks=ray_only)])
def test_an_item_that_always_kills_is_named(backend):
    with pytest.raises(RuntimeError, match="item 3"): parallel_map(always_dies, range(6), backend, workers=2, retries=1)


@pytest.mark.parametrize("backend", ["serial", "processes", pytest.param("ray", marks=ray_only)])
def test_an_error_is_raised_and_not_retried(backend, tmp_path):
    with pytest.raises(ZeroDivisionError): parallel_map(partial(_fails, str(tmp_path)), range(3), backend, workers=2)
    assert len(list(tmp_path.iterdir())) == 1


def _fails(folder, i):
    if i == 1:
        (Path(folder) / f"{time.time_ns()}").touch()
        raise ZeroDivisionError("one")
    return i


@ray_only
def test_a_node_of_a_local_cluster_is_killed(tmp_path):
    "Two nodes with one worker each; one is taken away while it works."
    import threading

    import ray
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        threading.Timer(4.0, lambda: cluster.remove_node(nodes[1], allow_graceful=False)).start()
        rows = parallel_map(partial(slow_row, str(tmp_path)), range(40), "ray", workers=2, retries=5)
        assert table(rows) == table(row(tmp_path, i, None) for i in range(40))
        assert len(list(tmp_path.glob("done-*"))) == 40
    finally:
        ray.shutdown()
        cluster.shutdown()


def slow_row(folder, i):
    time.sleep(0.3)
    (Path(folder) / f"done-{i}").touch()
    return row(folder, i, None)
