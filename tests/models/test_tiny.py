import pytest
import torch

from fiducial.core.errors import ModelError
from fiducial.models.tiny import SIZES, tiny


@pytest.mark.parametrize("architecture", sorted(SIZES))
def test_every_architecture_builds_small_and_gives_finite_logits(architecture):
    model = tiny(architecture, vocab=64)
    logits = model(torch.arange(3, 12)[None]).logits
    assert logits.shape == (1, 9, 64)
    assert logits.isfinite().all()
    assert sum(parameter.numel() for parameter in model.parameters()) < 250_000


def test_the_seed_decides_the_weights_and_nothing_else_does():
    torch.manual_seed(7)
    before = torch.rand(1)
    torch.manual_seed(7)
    first, same, other = tiny("llama", seed=1), tiny("llama", seed=1), tiny("llama", seed=2)
    assert torch.equal(torch.rand(1), before)
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_outputs_are_far_from_uniform():
    logits = tiny("llama")(torch.arange(3, 40)[None]).logits
    assert logits.softmax(-1).amax(-1).mean() > 0.05  # uniform would be 1/128


def test_configuration_and_dtype_can_be_set():
    model = tiny("llama", dtype=torch.bfloat16, attention="eager", num_hidden_layers=3)
    assert (model.dtype, model.config._attn_implementation, len(model.model.layers)) == (torch.bfloat16, "eager", 3)


def test_an_unknown_architecture_is_named_with_the_nearest():
    with pytest.raises(ModelError, match="did you mean 'llama'"):
        tiny("lama")
