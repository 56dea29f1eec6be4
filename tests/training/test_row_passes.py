"""One step's passes in threads side by side: the same figures and gradient as in one."""

import pytest
import torch
from accelerate import Accelerator

from fiducial.align.orpo import ORPO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.models import abreast
from fiducial.models.scoring import Engine
from fiducial.models.scripted import tiny
from fiducial.training import lora
from fiducial.training.data import Data
from fiducial.training.options import TrainOptions
from fiducial.training.row_passes import Work
from fiducial.training.updates import Updates

OPTIONS = TrainOptions(batch=4, lora_rank=0, clip=1e9)


@pytest.mark.parametrize("objective", [SFT(), ORPO(mean="token"), RewardModel()], ids=["log-probabilities", "what couples a step", "a head's scores"])
def test_a_step_in_two_threads_is_the_step_in_one(made, monkeypatch, objective):
    """Loss, figures and gradient; the weights of an adapter, float32."""
    monkeypatch.setattr(abreast, "TOKENS_EACH", 1)
    options = OPTIONS.model_copy(update={"lora_rank": 2})
    found = []
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            model = tiny()
            data = Data.of(model, made.pairs(5), objective, options)
            model.module = lora.attach(model.module, rank=2)
            lora.make_trainable(model.module)
            with torch.no_grad():
                for p in model.module.parameters():
                    if p.requires_grad:
                        p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view(p.shape))
            one = Updates(model, objective, options, Accelerator(cpu=True))
            work = Work(objective, data, None, None)
            parts = one.passes._parts(work, [4, 0, 3, 1])
            assert len(parts) == count
            assert sorted(i for part in parts for i in part.places) == [0, 1, 2, 3]
            figures = one.step(data, [4, 0, 3, 1], rate=1e-2)
            weights = torch.cat([p.detach().flatten() for p in one.trainables.parameters])
            found.append((figures, weights))
        finally:
            torch.set_num_threads(before)
    (alone, plain), (together, same) = found
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert torch.allclose(plain, same, atol=1e-5)


def test_a_step_plans_its_rows_once(made, monkeypatch):
    """In one thread and in two; a model that cannot be copied is not copied again at every step."""
    monkeypatch.setattr(abreast, "TOKENS_EACH", 1)
    planned, plan, copied, before = [], Engine.plan, [], torch.get_num_threads()
    monkeypatch.setattr(Engine, "plan", lambda self, paths, **more: (planned.append(len(paths)), plan(self, paths, **more))[1])
    options = OPTIONS.model_copy(update={"lora_rank": 2})
    model = tiny()
    data = Data.of(model, made.pairs(4), SFT(), options)
    model.module = lora.attach(model.module, rank=2)
    lora.make_trainable(model.module)
    one = Updates(model, SFT(), options, Accelerator(cpu=True))
    try:
        torch.set_num_threads(1)
        one.step(data, range(4), rate=1e-3)
        assert planned == [4]
        torch.set_num_threads(2)
        one.step(data, range(4), rate=1e-3)
        assert planned == [4, 2, 2]
        alone = Updates(model, SFT(), options, Accelerator(cpu=True))
        monkeypatch.setattr(abreast, "twins", lambda module, count: (copied.append(count), [module])[1])
        for _ in range(3):
            alone.step(data, range(4), rate=1e-3)
        assert planned == [4, 2, 2, 4, 4, 4]
        assert copied == [2]
    finally:
        torch.set_num_threads(before)


def test_gradients_reach_the_optimizer_in_the_order_of_their_weights(made, monkeypatch):
    """On a CPU torch's fused AdamW reads any other order wrong, and gives no error."""
    monkeypatch.setattr(abreast, "TOKENS_EACH", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = tiny()
        data = Data.of(model, made.pairs(4), SFT(), OPTIONS)
        model.module = lora.attach(model.module, rank=2)
        lora.make_trainable(model.module)
        one = Updates(model, SFT(), OPTIONS.model_copy(update={"lora_rank": 2}), Accelerator(cpu=True))
        seen = []
        one.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.stride() == p.stride() for p in one.trainables.parameters))
        assert len(one.passes._parts(Work(SFT(), data, None, None), [0, 1, 2, 3])) == 2
        one.step(data, [0, 1, 2, 3], rate=1e-2)
    finally:
        torch.set_num_threads(before)
    assert seen
    assert all(seen)


@pytest.fixture
def divided(monkeypatch, made):
    """The figures and the gradient of a step of all weights, one master after another, in as many threads as asked for."""
    monkeypatch.setattr(abreast, "TOKENS_EACH", 1)
    before = torch.get_num_threads()

    def gradient(objective, count, dtype=torch.float32):
        torch.set_num_threads(count)
        model = tiny()
        model.module = model.module.to(dtype)
        lora.make_trainable(model.module)
        one = Updates(model, objective, OPTIONS, Accelerator(cpu=True))
        data = Data.of(model, made.pairs(5), objective, OPTIONS)
        assert len(one.passes._parts(Work(objective, data, None, None), [4, 0, 3, 1])) == count
        return one.gradient(data, [4, 0, 3, 1]), one

    yield gradient
    torch.set_num_threads(before)


@pytest.mark.parametrize("objective", [SFT(), ORPO(mean="token"), RewardModel()], ids=["log-probabilities", "what couples a step", "a head's scores"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_a_gradient_of_all_weights_in_two_threads_is_that_in_one(divided, objective, dtype, near):
    (alone, one), (together, two) = divided(objective, 1, dtype), divided(objective, 2, dtype)
    assert together == pytest.approx(alone, rel=near, abs=near)
    assert one.trainables.masters.keys() == two.trainables.masters.keys()
    whole, sum_of_parts = (torch.cat([p.grad.flatten() for p in each.trainables.parameters if p.grad is not None]) for each in (one, two))
    assert whole.dtype == sum_of_parts.dtype == torch.float32
    assert (sum_of_parts - whole).norm() / whole.norm() < near
