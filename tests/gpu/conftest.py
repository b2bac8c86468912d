"""A card for the tests of this folder; without one they are skipped, and say so."""
import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" in item.path.as_posix(): item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device():
    "The card's name; VLAREPRO_TEST_DEVICE=cpu tries the tests themselves on a processor, where both sides are the same."
    name = os.environ.get("VLAREPRO_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available(): pytest.skip("no CUDA device: nothing is said about what a card computes")
    return name
