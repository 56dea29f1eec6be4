"""What a training is reckoned to take of memory is what a real step takes."""

import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.local import LocalModel
from fiducial.models.scripted import tiny
from fiducial.training import lora
from fiducial.training.data import Data
from fiducial.training.livebytes import LiveBytes
from fiducial.training.memory import parts
from fiducial.training.options import TrainOptions
from fiducial.training.processes import accelerator_on
from fiducial.training.updates import Updates

GROUPS = [
    Group(
        prompt=Prompt(messages=user(f"question {n} " + "why so " * 20)),
        completions=(Completion(text="because " * (6 + n)), Completion(text="no " * 12)),
        targets=(1.0, 0.0),
    )
    for n in range(8)
]
WITHIN = 0.1
"""Share by which the two may differ: the objective's own numbers and the optimizer's scratch are not reckoned."""


@pytest.fixture(autouse=True)
def one_thread():
    """A count of what exists at once is of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outlined():
    model = tiny()
    return LocalModel(model.module.to("meta"), model.tokenizer, uri="outline")


def reckoned(objective, options, groups=GROUPS):
    model = outlined()
    found = parts(model, Data.of(model, groups, objective, options), objective, options, device="cpu")
    assert all(p.is_meta for p in model.module.parameters())
    return {part.name: part.size for part in found}


def measured(objective, options):
    """Bytes of the weights, and the most that two real steps on the heaviest groups take besides."""
    model = tiny()
    data = Data.of(model, GROUPS, objective, options)
    reference = None
    if objective.needs_reference:
        reference = data.parts.with_logp(data.place(range(len(GROUPS)), model.score(data.paths).path_logp))
    if options.lora_rank:
        model.module = lora.attach(model.module, rank=options.lora_rank, depth=options.lora_depth)
    lora.make_trainable(model.module)
    model.engine.verdict  # noqa: B018 the self-check is no part of a step
    heaviest = sorted(range(len(GROUPS)), key=lambda g: -sum(len(data.paths.ids[p]) for p in data.paths_of([g])))[: options.batch]
    with LiveBytes() as live:
        updates = Updates(model, objective, options, accelerator_on(model.device))
        for _ in range(2):
            updates.step(data, heaviest, rate=1e-4, reference=reference)
    return sum(p.nbytes for p in model.module.parameters()) + live.peak


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (SFT(), {}),
        (SFT(), {"lora_rank": 0}),
        (DPO(), {"lora_depth": 0.5}),
        (DPO(), {"batch": 1}),
        (RewardModel(), {"lora_rank": 4}),
        (SFT(), {"neftune": 5.0, "lora_depth": 0.5, "epochs": 2.0}),
    ],
    ids=["adapter", "all weights", "half of the layers", "one group", "a score head", "noise"],
)
def test_it_is_near_the_peak_of_a_real_step(objective, options):
    options = TrainOptions(**{"batch": 4} | options)
    assert sum(reckoned(objective, options).values()) == pytest.approx(measured(objective, options), rel=WITHIN)


def test_what_each_part_takes_is_what_its_numbers_take():
    whole, adapted = reckoned(SFT(), TrainOptions(lora_rank=0)), reckoned(SFT(), TrainOptions(lora_rank=2))
    weights = tiny().module.num_parameters()
    assert (whole["weights"], whole["gradients"], whole["optimizer"]) == (4 * weights, 4 * weights, 8 * weights)
    module = lora.attach(tiny().module, rank=2)
    lora.make_trainable(module)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert (adapted["weights"], adapted["adapter"], adapted["optimizer"]) == (4 * weights, 4 * trained, 8 * trained)


def test_weights_that_train_in_bfloat16_have_copies_and_two_kinds_of_gradients():
    model = outlined()
    model.module = model.module.to(torch.bfloat16)
    options, weights = TrainOptions(lora_rank=0), model.module.num_parameters()
    found = {p.name: p.size for p in parts(model, Data.of(model, GROUPS, SFT(), options), SFT(), options, device="cpu")}
    assert (found["weights"], found["float32 copies"], found["gradients"], found["optimizer"]) == (2 * weights, 4 * weights, 6 * weights, 8 * weights)


def test_layers_below_the_adapter_leave_nothing_for_the_way_back_and_are_kept_where_that_pays():
    whole, half = reckoned(DPO(), TrainOptions(batch=4)), reckoned(DPO(), TrainOptions(batch=4, lora_depth=0.5, epochs=2))
    assert half["activations"] < 0.7 * whole["activations"]
    assert half["frozen layers"] > 0
    assert "frozen layers" not in reckoned(SFT(), TrainOptions(batch=4, lora_depth=0.5, epochs=2, neftune=5.0))
    assert "frozen layers" not in whole


def test_rows_are_bounded_whatever_the_batch():
    many = [g.model_copy(update={"prompt": Prompt(messages=user(f"{n} {g.prompt.text}"))}) for n in range(6) for g in GROUPS]
    small, large = (reckoned(SFT(), TrainOptions(batch=batch), many)["activations"] for batch in (8, 48))
    assert large < 1.5 * small


def test_threads_have_rows_and_gradients_of_their_own():
    alone = reckoned(SFT(), TrainOptions(batch=8))
    torch.set_num_threads(2)
    two = reckoned(SFT(), TrainOptions(batch=8))
    assert two["gradients"] == 3 * alone["gradients"]
    assert two["weights"] == alone["weights"]


def test_a_model_that_carries_an_adapter_is_held_as_it_was():
    model = outlined()
    model.module = lora.attach(model.module, rank=2)
    options = TrainOptions()
    (held,) = (p for p in parts(model, Data.of(model, GROUPS, SFT(), options), SFT(), options, device="cpu") if p.name == "reference")
    assert held.size >= 4 * tiny().module.num_parameters()
