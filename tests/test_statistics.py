"""Bootstrap and verdicts: the fast form against the general one, coverage, and every verdict rule."""

import numpy as np
import pytest

from vlarepro.scoring.statistics import bootstrap, bootstrap_means, difference, mann_whitney, mean_of, ratio, verdict


@pytest.fixture
def unchecked(request):
    "For tests of our own messages: with --jaxtyping-packages the type checker refuses a wrong shape first."
    if request.config.getoption("jaxtyping_packages", None): pytest.skip("the type checker refuses first")


def data(rng, n_scenes=40, seeds=3):
    scene = np.repeat([f"scene-{i:04d}" for i in range(n_scenes)], rng.integers(3, 12, n_scenes))
    hard = np.repeat(rng.gamma(2, 1, n_scenes), np.unique(scene, return_counts=True)[1])
    return {"a": hard + rng.normal(0.3, 0.3, (seeds, len(scene))), "b": hard + rng.normal(0, 0.3, (seeds, len(scene)))}, scene


@pytest.mark.parametrize("statistic", [mean_of("a"), difference("a", "b"), ratio("a", "b")])
@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_fast_form_equals_the_general_one(statistic, seeds):
    arms, scene = data(np.random.default_rng(0), seeds=seeds)
    fast = bootstrap_means(arms, scene, statistic, rng=np.random.default_rng(1), n=4000)
    slow = bootstrap(arms, scene, statistic, rng=np.random.default_rng(2), n=1500)
    assert fast.value == pytest.approx(slow.value)
    width = slow.high - slow.low
    assert fast.low == pytest.approx(slow.low, abs=0.12 * width) and fast.high == pytest.approx(slow.high, abs=0.12 * width)


