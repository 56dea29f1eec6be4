from math import log, nan

import pytest
import torch

from fiducial.align.sft import SFT
from fiducial.align.unlikelihood import Unlikelihood
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training.loop import train
from fiducial.training.objective import layout
from fiducial.training.options import TrainOptions

approx = pytest.approx


def made(logp, values):
    """One completion with the log-probability and the value of each token."""
    group = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="x"),))
    leaf = torch.tensor(logp, requires_grad=True)
    return layout([group], [[len(logp)]], {"value": torch.tensor(values)}).with_tokens(leaf), leaf


def test_good_tokens_are_raised_and_bad_ones_lowered():
    policy, leaf = made([log(0.4), log(0.3)], [1.0, -1.0])
    loss = Unlikelihood()(policy)
    assert loss.item() == approx(-log(0.4) - log(0.7))
    loss.sum().backward()
    # d/dx of -log(1 - e^x) is p / (1 - p)
    assert leaf.grad.tolist() == approx([-1.0, 0.3 / 0.7])


def test_a_threshold_of_zero_is_a_threshold():
    """The value 0 is good, anything below is bad: the paper's score 0 is harmless, anything above is not."""
    policy, _ = made([log(0.5), log(0.25)], [0.0, -1e-6])
    assert Unlikelihood(threshold=0.0)(policy).item() == approx(-log(0.5) - log(0.75))


def test_the_threshold_moves_the_border():
    policy, _ = made([log(0.5), log(0.25)], [-0.3, -0.5])
    assert Unlikelihood(threshold=-0.4)(policy).item() == approx(-log(0.5) - log(0.75))


def test_alpha_weighs_bad_tokens_alone():
    policy, _ = made([log(0.4), log(0.3)], [1.0, -1.0])
    assert Unlikelihood(alpha=0.01)(policy).item() == approx(-log(0.4) - 0.01 * log(0.7))


def test_tokens_of_unknown_value_teach_nothing_and_are_not_counted():
    policy, leaf = made([-1.0, -2.0, -3.0], [1.0, nan, -1.0])
    assert Unlikelihood().size(policy).tolist() == [2.0]
    Unlikelihood()(policy).sum().backward()
    assert leaf.grad[1] == 0.0


def test_a_certain_bad_token_is_finite():
    policy, leaf = made([0.0, -1e-9], [-1.0, -1.0])
    loss = Unlikelihood()(policy)
    assert loss.isfinite().all()
    assert loss.item() <= 2 * 46.1  # -log of the bound, each
    loss.sum().backward()
    assert leaf.grad.isfinite().all()


def test_metrics_tell_good_from_bad():
    policy, leaf = made([-1.0, -2.0, -4.0], [1.0, 1.0, -1.0])
    policy = policy.with_tokens(leaf.detach())
    assert Unlikelihood().metrics(policy) == approx({"good_logp": -1.5, "bad_logp": -4.0, "bad_share": 1 / 3})


def test_a_negative_alpha_is_a_config_error():
    with pytest.raises(ConfigError, match="alpha"):
        registry.create("align/unlikelihood", {"alpha": -1.0})


def test_what_was_learnt_by_heart_is_unlearnt_in_its_bad_part_alone(tmp_path):
    model = tiny()
    answer = Completion(text="fine, awful", ends=(6, 11), values=(1.0, -1.0))
    groups = [Group(prompt=Prompt(messages=user(q)), completions=(answer,)) for q in ("a", "b")]
    options = TrainOptions(epochs=10, batch=2, learning_rate=1e-2, lora_rank=4)
    train(model, groups, SFT(), options, folder=tmp_path / "sft")
    result = train(model, groups, Unlikelihood(), options, folder=tmp_path / "unlikelihood")
    first, last = result.history[0], result.history[-1]
    assert last["good_logp"] > first["good_logp"]
    assert last["bad_logp"] < first["bad_logp"] - 1.0
    assert last["bad_share"] == approx(6 / 12)
