"""Shared fixtures: one thread for every test process, and the optional folder of golden cases."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

from vlarepro.core.paths import shared


@pytest.fixture(scope="session")
def shared_folder():
    "The folder of golden cases and real samples; tests that need it skip when it is absent."
    p = shared()
    if p is None:
        pytest.skip("shared folder not found: set VLAREPRO_SHARED")
    return p


settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every run of the checks
settings.load_profile("repeatable")
