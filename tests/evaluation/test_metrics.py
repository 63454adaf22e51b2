"""sibo_lab/evaluation/metrics.py against scikit-learn and scipy."""

import numpy as np
import pytest
import scipy.stats
import sklearn.calibration
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from sibo_lab.evaluation import metrics

labels = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)
numbers = st.lists(st.tuples(st.integers(-5, 5), st.floats(-5, 5)), min_size=3, max_size=60)


@settings(max_examples=60, deadline=None)
@given(labels)
def test_matthews_and_f1_are_scikit_learns(pairs):
    predicted, gold = map(np.array, zip(*pairs, strict=True))
    assert metrics.matthews(predicted, gold) == pytest.approx(sklearn.metrics.matthews_corrcoef(gold, predicted))
    assert metrics.f1(predicted, gold) == pytest.approx(sklearn.metrics.f1_score(gold, predicted, zero_division=0))


@settings(max_examples=60, deadline=None)
@given(numbers)
def test_pearson_and_spearman_are_scipys(pairs):
    a, b = (np.array(x, dtype=float) for x in zip(*pairs, strict=True))
    if np.ptp(a) < 1e-3 or np.ptp(b) < 1e-3:
        assert abs(metrics.pearson(a, np.zeros_like(b))) == 0  # constant: no correlation, not a NaN
        return
    assert metrics.pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-6)
    assert metrics.ranks(b) == pytest.approx(scipy.stats.rankdata(b))
    assert metrics.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-6)


def test_last_five_is_the_mean_of_the_last_five_entries():
    assert metrics.last_five([9, 9, 1, 2, 3, 4, 5]) == 3.0


@given(st.integers(1, 60), st.sampled_from((0.8, 0.975)))
def test_the_quantile_of_students_t_is_scipys(df, p):
    assert metrics.student_t(df, p) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-3)


def test_where_examples_agree_the_interval_is_students_over_seeds():
    each = np.array([0.3, -0.1, 0.2, 0.5])
    d = metrics.paired(np.tile(each[:, None], 50))
    oracle = scipy.stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert (d.mean - d.half, d.mean + d.half) == pytest.approx(tuple(oracle), rel=1e-3)


@pytest.mark.parametrize(("seeds", "over_seeds", "over_examples", "both"), [
    (1, 0.0, 1.0, 1.0), (2, 0.5, 0.0, 1.0), (3, 0.0, 1.0, 1.0), (3, 0.2, 1.0, 0.5), (3, 1.0, 1.0, 1.0),
    (3, 0.35, 0.0, 1.0), (3, 0.0, 0.0, 1.0), (6, 0.3, 0.2, 1.0)])
def test_95_of_100_intervals_or_more_hold_the_true_difference_and_some_80_exclude_0_at_what_could_be_shown(
        seeds, over_seeds, over_examples, both):
    rng, inside, shown = np.random.default_rng(0), [], []

    def study(true):
        return metrics.paired(true + rng.normal(0, over_seeds, (seeds, 1)) + rng.normal(0, over_examples, (1, 40))
                              + rng.normal(0, both, (seeds, 40)))

    typical = np.mean([study(0.0).could_show for _ in range(200)])
    for _ in range(1000):
        d = study(typical)
        inside.append(abs(d.mean - typical) <= d.half)
        shown.append(d.mean - d.half > 0)
    assert 0.94 <= np.mean(inside) and 0.6 <= np.mean(shown) <= 0.85


def test_one_example_has_no_interval():
    d = metrics.paired(np.array([[0.5], [0.7]]))
    assert d.mean == pytest.approx(0.6) and np.isnan(d.half) and np.isnan(d.could_show)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_an_accuracy_is_wilsons(pair):
    k, n = pair
    expected = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert metrics.wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), [
    (metrics.matthews, lambda a, b: sklearn.metrics.matthews_corrcoef(b, a)),
    (metrics.f1, lambda a, b: sklearn.metrics.f1_score(b, a)),
    (metrics.pearson, lambda a, b: scipy.stats.pearsonr(a, b).statistic)])
def test_the_interval_of_any_other_metric_is_scipys_bootstrap(ours, theirs):
    g = np.random.default_rng(1)
    gold = g.integers(0, 2, 80)
    predicted = np.where(g.random(80) < 0.7, gold, 1 - gold)
    expected = scipy.stats.bootstrap((predicted, gold), theirs, paired=True, vectorized=False, n_resamples=1000,
                                     method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert metrics.bootstrap(ours, predicted, gold) == pytest.approx((expected.low, expected.high), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 14), st.floats(0.01, 0.99), st.booleans()), min_size=1, max_size=99))
def test_calibration_error_agrees_with_scikit_learns_curve(drawn):
    bins, within, right = map(np.array, zip(*drawn, strict=True))
    confidence = (bins + within) / 15  # on no edge
    share, said = sklearn.calibration.calibration_curve(right, confidence, n_bins=15)
    held = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    expected = np.sum(np.abs(share - said) * held[held > 0]) / len(right)
    assert metrics.calibration_error(confidence, right) == pytest.approx(expected, abs=1e-12)
