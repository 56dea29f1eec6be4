"""The table of reference log-probabilities: computed once, and only for these weights and tokens."""

import threading
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from fiducial.align.sft import SFT
from fiducial.core.errors import DataError
from fiducial.core.records import user
from fiducial.core.roles import Objective
from fiducial.models import abreast
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.scoring import Engine
from fiducial.models.scripted import tiny
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions
from fiducial.training.reference import key, logprobs


@pytest.fixture
def model():
    return tiny()


def paths(model, *texts, start=None):
    pairs = [model.encode(user("a question"), t) for t in texts]
    return Paths.of([(ids, start or at) for ids, at in pairs])


def files(folder):
    return sorted(p.name for p in folder.glob("reference-*.safetensors"))


def test_it_holds_the_sum_of_the_scored_tokens(model):
    chosen = paths(model, "yes", "no, never")
    ids, start = chosen.ids[1], chosen.start[1]
    with torch.no_grad():
        logp = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert logprobs(model.engine, chosen, fingerprint="f")[1].item() == pytest.approx(by_hand, rel=1e-5)


def test_a_stored_table_is_read_instead_of_computed(model, tmp_path):
    chosen = paths(model, "yes", "no")
    first = logprobs(model.engine, chosen, fingerprint=model.fingerprint, folder=tmp_path)
    steps = []
    again = logprobs(model.engine, chosen, fingerprint=model.fingerprint, folder=tmp_path, step=steps.append)
    assert torch.equal(first, again)
    assert steps == []
    assert len(files(tmp_path)) == 1


def test_changed_weights_get_a_table_of_their_own(model, tmp_path):
    chosen = paths(model, "yes", "no")
    first = logprobs(model.engine, chosen, fingerprint=model.fingerprint, folder=tmp_path)
    with torch.no_grad():
        model.module.lm_head.weight.mul_(1.5)
    again = logprobs(model.engine, chosen, fingerprint=model.fingerprint, folder=tmp_path)
    assert not torch.allclose(first, again)
    assert len(files(tmp_path)) == 2


def test_tokens_start_order_dtype_and_model_are_all_part_of_the_key(model):
    one = paths(model, "yes", "no")
    others = [paths(model, "no", "yes"), paths(model, "yes", "nO"), paths(model, "yes"), paths(model, "yes", "no", start=5)]
    keys = {key("f", "torch.float32", p) for p in (one, *others)}
    keys |= {key("g", "torch.float32", one), key("f", "torch.bfloat16", one)}
    assert len(keys) == 7
    assert key("f", "torch.float32", paths(model, "yes", "no")) == key("f", "torch.float32", one)


def test_each_row_tells_how_many_paths_it_finished(model):
    steps = []
    logprobs(model.engine, paths(model, *"abcdefg"), fingerprint="f", step=steps.append)
    assert sum(steps) == 7


def test_a_table_of_tokens_adds_up_to_that_of_completions_and_is_kept_apart(model, tmp_path):
    chosen = paths(model, "yes", "no, never")
    sums = logprobs(model.engine, chosen, fingerprint="f", folder=tmp_path)
    single = logprobs(model.engine, chosen, fingerprint="f", folder=tmp_path, tokens=True)
    assert torch.stack([single[list(span)].sum() for span in chosen.spans()]).tolist() == pytest.approx(sums.tolist(), rel=1e-5)
    assert len(files(tmp_path)) == 2
    assert torch.equal(single, logprobs(model.engine, chosen, fingerprint="f", folder=tmp_path, tokens=True))


def test_another_temperature_is_another_table(model, tmp_path):
    chosen = paths(model, "yes")
    one, other = (logprobs(model.engine, chosen, fingerprint="f", folder=tmp_path, temperature=t) for t in (1.0, 2.0))
    assert not torch.allclose(one, other)
    assert len(files(tmp_path)) == 2


def interleaved(model):
    """Four groups of unequal answers whose paths do not stand together."""
    pairs = [model.encode(user(f"question {n}"), f"{text} {n}") for text in ("yes", "no, never at all") for n in range(4)]
    return Paths.of(pairs, group=[0, 1, 2, 3] * 2)


@pytest.mark.parametrize("tokens", [False, True])
def test_two_threads_make_the_table_of_one_and_keep_groups_together(model, two_cores, monkeypatch, tokens):
    monkeypatch.setattr(abreast, "TOKENS_EACH", 1)
    stream, took, steps = Engine.stream, [], []
    monkeypatch.setattr(Engine, "stream", lambda self, some, **more: (took.append((threading.get_ident(), sorted(some.group))), stream(self, some, **more))[1])
    chosen = interleaved(model)
    both = logprobs(model.engine, chosen, fingerprint="f", tokens=tokens, step=steps.append)
    (first, one), (second, other) = took
    assert len({first, second, threading.get_ident()}) == 3
    assert sorted(one + other) == sorted(chosen.group)
    assert not set(one) & set(other)
    assert sum(steps) == 8
    alone = logprobs(model.engine, chosen, fingerprint="f", tokens=tokens, team=[model.engine])
    assert took[2:] == [(threading.get_ident(), sorted(chosen.group))]
    assert both.tolist() == pytest.approx(alone.tolist(), abs=1e-5)


