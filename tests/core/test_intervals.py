from itertools import combinations
from math import inf, isnan, log, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiducial.core.intervals import (
    Z95,
    Rate,
    best_of_n,
    best_of_n_kl,
    bootstrap,
    corrected_rate,
    design_effect,
    difference,
    mcnemar,
    mean,
    paired_difference,
    paired_rates,
    spearman,
)

# twelve items in four clusters of three; the sums below are worked by hand
S = [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0]
T = [1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0]
CLUSTERS = [c for c in "abcd" for _ in range(3)]


def test_the_mean_of_twelve_items_has_the_standard_error_of_the_sample():
    result = mean(S)
    assert result.value == 0.5
    # squared deviations: 12 * 0.25 = 3, over 11, over 12
    assert result.se == pytest.approx(sqrt(3 / 11 / 12)) == pytest.approx(0.150756, abs=1e-6)
    assert (result.n, result.clusters) == (12, None)


def test_clusters_widen_the_standard_error():
    result = mean(S, CLUSTERS)
    # residuals summed per cluster: +0.5, -0.5, +1.5, -1.5; squares sum to 5; sqrt(5)/12 = 0.186339; four clusters: times sqrt(4/3)
    assert sqrt(5) / 12 == pytest.approx(0.186339, abs=1e-6)
    assert result.se == pytest.approx(sqrt(5) / 12 * sqrt(4 / 3)) == pytest.approx(0.215166, abs=1e-6)
    assert result.clusters == 4


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        # both, only after, only before, neither; by hand from the formula
        ((0, 0, 0, 40), (0.0, -0.0876, 0.0876)),
        ((40, 0, 0, 0), (0.0, -0.0876, 0.0876)),
        ((0, 40, 0, 0), (1.0, 0.8761, 1.0)),
        # with both margins filled, so that phi counts
        ((36, 12, 2, 0), (0.2, 0.0569, 0.3404)),
        ((1, 1, 7, 12), (-0.2857, -0.5069, -0.0256)),
    ],
)
def test_paired_rates_do_not_shrink_to_a_point(cells, expected):
    both, only_after, only_before, neither = cells
    after = [True] * (both + only_after) + [False] * (only_before + neither)
    before = [True] * both + [False] * only_after + [True] * only_before + [False] * neither
    assert paired_rates(after, before) == pytest.approx(expected, abs=1e-4)


def test_paired_rates_are_turned_round_with_their_sides_and_near_the_normal_interval_for_many():
    after, before = [True] * 300 + [False] * 700, [True] * 250 + [False] * 50 + [True] * 20 + [False] * 680
    value, low, high = paired_rates(after, before)
    assert paired_rates(before, after) == pytest.approx((-value, -high, -low))
    normal = paired_difference([float(a) for a in after], [float(b) for b in before])
    assert value == pytest.approx(normal.value)
    assert (low, high) == pytest.approx(normal.interval(), abs=2e-3)
    assert paired_rates([], [])[1:] == (-1.0, 1.0)


def test_a_paired_difference_is_tighter_than_two_separate_means():
    result = paired_difference(S, T)
    # two differences of 1 in twelve: mean 1/6, squared deviations 2 * (5/6)^2 + 10 * (1/6)^2 = 5/3
    assert result.value == pytest.approx(1 / 6)
    assert result.se == pytest.approx(sqrt(5 / 3 / 11 / 12)) == pytest.approx(0.112367, abs=1e-6)
    assert sqrt(mean(S).se ** 2 + mean(T).se ** 2) == pytest.approx(0.207194, abs=1e-6)


def test_the_interval_of_a_mean_is_normal():
    low, high = mean(S).interval()
    assert (low, high) == (pytest.approx(0.5 - 1.959964 * 0.1507557, abs=1e-6), pytest.approx(0.5 + 1.959964 * 0.1507557, abs=1e-6))
    assert str(mean(S)) == "0.5 (0.205 to 0.795, n = 12)"


def test_a_mean_of_one_item_or_one_cluster_has_no_standard_error():
    assert isnan(mean([1.0]).se)
    assert mean([1.0]).interval() == (-inf, inf)
    assert isnan(mean([1.0, 0.0], ["a", "a"]).se)
    assert isnan(mean([]).value)
    assert mean([]).n == 0


