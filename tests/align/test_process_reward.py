from dataclasses import replace
from math import exp, log1p

import pytest
import torch

from fiducial.align.process_reward import ProcessReward
from fiducial.core import registry
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scorehead import ScoreHead
from fiducial.models.scripted import tiny
from fiducial.training.data import Data
from fiducial.training.loop import train
from fiducial.training.objective import layout
from fiducial.training.options import TrainOptions

approx = pytest.approx
TEXT, ENDS = "1+1=2\n2*3=7\n7-1=6", (6, 12, 17)


def solution(*values, **fields):
    return Group(prompt=Prompt(messages=user("q")), completions=(Completion(text=TEXT, ends=ENDS, values=values),), **fields)


def prefixes(group, labels="process"):
    prepared = ProcessReward(labels=labels).prepare(group)
    return [c.text for c in prepared.completions], prepared.rewards


def test_every_step_up_to_the_first_error_is_supervised_and_nothing_after_it():
    assert prefixes(solution(1.0, 0.0, 1.0)) == (["1+1=2\n", "1+1=2\n2*3=7\n"], (1.0, 0.0))
    assert prefixes(solution(1.0, 1.0, 1.0)) == (["1+1=2\n", "1+1=2\n2*3=7\n", TEXT], (1.0, 1.0, 1.0))


def test_a_low_share_of_right_continuations_is_no_error_and_none_is():
    assert prefixes(solution(0.25, 1.0, 1.0))[1] == (0.25, 1.0, 1.0)
    assert prefixes(solution(0.25, 0.0, 0.5))[1] == (0.25, 0.0)


@pytest.mark.parametrize("labels", ["process", "outcome"])
def test_the_head_says_which_labels_it_learnt_from_also_on_disk(tmp_path, labels):
    model = tiny()
    train(model, [solution(1.0, 1.0, 0.0, rewards=(1.0,))], ProcessReward(labels=labels), TrainOptions(lora_rank=2), folder=tmp_path)
    assert model.head.learns_from == labels
    model.head.save(tmp_path)
    assert ScoreHead.read(tmp_path, width=model.width).learns_from == labels


def test_a_head_that_learnt_from_other_labels_does_not_train_on(tmp_path):
    group = solution(1.0, 1.0, 0.0, rewards=(1.0,))
    model = tiny()
    kept = model.head = ScoreHead.fresh(model.width, seed=9, higher_is="better", trained_by="align/process_reward", learns_from="outcome")
    train(model, [group], ProcessReward(labels="outcome"), TrainOptions(lora_rank=2), folder=tmp_path / "on")
    assert model.head.weight is kept.weight
    train(model, [group], ProcessReward(), TrainOptions(lora_rank=2), folder=tmp_path / "other")
    assert model.head.weight is not kept.weight


def test_steps_that_nobody_judged_are_passed_over():
    assert prefixes(solution(1.0, None, 0.0)) == (["1+1=2\n", TEXT], (1.0, 0.0))


def test_an_outcome_labels_every_step_with_the_end():
    texts, labels = prefixes(solution(1.0, 0.0, 1.0, rewards=(-1.0,)), labels="outcome")
    assert (len(texts), labels) == (3, (0.0, 0.0, 0.0))
    whole = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="42"),), rewards=(2.0,))
    assert prefixes(whole, labels="outcome") == (["42"], (1.0,))


def test_the_head_reads_the_last_token_of_each_step_and_no_other():
    model = tiny()
    objective = ProcessReward()
    data = Data.of(model, [solution(1.0, 1.0, 0.0)], objective, TrainOptions())
    prompt = len(model.encode(user("q"))[0])
    assert [len(ids) - prompt for ids in data.paths.ids] == list(ENDS)  # one byte is one token, and no end token follows
    assert data.paths.start == tuple(len(ids) for ids in data.paths.ids)
    whole = model.encode(user("q"), TEXT, end=False)[0]
    assert all(list(ids) == whole[: len(ids)] for ids in data.paths.ids)
    assert data.parts.rewards.tolist() == [[1.0, 1.0, 0.0]]


def test_the_loss_is_cross_entropy_with_the_label_summed_over_steps():
    group = ProcessReward().prepare(solution(1.0, 0.3, None))
    leaf = torch.tensor([[2.0, -0.5]], requires_grad=True)
    policy = replace(layout([group], [[1, 1]]), scores=leaf)
    loss = ProcessReward()(policy)
    assert loss.item() == approx(log1p(exp(-2.0)) + 0.3 * log1p(exp(0.5)) + 0.7 * log1p(exp(-0.5)))
    assert ProcessReward().size(policy).tolist() == [2.0]
    loss.sum().backward()
    assert leaf.grad[0].tolist() == approx([1 / (1 + exp(-2.0)) - 1.0, 1 / (1 + exp(0.5)) - 0.3])


def test_metrics_count_steps_on_the_right_side():
    group = ProcessReward().prepare(solution(1.0, 1.0, 0.0))
    policy = replace(layout([group], [[1, 1, 1]]), scores=torch.tensor([[1.0, -1.0, -2.0]]))
    assert ProcessReward().metrics(policy) == approx({"accuracy": 2 / 3, "right_steps": 2 / 3})


def test_a_step_value_that_is_no_probability_is_a_data_error():
    with pytest.raises(DataError, match="from 0 to 1"):
        ProcessReward().prepare(solution(1.0, -1.0, 1.0))


def test_solutions_without_steps_are_left_out_and_counted(tmp_path):
    none = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="42"),))
    model = tiny()
    result = train(model, [none, solution(1.0, 1.0, 0.0)], ProcessReward(), TrainOptions(lora_rank=2), folder=tmp_path)
    assert (result.groups, result.left_out) == (1, 1)
    assert model.head.scale is None  # steps are read as probabilities


def test_another_kind_of_label_is_a_config_error():
    with pytest.raises(ConfigError, match="labels"):
        registry.create("align/process_reward", {"labels": "other"})


def test_it_learns_which_step_is_wrong_and_all_prefixes_share_their_tokens(tmp_path):
    model = tiny()
    groups = [
        solution(1.0, 0.0, 1.0),
        Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="1+1=2\n2*3=6\n", ends=(6, 12), values=(1.0, 1.0)),)),
    ]
    result = train(model, groups, ProcessReward(), TrainOptions(epochs=30, batch=2, learning_rate=1e-2, lora_rank=8), folder=tmp_path)
    assert result.history[-1]["accuracy"] == 1.0
    assert result.tokens < 0.6 * result.naive_tokens
