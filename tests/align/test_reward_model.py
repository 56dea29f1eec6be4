import random
from collections import defaultdict
from dataclasses import replace
from math import exp, log, log1p
from types import SimpleNamespace

import pytest
import torch

from fiducial.align.learned_reward import LearnedReward
from fiducial.align.reward_model import RewardModel
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.scorehead import ScoreHead, scores
from fiducial.models.scoring import Engine
from fiducial.models.scripted import tiny
from fiducial.models.tiny import tiny as tiny_of
from fiducial.training.loop import train
from fiducial.training.objective import layout
from fiducial.training.options import TrainOptions

approx = pytest.approx
PLAIN = RewardModel(centering=0.0)


def scored(*rows, targets=None, rewards=None):
    """Groups with given scores, as a leaf [G, K]."""
    groups = [
        Group(
            prompt=Prompt(messages=user("a")),
            completions=tuple(Completion(text="x") for _ in row),
            targets=targets and targets[i],
            rewards=rewards and rewards[i],
        )
        for i, row in enumerate(rows)
    ]
    leaf = torch.tensor(rows, requires_grad=True)
    return replace(layout(groups, [[2] * len(row) for row in rows]), scores=leaf), leaf


def test_rewards_alone_teach_the_order_of_all_answers():
    """3 > 2 > 1 at equal scores: each of three pairs pulls by 1/2, mean over pairs: -(1 + 1)/6, (1 - 1)/6, (1 + 1)/6."""
    policy, leaf = scored([0.0, 0.0, 0.0], rewards=[(3.0, 2.0, 1.0)])
    PLAIN(policy).sum().backward()
    assert leaf.grad[0].tolist() == approx([-1 / 3, 0.0, 1 / 3])


def test_the_loss_is_bradley_terry_on_the_difference():
    policy, leaf = scored([2.0, -1.0])
    assert PLAIN(policy).item() == approx(log1p(exp(-3.0)))
    PLAIN(policy).sum().backward()
    pull = -1 / (1 + exp(3.0))
    assert leaf.grad[0].tolist() == approx([pull, -pull])


def test_a_soft_label_is_where_the_gradient_vanishes():
    policy, leaf = scored([log(4.0), 0.0], targets=[(0.8, 0.2)])
    assert PLAIN(policy).item() == approx(-0.8 * log(0.8) - 0.2 * log(0.2))
    PLAIN(policy).sum().backward()
    assert leaf.grad.abs().max() < 1e-7


def test_swapping_completions_with_their_labels_changes_nothing():
    one, _ = scored([0.3, -1.1], targets=[(0.7, 0.3)])
    other, _ = scored([-1.1, 0.3], targets=[(0.3, 0.7)])
    assert RewardModel()(one).item() == approx(RewardModel()(other).item())


def test_the_margin_grows_with_the_difference_of_rewards():
    policy, _ = scored([2.0, 0.0], rewards=[(3.0, 1.0)])
    assert RewardModel(centering=0.0, labels="rewards", margin=0.5)(policy).item() == approx(log1p(exp(-(2.0 - 0.5 * 2.0))))


def test_centering_adds_the_squared_sum_of_the_pair():
    policy, _ = scored([2.0, -0.5])
    assert RewardModel(centering=0.1)(policy).item() == approx(log1p(exp(-2.5)) + 0.1 * 1.5**2)


def test_a_ranking_counts_every_pair_of_the_prompt_once_and_equally():
    policy, _ = scored([1.0, 0.5, -1.0], rewards=[(3.0, 2.0, 1.0)])
    by_hand = sum(log1p(exp(-d)) for d in (0.5, 2.0, 1.5)) / 3
    assert RewardModel(centering=0.0, labels="rewards")(policy).item() == approx(by_hand)


def test_a_group_in_which_nothing_is_ordered_does_not_count():
    policy, leaf = scored([1.0, 2.0], [1.0, 2.0], rewards=[(1.0, 1.0), (1.0, 2.0)])
    objective = RewardModel(labels="rewards")
    assert objective.size(policy).tolist() == [0.0, 1.0]
    objective(policy).sum().backward()
    assert leaf.grad[0].tolist() == [0.0, 0.0]


def test_scores_far_apart_are_finite():
    policy, leaf = scored([-500.0, 500.0])
    assert PLAIN(policy).item() == approx(1000.0)
    PLAIN(policy).sum().backward()
    assert leaf.grad.isfinite().all()


def test_without_scores_it_says_so():
    with pytest.raises(ValueError, match="scores of a head"):
        RewardModel()(replace(scored([1.0, 0.0])[0], scores=None))


@pytest.mark.parametrize("options", [{"labels": "other"}, {"margin": -1.0}, {"centering": -0.1}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError):
        registry.create("align/reward_model", options)


@pytest.mark.parametrize("margin", [None, [1.0, 0.5, 0.0]])
def test_value_and_gradient_with_centering_equal_those_of_trl(margin):
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'fiducial[train]'")
    from trl import RewardTrainer

    rows = [[1.3, -0.4], [-0.7, 0.2], [0.1, 0.05]]
    policy, leaf = scored(*rows, targets=[(1.0, 0.0)] * 3, rewards=[(m, 0.0) for m in margin] if margin else None)
    loss = RewardModel(centering=0.05, margin=1.0 if margin else 0.0)(policy).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)

    given = torch.tensor(rows).T.reshape(-1, 1).requires_grad_()  # chosen rows above rejected ones
    said = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=0.05), accelerator=said,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(6, 2)} | ({"margin": torch.tensor(margin)} if margin else {})
    peer = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=given), inputs)
    (other,) = torch.autograd.grad(peer, given)
    assert float(loss.detach()) == approx(float(peer.detach()), abs=1e-6)
    assert (gradient - other.view(2, -1).T).abs().max() < 1e-6


