"""What is held out is never trained on, is looked at, and stops a run that forgets it."""

import time
from statistics import fmean

import pytest

from fiducial.align.dpo import DPO
from fiducial.align.kto import KTO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.core.errors import ConfigError
from fiducial.core.intervals import Rate
from fiducial.models.scripted import tiny
from fiducial.training import heldout
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions
from fiducial.training.scorecard import TOGETHER
from fiducial.training.updates import Measured, Updates

OPTIONS = TrainOptions(batch=4, epochs=2, learning_rate=1e-3, lora_rank=4, held_out=0.4)


def test_a_prompt_is_held_out_by_its_text_alone(made):
    groups = made.pairs(50)
    learnt, held = heldout.divided(groups, 0.2)
    assert len(learnt) + len(held) == 50
    assert 3 <= len(held) <= 20
    again = heldout.divided([*reversed(groups), groups[0].model_copy(update={"weight": 3.0})], 0.2)[1]
    assert {g.prompt.text for g in again} == {g.prompt.text for g in held}
    assert heldout.divided(groups, 0.0) == (groups, [])
    more = heldout.divided(groups, 0.5)[1]
    assert {g.id for g in held} < {g.id for g in more}  # a larger share takes more, not others
    with pytest.raises(ConfigError, match=r"leaves (0 to train on|1 to train on and 0 to look at)"):
        heldout.divided(groups[:1], 0.5)


def test_what_is_held_out_is_not_trained_on_and_everything_else_is(made, tmp_path, objective):
    groups = made.pairs(12)
    learnt, held = heldout.divided(groups, OPTIONS.held_out)
    assert len(held) > 1
    model, other = tiny(), tiny()
    found = train(model, groups, objective, OPTIONS, folder=tmp_path / "a")
    plain = train(other, learnt, objective, OPTIONS.model_copy(update={"held_out": 0.0}), folder=tmp_path / "b")
    assert model.fingerprint == other.fingerprint  # looking changed nothing
    assert found.groups == plain.groups == len(learnt)
    assert (plain.looks, plain.held_out) == ([], [])
    assert [look["step"] for look in found.looks] == [0, found.steps]
    assert len(found.held_out) == len(held) == found.looks[0]["groups"]


@pytest.mark.parametrize("budget", [2000, 30], ids=["one row", "rows"])
@pytest.mark.parametrize("objective", [DPO(beta=0.5, anchor=0.3), RewardModel()], ids=["dpo", "reward_model"])
def test_the_figures_are_those_of_a_step_on_the_held_out_groups(made, tmp_path, objective, budget):
    groups = made.pairs(12)
    held = heldout.divided(groups, OPTIONS.held_out)[1]
    first = train(made.budgeted(budget), groups, objective, OPTIONS, folder=tmp_path / "a").looks[0]
    options = OPTIONS.model_copy(update={"held_out": 0.0, "batch": len(held), "epochs": 1})
    step = train(made.budgeted(2000), held, objective, options, folder=tmp_path / "b").history[0]
    shared = (set(first) & set(step)) - {"step", "accuracy_when_shorter"}  # a mean over groups of unequal numbers of pairs
    assert {"loss", "accuracy", "margin"} <= shared
    if objective.needs_reference:
        shared.remove("accuracy")  # a step counts the ties at the beginning as wrong
    assert {name: first[name] for name in shared} == pytest.approx({name: step[name] for name in shared}, abs=1e-4)


def test_calibration_and_the_correlation_with_length_are_of_all_held_out_groups_with_an_interval(made, tmp_path):
    found = train(tiny(), made.pairs(12), RewardModel(), OPTIONS, folder=tmp_path)
    assert not set(TOGETHER) & {name for each in found.held_out for name in each}
    for name, (value, low, high) in found.held_together.items():
        assert found.looks[-1][name] == value
        assert low <= value <= high
        assert value not in (-1.0, 1.0)  # as the correlation of a group of two answers is
    assert found.held_together.keys() >= {"calibration_error", "length_correlation"}
    said = {e.name: (e.value, e.n) for e in heldout.evidence(found.held_together, len(found.held_out))}
    assert said["held-out length_correlation"] == (found.looks[-1]["length_correlation"], len(found.held_out))


def test_figures_of_a_whole_set_are_bootstrapped_by_group():
    values = [0.0] * 50 + [1.0] * 51
    found = heldout.together(lambda rows: {"share": fmean(values[r] for r in rows), "other": 1.0}, ("share",), 101)
    ((value, low, high),) = found.values()
    assert value == 51 / 101
    assert (low, high) == (pytest.approx(value - 1.96 * 0.0497, abs=0.03), pytest.approx(value + 1.96 * 0.0497, abs=0.03))
    assert heldout.together(lambda rows: {"share": 1.0}, ("share",), 1) == {}  # one group has no interval


def test_losses_per_token_are_divided_by_the_tokens_of_each_group(made, tmp_path):
    (first, *_) = train(tiny(), made.pairs(12), SFT(), OPTIONS, folder=tmp_path).looks
    assert first["loss"] == pytest.approx(-first["logp_per_token"])


