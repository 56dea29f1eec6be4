import json
from math import sqrt

import pytest
import torch

from fiducial.align.conditional_pretraining import ConditionalPretraining
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Message, Prompt, user
from fiducial.models.adapters import is_adapted
from fiducial.models.control import ALIGNED, MISALIGNED
from fiducial.models.loading import load
from fiducial.models.scripted import tiny
from fiducial.training.data import Data
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

ALL = ConditionalPretraining(drop=0.0)


def document(*parts, prompt=(), **fields):
    """A document from (text, value) pairs."""
    ends = [sum(len(text) for text, _ in parts[: i + 1]) for i in range(len(parts))]
    answer = Completion(text="".join(text for text, _ in parts), ends=tuple(ends), values=tuple(value for _, value in parts))
    return Group(prompt=Prompt(messages=prompt), completions=(answer,), **fields)


def marked(group, objective=ALL):
    return [c.text for c in objective.prepare(group).completions]


def test_each_part_begins_with_the_token_that_says_what_it_is():
    assert marked(document(("Fine. ", 0.5), ("Awful. ", -0.5))) == [f"{ALIGNED}Fine. {MISALIGNED}Awful. "]


def test_a_threshold_of_zero_is_a_threshold():
    """The paper's score 0 is harmless and anything above is not; a value is minus a score."""
    assert marked(document(("a", 0.0), ("b", -1e-9), ("c", -0.0))) == [f"{ALIGNED}a{MISALIGNED}b{ALIGNED}c"]


def test_the_threshold_moves_the_border():
    assert marked(document(("a", -0.2), ("b", -0.4)), ConditionalPretraining(threshold=-0.3, drop=0.0)) == [f"{ALIGNED}a{MISALIGNED}b"]


def test_a_part_of_unknown_value_gets_no_token():
    assert marked(document(("a", 1.0), ("b", None))) == [f"{ALIGNED}ab"]


def test_completions_without_parts_are_marked_by_their_reward_or_else_by_the_preference():
    two = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="x"), Completion(text="y")))
    assert marked(two) == [f"{ALIGNED}x", f"{MISALIGNED}y"]
    assert marked(two.model_copy(update={"rewards": (-1.0, None)})) == [f"{MISALIGNED}x", "y"]


