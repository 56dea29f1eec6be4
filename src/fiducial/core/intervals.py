"""Intervals and paired comparisons for figures that leave the program.

Wilson for one rate, normal for one mean, McNemar (exact) and paired differences for two models on the same items. Rates of trials that come in
clusters have the interval of fewer, independent ones: n over Kish's design effect.
All intervals are two-sided at 95 % unless `z` says otherwise. Source: "Adding Error Bars to Evals", arXiv:2411.00640;
for rates near 0 or 1 the normal interval is too narrow (arXiv:2503.01747), hence Wilson and Newcombe.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, isnan, log, sqrt
from statistics import correlation

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Rate:
    """`hits` out of `n` trials.

    >>> str(Rate(2, 40))
    '2/40 = 5% (1% to 17%)'
    """

    hits: int
    n: int
    design: float = 1.0
    """How many times the variance is that of independent trials (Kish's design effect), at least 1; see `design_effect`."""

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.n:
            raise ValueError(f"hits must lie in 0..n, got {self.hits} of {self.n}")
        if not self.design >= 1:
            raise ValueError(f"the design effect must be at least 1, got {self.design}")

    @property
    def value(self) -> float:
        """The share in [0, 1]; NaN when nothing was tried."""
        return self.hits / self.n if self.n else float("nan")

    def interval(self, z: float = Z95) -> tuple[float, float]:
        """Wilson score interval of as many independent trials as these are worth; (0, 1) when nothing was tried."""
        if self.n == 0:
            return 0.0, 1.0
        worth = self.n / self.design
        p, s = self.hits / self.n, z * z / worth
        centre, half = p + s / 2, z * sqrt(p * (1 - p) / worth + s / (4 * worth))
        # at the ends the formula gives exactly 0 or 1, and rounding can pass them by 1e-17
        low = 0.0 if self.hits == 0 else (centre - half) / (1 + s)
        high = 1.0 if self.hits == self.n else (centre + half) / (1 + s)
        return low, high

    def __str__(self) -> str:
        if self.n == 0:
            return "not measured (n = 0)"
        low, high = self.interval()
        return f"{self.hits}/{self.n} = {self.value:.0%} ({low:.0%} to {high:.0%})"


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its standard error, from `n` items (in `clusters` clusters where items come in groups)."""

    value: float
    se: float
    n: int
    clusters: int | None = None

    def interval(self, z: float = Z95) -> tuple[float, float]:
        """Normal interval `value +- z * se`."""
        if isnan(self.se):
            return float("-inf"), float("inf")
        return self.value - z * self.se, self.value + z * self.se

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.3g} ({low:.3g} to {high:.3g}, n = {self.n})"


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Mean:
    """Mean of `values` with its standard error; clustered when `clusters` names a cluster per value.

    Unclustered: sample standard deviation over sqrt(n). Clustered: sqrt of the sum of squared cluster sums of residuals
    over n, times sqrt(C / (C - 1)) for C clusters, as Inspect does. NaN standard error when it cannot be estimated.
    """
    n = len(values)
    if n == 0:
        return Mean(float("nan"), float("nan"), 0)
    centre = sum(values) / n
    if clusters is None:
        se = sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n) if n > 1 else float("nan")
        return Mean(centre, se, n)
    if len(clusters) != n:
        raise ValueError(f"{n} values but {len(clusters)} cluster labels")
    sums: dict[Hashable, float] = {}
    for v, c in zip(values, clusters, strict=True):
        sums[c] = sums.get(c, 0.0) + (v - centre)
    count = len(sums)
    se = sqrt(sum(s * s for s in sums.values())) / n * sqrt(count / (count - 1)) if count > 1 else float("nan")
    return Mean(centre, se, n, clusters=count)


def design_effect(hits: Sequence[bool], clusters: Sequence[Hashable]) -> float:
    """How many times the variance of the rate of `hits` is that of independent trials, when trials of one cluster go alike; at least 1.

    The clustered variance of `mean` over p (1 - p) / n (Kish 1965). Trials of a single cluster are worth one. Where all went alike there is no variance to
    compare, and the first is taken as if it had not: no hits must not look less certain than one.

    >>> round(design_effect([True, True, False, False], ["a", "a", "b", "b"]), 6)
    4.0
    """
    n, several = len(hits), len(set(clusters))
    if several in (n, 1):
        return float(max(1, n) if several == 1 else 1)
    found = mean([float(hit) for hit in (hits if len(set(hits)) > 1 else [not hits[0], *hits[1:]])], clusters)
    return max(1.0, found.se**2 * n / (found.value * (1 - found.value)))


def paired_difference(after: Sequence[float], before: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Mean:
    """Mean of `after - before` over the same items, in the same order."""
    return mean([a - b for a, b in zip(after, before, strict=True)], clusters)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that `only_a` and `only_b` discordant pairs differ by chance; 1.0 without any.

    >>> round(mcnemar(1, 9), 4)
    0.0215
    """
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**n))


