"""The chunked head against log_softmax of all logits."""

import pytest
import torch
from torch.nn import functional as F

from fiducial.models import head as head_module
from fiducial.models.head import logsumexp, module_logprobs, selected_logprobs

U, D, V, E = 7, 5, 11, 12


def case(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*shape, generator=draw, dtype=dtype, requires_grad=True) for shape in ((U, D), (V, D), (V,)))
    return h, weight, bias, torch.randint(U, (E,), generator=draw), torch.randint(V, (E,), generator=draw)


FORMS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 0.5, "softcap": 3.0, "temperature": 0.7}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_equals_log_softmax_of_the_formed_logits(form, chunk):
    h, weight, bias, u, target = case()
    logits = (h @ weight.T + bias) * form.get("scale", 1.0)
    if "softcap" in form:
        logits = form["softcap"] * torch.tanh(logits / form["softcap"])
    logits = logits / form.get("temperature", 1.0)
    truth = logits.log_softmax(-1)
    found = selected_logprobs(h, weight, bias, u, target, chunk=chunk, want_entropy=True, **form)
    assert torch.allclose(found.logp, truth[u, target])
    assert torch.allclose(found.entropy, -(truth.exp() * truth).sum(-1)[u])
    assert torch.equal(found.greedy, logits.argmax(-1)[u] == target)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_gradcheck_with_repeated_positions(form):
    h, weight, bias, u, target = case()

    def scores(h, weight, bias):
        found = selected_logprobs(h, weight, bias, u, target, chunk=3, want_entropy=True, **form)
        return found.logp, found.entropy

    assert torch.autograd.gradcheck(scores, (h, weight, bias))


def test_weight_gradients_over_many_flushes_equal_one_product(monkeypatch):
    monkeypatch.setattr(head_module, "WEIGHT_ROWS", 2)
    h, weight, bias, u, target = case()
    selected_logprobs(h, weight, bias, u, target, chunk=1).logp.sum().backward()
    truth = torch.autograd.grad(F.linear(h, weight, bias).log_softmax(-1)[u, target].sum(), weight)[0]
    assert torch.allclose(weight.grad, truth)


def test_a_frozen_weight_gets_no_gradient():
    h, weight, _, u, target = case()
    weight.requires_grad_(False)
    selected_logprobs(h, weight, None, u, target).logp.sum().backward()
    assert weight.grad is None
    assert h.grad is not None


def test_a_head_known_only_as_a_callable_gives_the_same():
    h, weight, bias, u, target = case()
    known = selected_logprobs(h, weight, bias, u, target, softcap=2.0, chunk=2, want_entropy=True)
    called = module_logprobs(h, lambda x: F.linear(x, weight, bias), u, target, softcap=2.0, chunk=2, want_entropy=True)
    assert torch.allclose(known.logp, called.logp)
    assert torch.allclose(known.entropy, called.entropy)
    assert torch.equal(known.greedy, called.greedy)
    for one, other in zip(torch.autograd.grad(known.logp.sum(), (h, weight)), torch.autograd.grad(called.logp.sum(), (h, weight)), strict=True):
        assert torch.allclose(one, other)


def test_the_first_of_equal_logits_is_the_greedy_one():
    h, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [2.0]])
    assert selected_logprobs(h, weight, None, torch.tensor([0, 0]), torch.tensor([1, 2])).greedy.tolist() == [True, False]


def test_log_probabilities_of_bfloat16_models_are_float32():
    h, weight, bias, u, target = case(torch.bfloat16)
    assert selected_logprobs(h, weight, bias, u, target).logp.dtype == torch.float32


def test_autocast_narrows_the_product_and_not_the_result():
    h, weight, _, u, target = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = selected_logprobs(h, weight, None, u, target)
    narrow = selected_logprobs(h.bfloat16(), weight.bfloat16(), None, u, target)
    assert torch.equal(found.logp, narrow.logp)
    found.logp.sum().backward()
    assert h.grad.dtype == torch.float32


def test_log_sum_exp_survives_large_numbers():
    assert logsumexp(torch.tensor([[1e4, 1e4]])).item() == pytest.approx(1e4 + 0.6931, abs=1e-3)
