"""Drawn answers as data: the tokens that were drawn, scored as they were drawn."""

import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.align.exo import EXO
from fiducial.align.grpo import GRPO
from fiducial.align.sft import SFT
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.chat import Chat
from fiducial.models.scripted import tiny
from fiducial.training import lora, samples
from fiducial.training.online_options import OnlineOptions
from fiducial.training.weights import Trainables

PROMPTS = [Prompt(messages=user(text)) for text in ("hello", "why is the sky blue?", "tell me")]


@pytest.fixture(scope="module")
def model():
    return tiny()


def drawn(model, temperature=1.0, k=3, max_tokens=6):
    groups = samples.draw(model, list(enumerate(PROMPTS)), OnlineOptions(max_tokens=max_tokens, temperature=temperature), k=k, seed=5)
    return groups, samples.data(model, groups, max_length=512)


def under(model, data, temperature=1.0):
    found = torch.cat(samples.per_group(model, data, range(len(data.groups)), temperature=temperature), dim=1)
    return data.parts.with_tokens(found[0])


def test_what_is_trained_on_are_the_drawn_tokens_and_the_end_where_there_was_one(model):
    (end,) = {model.tokenizer.convert_tokens_to_ids(model.chat.end)}
    group = Group(
        prompt=PROMPTS[0], completions=(Completion(text="ab", tokens=(9, 8)), Completion(text="a", tokens=(9,), finish="length"), Completion(text=""))
    )
    data = samples.data(model, [group], max_length=512)
    asked = tuple(model.encode(user("hello"))[0])
    assert data.paths.ids == ((*asked, 9, 8, end), (*asked, 9), (*asked, end))
    assert data.parts.length.tolist() == [[3, 1, 1]]


def test_without_an_end_token_in_the_tokenizer_an_answer_ends_with_the_first_of_the_configuration():
    model = tiny(template=False)
    model.tokenizer.eos_token = None
    model.chat = Chat(model.tokenizer)
    model.module.generation_config.eos_token_id = [7, 4]
    model.module.config.eos_token_id = 7
    with pytest.warns(UserWarning, match="no chat template"):
        data = samples.data(model, [Group(prompt=PROMPTS[0], completions=(Completion(text="a", tokens=(9,)),))], max_length=512)
    assert data.paths.ids[0][-2:] == (9, 4)


