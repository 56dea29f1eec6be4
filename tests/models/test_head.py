"""The chunked head against log_softmax of all logits."""

import pytest
import torch
from torch.nn import functional as F

from fiducial.core.errors import DataError
from fiducial.models import head as head_module
from fiducial.models.head import logsumexp, module_logprobs, selected_logprobs

U, D, V, E = 7, 5, 11, 12


def case(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*shape, generator=draw, dtype=dtype, requires_grad=True) for shape in ((U, D), (V, D), (V,)))
    return h, weight, bias, torch.randint(U, (E,), generator=draw), torch.randint(V, (E,), generator=draw)


FORMS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 0.5, "softcap": 3.0, "temperature": 0.7}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cells", [1, 6, 21, 1000])
def test_equals_log_softmax_of_the_formed_logits(form, cells):
    h, weight, bias, u, target = case()
    logits = (h @ weight.T + bias) * form.get("scale", 1.0)
    if "softcap" in form:
        logits = form["softcap"] * torch.tanh(logits / form["softcap"])
    logits = logits / form.get("temperature", 1.0)
    truth = logits.log_softmax(-1)
    found = selected_logprobs(h, weight, bias, u, target, cells=cells, want_entropy=True, **form)
    assert torch.allclose(found.logp, truth[u, target])
    assert torch.allclose(found.entropy, -(truth.exp() * truth).sum(-1)[u])
    assert torch.equal(found.greedy, logits.argmax(-1)[u] == target)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_gradcheck_with_repeated_positions(form):
    h, weight, bias, u, target = case()

    def scores(h, weight, bias):
        found = selected_logprobs(h, weight, bias, u, target, cells=21, want_entropy=True, **form)
        return found.logp, found.entropy

    assert torch.autograd.gradcheck(scores, (h, weight, bias))


@pytest.mark.parametrize("form", [{}, {"scale": 0.5, "temperature": 0.7}])
@pytest.mark.parametrize("cells", [1, 21, 1000])
def test_gradients_of_the_states_alone_pass_gradcheck(form, cells):
    h, weight, bias, u, target = case()
    again = torch.cat([u, u[:3]]), torch.cat([target, target[:3]])
    for output in (slice(0, 1), slice(1, 2), slice(0, 2)):  # log-probabilities, entropy, both

        def scores(h, output=output):
            found = selected_logprobs(h, weight.detach(), bias.detach(), *again, cells=cells, want_entropy=True, **form)
            return (found.logp, found.entropy)[output]

        assert torch.autograd.gradcheck(scores, (h,))


def test_states_alone_need_no_second_look_at_the_logits(monkeypatch):
    h, weight, _, u, target = case()
    found = selected_logprobs(h, weight.detach(), None, u, target, want_entropy=True)
    monkeypatch.setattr(head_module._Buffers, "logits", None)
    found.logp.sum().backward()
    truth = torch.autograd.grad(F.linear(h, weight).log_softmax(-1)[u, target].sum(), h)[0]
    assert torch.allclose(h.grad, truth)


def test_near_certainty_the_gradient_is_that_of_float32():
    """In bfloat16 the token's embedding and the mean embedding are nearly alike, and so is what rounding makes of either."""
    h, weight = torch.tensor([[8.0, 0.0]]), torch.tensor([[1.0, 0.3], [0.1, 1.7], [-1.0, 0.4]])
    at, token = torch.tensor([0]), torch.tensor([0])
    narrow = h.bfloat16().requires_grad_()
    selected_logprobs(narrow, weight.bfloat16(), None, at, token).logp.sum().backward()
    wide = h.clone().requires_grad_()
    F.linear(wide, weight.bfloat16().float()).log_softmax(-1)[0, 0].backward()
    assert torch.allclose(narrow.grad.float(), wide.grad, rtol=0.02)


