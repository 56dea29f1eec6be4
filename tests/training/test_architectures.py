"""Tiny models of many architectures are opened, scored, sampled and trained, with an adapter and as a whole."""

import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.open import open as open_model
from fiducial.models.scripted import tiny as scripted_tiny
from fiducial.models.tiny import tiny
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "mamba2", "jamba"]
QUESTION = user("a question that is longer than a window of eight")


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    tokenizer = scripted_tiny().tokenizer
    return LocalModel(tiny(request.param, vocab=len(tokenizer)), tokenizer, uri=request.param)


def groups():
    texts = [("no, I will not", "yes"), ("never", "of course, gladly"), ("no", "yes, the first step")]
    return [Group(prompt=Prompt(messages=QUESTION), completions=tuple(Completion(text=t) for t in pair)) for pair in texts]


def test_scores_are_those_of_a_plain_forward_pass(model):
    ids, start = model.encode(QUESTION, "an answer")
    other, at = model.encode(QUESTION, "another one")
    with torch.no_grad():
        logp = model.module(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    by_hand = sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))
    scores = model.score(Paths.of([(ids, start), (other, at)]))
    assert scores.path_logp[0].item() == pytest.approx(by_hand, rel=1e-4)


def test_the_likeliest_answer_is_the_argmax_at_every_place(model):
    (completion,) = model.sample([QUESTION], max_tokens=4)[0]
    ids, _ = model.encode(QUESTION)
    for token in completion.tokens:
        with torch.no_grad():
            assert int(model.module(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids = [*ids, token]


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_a_training_step_lowers_the_loss_of_what_it_saw(model, rank, tmp_path):
    before = model.fingerprint
    options = TrainOptions(batch=3, epochs=4, learning_rate=1e-3, lora_rank=rank, warmup=0.0)
    result = train(model, groups(), DPO(), options, folder=tmp_path)
    assert result.history[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert model.fingerprint != before
    assert model.sample([QUESTION], max_tokens=2)[0][0].finish in ("stop", "length")


def test_a_saved_model_opens_as_it_was(model, tmp_path):
    again = open_model(str(model.save(tmp_path / "m")), dtype="float32")
    if model.uri != "qwen2":  # which transformers opens with a tokenizer class of its own, that says the same in other words
        assert again.fingerprint == model.fingerprint
    assert again.encode(QUESTION, "an answer") == model.encode(QUESTION, "an answer")
    held, kept = again.module.state_dict(), model.module.state_dict()
    assert held.keys() == kept.keys()
    assert all(torch.equal(held[name], kept[name]) for name in held)
    ((one,),), ((other,),) = (m.sample([QUESTION], max_tokens=4) for m in (again, model))
    assert one.tokens == other.tokens
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