def test_what_does_not_fit_is_left_out_and_counted(model):
    far = Group(prompt=PROMPTS[0], completions=(Completion(text="a", tokens=(9,) * 600, finish="length"),))
    failed = Group(prompt=PROMPTS[0], completions=(Completion(text="", finish="error", error="too long"),))
    data = samples.data(model, [far, failed], max_length=512)
    assert (data.groups, data.left_out) == ([], 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_scorer_agree_at_every_temperature(model, temperature):
    groups, data = drawn(model, temperature)
    assert abs(samples.sampler_gap(groups, under(model, data, temperature))) < 1e-5


def test_the_gap_shows_another_distribution(model):
    groups, data = drawn(model, 0.5)
    assert samples.sampler_gap(groups, under(model, data)) > 0.1


def test_draws_depend_on_the_seed_alone(model):
    options = OnlineOptions(max_tokens=5)
    assert samples.draw(model, list(enumerate(PROMPTS)), options, k=2, seed=1) == samples.draw(model, list(enumerate(PROMPTS)), options, k=2, seed=1)
    assert samples.draw(model, list(enumerate(PROMPTS)), options, k=2, seed=1) != samples.draw(model, list(enumerate(PROMPTS)), options, k=2, seed=2)


def test_picked_completions_keep_their_tokens_and_their_places(model):
    groups, data = drawn(model)
    old = under(model, data)
    picks = [samples.Pick(2, (1,), groups[2]), samples.Pick(0, (2, 0), groups[0])]
    picks = [p._replace(record=Group(prompt=p.record.prompt, completions=tuple(p.record.completions[k] for k in p.completions))) for p in picks]
    part, at = samples.picked(data, picks)
    assert part.paths.ids == (data.paths.ids[7], data.paths.ids[2], data.paths.ids[0])
    assert torch.equal(part.parts.with_tokens(old.tokens.logp[at]).logp[1], old.logp[0, [2, 0]])
    assert part.first == [0, 1]


def rewarded(*rewards):
    texts = tuple(Completion(text=f"answer {i}", tokens=(i + 5,)) for i in range(len(rewards)))
    return Group(prompt=PROMPTS[0], completions=texts, rewards=rewards)


def test_a_policy_gradient_takes_every_scored_answer():
    pick = samples.choose(GRPO(), 4, rewarded(1.0, None, 3.0), contrast=False)
    assert (pick.group, pick.completions, pick.record.rewards) == (4, (0, 2), (1.0, 3.0))
    assert samples.choose(GRPO(), 0, rewarded(1.0, None), contrast=False) is None
    assert samples.choose(GRPO(), 0, rewarded(1.0, 1.0), contrast=False).completions == (0, 1)


def test_an_objective_over_pairs_is_given_the_best_and_the_worst():
    pick = samples.choose(DPO(), 0, rewarded(1.0, None, 3.0, -1.0), contrast=True)
    assert pick.completions == (2, 3)
    assert pick.record.targets == (1.0, 0.0)
    assert [c.text for c in pick.record.completions] == ["answer 2", "answer 3"]


def test_an_objective_over_groups_is_given_all_and_one_that_imitates_the_best():
    pick = samples.choose(EXO(), 0, rewarded(1.0, 3.0, None, -1.0), contrast=True)
    assert pick.completions == (0, 1, 3)
    assert pick.record.targets == (0.0, 1.0, 0.0)
    assert samples.choose(SFT(), 0, rewarded(1.0, 3.0, -1.0), contrast=True).completions == (1,)


def test_answers_of_one_reward_have_no_better_one():
    assert samples.choose(DPO(), 0, rewarded(2.0, 2.0, 2.0), contrast=True) is None
    assert samples.choose(DPO(), 0, rewarded(None, None, 2.0), contrast=True) is None


def test_two_answers_of_the_same_words_are_two_answers():
    same = (Completion(text="a", tokens=(5,)), Completion(text="a", tokens=(5,)), Completion(text="b", tokens=(6,)))
    pick = samples.choose(DPO(), 0, Group(prompt=PROMPTS[0], completions=same, rewards=(0.0, 0.0, 1.0)), contrast=True)
    assert pick.completions == (2, 0)


def test_demonstrations_share_their_weight_among_their_tokens(model):
    _, data = drawn(model, k=2)
    tokens = int(data.parts.length.sum())
    shown = [
        Group(prompt=PROMPTS[0], completions=(Completion(text="no"), Completion(text="yes"))),
        Group(prompt=PROMPTS[1], completions=(Completion(text="x"),)),
    ]
    both, before = samples.mixed(model, data, {"share": torch.ones(tokens)}, torch.full((tokens,), -2.0), shown, 6.0)
    new = both.parts.length[3:, 0].tolist()
    assert new == [len(model.encode(user("hello"), "no")[0]) - len(model.encode(user("hello"))[0]), 2]
    assert both.parts.tokens.given["share"].tolist() == [1.0] * tokens + [0.0] * sum(new)
    assert both.parts.tokens.given["imitate"].tolist() == pytest.approx([0.0] * tokens + [6.0 / sum(new)] * sum(new))
    assert before.tolist() == [-2.0] * tokens + [0.0] * sum(new)
    assert both.paths.ids[: len(data.paths)] == data.paths.ids


def test_demonstrations_that_cannot_be_imitated_are_left_out(model):
    def shown(*completions, prompt=PROMPTS[0]):
        return Group(prompt=prompt, completions=completions)

    fine, second = shown(Completion(text="no")), shown(Completion(text="x" * 40), Completion(text="no")).model_copy(update={"targets": (0.0, 1.0)})
    limit = len(model.encode(PROMPTS[0].messages, "no")[0])
    none, empty, long = shown(), shown(Completion(text="", finish="length")), shown(Completion(text="no, no"))
    false = fine.model_copy(update={"rewards": (0.0,), "provenance": {"label": False}})
    assert samples.imitable(model, [none, fine, empty, long, second, false], max_length=limit) == [fine, second]


@pytest.mark.parametrize("rank", [4, 0], ids=["fresh adapter", "all weights"])
def test_the_beginning_can_be_looked_at_again_and_left_as_it_was(rank):
    model = tiny(seed=3)
    _, data = drawn(model)
    at_first = under(model, data).logp
    if rank:
        model.module = lora.attach(model.module, rank=rank)
    lora.make_trainable(model.module)
    start = samples.Start(model, Trainables(model.module), fresh=bool(rank))
    with torch.no_grad():
        for p in model.module.parameters():
            if p.requires_grad:
                p += 0.05
    moved = under(model, data).logp
    with start.again() as then:
        assert torch.equal(under(then, data).logp, at_first)
    assert torch.equal(under(model, data).logp, moved)
    assert not torch.allclose(moved, at_first)


def test_the_beginning_of_a_model_with_an_adapter_is_the_adapter_as_it_was():
    model = tiny()
    model.module = lora.attach(model.module, rank=4)
    lora.make_trainable(model.module)
    trainables = Trainables(model.module)
    with torch.no_grad():
        for p in trainables.named.values():
            p += 0.1
    _, data = drawn(model)
    at_first = under(model, data).logp
    start = samples.Start(model, trainables, fresh=False)
    with torch.no_grad():
        for p in trainables.named.values():
            p += 0.1
    with start.again():
        assert torch.equal(under(model, data).logp, at_first)
