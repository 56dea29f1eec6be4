"""Random weights in the shape of a configuration."""

import pytest
import torch

from fiducial.align.sft import SFT
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.local import LocalModel
from fiducial.models.scripted import tiny
from fiducial.models.selfcheck import check
from fiducial.models.tiny import tiny as untrained
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions
from fiducial.training.scratch import begin_from_scratch


def begun(seed=0, **sizes):
    model = tiny()
    begin_from_scratch(model, TrainOptions(lora_rank=0, seed=seed, from_scratch=True, sizes=sizes))
    return model


def test_the_shape_stays_and_the_weights_are_others_for_each_seed():
    models = [tiny(), begun(seed=1), begun(seed=2), begun(seed=1)]
    assert len({sum(p.numel() for p in m.module.parameters()) for m in models}) == 1
    assert len({m.fingerprint for m in models}) == 3
    assert models[1].fingerprint == models[3].fingerprint


def test_other_sizes_can_be_named():
    model = begun(num_hidden_layers=1, hidden_size=16)
    assert len(model.module.model.layers) == 1
    assert model.module.get_input_embeddings().weight.shape == (len(model.tokenizer), 16)
    assert model.sample([user("hi")], max_tokens=2)[0][0].finish in ("stop", "length")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"layers": 1}, "no 'layers' to change"), ({"vocab_size": 5}, "no 'vocab_size' to change"), ({"num_attention_heads": 0}, "sizes: ")],
)
def test_sizes_that_are_none_or_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        begun(**sizes)


def test_random_weights_share_no_rows_also_with_control_tokens():
    model = begun()
    assert model.engine.backend == "padded"
    model.take_control_tokens()
    assert model.engine.backend == "padded"
    model.module = tiny().module
    assert model.engine.backend == "tree"


def test_a_model_that_learnt_from_scratch_is_measured_on_the_weights_it_has(tmp_path):
    small = {"vocab": len(tiny().tokenizer), "initializer_range": 0.02}
    model = LocalModel(untrained("lfm2", **small), tiny().tokenizer, uri="lfm2")
    groups = [Group(prompt=Prompt(messages=()), completions=(Completion(text=t),)) for t in ("one two", "two three")]
    train(model, groups, SFT(), TrainOptions(epochs=10, batch=2, lora_rank=0, from_scratch=True, learning_rate=3e-2), folder=tmp_path)
    assert check(untrained("lfm2", **small)).tree_mask == "additive"  # what is wrong does not show yet
    assert check(model.module).tree_mask is None
    assert model.engine.backend == "padded"


def test_an_adapter_on_random_weights_is_refused():
    with pytest.raises(ConfigError, match="an adapter on random weights"):
        begin_from_scratch(tiny(), TrainOptions(from_scratch=True))


def test_training_from_scratch_goes_on_where_it_was_and_ends_the_same(tmp_path):
    groups = [Group(prompt=Prompt(messages=()), completions=(Completion(text=t),)) for t in ("one", "two", "three", "four")]
    options = TrainOptions(epochs=2, batch=2, lora_rank=0, save_every=1, from_scratch=True, learning_rate=1e-2)
    whole, first, second = tiny(), tiny(), tiny()
    train(whole, groups, SFT(), options, folder=tmp_path / "one")

    class Stop(Exception):  # noqa: N818
        pass

    def stops(step, _steps, _figures):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(first, groups, SFT(), options, folder=tmp_path / "two", report=stops)
    train(second, groups, SFT(), options, folder=tmp_path / "two")
    for a, b in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)
