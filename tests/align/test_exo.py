from math import exp, log, nan

import numpy as np
import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.align.exo import EXO
from fiducial.core import registry
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Completion, Group, Prompt, user

approx = pytest.approx


def sigmoid(x):
    return 1 / (1 + exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def table(group):
    """Six groups of four: policy, reference, beta * log-ratio as numpy with beta 0.3, soft targets and rewards."""
    rng = np.random.default_rng(0)
    logp, ref = -rng.uniform(1, 9, (2, 6, 4)).astype("float32")
    targets, rewards = rng.dirichlet(np.ones(4), 6).astype("float32"), rng.normal(size=(6, 4)).astype("float32")
    policy = group(*logp.tolist(), targets=targets.tolist(), rewards=rewards.tolist())
    return policy, group(*ref.tolist()), 0.3 * (logp - ref).astype("float64"), targets.astype("float64"), rewards.astype("float64")


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_on_preferences_the_loss_is_that_of_the_formula(table, divergence):
    policy, reference, z, targets, _ = table
    q, p = softmax(z), targets * 0.9 + (1 - targets) * 0.1 / 3
    by_hand = (q * (np.log(q) - np.log(p))).sum(1) if divergence == "reverse" else -(p * np.log(q)).sum(1)
    assert EXO(beta=0.3, label_smoothing=0.1, divergence=divergence)(policy, reference).tolist() == approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
@pytest.mark.parametrize("normalized", [True, False])
def test_on_rewards_the_loss_is_that_of_the_formula(table, divergence, normalized):
    policy, reference, z, _, r = table
    r = (r - r.mean(1, keepdims=True)) / r.std(1, keepdims=True) if normalized else r
    q, p = softmax(z), softmax(r / 0.4)
    by_hand = (q * (np.log(q) - np.log(p))).sum(1) if divergence == "reverse" else -(p * np.log(q)).sum(1)
    found = EXO(beta=0.3, labels="rewards", beta_reward=0.4, normalized=normalized, divergence=divergence)(policy, reference)
    assert found.tolist() == approx(by_hand, rel=1e-4)


def test_a_hard_label_gives_the_winner_one_less_the_smoothing_and_the_rest_an_equal_share(group):
    # policy = reference, so q is uniform: sum_k 1/4 (log 1/4 - log p_k) with p = (0.97, 0.01, 0.01, 0.01)
    both = group((-1.0, -2.0, -3.0, -4.0))
    by_hand = -log(4) - (log(0.97) + 3 * log(0.01)) / 4
    assert EXO(label_smoothing=0.03)(both, both).item() == approx(by_hand)


@pytest.mark.parametrize("z", [-6.0, -1.0, 0.0, 2.0, 6.906755, 12.0])
def test_with_two_completions_the_gradient_has_a_closed_form(group, pull, z):
    gradient, _ = pull(EXO(beta=0.1, label_smoothing=1e-3), group((10 * z, 0.0), grad=True), group((0.0, 0.0)))
    by_hand = 0.1 * sigmoid(z) * sigmoid(-z) * (z - log(0.999 / 0.001))
    assert gradient == approx([by_hand, -by_hand], rel=1e-4, abs=1e-8)


def test_its_first_step_is_three_and_a_half_times_that_of_dpo(group, pull):
    policy, reference = group((-3.0, -4.0), grad=True), group((-3.0, -4.0))
    assert pull(EXO(), policy, reference)[0][0] == approx(-0.1727, abs=1e-4)
    assert pull(DPO(), policy, reference)[0][0] == approx(-0.05)


def test_with_two_completions_it_is_the_kl_divergence_of_a_pair(pairs):
    z, p = 0.1 * pairs.h, pairs.p * 0.95 + (1 - pairs.p) * 0.05
    q = 1 / (1 + np.exp(-z))
    by_hand = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    assert EXO(label_smoothing=0.05)(pairs.policy, pairs.reference).tolist() == approx(by_hand, rel=1e-4, abs=1e-6)


def test_the_forward_divergence_on_two_targets_is_dpo(pairs):
    forward = EXO(beta=0.3, label_smoothing=0.0, divergence="forward")
    assert forward(pairs.policy, pairs.reference).tolist() == approx(DPO(beta=0.3)(pairs.policy, pairs.reference).tolist(), rel=1e-5, abs=1e-6)


def test_the_margin_of_a_pair_settles_at_the_logit_of_its_smoothed_label(group, settled):
    first, second = settled(EXO(beta=0.5, label_smoothing=0.05), group((0.0, 0.0)), rate=8.0)[0].tolist()
    assert first - second == approx(log(0.95 / 0.05) / 0.5, rel=1e-4)


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_log_ratios_settle_at_the_rewards_over_both_temperatures(group, settled, divergence):
    # beta (D_i - D_j) = (r_i - r_j) / beta_reward: the optimum of reinforcement learning with a KL coefficient of 0.5 * 0.8
    objective = EXO(beta=0.5, labels="rewards", beta_reward=0.8, normalized=False, divergence=divergence)
    found = settled(objective, group((0.0, 0.0, 0.0), rewards=[[1.0, 0.5, -0.2]]), rate=8.0)[0]
    assert (found - found[0]).tolist() == approx([0.0, -0.5 / 0.4, -1.2 / 0.4], rel=1e-4)


def test_reverse_seeks_one_mode_and_forward_covers_both():
    """A bell curve over 20 answers cannot follow two peaks: at 4 and, a little lower, at 15."""
    from fiducial.training.objective import GroupLogProbs

    place = torch.arange(20.0)
    rewards = torch.maximum(3 - (place - 4).abs(), 2.8 - (place - 15).abs()).unsqueeze(0)
    ones = torch.ones(1, 20)
    parts = GroupLogProbs(ones * -log(20), ones.long(), ones.bool(), ones / 20, rewards, torch.ones(1))

    def spread(divergence):
        objective = EXO(beta=1.0, labels="rewards", beta_reward=0.3, normalized=False, divergence=divergence)
        shape = torch.tensor([6.0, 1.0], requires_grad=True)  # centre, log width
        optimizer = torch.optim.Adam([shape], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            logp = (-0.5 * ((place - shape[0]) / shape[1].exp()).square()).log_softmax(0)
            objective(parts.with_logp(logp.unsqueeze(0)), parts).sum().backward()
            optimizer.step()
        return logp.exp()

    assert spread("reverse")[2:7].sum() > 0.95
    covering = spread("forward")
    assert covering[:9].sum() > 0.2
    assert covering[11:].sum() > 0.2


def test_training_is_given_only_what_is_scored():
    answers = tuple(Completion(text=t) for t in "abc")
    group = Group(prompt=Prompt(messages=user("?")), completions=answers, rewards=(0.5, None, 0.0))
    assert [c.text for c in EXO(labels="rewards").prepare(group).completions] == ["a", "c"]
    assert EXO(labels="rewards").prepare(group).rewards == (0.5, 0.0)
    assert EXO(labels="rewards").prepare(group.model_copy(update={"rewards": None})).completions == ()
    assert EXO().prepare(group) is group


def test_normalized_rewards_have_any_scale(group):
    objective, reference = EXO(labels="rewards"), group((-4.0, -4.0, -4.0))
    small = objective(group((-3.0, -9.0, -5.0), rewards=[[0.1, 0.2, 0.4]]), reference)
    large = objective(group((-3.0, -9.0, -5.0), rewards=[[110.0, 120.0, 140.0]]), reference)
    assert small.item() == approx(large.item(), rel=1e-4)


def test_of_two_normalized_rewards_only_the_order_counts(group):
    losses = {
        normalized: [
            EXO(labels="rewards", normalized=normalized)(group((-1.0, -2.0), rewards=[[high, 0.0]]), group((0.0, 0.0))).item() for high in (1e-3, 1.0, 50.0)
        ]
        for normalized in (True, False)
    }
    assert losses[True] == approx([losses[True][0]] * 3)
    assert len({round(loss, 3) for loss in losses[False]}) == 3


@pytest.mark.parametrize("normalized", [True, False])
def test_equal_rewards_hold_the_policy_where_the_reference_is(group, pull, normalized):
    objective, reference = EXO(labels="rewards", normalized=normalized), group((-4.0, -4.0, -4.0))
    equal = [[0.1, 0.1, 0.1]]  # whose mean in float32 is not 0.1
    gradient, loss = pull(objective, group((-4.0, -4.0, -4.0), rewards=equal, grad=True), reference)
    assert loss == approx(0.0, abs=1e-6)
    assert gradient == approx([0.0, 0.0, 0.0], abs=1e-7)
    gradient, _ = pull(objective, group((-3.0, -4.0, -4.0), rewards=equal, grad=True), reference)
    assert gradient[0] > 0


@pytest.mark.parametrize("normalized", [True, False])
def test_a_completion_without_a_reward_is_left_out_of_both_distributions(group, pull, normalized):
    objective = EXO(labels="rewards", normalized=normalized)
    policy = group((-3.0, -1.0, -9.0, -2.0), rewards=[[1.0, nan, 0.0, 0.5]], grad=True)
    gradient, loss = pull(objective, policy, group((-4.0, -4.0, -4.0, -4.0)))
    without, same = pull(objective, group((-3.0, -9.0, -2.0), rewards=[[1.0, 0.0, 0.5]], grad=True), group((-4.0, -4.0, -4.0)))
    assert loss == approx(same)
    assert gradient == approx([without[0], 0.0, without[1], without[2]])


def test_a_group_with_one_reward_is_worth_nothing_and_one_without_any_is_a_data_error(group, pull):
    policy, reference = group((-3.0, -9.0), rewards=[[1.0, nan]], grad=True), group((-4.0, -4.0))
    assert pull(EXO(labels="rewards"), policy, reference) == ([0.0, 0.0], 0.0)
    with pytest.raises(DataError, match="align/exo reads rewards, but 1 of 1 groups here have none"):
        EXO(labels="rewards")(group((-3.0, -9.0)), reference)


@pytest.mark.parametrize("options", [{}, {"labels": "rewards"}, {"divergence": "forward"}])
def test_order_padding_and_neighbours_do_not_matter(group, options):
    objective = EXO(**options)
    one = objective(group((-3.0, -9.0, -5.0), targets=[[0.7, 0.1, 0.2]], rewards=[[3.0, 1.0, 2.0]]), group((-4.0, -4.5, -4.2)))
    other = objective(group((-9.0, -5.0, -3.0), targets=[[0.1, 0.2, 0.7]], rewards=[[1.0, 2.0, 3.0]]), group((-4.5, -4.2, -4.0)))
    padded = objective(
        group(
            (-3.0, -9.0, -5.0, 0.0),
            (-1.0, -2.0, -3.0, -4.0),
            targets=[[0.7, 0.1, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]],
            rewards=[[3.0, 1.0, 2.0, nan], [1.0, 1.0, 0.0, 0.0]],
            mask=[[True, True, True, False], [True] * 4],
        ),
        group((-4.0, -4.5, -4.2, 0.0), (-2.0, -2.0, -2.0, -2.0)),
    )
    assert one.item() == approx(other.item(), rel=1e-5)
    assert one.item() == approx(padded[0].item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"labels": "rewards"}, {"labels": "rewards", "normalized": False}, {"divergence": "forward"}])
