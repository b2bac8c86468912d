"""The expert by the PDM scorer: PDMS >= 0.95 and EPDMS >= 0.90 on val scenes (bounds leave room for 90 samples)."""
import numpy as np
import pytest

from vlarepro.world.scenarios import make_scene
from vlarepro.world.scene import LOCATIONS

minidrive = pytest.importorskip("vlarepro.scoring.pdm.minidrive", reason="the PDM scorer is not part of this tree")


def test_expert_scores_as_a_good_driver():
    from vlarepro.scoring.pdm.score import navsim_v1_pdms, navsim_v2_epdms

    pdms, epdms, nc = [], [], []
    for s in range(600, 690):
        scene = make_scene(s, f"scene-{s:04d}", "val", LOCATIONS[s % 4])
        k = (5, 11, 17, 23)[s % 4]
        cache = minidrive.cache_from_scene(scene, k)
        before = minidrive.cache_from_scene(scene, k - 1, reference=False)
        first = navsim_v1_pdms(cache, cache.human[None])
        second = navsim_v2_epdms(cache, cache.human[None], human_filter=False, previous_plans=before.human[None])
        pdms.append(float(first.score[0]))
        epdms.append(float(second.score[0]))
        nc.append(float(first.nc[0]))
    assert np.mean(pdms) > 0.94 and np.mean(epdms) > 0.90, (np.mean(pdms), np.mean(epdms))
    assert np.mean(nc) > 0.98
    assert np.std(pdms) > 0.01  # not PDM-Closed: it does not match the reference everywhere