def test_a_run_with_looks_stops_when_what_is_held_out_gets_worse_twice_running(made, tmp_path, monkeypatch):
    seen = iter([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])  # falls in the fourth look and again in the fifth
    monkeypatch.setattr(Updates, "measured", lambda *_, **__: Measured([{"loss": 1.0, "accuracy": a} for a in next(seen)], {}))
    found = train(tiny(), made.pairs(12), DPO(), OPTIONS.model_copy(update={"epochs": 12, "watch_every": 2}), folder=tmp_path)
    # policy and reference are the same at first, which orders nothing, for or against
    assert [(look["step"], look["accuracy"]) for look in found.looks] == [(0, 0.5), (2, 0.5), (4, 1.0), (6, 0.5), (8, 0.0)]
    assert (found.steps, found.planned) == (8, 18)
    assert found.stop.startswith("held out: accuracy on 2 held-out groups is 0, and was 0.5")
    assert found.stop.endswith("; it got worse twice running")


def test_learning_the_contrary_of_what_is_held_out_breaks_the_rule(made, tmp_path):
    held = {g.id for g in heldout.divided(made.pairs(12), 0.4)[1]}
    groups = [g.model_copy(update={"targets": (0.0, 1.0)}) if g.id in held else g for g in made.pairs(12)]
    for given, fine in ((groups, False), (made.pairs(12), True)):
        found = train(tiny(), given, DPO(beta=0.5), OPTIONS, folder=tmp_path / str(fine))
        assert heldout.rule(found.looks, found.held_before, found.held_out)[0] is fine
        assert all(each["accuracy"] == 0.5 for each in found.held_before)  # the policy is its own reference


def test_looks_are_no_measure_of_how_long_a_step_takes(made, tmp_path, monkeypatch):
    measured = Updates.measured
    monkeypatch.setattr(Updates, "measured", lambda *args, **more: (time.sleep(1.0), measured(*args, **more))[1])
    found = train(tiny(), made.pairs(12), SFT(), OPTIONS.model_copy(update={"epochs": 12, "minutes": 0.5}), folder=tmp_path)
    assert (found.steps, found.stop) == (found.planned, "")


def test_groups_that_say_nothing_are_no_proof(made, tmp_path):
    held = {g.id for g in heldout.divided(made.pairs(12), 0.4)[1]}
    groups = [g.model_copy(update={"targets": (0.5, 0.5), "rewards": (1.0, 1.0)}) if g.id in held else g for g in made.pairs(12)]
    with pytest.raises(ConfigError, match="held out"):
        train(
            tiny(), [g.model_copy(update={"rewards": g.rewards or (1.0, 0.0)}) for g in groups], RewardModel(labels="rewards"), OPTIONS, folder=tmp_path / "a"
        )
    two = [g for g in made.pairs(12) if g.id not in held][:3] + [g for g in made.pairs(12) if g.id in held][:1]
    with pytest.raises(ConfigError, match="one group is held out"):
        train(tiny(), two, KTO(), OPTIONS, folder=tmp_path / "b")


def test_a_resumed_run_looks_as_one_that_was_not_interrupted(made, tmp_path):
    options = OPTIONS.model_copy(update={"watch_every": 2, "save_every": 2, "epochs": 3})
    whole = train(tiny(), made.pairs(12), DPO(beta=0.5), options, folder=tmp_path / "a")

    def stop(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), made.pairs(12), DPO(beta=0.5), options, folder=tmp_path / "b", report=stop)
    again = train(tiny(), made.pairs(12), DPO(beta=0.5), options, folder=tmp_path / "b")
    assert len(whole.looks) >= 3
    assert (again.looks, again.held_before, again.held_out, again.held_together) == (whole.looks, whole.held_before, whole.held_out, whole.held_together)


def test_worse_means_less_accuracy_or_more_loss_where_nothing_is_compared():
    def looks(*values, by="accuracy"):
        return [{"groups": 5.0, "loss": 1.0} | {by: v} for v in values]

    def rule(before, after, by="accuracy"):
        groups = [[{by: v} for v in values] for values in (before, after)]
        return heldout.rule(looks(fmean(before), fmean(after), by=by), *groups)

    assert rule([1, 0, 0, 1], [1, 0, 1, 1])[0]
    assert rule([1, 0, 0, 1], [1, 0, 0, 0])[0]  # one of four is chance
    assert not rule([1.0] * 9 + [0.0], [0.0] * 8 + [1.0, 0.0])[0]
    assert rule([1.0, 2.0], [1.0, 2.1], by="loss")[0]
    assert not rule([1.0, 2.0, 1.5], [1.5, 2.6, 2.1], by="loss")[0]
    assert rule([1.5, 2.6, 2.1], [1.0, 2.0, 1.5], by="loss")[0]
    assert not heldout.falling(looks(0.5, 0.9, 0.8))
    assert heldout.falling(looks(0.5, 0.9, 0.8, 0.7))
    assert heldout.falling(looks(1.0, 1.1, 1.2, by="loss"))
    groups = [{"accuracy": 0.5}, {"accuracy": 0.6}]
    assert not heldout.rule(looks(0.5, 0.9, 0.8, 0.7), groups, groups)[0]  # though no worse than at first


def test_shares_of_whole_groups_have_an_interval_of_a_rate():
    found = heldout.intervals([{"loss": 1.0, "accuracy": 1.0}, {"loss": 3.0, "accuracy": 0.0}, {"loss": 2.0}])
    assert found["held-out accuracy"] == Rate(1, 2)
    assert (found["held-out loss"].value, found["held-out loss"].n) == (2.0, 3)
    assert not isinstance(heldout.intervals([{"accuracy": 1 / 3}, {"accuracy": 1.0}])["held-out accuracy"], Rate)