def test_far_out_it_is_finite(group, pull, options):
    for ratio in ((500.0, 0.0), (-500.0, 0.0), (5e4, -5e4)):
        gradient, loss = pull(EXO(beta=0.1, **options), group(ratio, rewards=[[50.0, -50.0]], grad=True), group((0.0, 0.0)))
        assert np.isfinite([*gradient, loss]).all()


def test_a_pair_ranked_far_wrongly_is_abandoned_where_dpo_is_not(group, pull):
    policy, reference = group((-500.0, 0.0), grad=True), group((0.0, 0.0))
    assert pull(EXO(beta=0.1), policy, reference)[0] == approx([0.0, 0.0], abs=1e-8)
    assert pull(DPO(beta=0.1), policy, reference)[0] == approx([-0.1, 0.1])


def test_its_figures_follow_the_labels_it_reads(group):
    policy, reference = group((-3.0, -9.0, -5.0), rewards=[[0.0, 1.0, nan]]), group((-4.0, -4.0, -4.0))
    assert EXO(beta=0.1).metrics(policy, reference)["margin"] == approx(0.1 * (6 + 2) / 2)
    found = EXO(beta=0.1, labels="rewards").metrics(policy, reference)
    assert (found["accuracy"], found["margin"], found["displaced"]) == (0.0, approx(-0.6), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"labels": "rewards", "beta_reward": nan}, "beta_reward"),
        ({"labels": "votes"}, "labels"),
        ({"divergence": "both"}, "divergence"),
        ({"label_smoothing": 0.0}, "infinite"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"beta_reward": 0.1}, "beta_reward has no effect when labels is targets"),
        ({"normalized": False}, "normalized has no effect"),
        ({"labels": "rewards", "label_smoothing": 0.1}, "label_smoothing has no effect when labels is rewards"),
    ],
)
def test_options_out_of_range_or_without_effect_are_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        registry.create("align/exo", options)