def test_weight_gradients_over_many_tiles_equal_one_product():
    h, weight, bias, u, target = case()
    selected_logprobs(h, weight, bias, u, target, cells=6).logp.sum().backward()
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
    known = selected_logprobs(h, weight, bias, u, target, softcap=2.0, cells=22, want_entropy=True)
    called = module_logprobs(h, lambda x: F.linear(x, weight, bias), u, target, softcap=2.0, chunk=2, want_entropy=True)
    assert torch.allclose(known.logp, called.logp)
    assert torch.allclose(known.entropy, called.entropy)
    assert torch.equal(known.greedy, called.greedy)
    for one, other in zip(torch.autograd.grad(known.logp.sum(), (h, weight)), torch.autograd.grad(called.logp.sum(), (h, weight)), strict=True):
        assert torch.allclose(one, other)


def test_the_first_of_equal_logits_is_the_greedy_one():
    h, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [2.0]])
    assert selected_logprobs(h, weight, None, torch.tensor([0, 0]), torch.tensor([1, 2])).greedy.tolist() == [True, False]


@pytest.mark.parametrize("cells", [1, 2, 3, 7])
def test_the_first_of_equal_logits_in_several_tiles_is_the_greedy_one(cells):
    h, weight = torch.ones(2, 1), torch.tensor([[1.0], [2.0], [0.0], [2.0], [2.0], [1.0]])
    every = torch.arange(6)
    found = selected_logprobs(h, weight, None, torch.cat([torch.zeros(6), torch.ones(6)]).long(), torch.cat([every, every]), cells=cells)
    assert found.greedy.tolist() == [False, True, False, False, False, False] * 2


@pytest.mark.parametrize("cells", [2, 12])
def test_tokens_shut_out_by_an_endless_bias_count_for_nothing(cells):
    h, weight, shut = torch.ones(1, 1), torch.tensor([[5.0], [9.0], [1.0], [2.0]]), torch.tensor([float("-inf"), float("-inf"), 0.0, 0.0])
    found = selected_logprobs(h, weight, shut, torch.tensor([0]), torch.tensor([3]), cells=cells, want_entropy=True)
    truth = torch.tensor([1.0, 2.0]).log_softmax(-1)
    assert found.logp.item() == pytest.approx(truth[1].item())
    assert found.entropy.item() == pytest.approx(-(truth.exp() * truth).sum().item())


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


@pytest.mark.parametrize("trained", [False, True])
def test_rounding_of_tiles_is_of_the_order_of_one_product(trained):
    """A tile's products are in bfloat16; their sum is not."""
    draw = torch.Generator().manual_seed(0)
    h, weight = torch.randn(40, 32, generator=draw), torch.randn(4000, 32, generator=draw) * 0.3
    u, target = torch.arange(40), torch.randint(4000, (40,), generator=draw)
    truth = torch.autograd.grad(F.linear(x := h.bfloat16().float().requires_grad_(), weight.bfloat16().float()).log_softmax(-1)[u, target].sum(), x)[0]

    def error(cells):
        narrow = h.bfloat16().requires_grad_()
        selected_logprobs(narrow, weight.bfloat16().requires_grad_(trained), None, u, target, cells=cells).logp.sum().backward()
        return (narrow.grad.float() - truth).norm() / truth.norm()

    assert error(2000) < 0.01
    assert error(2000) < 1.5 * error(40 * 4000)


def test_a_token_beyond_the_heads_vocabulary_is_refused():
    h, weight, _, u, target = case()
    with pytest.raises(DataError, match="vocabulary of 11"):
        selected_logprobs(h, weight, None, u, target + V)


def test_nothing_scored_has_gradients_of_zero():
    h, weight, bias, _, _ = case()
    none = torch.zeros(0, dtype=torch.long)
    selected_logprobs(h[:0], weight, bias, none, none).logp.sum().backward()
    assert bool((weight.grad == 0).all())


def test_the_entropys_gradient_survives_tokens_that_are_shut_out():
    h, weight, shut = torch.ones(1, 1, requires_grad=True), torch.tensor([[5.0], [9.0], [1.0]]), torch.tensor([float("-inf"), 0.0, 0.0])
    selected_logprobs(h, weight, shut, torch.tensor([0]), torch.tensor([1]), want_entropy=True).entropy.sum().backward()
    assert bool(h.grad.isfinite().all())
