"""The table of reference log-probabilities: computed once, and only for these weights and tokens."""

import pytest
import torch

from fiducial.core.records import user
from fiducial.models.forest import Paths
from fiducial.models.scripted import tiny
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
