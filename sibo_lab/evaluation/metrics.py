"""Metrics and their intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

Array = np.ndarray


@cache
def student_t(df: int, p: float = 0.975) -> float:
    """The point that Student's t is below with probability p ≥ 0.5: with t = √df tan u its density is that of
    cos(u)^(df−1)."""
    u = np.linspace(0, np.pi / 2, 100_001)
    mass = np.cumsum(np.cos(u) ** (df - 1))
    return float(math.sqrt(df) * np.tan(np.interp((2 * p - 1) * mass[-1], mass, u)))


@dataclass(frozen=True)
class Difference:
    """Of two methods."""

    mean: float
    half: float  # of its 95 % interval; nan: unknown
    could_show: float = math.nan  # the smallest true difference whose interval excludes 0 in some 75 % of such studies


def paired(d: Array) -> Difference:
    """Of differences (seeds, examples) of the same seeds and examples, which are two crossed samples: the interval
    covers other seeds and other examples. Student's intervals over the seeds' means and over the examples' are added
    as Zou and Donner (2008) add intervals. That counts twice what differs by seed and example at once, on the safe
    side: to take it out once is to trust a variance of few seeds. One seed: other examples alone."""
    mean = float(d.mean())
    if d.shape[1] < 2:
        return Difference(mean, math.nan)
    parts = [(len(x) - 1, float(x.var(ddof=1)) / len(x)) for x in (d.mean(0), d.mean(1)) if len(x) > 1]
    half, more = (math.sqrt(sum(student_t(df, p) ** 2 * v for df, v in parts)) for p in (0.975, 0.8))
    return Difference(mean, half, half + more)


def last_five(curve: Sequence[float]) -> float:
    """The paper's summary of a curve (Figures 5 and 6): the mean over the last five layers."""
    return float(np.mean(curve[-5:]))


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson 1927), which never leaves [0, 1]."""
    z = 1.959964
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max((centre - half) / (1 + z * z / n), 0.0), min((centre + half) / (1 + z * z / n), 1.0)


def bootstrap(metric: Callable[[Array, Array], float], predicted: Array, labels: Array) -> tuple[float, float]:
    """95 % interval of any metric (Efron 1979): percentiles over 1,000 draws with replacement, the same every time."""
    rng, n = np.random.default_rng(0), len(labels)
    values = [metric(predicted[i], labels[i]) for i in (rng.integers(0, n, n) for _ in range(1000))]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist())


def calibration_error(confidence: Array, right: Array) -> float:
    """Expected calibration error (Guo et al. 2017): mean gap of confidence and accuracy over 15 bins, by their size."""
    bins = np.minimum(confidence * 15, 14).astype(int)
    return float(np.abs(np.bincount(bins, right - confidence)).sum() / len(right))


def accuracy(predicted: Array, labels: Array) -> float:
    return float(np.mean(predicted == labels))


def f1(predicted: Array, labels: Array) -> float:
    """Of class 1; 0 if it is neither predicted nor present."""
    hits = np.sum((predicted == 1) & (labels == 1))
    return float(2 * hits / max(np.sum(predicted == 1) + np.sum(labels == 1), 1))


def pearson(a: Array, b: Array) -> float:
    """0 if either is constant."""
    a, b = a - a.mean(dtype=float), b - b.mean(dtype=float)
    scale = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0


matthews = pearson  # of the 0/1 values of two classes


def ranks(a: Array) -> Array:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(a, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: Array, b: Array) -> float:
    return pearson(ranks(a), ranks(b))