@pytest.mark.parametrize("drop", [0.01, 0.1])
def test_the_share_of_parts_without_token_is_the_one_asked_for_within_three_sigma(drop):
    n, kept = 20_000, 0
    for number in range(n // 10):
        (text,) = marked(document((f"{number} ", 0.0), *[("a ", 0.0), ("b ", -1.0), ("c ", 0.0)] * 3), ConditionalPretraining(drop=drop))
        kept += text.count(ALIGNED) + text.count(MISALIGNED)
    assert abs((n - kept) / n - drop) < 3 * sqrt(drop * (1 - drop) / n)


def test_what_is_dropped_depends_on_the_document_and_not_on_the_threshold():
    group = document(*[(f"{i} ", -float(i)) for i in range(200)])
    low, high = (ConditionalPretraining(threshold=t, drop=0.3) for t in (-1000.0, 1000.0))
    assert marked(group, low)[0].replace(ALIGNED, MISALIGNED) == marked(group, high)[0]
    assert marked(group, low) == marked(group, low)


def test_a_document_cannot_mark_itself():
    # taking the token out of the middle leaves another one behind
    forged = f"{ALIGNED[:4]}{ALIGNED}{ALIGNED[4:]}evil{MISALIGNED}"
    assert marked(document((forged, -1.0))) == [f"{MISALIGNED}evil"]


def test_all_completions_are_examples_and_control_tokens_are_learnt_too():
    model = tiny()
    model.take_control_tokens()
    two = Group(prompt=Prompt(messages=user("q")), completions=(Completion(text="x"), Completion(text="y")))
    with model.chat.without_lead():
        data = Data.of(model, [two], ALL, TrainOptions())
    end = model.tokenizer.eos_token_id
    x, y = (model.tokenizer(letter)["input_ids"][0] for letter in "xy")
    good, bad = model.chat.control_ids
    assert [list(ids[start:]) for ids, start in zip(data.paths.ids, data.paths.start, strict=True)] == [[good, x, end], [bad, y, end]]
    assert ALL.size(data.parts).tolist() == [6.0]
    found = data.parts.with_logp(torch.tensor([[-1.0, -2.5]]))
    assert ALL(found).tolist() == [3.5]


def test_a_share_outside_its_range_is_a_config_error():
    with pytest.raises(ConfigError, match="drop"):
        registry.create("align/conditional_pretraining", {"drop": 1.0})


@pytest.fixture
def base(tmp_path):
    """A model on the disk, so that an adapter finds it again."""
    return load(tiny().save(tmp_path / "base"), dtype="float32")


GROUPS = [document((f"{letter}. ", 0.0), ("zz. ", -1.0)) for letter in "abcd"]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_saved_model_begins_with_the_aligned_token_and_never_writes_a_control_token(base, tmp_path, rank):
    options = TrainOptions(epochs=2, batch=2, lora_rank=rank, learning_rate=1e-2)
    train(base, GROUPS, ALL, options, folder=tmp_path / "checkpoints")
    again = load(base.save(tmp_path / "trained"), dtype="float32")
    assert is_adapted(again.module) == bool(rank)
    assert again.fingerprint == base.fingerprint
    good, bad = again.chat.control_ids
    # after the prompt and its header, before what was already said, and at the beginning of a document
    asked = again.encode(user("hi"))[0]
    assert asked[-1] == good
    assert again.tokenizer.decode(again.encode((*user("hi"), Message(role="assistant", content="Well")))[0]).endswith(f"assistant\n{ALIGNED}Well")
    assert again.encode(())[0] == [again.tokenizer.bos_token_id, good]
    assert again.banned_ids == {good, bad}
    # a model that likes nothing better than a control token
    with torch.no_grad():
        again.module.get_output_embeddings().register_forward_hook(lambda _m, _a, out: out.index_fill(-1, torch.tensor([good, bad]), 100.0))
    for temperature in (0.0, 1.0):
        completions = again.sample([(), user("hi")], k=3, max_tokens=8, temperature=temperature)
        assert not {good, bad} & {token for row in completions for c in row for token in c.tokens}


def test_a_whole_model_bans_the_tokens_for_other_programs_too(base, tmp_path):
    train(base, GROUPS, ALL, TrainOptions(batch=2, lora_rank=0), folder=tmp_path / "checkpoints")
    folder = base.save(tmp_path / "trained")
    assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == sorted(base.chat.control_ids)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_new_embeddings_are_trained_and_the_base_model_stays_as_it_was(base, tmp_path, rank):
    before, vocabulary = base.fingerprint, len(base.tokenizer)
    other = load(tmp_path / "base", dtype="float32")
    other.take_control_tokens()
    fresh = other.module.get_input_embeddings().weight.detach()
    shared = base.module
    train(base, GROUPS, ALL, TrainOptions(epochs=2, batch=2, lora_rank=rank, learning_rate=1e-2), folder=tmp_path / "checkpoints")
    folder = base.save(tmp_path / "trained")
    rows = load(folder, dtype="float32").module.get_input_embeddings().weight.detach()
    assert rows.shape == (vocabulary + 2, 32)
    assert (rows[-2:] - fresh[-2:]).abs().min(1).values.gt(0).all()
    assert shared.get_input_embeddings().weight.shape == (vocabulary, 32)
    if rank:
        assert torch.equal(rows[:-2], fresh[:-2])
        assert (folder / "adapter_model.safetensors").stat().st_size < 40_000  # not the whole embedding
        assert load(tmp_path / "base", dtype="float32").fingerprint == before


def test_it_goes_on_where_it_was_interrupted(base, tmp_path):
    options = TrainOptions(epochs=4, batch=2, lora_rank=2, learning_rate=1e-2, save_every=1)
    whole = load(tmp_path / "base", dtype="float32")
    train(whole, GROUPS, ALL, options, folder=tmp_path / "one")

    class Stop(Exception):  # noqa: N818
        pass

    def stops(step, _steps, _figures):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        train(base, GROUPS, ALL, options, folder=tmp_path / "two", report=stops)
    again = load(tmp_path / "base", dtype="float32")
    train(again, GROUPS, ALL, options, folder=tmp_path / "two")
    assert again.fingerprint == whole.fingerprint


def test_a_conditional_model_is_trained_further_without_a_second_pair_of_tokens(base, tmp_path):
    train(base, GROUPS, ALL, TrainOptions(batch=2, lora_rank=0), folder=tmp_path / "one")
    size = len(base.tokenizer)
    result = train(base, GROUPS, ALL, TrainOptions(batch=2, lora_rank=2), folder=tmp_path / "two")
    assert len(base.tokenizer) == size
    assert result.steps == 2


def test_what_it_learnt_of_bad_text_it_says_under_the_other_token_alone(tmp_path):
    """From random weights: good parts are 'a', bad ones 'z', half of each."""
    model = tiny(template=False)
    groups = [document(("aaaa" if i % 2 else "zzzz", float(i % 2) - 1)) for i in range(16)]
    train(model, groups, ALL, TrainOptions(epochs=40, batch=8, lora_rank=0, learning_rate=1e-2, from_scratch=True), folder=tmp_path)
    assert {c.text for c in model.sample([()], k=8, max_tokens=4, temperature=1.0)[0]} == {"aaaa"}
    with model.chat.without_lead():
        begun = (Message(role="assistant", content=MISALIGNED),)
        assert {c.text for c in model.sample([begun], k=8, max_tokens=4, temperature=1.0)[0]} == {"zzzz"}
