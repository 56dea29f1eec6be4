"""Single optimizer steps: what is read of the model, and the head that is trained with it."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator

from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.core.roles import Objective
from fiducial.models.scorehead import ScoreHead
from fiducial.models.scripted import tiny
from fiducial.training import lora
from fiducial.training.data import Data
from fiducial.training.options import TrainOptions
from fiducial.training.updates import Updates

OPTIONS = TrainOptions(batch=4, lora_rank=0, clip=1e9)


@dataclass(frozen=True)
class Kept(Objective):
    """Keeps what it was shown."""

    reads: ClassVar = ("tokens", "values")
    seen: ClassVar = []

    def __call__(self, policy, reference=None):
        self.seen.append(policy)
        return policy.summed(policy.per_token + policy.values).sum(1)


class Both(Kept):
    """Has both heads in its loss."""

    seen: ClassVar = []

    def __call__(self, policy, reference=None):
        return super().__call__(policy) + policy.summed(policy.tokens.cost_values.square()).sum(1)


def updates(model, objective, **more):
    lora.make_trainable(model.module)
    return Updates(model, objective, OPTIONS, Accelerator(cpu=True), **more)


def test_single_tokens_and_the_values_before_them_are_those_of_a_plain_pass(made):
    model = tiny()
    data = Data.of(model, made.pairs(3), Kept(), OPTIONS)
    Kept.seen.clear()
    one = updates(model, Kept(), temperature=2.0)
    plain, head = tiny(), model.head.weight.detach().clone()
    one.step(data, [2, 0], rate=1e-3)
    (policy,) = Kept.seen
    logp, values = [], []
    for g in (2, 0):
        for path in data.paths_of([g]):
            ids, start = list(data.paths.ids[path]), data.paths.start[path]
            out = plain.module(torch.tensor([ids]), output_hidden_states=True)
            scaled = (out.logits[0] / 2.0).log_softmax(-1)
            logp += [float(scaled[i - 1, ids[i]].detach()) for i in range(start, len(ids))]
            values += (out.hidden_states[-1][0, start - 1 : -1] @ head).tolist()
    assert policy.tokens.logp.tolist() == pytest.approx(logp, abs=1e-4)
    assert policy.tokens.values.tolist() == pytest.approx(values, abs=1e-4)
    assert not torch.equal(model.head.weight, head)


def test_a_head_is_drawn_by_the_seed_and_kept_by_its_own_objective():
    model = tiny()
    first = updates(model, RewardModel()).model.head
    assert first.weight.tolist() == ScoreHead.fresh(32, seed=0, higher_is="better", trained_by="x").weight.tolist()
    assert updates(model, RewardModel()).model.head is first


def test_a_head_of_another_objective_is_replaced_and_dropped_where_none_is_read():
    model = tiny()
    model.head = ScoreHead.fresh(32, seed=5, higher_is="worse", trained_by="align/cost_model")
    assert updates(model, RewardModel()).model.head.higher_is == "better"
    updates(model, SFT())
    assert model.head is None


def test_a_second_head_values_the_cost_where_there_is_one_and_values_are_read():
    model = tiny()
    one = updates(model, Kept(), costed=True)
    assert list(one.heads.named) == ["score_head.weight", "cost_head.weight"]
    assert not torch.equal(model.head.weight, model.cost_head.weight)
    assert (model.head.higher_is, model.cost_head.higher_is) == ("better", "worse")
    assert list(updates(model, RewardModel(), costed=True).heads.named) == ["score_head.weight"]
    assert model.cost_head is None


@pytest.mark.parametrize("backend", ["tree", "split"])
def test_what_either_head_says_reaches_the_objective_in_one_pass_or_two(made, trainers, backend):
    model = trainers.budgeted(30, backend=backend)
    data = Data.of(model, made.pairs(3), Kept(), OPTIONS)
    one = updates(model, Both(), costed=True)
    heads = [head.weight.detach().clone() for head in (model.head, model.cost_head)]
    Both.seen.clear()
    one.step(data, [0], rate=1e-3)
    tokens, ids = Both.seen[0].tokens, [list(data.paths.ids[path]) for path in data.paths_of([0])]
    starts = [data.paths.start[path] for path in data.paths_of([0])]
    plain = [tiny().module(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, s - 1 : -1] for row, s in zip(ids, starts, strict=True)]
    states = torch.cat(plain).detach()
    if backend == "split":  # the whole group at once, from the pass without gradients
        assert len(tokens.logp) == len(states)
        assert tokens.values.tolist() == pytest.approx((states @ heads[0]).tolist(), abs=1e-4)
        assert tokens.cost_values.tolist() == pytest.approx((states @ heads[1]).tolist(), abs=1e-4)
    moves = [(head.weight - before).abs().max() for head, before in zip((model.head, model.cost_head), heads, strict=True)]
    assert min(moves) > 1e-4


def test_the_head_moves_with_the_adapter_though_the_base_is_frozen(made):
    model = tiny()
    data = Data.of(model, made.pairs(3), RewardModel(), OPTIONS)
    model.module = lora.attach(model.module, rank=2)
    one = updates(model, RewardModel())
    assert {n for n in one.trainables.named if "lora_" not in n} == {"score_head.weight"}
    before = model.head.weight.detach().clone()
    one.step(data, range(3), rate=1e-2)
    assert (model.head.weight - before).abs().max() > 1e-3
    assert one.steps == 1
