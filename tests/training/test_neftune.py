"""Noise on the embeddings of demonstrations: in training passes alone, and the same however a step is cut up or taken up again."""

from math import sqrt

import pytest
import torch
from accelerate import Accelerator

from fiducial.align.dpo import DPO
from fiducial.align.kto import KTO
from fiducial.align.orpo import ORPO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.align.unlikelihood import Unlikelihood
from fiducial.core.errors import ConfigError
from fiducial.core.records import digest
from fiducial.models.scripted import tiny
from fiducial.training import frozen, lora
from fiducial.training.data import Data
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions
from fiducial.training.updates import Updates

OPTIONS = TrainOptions(batch=8, learning_rate=1e-2, lora_rank=0, warmup=0.0, clip=1e9, neftune=5.0)


def both(made, count=6):
    """Groups that teach two answers to one prompt."""
    return [g.model_copy(update={"targets": (0.75, 0.25)}) for g in made.pairs(count)]


def gradient(model, groups, **changes):
    """Gradient of one step on all groups, as a vector, and its figures."""
    options = OPTIONS.model_copy(update=changes)
    data = Data.of(model, groups, SFT(), options)
    updates = Updates(model, SFT(), options, Accelerator(cpu=True))
    figures = updates.gradient(data, range(len(groups)))
    return torch.cat([p.grad.flatten() for p in updates.trainables.parameters if p.grad is not None]), figures


def distance(one, other):
    return float((one - other).norm() / other.norm())


def test_the_gradient_is_that_of_the_plain_network_with_noise_on_its_embeddings(made):
    groups = both(made, 3)
    found, figures = gradient(tiny(), groups)
    plain, total, tokens = tiny(), torch.zeros(()), 0.0
    for place, group in enumerate(groups):
        for k, (completion, target) in enumerate(zip(group.completions, group.targets, strict=True)):
            ids, start = plain.encode(group.prompt.messages, completion.text)
            states = plain.module.get_input_embeddings()(torch.tensor([ids]))
            draw = torch.Generator().manual_seed(int(digest([0, "noise", 0, place, k])[:15], 16))
            uniform = 2 * torch.rand(states.shape[1:], generator=draw) - 1
            logp = plain.module(inputs_embeds=states + 5.0 / sqrt(states[0].numel()) * uniform).logits[0].log_softmax(-1)
            total = total - target * sum(logp[i - 1, ids[i]] for i in range(start, len(ids)))
            tokens += target * (len(ids) - start)
    (total / tokens).backward()
    assert figures["loss"] == pytest.approx(float((total / tokens).detach()), rel=1e-5)
    assert distance(found, torch.cat([p.grad.flatten() for p in plain.module.parameters() if p.grad is not None])) < 1e-5


def test_the_gradient_does_not_depend_on_how_a_step_is_cut_into_rows(made):
    """30 tokens do not hold the answers to one prompt, so that such groups take two passes, which must see the same noise."""
    whole, figures = gradient(made.budgeted(2000), both(made))
    for model in (made.budgeted(100), made.budgeted(30), made.budgeted(30, backend="split")):
        parts, again = gradient(model, both(made))
        assert distance(parts, whole) < 1e-5
        assert again["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_two_threads_add_the_same_noise_as_one(made, two_cores):
    alike = made.pairs(40)
    torch.set_num_threads(1)
    one, _ = gradient(tiny(), alike)
    torch.set_num_threads(2)
    two, _ = gradient(tiny(), alike)
    assert distance(two, one) < 1e-5


def test_each_step_and_each_seed_draw_anew_and_nothing_else_does(made):
    losses = {}
    for seed in (0, 1):
        model = tiny()
        data, updates = Data.of(model, both(made), SFT(), OPTIONS), Updates(model, SFT(), OPTIONS.model_copy(update={"seed": seed}), Accelerator(cpu=True))
        for steps in (0, 1, 0):
            updates.steps = steps
            losses.setdefault((seed, steps), set()).add(updates.gradient(data, range(6))["loss"])
    assert all(len(each) == 1 for each in losses.values())
    assert len(set.union(*losses.values())) == 4


def test_what_is_held_out_is_measured_without_noise(made, tmp_path):
    looks = []
    for neftune in (0.0, 5.0):
        asked = OPTIONS.model_copy(update={"neftune": neftune, "held_out": 0.4, "learning_rate": 1e-30})
        result = train(tiny(), made.pairs(10), SFT(), asked, folder=tmp_path / str(neftune))
        looks.append([result.held_before, result.held_out])
    assert looks[0] == looks[1]


def test_frozen_blocks_run_anew_in_every_step_under_noise(made, tmp_path, monkeypatch):
    kept, gradient_of = [], Updates.gradient
    monkeypatch.setattr(Updates, "gradient", lambda self, *a, **k: (kept.append(self.model.engine.lower is not None), gradient_of(self, *a, **k))[1])
    for neftune in (0.0, 5.0):
        asked = OPTIONS.model_copy(update={"neftune": neftune, "lora_rank": 4, "lora_depth": 0.5, "epochs": 3.0, "batch": 6})
        train(tiny(), made.pairs(6), SFT(), asked, folder=tmp_path / str(neftune))
    assert kept == [True, True, True, False, False, False]


def test_states_that_are_kept_are_not_used_under_noise(made):
    options = OPTIONS.model_copy(update={"lora_rank": 4, "lora_depth": 0.5})
    model = tiny()
    model.module = lora.attach(model.module, rank=4, depth=0.5)
    lora.make_trainable(model.module)
    data = Data.of(model, made.pairs(6), SFT(), options)
    updates = Updates(model, SFT(), options, Accelerator(cpu=True))
    loss = updates.gradient(data, range(6))["loss"]
    with frozen.kept([model.engine], data.paths, passes=3.0, keep_last=False):
        assert model.engine.lower is not None
        assert updates.gradient(data, range(6))["loss"] == loss


def test_an_interrupted_training_ends_in_the_same_bits(trainers, tmp_path):
    one, other = (trainers.found(*trainers.go(name, tmp_path / name)) for name in ("sft@noise", "sft@noise@again"))
    assert one == other
    assert one["weights"] != trainers.found(*trainers.go("sft", tmp_path / "sft"))["weights"]


@pytest.mark.parametrize("objective", [DPO(), KTO(), ORPO(), RewardModel(), Unlikelihood()], ids=lambda o: o.name)
def test_noise_is_refused_where_nothing_is_imitated(made, tmp_path, objective):
    with pytest.raises(ConfigError, match=f"neftune is noise on what is imitated, which {objective.name} does not do"):
        train(tiny(), made.pairs(), objective, OPTIONS, folder=tmp_path)