def test_a_team_that_is_made_while_an_adapter_is_off_has_it_off(model, made, tmp_path):
    chosen = interleaved(model)
    base = logprobs(model.engine, chosen, fingerprint="f")
    adapted = moved(made, tmp_path)
    apart = logprobs(adapted.engine, chosen, fingerprint="f")
    assert (apart - base).abs().max() > 0.1
    with adapted.module.disable_adapter():
        team = adapted.engine.team(2)
        assert len(team) == 2
        assert logprobs(adapted.engine, chosen, fingerprint="f", team=team).tolist() == pytest.approx(base.tolist(), abs=1e-4)
    # afterwards the first has it on again, the other still off
    assert [logprobs(engine, chosen, fingerprint="f", team=[engine]).tolist() for engine in team] == [
        pytest.approx(apart.tolist(), abs=1e-4),
        pytest.approx(base.tolist(), abs=1e-4),
    ]


def test_an_error_in_one_thread_is_raised_and_no_table_is_kept(model, tmp_path):
    chosen = interleaved(model)
    bad = Paths([*chosen.ids[:-1], [*chosen.ids[-1][:-1], 99_999]], chosen.start, chosen.group)
    with pytest.raises(DataError, match="token 99999"):
        logprobs(model.engine, bad, fingerprint="f", folder=tmp_path, team=model.engine.team(2))
    assert files(tmp_path) == []
    assert not [t for t in threading.enumerate() if t.name == "fiducial-abreast"]


@dataclass(frozen=True, slots=True)
class Compared(Objective):
    """Writes down how far the policy is from the reference, as largest difference of a completion and of a token."""

    reads: ClassVar = ("tokens",)
    needs_reference: ClassVar = True
    seen: list = field(default_factory=list)

    def __call__(self, policy, reference=None):
        apart = (policy.logp - reference.logp).abs().max(), (policy.per_token - reference.per_token).abs().max()
        self.seen.append(max(float(x.detach()) for x in apart))
        return policy.logp.sum(1)


OPTIONS = TrainOptions(batch=8, learning_rate=1e-2, lora_rank=2)


def moved(made, folder):
    """A model with an adapter that was trained before."""
    model = tiny()
    train(model, made.pairs(3), SFT(), OPTIONS, folder=folder / "before")
    return model


STARTS = {
    "a new adapter": (lambda *_: tiny(), {}),
    "all weights": (lambda *_: tiny(), {"lora_rank": 0}),
    "an adapter that was there": (moved, {}),
    "groups over several rows": (lambda made, _: made.budgeted(30, backend="split"), {}),
    "all weights over several rows": (lambda made, _: made.budgeted(30, backend="split"), {"lora_rank": 0}),
}


class StopError(Exception):
    """Ends a training after its first step, before a checkpoint."""


def stop(*_):
    raise StopError


@pytest.mark.parametrize("start", STARTS)
def test_before_the_first_update_the_policy_is_the_reference_computed_or_read(made, tmp_path, start):
    begin, changes = STARTS[start]
    found = []
    for _ in range(2):
        objective = Compared()
        with pytest.raises(StopError):
            train(begin(made, tmp_path), made.pairs(), objective, OPTIONS.model_copy(update=changes), folder=tmp_path, report=stop)
        found.append((objective.seen[0], files(tmp_path), [(tmp_path / f).stat().st_mtime_ns for f in files(tmp_path)]))
    (computed, *table), (read, *again) = found
    assert max(computed, read) < 1e-4
    assert again == table  # the second one wrote nothing
    assert len(table[0]) == 1


@pytest.mark.parametrize("change", ["weights", "type", "template", "answers"])
def test_a_table_of_something_else_is_not_taken_for_the_reference(made, tmp_path, change):
    """A model whose weights, type of weights or template changed, or other answers: the policy is its own reference all the same."""
    for changed in (False, True):
        model, pairs, objective = tiny(), made.pairs(), Compared()
        if changed and change == "weights":
            with torch.no_grad():
                model.module.lm_head.weight.mul_(1.5)
        elif changed and change == "type":
            model.module = model.module.bfloat16()
        elif changed and change == "template":
            tokenizer = model.tokenizer
            tokenizer.chat_template = "You are kind. " + tokenizer.chat_template
            model = LocalModel(model.module, tokenizer, uri="tiny")
        elif changed:
            pairs = [g.model_copy(update={"completions": g.completions[::-1]}) for g in pairs]
        with pytest.raises(StopError):
            train(model, pairs, objective, OPTIONS, folder=tmp_path, report=stop)
        assert objective.seen[0] < (0.05 if changed and change == "type" else 1e-4)
    assert len(files(tmp_path)) == 2
