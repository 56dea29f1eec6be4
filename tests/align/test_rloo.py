"""RLOO by hand."""

from math import log

import pytest
import torch

from fiducial.align.rloo import RLOO
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.objective import layout

approx = pytest.approx
OLD = [-1.0, -2.0, -3.0]
LENGTHS = [[2, 1]]


def parts(rewards, lengths=LENGTHS, given=None):
    groups = [Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="b"),) * len(r), rewards=tuple(r)) for r in rewards]
    return layout(groups, lengths, given or {})


def taught(objective, rewards, reference=OLD, old=OLD, lengths=LENGTHS):
    plain = parts(rewards, lengths)
    before = plain.with_tokens(torch.tensor(reference))
    lessons = objective.lessons(plain.with_tokens(torch.tensor(old)), before, room=10)
    return parts(rewards, lengths, {**lessons.given, "old": torch.tensor(old)}), before, lessons


def test_the_gradient_of_an_answer_is_its_reward_less_its_siblings_whatever_its_length():
    objective = RLOO(beta=0.0)
    group, reference, _ = taught(objective, [(3.0, 1.0)])
    logp = torch.tensor(OLD, requires_grad=True)
    objective(group.with_tokens(logp), reference).sum().backward()
    assert logp.grad.tolist() == approx([-2.0, -2.0, 2.0])
    assert objective.size(group).tolist() == [2.0]


def test_the_kl_lowers_the_reward_by_beta_for_each_nat():
    # the first answer is 1 nat likelier than under the reference, the second as likely: R' = 3 - 0.5, 1
    _, _, lessons = taught(RLOO(beta=0.5), [(3.0, 1.0)], reference=[-1.5, -2.5, -3.0])
    assert lessons.given["advantage"].tolist() == approx([1.5, 1.5, -1.5])


def test_the_ratio_is_of_the_whole_answer():
    objective = RLOO(beta=0.0)
    group, reference, _ = taught(objective, [(3.0, 1.0)])
    # ratio 1.1 * 1.05 of the first, 0.9 of the second: both within the clip
    now = torch.tensor([-1.0 + log(1.1), -2.0 + log(1.05), -3.0 + log(0.9)])
    assert objective(group.with_tokens(now), reference).item() == approx(-1.1 * 1.05 * 2 + 0.9 * 2)
    assert objective.metrics(group.with_tokens(now), reference)["clipped"] == 0.0


def test_an_answer_beyond_the_clip_has_no_gradient():
    objective = RLOO(beta=0.0)
    group, reference, _ = taught(objective, [(3.0, 1.0)])
    logp = torch.tensor([-1.0 + log(1.15), -2.0 + log(1.15), -3.0], requires_grad=True)  # 1.3225 > 1.2
    objective(group.with_tokens(logp), reference).sum().backward()
    assert logp.grad.tolist() == approx([0.0, 0.0, 2.0])
    assert objective.metrics(group.with_tokens(logp.detach()), reference)["clipped"] == 0.5


def test_a_smaller_group_beside_a_larger_one_is_compared_within_itself():
    objective = RLOO(beta=0.0)
    group, _, lessons = taught(objective, [(3.0, 1.0), (0.0, 0.0, 6.0)], reference=[-1.0] * 6, old=[-1.0] * 6, lengths=[[1, 1], [1, 1, 2]])
    assert lessons.given["advantage"].tolist() == approx([2.0, -2.0, -3.0, -3.0, 6.0, 6.0])
    assert objective.size(group).tolist() == [2.0, 3.0]


def test_whether_a_group_teaches_is_asked_of_its_rewards():
    _, _, lessons = taught(RLOO(), [(1.0, 1.0)], reference=[-9.0, -2.0, -3.0])
    assert lessons.flat.tolist() == [True]


@pytest.mark.parametrize("options", [{"beta": -1.0}, {"clip_low": 0.0}, {"clip_high": -0.2}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="align/rloo"):
        registry.create("align/rloo", options)
