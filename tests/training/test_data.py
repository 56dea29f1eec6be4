"""Groups become token paths: where scoring starts, what is known of each token, what is left out."""

import math

import pytest
import torch

from fiducial.align.dft import DFT
from fiducial.align.dpo import DPO
from fiducial.align.kto import KTO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Completion, Group, Message, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training.data import Data
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

OPTIONS = TrainOptions(batch=4, lora_rank=0, warmup=0.0)


@pytest.fixture(scope="module")
def model():
    return tiny()


def group(*completions, **fields):
    return Group(prompt=Prompt(messages=user("a")), completions=completions, **fields)


def values(model, *groups):
    """The number known of each token, by completion."""
    parts = Data.of(model, groups, DFT(), OPTIONS).parts
    found = parts.tokens.given["value"].tolist()
    sizes = [int(n) for n in parts.length.flatten() if n]
    return [found[end - n : end] for n, end in zip(sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True)]


def test_each_token_has_the_value_of_its_part_and_the_end_that_of_the_last(model):
    # the tokens are a, b, he, and the end of the turn
    assert values(model, group(Completion(text="abhe", ends=(2, 4), values=(1.0, -2.0)))) == [[1.0, 1.0, -2.0, -2.0]]


def test_a_token_across_a_border_belongs_to_the_part_in_which_it_ends(model):
    # t and he, though the first part ends within he
    assert values(model, group(Completion(text="the", ends=(2, 3), values=(1.0, -1.0)))) == [[1.0, -1.0, -1.0]]


def test_a_value_that_is_unknown_is_no_number(model):
    (found,) = values(model, group(Completion(text="ab", ends=(1, 2), values=(None, 3.0))))
    assert math.isnan(found[0])
    assert found[1:] == [3.0, 3.0]


def test_completions_that_no_end_token_closes_are_counted(model):
    found = Data.of(
        model, [group(Completion(text="ab"), Completion(text="b", finish="length")), group(Completion(text="cut", finish="length"))], SFT(), OPTIONS
    )
    assert (found.endless, len(found.paths)) == (1, 2)  # only preferred completions are imitated


def test_completions_that_share_a_token_with_their_prompt_are_refused_above_one_in_a_hundred(model):
    begun = Prompt(messages=(*user("a"), Message(role="assistant", content="h")))
    apart, across = (Group(prompt=begun, completions=(Completion(text=text),)) for text in ("o", "e"))
    assert model.encode(begun.messages, "e")[1] < model.encode(begun.messages)[1]  # he is one token
    assert len(Data.of(model, [apart] * 99 + [across], SFT(), OPTIONS).groups) == 100
    with pytest.raises(DataError, match="in 2 of 101 completions the first token begins in the prompt"):
        Data.of(model, [apart] * 99 + [across] * 2, SFT(), OPTIONS)


def test_without_parts_the_reward_is_the_value_of_every_token(model):
    assert values(model, group(Completion(text="ab"), rewards=(0.5,))) == [[0.5] * 3]


def test_without_rewards_preferred_completions_have_the_value_one(model):
    assert values(model, group(Completion(text="a"), targets=(1.0,))) == [[1.0, 1.0]]


def test_a_head_reads_the_last_token_and_nothing_is_scored(model):
    given = group(Completion(text="ab"), Completion(text="abc"))
    data = Data.of(model, [given], RewardModel(), OPTIONS)
    assert data.paths.start == tuple(len(ids) for ids in data.paths.ids)
    assert data.parts.length.tolist() == [[3, 4]]
    assert [ids[-1] for ids in data.paths.ids] == [model.tokenizer.eos_token_id] * 2


def test_mismatched_pairs_are_prompts_with_the_answer_before_them(model):
    groups = [Group(prompt=Prompt(messages=user(q)), completions=(Completion(text=a),)) for q, a in (("one", "x"), ("two", "yy"), ("three", "zzz"))]
    data = Data.of(model, groups, KTO(), OPTIONS)
    pairs = data.mismatched([2, 0, 1])
    asked = [model.encode(user(q))[0] for q in ("three", "one", "two")]
    answers = [[*model.tokenizer(a)["input_ids"], model.tokenizer.eos_token_id] for a in ("yy", "zzz", "x")]
    assert [list(ids) for ids in pairs.ids] == [a + b for a, b in zip(asked, answers, strict=True)]
    assert list(pairs.start) == [len(a) for a in asked]
    # a step of one takes the group before it in the data, the first the last
    assert list(data.mismatched([0]).ids[0]) == asked[1] + answers[1]