def test_same_generator_same_interval():
    arms, scene = data(np.random.default_rng(0))
    runs = [bootstrap_means(arms, scene, difference("a", "b"), rng=np.random.default_rng(9)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_order_of_samples_does_not_matter_to_the_value_and_scenes_are_units():
    arms, scene = data(np.random.default_rng(0), seeds=1)
    p = np.random.default_rng(4).permutation(len(scene))
    shuffled = bootstrap_means({k: v[:, p] for k, v in arms.items()}, scene[p], difference("a", "b"), rng=np.random.default_rng(9))
    straight = bootstrap_means(arms, scene, difference("a", "b"), rng=np.random.default_rng(9))
    np.testing.assert_allclose(shuffled, straight)
    doubled = bootstrap_means({k: np.repeat(v, 2, 1) for k, v in arms.items()}, np.repeat(scene, 2), difference("a", "b"), rng=np.random.default_rng(9))
    np.testing.assert_allclose(doubled, straight)


def test_single_and_several_seeds_mix():
    arms, scene = data(np.random.default_rng(0))
    arms["b"] = arms["b"][:1]
    ci = bootstrap_means(arms, scene, difference("a", "b"), rng=np.random.default_rng(1))
    assert ci.low < ci.value < ci.high


def test_stratum_means():
    arms, scene = data(np.random.default_rng(0), seeds=2)
    hard = np.random.default_rng(1).random(len(scene)) < 0.4
    v = {"x": arms["a"], "y": arms["a"]}
    ci = bootstrap_means(v, scene, ratio("x", "y"), subset={"x": hard, "y": ~hard}, rng=np.random.default_rng(2))
    assert ci.value == pytest.approx(arms["a"][:, hard].mean() / arms["a"][:, ~hard].mean())
    for subset, error, message in (({"z": hard}, KeyError, "subset names no arm"), ({"x": hard & ~hard}, ValueError, "its subset is empty")):
        with pytest.raises(error, match=message): bootstrap_means(v, scene, ratio("x", "y"), subset=subset, rng=np.random.default_rng(2))


def test_strata_of_few_scenes():
    "One scene gives no interval; a stratum of few scenes is drawn from those, and draws that miss one of two strata are left out."
    arms, scene = data(np.random.default_rng(0), seeds=2)
    names, x = np.unique(scene), {"x": arms["a"]}
    lone = bootstrap_means(x, scene, mean_of("x"), subset={"x": scene == names[4]}, rng=np.random.default_rng(2))
    assert lone == (pytest.approx(arms["a"][:, scene == names[4]].mean()), None, None)
    assert bootstrap(x, np.zeros(len(scene)), mean_of("x"), rng=np.random.default_rng(2))[1:] == (None, None)
    few = np.isin(scene, names[:3])
    a = bootstrap_means(x, scene, mean_of("x"), subset={"x": few}, rng=np.random.default_rng(2))
    b = bootstrap_means({"x": arms["a"][:, few]}, scene[few], mean_of("x"), rng=np.random.default_rng(2))
    np.testing.assert_allclose(a, b)
    assert a.low < a.value < a.high
    two = {"x": few, "y": np.isin(scene, names[5:7])}
    c = bootstrap_means({"x": arms["a"], "y": arms["b"]}, scene, difference("x", "y"), subset=two, rng=np.random.default_rng(2))
    assert c.low < c.value < c.high
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_means({"x": arms["a"], "y": 0 * arms["a"]}, scene, ratio("x", "y"), rng=np.random.default_rng(2))


@pytest.mark.parametrize("seeds", [1, 3])
def test_coverage(seeds):
    "A 95 % interval covers the truth 95 % of the time within three Monte-Carlo standard errors; with three seeds more often (98 %), never less."
    rng, hits, n = np.random.default_rng(6), 0, 300
    for _ in range(n):
        scene = np.repeat(np.arange(40), 6)
        effect = 0.2 + rng.normal(0, 0.3, 40)[scene] + (seeds > 1) * rng.normal(0, 0.06, (seeds, 1))
        ci = bootstrap_means({"d": effect + rng.normal(0, 0.2, (seeds, len(scene)))}, scene, mean_of("d"), rng=rng, n=300)
        hits += ci.low <= 0.2 <= ci.high
    error = 3 * np.sqrt(0.95 * 0.05 / n)
    assert 0.95 - error < hits / n < (0.95 + error if seeds == 1 else 0.999)


def test_what_is_refused(unchecked):
    arms, scene = data(np.random.default_rng(0))
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="one run is v"): bootstrap({"a": arms["a"][0]}, scene, mean_of("a"), rng=rng)
    with pytest.raises(ValueError, match="no arms"): bootstrap({}, scene, mean_of("a"), rng=rng)
    with pytest.raises(ValueError, match="both groups"): mann_whitney(np.array([]), np.array([1.0]))


@pytest.mark.parametrize("kind, effect, interval, threshold, margin, expected", [
    ("greater", 1.0, (0.5, 1.5), 0.0, None, "reproduced"),
    ("greater", 1.0, (0.0, 1.5), 0.0, None, "inconclusive"),
    ("greater", -1.0, (-2.0, -0.5), 0.0, None, "not reproduced"),
    ("greater", 2.5, (2.1, 2.9), 2.0, None, "reproduced"),
    ("equivalent", 0.0, (-0.1, 0.1), 0.0, 0.2, "reproduced"),
    ("equivalent", 0.0, (-0.3, 0.1), 0.0, 0.2, "inconclusive"),
    ("equivalent", 0.5, (0.3, 0.7), 0.0, 0.2, "not reproduced"),
    ("equivalent", 1.02, (0.95, 1.05), 1.0, 0.1, "reproduced"),
    ("exact", 0, None, 0, None, "reproduced"),
    ("exact", 1, None, 0, None, "not reproduced"),
    ("exact", 1e-7, None, 0, 1e-6, "reproduced"),
    ("ordered", [0.2, 0.3], [(0.1, 0.3), (0.2, 0.4)], 0.0, None, "reproduced"),
    ("ordered", [0.2, -0.3], [(0.1, 0.3), (-0.4, -0.2)], 0.0, None, "not reproduced"),
    ("ordered", [0.2, 0.0], [(0.1, 0.3), (-0.1, 0.1)], 0.0, None, "inconclusive"),
    ("interior optimum", [0.2, 0.1], [(0.1, 0.3), (0.05, 0.2)], 0.0, None, "reproduced"),
    ("interior optimum", [0.2, -0.1], [(0.1, 0.3), (-0.2, -0.05)], 0.0, None, "not reproduced"),
    ("descriptive", 0.78, (0.74, 0.82), 0.78, 0.1, "reproduced"),
    ("descriptive", 0.4, (0.3, 0.5), 0.78, 0.1, "not reproduced"),
    ("greater", None, None, 0.0, None, "not run in this profile"),
    ("greater", 0.3, (None, None), 0.0, None, "inconclusive"),
])
def test_verdicts(kind, effect, interval, threshold, margin, expected):
    assert verdict(kind, effect, interval, threshold, margin) == expected


@pytest.mark.parametrize("args, message", [
    (("greater", 1.0, None, 0.0), "without an interval"),
    (("greater", float("nan"), (0, 1), 0.0), "not measured"),
    (("greater", 1.0, (2.0, 1.0), 0.0), "not an interval"),
    (("greater", 1.0, [(0, 1), (0, 1)], 0.0), r"expected \(low, high\)"),
    (("interior optimum", [1.0], [(0, 1)], 0.0), "expected 2 intervals"),
    (("ordered", [1.0], [(0, 1), (0, 1)], 0.0), "1 effects, but 2 intervals"),
    (("equivalent", 1.0, (0.9, 1.1), 1.0), "needs a margin"),
])
def test_verdicts_refuse_what_is_no_result(args, message):
    with pytest.raises(ValueError, match=message): verdict(*args)