def test_values_and_clusters_must_be_as_many():
    with pytest.raises(ValueError, match="2 values but 1 cluster"):
        mean([1, 0], ["a"])
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1, 0], [1])


def test_the_wilson_interval_of_eight_in_ten():
    # centre (0.8 + z2/20) / (1 + z2/10), z2 = 3.841459: (0.8 + 0.192073) / 1.384146 = 0.716740
    # half   z sqrt(0.016 + 3.841459/400) / 1.384146 = 1.959964 * sqrt(0.0256036) / 1.384146 = 0.226577
    low, high = Rate(8, 10).interval()
    assert low == pytest.approx(0.716740 - 0.226577, abs=2e-5)
    assert high == pytest.approx(0.716740 + 0.226577, abs=2e-5)


def test_nothing_in_ten_still_leaves_up_to_28_percent():
    # low is exactly 0; high is z2 / (n + z2) = 3.841459 / 13.841459
    assert Rate(0, 10).interval() == (0.0, pytest.approx(3.841459 / 13.841459, abs=1e-6))
    assert Rate(10, 10).interval() == (pytest.approx(10 / 13.841459, abs=1e-6), 1.0)


def test_a_rate_of_nothing_tried_is_not_a_number():
    assert isnan(Rate(0, 0).value)
    assert Rate(0, 0).interval() == (0.0, 1.0)
    assert str(Rate(0, 0)) == "not measured (n = 0)"


def test_a_rate_refuses_nonsense():
    with pytest.raises(ValueError, match="5 of 4"):
        Rate(5, 4)


def test_trials_that_go_alike_in_clusters_are_worth_fewer():
    # ten clusters of two alike, half of them hits: clustered variance 1/36 (cluster sums +1 or -1), independent 0.25/20 = 1/80
    hits, clusters = [n < 5 for n in range(10) for _ in range(2)], [n for n in range(10) for _ in range(2)]
    assert design_effect(hits, clusters) == pytest.approx(80 / 36)
    assert Rate(10, 20, 80 / 36).interval() == pytest.approx(Rate(9, 18, 2.0).interval())
    # pairs that went apart are no worse than independent ones
    assert design_effect([True, False] * 10, clusters) == 1.0
    assert design_effect(hits, range(20)) == 1.0
    # one of six in three pairs: residuals summed by pair are 4/6, -2/6, -2/6, so the variance is 24/36 / 36 * 3/2 against 5/36 / 6
    assert design_effect([True] * 6, [0, 0, 1, 1, 2, 2]) == pytest.approx(1.2)
    assert design_effect([False] * 5 + [True], [0, 0, 1, 1, 2, 2]) == pytest.approx(1.2)
    assert design_effect([False] * 3, ["one"] * 3) == 3.0
    assert design_effect([False] * 3, range(3)) == 1.0
    assert design_effect([True, False, True], ["one"] * 3) == 3.0
    assert design_effect([], []) == 1.0
    with pytest.raises(ValueError, match="at least 1"):
        Rate(1, 2, 0.5)