def test_a_step_over_the_border_of_two_passes_pairs_no_prompt_with_its_own_answer(model):
    groups = [Group(prompt=Prompt(messages=user(q)), completions=(Completion(text=a),)) for q, a in (("one", "x"), ("two", "yy"), ("three", "zzz"))]
    data = Data.of(model, groups, KTO(), OPTIONS)

    def answers(chosen):
        """Letters of each answer."""
        pairs = data.mismatched(chosen)
        return [model.tokenizer.decode(ids[start:-1]) for ids, start in zip(pairs.ids, pairs.start, strict=True)]

    assert answers([2, 0, 0, 1]) == ["yy", "zzz", "zzz", "x"]
    assert answers([0, 1, 0]) == ["yy", "x", "yy"]
    assert answers([1, 1]) == ["x", "x"]  # no other in the step: the one before in the data
    assert answers([0, 0]) == ["zzz", "zzz"]


def test_mismatched_pairs_beyond_the_limit_are_left_out(model):
    groups = [Group(prompt=Prompt(messages=user(q)), completions=(Completion(text=a),)) for q, a in (("q" * 50, "x"), ("q", "y" * 50))]
    limit = len(model.encode(user("q" * 50), "x")[0])
    data = Data.of(model, groups, KTO(), OPTIONS.model_copy(update={"max_length": limit}))
    assert len(data.mismatched([0, 1])) == 1


def test_a_reference_point_needs_two_groups(model, tmp_path):
    with pytest.raises(DataError, match="there is one group"):
        train(tiny(), [group(Completion(text="ab"))], KTO(), OPTIONS, folder=tmp_path)


DIALOGUE = Prompt(messages=(*user("a"), Message(role="assistant", content="bc"), Message(role="user", content="d")))


@pytest.mark.parametrize("learn", ["completion", "assistant", "all"])
def test_demonstrations_teach_the_answer_every_answer_or_everything(tmp_path, learn):
    """Loss of the first step against the plain model, with the tokens of each way marked by hand."""
    model = tiny()
    taught = Group(prompt=DIALOGUE, completions=(Completion(text="efg"),))
    ids, start = model.encode(DIALOGUE.messages, "efg")
    first, at = model.encode(DIALOGUE.messages[:1], "bc")
    assert ids[: len(first)] == first
    marked = {"completion": range(start, len(ids)), "assistant": [*range(at, len(first)), *range(start, len(ids))], "all": range(1, len(ids))}[learn]
    logp = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = -sum(float(logp[i - 1, ids[i]].detach()) for i in marked) / len(marked)
    result = train(model, [taught], SFT(), OPTIONS.model_copy(update={"learn": learn}), folder=tmp_path)
    assert result.history[0]["loss"] == pytest.approx(by_hand, rel=1e-5)
    assert result.tokens <= len(ids)  # the first answer is a beginning of the whole


def test_earlier_answers_are_taught_as_they_were_asked_for_whatever_the_template_does_to_history(model):
    """Here it leaves out what was said before the last question, as templates of reasoning models do."""
    forgetful = tiny()
    forgetful.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    data = Data.of(forgetful, [Group(prompt=DIALOGUE, completions=(Completion(text="efg"),))], SFT(), OPTIONS.model_copy(update={"learn": "assistant"}))
    assert [list(ids) for ids in data.paths.ids] == [forgetful.encode(DIALOGUE.messages[:1], "bc")[0], forgetful.encode(DIALOGUE.messages, "efg")[0]]
    assert data.parts.targets.tolist() == [[1.0, 1.0]]


def test_what_stands_before_the_answer_cannot_be_learnt_by_comparing(model):
    pair = group(Completion(text="ab"), Completion(text="c"))
    with pytest.raises(ConfigError, match="align/dpo compares completions"):
        Data.of(model, [pair], DPO(), OPTIONS.model_copy(update={"learn": "all"}))