def pairs(count):
    """Pairs of unequal lengths; the other answer ends with an exclamation mark."""
    words = ["apple", "brick", "cloud", "delta", "ember", "flint", "grove", "hedge"]
    return [
        Group(
            prompt=Prompt(messages=user(f"question {n}")), completions=(Completion(text=words[n % 8] * (1 + n % 2)), Completion(text=words[-1 - n % 7] + "!"))
        )
        for n in range(count)
    ]


def mixed(count):
    """The same with a random half turned around: the mark says nothing, and the 15 texts are both better and worse, by the prompt."""
    turned = random.Random(0).sample(range(count), count // 2)
    return [g.model_copy(update={"completions": g.completions[::-1]}) if n in turned else g for n, g in enumerate(pairs(count))]


@pytest.mark.parametrize(("rank", "rate"), [(8, 1e-2), (0, 5e-3)], ids=["adapter", "all weights"])
def test_it_learns_thirty_two_pairs_by_heart(tmp_path, rank, rate):
    model = tiny()
    options = TrainOptions(epochs=30, batch=32, learning_rate=rate, lora_rank=rank, warmup=0.1)
    result = train(model, mixed(32), RewardModel(), options, folder=tmp_path)
    assert min(h["accuracy"] for h in result.history[-4:]) == 1.0
    assert result.history[0]["accuracy"] < 0.8
    assert abs(result.history[-1]["score"]) < 1.0
    assert (model.head.higher_is, model.head.trained_by) == ("better", "align/reward_model")


def test_training_keeps_where_the_scores_lie(tmp_path):
    model, data = tiny(), pairs(6)
    train(model, data, RewardModel(), TrainOptions(batch=3, learning_rate=1e-2), folder=tmp_path)
    said = [scores(model, [model.encode(g.prompt.messages, g.completions[k].text)[0] for g in data]) for k in (0, 1)]
    assert model.head.scale.location == approx(float(said[0].mean()), abs=1e-5)
    assert model.head.scale.spread == approx(float(torch.cat(said).std(correction=0)), abs=1e-5)
    reward = LearnedReward(models=("it",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fiducial.align.learned_reward.opened", lambda name: model)
        assert sum(first for first, _ in reward.score(data)) == approx(0.0, abs=1e-4)


def test_the_scale_of_much_data_is_that_of_groups_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fiducial.training.loop.SCALED", 2)
    model, data = tiny(), pairs(7)
    train(model, data, RewardModel(), TrainOptions(batch=7), folder=tmp_path)
    some = [model.encode(data[n].prompt.messages, data[n].completions[0].text)[0] for n in (0, 4)]
    assert model.head.scale.location == approx(float(scores(model, some).mean()), abs=1e-5)


def test_the_prompt_is_computed_once_for_all_completions(tmp_path):
    model = tiny()
    result = train(model, pairs(2), RewardModel(), TrainOptions(batch=2), folder=tmp_path)
    rows = [model.encode(g.prompt.messages, c.text)[0] for g in pairs(2) for c in g.completions]
    assert result.naive_tokens == sum(map(len, rows))
    assert result.tokens < result.naive_tokens


@pytest.mark.parametrize("architecture", ["llama", "mamba2"])
def test_a_score_is_read_at_the_end_of_turn_also_where_that_is_the_padding_token(architecture):
    """Alone, beside a longer one in a padded row, and beside a shorter one; the end of the turn counts and is no padding."""
    tokenizer = tiny().tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    model = LocalModel(tiny_of(architecture, vocab=len(tokenizer), pad_token_id=tokenizer.eos_token_id), tokenizer, uri="tiny")
    head = ScoreHead.fresh(model.width, seed=0, higher_is="better", trained_by="align/reward_model")
    ids, start = model.encode(user("question"), "yes")
    assert ids[-1] == tokenizer.pad_token_id
    longer, shorter = (model.encode(user("question"), text)[0] for text in ("yes, and many more words", "a"))

    def scored_beside(*others):
        states = Engine(model.module, backend="padded").score(Paths.of([(row, start) for row in (ids, *others)]), hidden={"at": "leaf"}).hidden["last"]
        return float(head(states)[0].detach())

    with torch.no_grad():
        states = model.module(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1:]
    alone = float(head(states).detach())
    for others in ((), (longer,), (shorter,), (longer, shorter)):
        assert scored_beside(*others) == approx(alone, abs=1e-4)


def test_a_margin_without_rewards_to_take_it_from_is_refused():
    bare = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="a"), Completion(text="b")))
    assert RewardModel(margin=1.0).prepare(bare.model_copy(update={"rewards": (1.0, 0.0)})).rewards == (1.0, 0.0)
    assert RewardModel().prepare(bare) == bare
    with pytest.raises(ConfigError, match="margin has no effect on a group without rewards"):
        RewardModel(margin=1.0).prepare(bare)
