"""A linear layer with a low-rank change in one function against the same by autograd."""

import pytest
import torch
from torch.nn import functional as F

from fiducial.core.records import user
from fiducial.models import adapters, lowrank
from fiducial.models.loading import load
from fiducial.models.lowrank import adapted
from fiducial.models.scripted import tiny

IN, OUT, RANK, SCALE = 6, 5, 2, 1.7


def drawn(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (torch.randn(*shape, generator=draw, dtype=dtype) for shape in ((2, 3, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK)))
    return x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_products_and_their_gradients(with_bias):
    x, weight, bias, a, b = drawn()
    bias = bias if with_bias else None
    found, truth = adapted(x, weight, bias, a, b, SCALE), F.linear(x, weight, bias) + SCALE * (x @ a.T) @ b.T
    assert torch.allclose(found, truth)
    assert torch.autograd.gradcheck(lambda x, a, b: adapted(x, weight, bias, a, b, SCALE), (x, a, b))


@pytest.mark.parametrize("wanted", ["x", "a", "b"])
def test_each_may_need_a_gradient_alone(wanted):
    given = dict(zip(("x", "weight", "bias", "a", "b"), (t.detach() for t in drawn()), strict=True))
    given[wanted].requires_grad_()
    x, weight, bias, a, b = given.values()
    found = torch.autograd.grad(adapted(x, weight, bias, a, b, SCALE).square().sum(), given[wanted])[0]
    truth = torch.autograd.grad((F.linear(x, weight, bias) + SCALE * (x @ a.T) @ b.T).square().sum(), given[wanted])[0]
    assert torch.allclose(found, truth)


def test_float32_matrices_on_a_bfloat16_layer_get_float32_gradients():
    x, weight, bias, a, b = drawn(torch.float32)
    narrow = x.detach().bfloat16().requires_grad_()
    out = adapted(narrow, weight.bfloat16(), bias.bfloat16(), a, b, SCALE)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.float().square().sum(), (narrow, a, b))
    truth = torch.autograd.grad((F.linear(x, weight, bias) + SCALE * (x @ a.T) @ b.T).square().sum(), (x, a, b))
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(found, truth, strict=True):
        assert (one.float() - other).norm() < 0.05 * other.norm()


def test_what_comes_out_can_be_changed_in_place():
    x, weight, bias, a, b = drawn()
    adapted(x, weight, bias, a, b, SCALE).clamp_(min=0).sum().backward()
    assert a.grad is not None


def test_no_tokens_give_none():
    _, weight, bias, a, b = drawn()
    assert adapted(torch.zeros(0, 3, IN, dtype=torch.float64), weight, bias, a, b, SCALE).shape == (0, 3, OUT)


@pytest.mark.parametrize("change", ["hook", "bias", "offloaded", "none"])
def test_a_layer_that_somebody_looks_into_is_called(change, tmp_path, monkeypatch):
    """Hooks, a bias that trains, and weights that are fetched when the layer is called."""
    from peft import LoraConfig

    model = load(tiny().save(tmp_path / "base"), dtype="float32")
    module = adapters.add(model.module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.tensor([model.encode(user("a"))[0]])
    truth, layers = module(ids).logits, [m.base_layer for m in module.modules() if hasattr(m, "base_layer")]
    assert layers
    called = []
    for layer in layers:
        if change == "hook":
            layer.register_forward_hook(lambda *_: called.append(1))
        elif change == "bias":
            layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
        elif change == "offloaded":
            monkeypatch.setattr(layer, "forward", lambda x, layer=layer: called.append(1) or F.linear(x, layer.weight), raising=False)
    if change != "none":
        monkeypatch.setattr(lowrank, "adapted", None)
    assert torch.allclose(module(ids).logits, truth, atol=1e-5)
    assert bool(called) == (change in ("hook", "offloaded"))