def difference(a: Rate, b: Rate, z: float = Z95) -> tuple[float, float, float]:
    """`a - b` of two independent rates with Newcombe's interval (1998, method 10): (value, low, high)."""
    (la, ua), (lb, ub) = a.interval(z), b.interval(z)
    if not (a.n and b.n):
        return float("nan"), -1.0, 1.0
    d = a.value - b.value
    low = d - sqrt((a.value - la) ** 2 + (ub - b.value) ** 2)
    high = d + sqrt((ua - a.value) ** 2 + (b.value - lb) ** 2)
    return d, max(-1.0, low), min(1.0, high)


def paired_rates(after: Sequence[bool], before: Sequence[bool], z: float = Z95) -> tuple[float, float, float]:
    """Difference of two rates of the same items, `after` less `before`: (value, low, high).

    The interval is Newcombe's for pairs (1998, Statistics in Medicine 17:2635, method 10), which does not shrink to a point where no item changed.
    """
    pairs = list(zip(after, before, strict=True))
    n = len(pairs)
    both, only_after, only_before, neither = (sum((a, b) == kind for a, b in pairs) for kind in ((1, 1), (1, 0), (0, 1), (0, 0)))
    if not n:
        return float("nan"), -1.0, 1.0
    now, then = Rate(both + only_after, n), Rate(both + only_before, n)
    (l_now, u_now), (l_then, u_then) = now.interval(z), then.interval(z)
    product = both * neither - only_after * only_before
    spread = sqrt(now.hits * (n - now.hits) * then.hits * (n - then.hits))
    phi = (max(product - n / 2, 0) if product > 0 else product) / spread if spread else 0.0

    def half(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    d = now.value - then.value
    return d, d - half(now.value - l_now, u_then - then.value), d + half(u_now - now.value, then.value - l_then)


def bootstrap(statistics: Callable[[Sequence[int]], Mapping[str, float]], n: int, *, draws: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of named statistics of `n` items, by drawing items with replacement (Efron 1979).

    `statistics` is given the indices of a draw. A statistic that more than one draw in twenty cannot tell is left out. For shares near 0 or
    1 take Wilson's interval: a draw of equal items never varies.

    >>> bootstrap(lambda rows: {"mean": sum(rows) / len(rows)}, 101)["mean"]
    (44.75247524752475, 55.48514851485149)
    """
    rng = random.Random(seed)
    found: dict[str, list[float]] = {}
    for _ in range(draws if n > 1 else 0):
        for name, value in statistics(rng.choices(range(n), k=n)).items():
            if not isnan(value):
                found.setdefault(name, []).append(value)
    cut = {name: sorted(values) for name, values in found.items() if len(values) > 0.95 * draws}
    return {name: (v[round(0.025 * (len(v) - 1))], v[round(0.975 * (len(v) - 1))]) for name, v in cut.items()}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of the ranks of paired values, in [-1, 1]; equal values share their mean rank. 0 where either side is all alike and ranks nothing.

    >>> spearman([1, 2, 3, 4], [10, 20, 40, 30]), spearman([1, 1, 2], [5, 5, 5])
    (0.8, 0.0)
    """
    left, right = _ranks(a), _ranks(b)
    return correlation(left, right) if len(set(left)) > 1 and len(set(right)) > 1 else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [bisect_left(ordered, v) + (bisect_right(ordered, v) - bisect_left(ordered, v) - 1) / 2 for v in values]


def corrected_rate(observed: float, *, tpr: float, fpr: float) -> float | None:
    """Rogan-Gladen estimate of the true rate behind a judge with known errors, clipped to [0, 1].

    None when the judge tells nothing (tpr <= fpr).
    """
    if tpr <= fpr:
        return None
    return min(1.0, max(0.0, (observed - fpr) / (tpr - fpr)))


def best_of_n(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Expected `gold` of the sample with the highest `proxy` among `n` drawn without replacement from the N that were scored.

    The mean over all subsets, by order statistics instead of enumeration: sum over i = n..N of C(i - 1, n - 1) / C(N, n) * gold_(i), in the
    order of the proxy; samples of equal proxy share their places. Its distance from the sampling policy is `best_of_n_kl`.

    >>> best_of_n([0.1, 0.2, 0.3], [0, 1, 0], 2)  # of the three pairs one has the good sample on top
    0.3333333333333333
    """
    total = len(proxy)
    if len(gold) != total or not 1 <= n <= total:
        raise ValueError(f"n must lie in 1..{total} with one gold value per proxy value, got n = {n} and {len(gold)} values")
    found, below = 0.0, 0
    for value in sorted(set(proxy)):
        tied = [g for p, g in zip(proxy, gold, strict=True) if p == value]
        up_to = below + len(tied)
        # the highest lies among the tied in C(up_to, n) - C(below, n) subsets
        found += (comb(up_to, n) - comb(below, n)) / comb(total, n) * sum(tied) / len(tied)
        below = up_to
    return found


def best_of_n_kl(n: int) -> float:
    """Upper bound, in nats, of the divergence of the best of `n` samples from one sample: log n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879)."""
    return log(n) - (n - 1) / n
