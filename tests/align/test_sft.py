import pytest

from fiducial.align.sft import SFT

approx = pytest.approx


def test_the_loss_is_the_negative_log_likelihood_summed_over_the_preferred_completion(group):
    assert SFT()(group((-6.0, -2.0), (-1.5, -9.0))).tolist() == approx([6.0, 1.5])


def test_the_other_completion_gets_no_gradient(group):
    policy = group((-6.0, -2.0), grad=True)
    SFT()(policy).sum().backward()
    assert policy.logp.grad.tolist() == [[-1.0, 0.0]]


def test_soft_targets_weigh_the_completions(group):
    policy = group((-6.0, -2.0), targets=[[0.25, 0.75]], grad=True)
    loss = SFT()(policy)
    assert loss.item() == approx(0.25 * 6 + 0.75 * 2)
    loss.sum().backward()
    assert policy.logp.grad.tolist() == [[-0.25, -0.75]]


def test_swapping_completions_with_their_targets_changes_nothing(group):
    one = SFT()(group((-6.0, -2.0), targets=[[0.25, 0.75]]))
    assert SFT()(group((-2.0, -6.0), targets=[[0.75, 0.25]])).item() == approx(one.item())


def test_a_masked_place_counts_nothing(group):
    assert SFT()(group((-6.0, 0.0), targets=[[1.0, 0.0]], mask=[[True, False]])).item() == approx(6.0)


def test_far_out_values_stay_finite(group):
    assert SFT()(group((-5e4, 0.0))).item() == approx(5e4)


def test_it_is_normalised_by_tokens_and_needs_no_reference():
    assert SFT.per_token
    assert not SFT.needs_reference


def test_the_metric_is_the_mean_per_preferred_token(group):
    # 6 nats on 3 tokens and 1.5 nats on 2: 7.5 / 5
    assert SFT().metrics(group((-6.0, -2.0), (-1.5, -9.0), length=[[3, 1], [2, 8]]))["logp_per_token"] == approx(-1.5)


def test_answers_that_are_labelled_false_are_left_out_and_counted():
    from fiducial.core.records import Completion, Group, Prompt, user
    from fiducial.models.scripted import tiny
    from fiducial.training.data import Data
    from fiducial.training.options import TrainOptions

    groups = [
        Group(prompt=Prompt(messages=user(f"q {r}")), completions=(Completion(text="an answer"),), rewards=(r,), provenance={"label": bool(r)})
        for r in (1.0, 0.0)
    ]
    data = Data.of(tiny(), groups, SFT(), TrainOptions())
    assert ([g.rewards for g in data.groups], data.left_out) == ([(1.0,)], 1)
