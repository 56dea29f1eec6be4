"""Float32 masters of smaller weights."""

import pytest
import torch
from torch import nn

from fiducial.core.errors import ConfigError
from fiducial.training.weights import Trainables, refuse_float16


def module(dtype):
    layer = nn.Linear(2, 2, bias=False, dtype=dtype)
    nn.init.constant_(layer.weight, 1.0)
    return layer


def test_float32_weights_are_their_own_masters():
    layer = module(torch.float32)
    assert Trainables(layer).parameters[0] is layer.weight


def test_updates_that_round_away_add_up_in_the_master():
    layer = module(torch.bfloat16)
    trainables = Trainables(layer)
    optimizer = torch.optim.SGD(trainables.parameters, lr=1.0)
    for _ in range(16):  # bfloat16 steps above 1 are 1/128
        layer.weight.grad = torch.full_like(layer.weight, -1 / 2048)
        trainables.collect()
        optimizer.step()
        trainables.publish()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.flatten().tolist() == [1 + 1 / 128] * 4


def test_gradients_of_several_passes_are_added_up_in_float32():
    layer = module(torch.bfloat16)
    trainables = Trainables(layer)
    for value in (256.0, 1.0, 1.0):  # in bfloat16 256 + 1 is 256
        layer.weight.grad = torch.full_like(layer.weight, value)
        trainables.collect()
        assert layer.weight.grad is None
    assert trainables.parameters[0].grad.flatten().tolist() == [258.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_threads_are_added_in_the_layout_of_the_weight(dtype):
    """On a CPU torch's fused AdamW reads any other order wrong, and gives no error."""
    layer = module(dtype)
    trainables = Trainables(layer)
    optimizer = torch.optim.AdamW(trainables.parameters, lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, fused=True)
    turned = torch.tensor([[2.0, 3.0], [-4.0, 5.0]], dtype=dtype).T  # [[2, -4], [3, 5]]
    for _ in range(2):
        trainables.add([turned])
    (master,) = trainables.parameters
    assert master.grad.tolist() == [[4.0, -8.0], [6.0, 10.0]]
    assert master.grad.stride() == master.stride()
    optimizer.step()  # by 1 against the sign
    trainables.publish()
    assert layer.weight.tolist() == [[0.0, 2.0], [0.0, 0.0]]


def test_frozen_weights_are_left_out():
    pair = nn.Sequential(module(torch.float32), module(torch.float32))
    pair[0].weight.requires_grad_(False)
    assert list(Trainables(pair).masters) == ["1.weight"]


def test_publishing_forgets_gradients():
    layer = module(torch.float32)
    trainables = Trainables(layer)
    layer.weight.grad = torch.ones(2, 2)
    trainables.publish()
    assert layer.weight.grad is None


def test_float16_is_refused_and_bfloat16_is_not():
    refuse_float16(module(torch.bfloat16))
    with pytest.raises(ConfigError, match="float16 weights cannot be trained"):
        refuse_float16(module(torch.float16))