def test_the_fewer_hits_the_lower_the_interval_also_in_clusters():
    """30 goals under four attacks each, hits on different goals."""
    goals = [n // 4 for n in range(120)]
    highs = [Rate(hits, 120, design_effect([n % 4 == 0 and n < 4 * hits for n in range(120)], goals)).interval()[1] for hits in range(12)]
    assert highs == sorted(highs)
    assert highs[0] == pytest.approx(Rate(0, 120).interval()[1], rel=0.02)


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_rate_and_lies_in_zero_to_one(case):
    hits, n = case
    low, high = Rate(hits, n).interval()
    assert 0 <= low <= high <= 1
    if n:
        assert low <= hits / n <= high
    mirrored = Rate(n - hits, n).interval()
    assert mirrored == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_mcnemar_is_the_two_sided_sign_test_of_the_discordant_pairs():
    # 1 against 9: 2 * (C(10,0) + C(10,1)) / 2^10 = 22 / 1024
    assert mcnemar(1, 9) == mcnemar(9, 1) == 22 / 1024
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == 2 / 32


def test_newcombe_s_interval_for_two_independent_rates():
    # Newcombe 1998, table II, first contrast, 56/70 - 48/80, method 10: 0.0524 to 0.3339
    assert difference(Rate(56, 70), Rate(48, 80)) == (pytest.approx(0.2), pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_a_difference_with_nothing_tried_says_nothing():
    value, low, high = difference(Rate(0, 0), Rate(3, 4))
    assert isnan(value)
    assert (low, high) == (-1.0, 1.0)


def test_a_difference_changes_sign_when_the_two_are_swapped():
    value, low, high = difference(Rate(7, 10), Rate(2, 10))
    assert difference(Rate(2, 10), Rate(7, 10)) == (pytest.approx(-value), pytest.approx(-high), pytest.approx(-low))


def test_the_true_rate_behind_an_imperfect_judge():
    # 0.3 observed = 0.9 t + 0.1 (1 - t) gives t = 0.25
    assert corrected_rate(0.3, tpr=0.9, fpr=0.1) == pytest.approx(0.25)
    assert corrected_rate(0.05, tpr=0.9, fpr=0.1) == 0.0
    assert corrected_rate(0.95, tpr=0.9, fpr=0.1) == 1.0
    assert corrected_rate(0.3, tpr=0.5, fpr=0.5) is None


def test_the_constant_is_the_975_quantile_of_the_normal_distribution():
    from statistics import NormalDist

    assert pytest.approx(NormalDist().inv_cdf(0.975)) == Z95


@pytest.mark.parametrize("n", range(1, 9))
def test_the_best_of_n_estimate_equals_brute_force_over_all_subsets(n):
    proxy = [0.3, -1.0, 2.5, 0.3, 0.9, 1.1, -0.2, 0.3]  # three ties
    gold = [1.0, 0.0, 0.2, 0.5, 1.0, 0.0, 0.7, 0.1]

    def best(subset):
        top = max(proxy[i] for i in subset)
        tied = [gold[i] for i in subset if proxy[i] == top]
        return sum(tied) / len(tied)

    subsets = list(combinations(range(8), n))
    assert best_of_n(proxy, gold, n) == pytest.approx(sum(map(best, subsets)) / len(subsets))


def test_the_best_of_all_is_the_top_sample_and_of_one_the_mean():
    assert best_of_n([1.0, 3.0, 2.0], [5.0, 7.0, 6.0], 3) == 7.0
    assert best_of_n([1.0, 3.0, 2.0], [5.0, 7.0, 9.0], 1) == pytest.approx(7.0)
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(log(4) - 0.75)


@pytest.mark.parametrize(("proxy", "gold", "n"), [([1.0], [1.0], 2), ([1.0], [1.0], 0), ([1.0, 2.0], [1.0], 1)])
def test_a_best_of_more_than_there_are_is_an_error(proxy, gold, n):
    with pytest.raises(ValueError, match="n must lie in"):
        best_of_n(proxy, gold, n)


def test_the_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    low, high = bootstrap(lambda rows: {"mean": sum(S[i % 12] for i in rows) / len(rows)}, 120)["mean"]
    # the share is 0.5 with standard error sqrt(0.25 / 120) = 0.0456
    assert low == pytest.approx(0.5 - 1.96 * 0.0456, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.0456, abs=0.015)


def test_the_bootstrap_leaves_out_what_draws_cannot_tell_and_says_nothing_of_one_item():
    found = bootstrap(lambda rows: {"sure": 1.0} | ({"rare": 2.0} if 0 in rows else {}), 20)
    assert found == {"sure": (1.0, 1.0)}
    assert bootstrap(lambda rows: {"mean": 0.0}, 1) == {}


def test_a_rank_correlation_is_one_less_the_squared_differences_of_ranks_and_ties_share_a_rank():
    # ranks 1 2 3 4 5 and 2 1 4 3 5: squared differences sum to 4, and 1 - 6 * 4 / (5 * 24) = 0.8
    assert spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 5000]) == pytest.approx(0.8)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5, variances 4.5 and 5
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / sqrt(4.5 * 5))


def test_what_ranks_nothing_correlates_with_nothing():
    assert spearman([1, 1, 1], [1, 2, 3]) == spearman([1, 2, 3], [0, 0, 0]) == spearman([], []) == 0.0


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2))
def test_a_rank_correlation_depends_on_order_alone_and_turns_with_it(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    assert spearman(a, b) == pytest.approx(spearman([x**3 for x in a], b)) == pytest.approx(-spearman(a, [-y for y in b])) == pytest.approx(spearman(b, a))
    assert -1 - 1e-9 <= spearman(a, b) <= 1 + 1e-9
