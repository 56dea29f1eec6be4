"""One DPO step, policy forward and backward and reference forward, against TRL's DPOTrainer and against our own padded back end.

    python bench/dpo_step.py [--repetitions N] [--threads N] [--small]

TRL runs `compute_loss` and `backward` on its own collated batch, with its padding and its metrics as they are; gradient checkpointing
is off and dropout is 0 on both sides, and attention is by plain products, on a CPU the fastest for both. Ours is what the training loop
does in a step, the table of the reference and `Updates.gradient` with the objective of align/dpo, once with the engine's choice of rows and
once with its padded back end: with two threads each takes a pair. Planning the rows is inside the time, collating TRL's batch is not. Both sides
take the norm of their gradient, and neither includes the optimizer. The reference is not the policy (a random adapter, or one per cent of noise
on the reference), so that the loss is not trivially log 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from protocol import TOLERANCE, Bench, Case, Claim, Models, Text, interleave, models, options  # isort: skip

import torch

import twins
from fiducial.align.dpo import DPO
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models import adapters
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.planning import stats
from fiducial.models.scoring import Engine
from fiducial.training import lora, reference
from fiducial.training.data import Data
from fiducial.training.objective import layout
from fiducial.training.options import TrainOptions
from fiducial.training.updates import Updates

PAIRS = 2
BETA = 0.1
Preference = tuple[list[int], list[int], list[int]]
"""Prompt, chosen, rejected."""
UNCLIPPED = 1e9
"""Largest norm of the gradient: it is computed, but gradients are compared as they are."""
BACK_ENDS = {"tree": "auto", "padded": "padded"}
SAME = "sharing would not pay at these lengths, so tree runs the very rows of padded, and there is no ratio between them"


@dataclass(frozen=True, slots=True)
class Setting:
    """Longest prompt and completion in tokens, and ratios to reach: over TRL by mode, over our padded back end."""

    name: str
    prompt: int
    completion: int
    targets: dict[str, float]
    sharing: float


SETTINGS = (
    Setting("4:1 (128:32)", 128, 32, {"lora": 2.2, "full": 1.9}, 1.45),
    Setting("1:1 (80:80)", 80, 80, {"lora": 1.9, "full": 1.8}, 1.2),
    Setting("1:4 (40:160)", 40, 160, {"lora": 1.5, "full": 1.35}, 1.0),
)
SMALL = (Setting("4:1 (32:8)", 32, 8, {}, 1.0), Setting("1:4 (8:32)", 8, 32, {}, 1.0))


@dataclass(frozen=True, slots=True)
class Policies:
    """One policy twice, and how each reaches its reference."""

    ours: Any
    frozen: Any | None
    trainer: Any


@dataclass(frozen=True, slots=True)
class Side:
    """A step that leaves its gradient in `named`, what trains by name, and gives its loss."""

    run: Callable[[], float]
    named: Mapping[str, torch.Tensor]


@contextmanager
def policies(mode: str, base: Any, tokenizer: Any) -> Iterator[Policies]:
    """Our policy and reference, and TRL's trainer around the same weights."""
    ours = twins.lora_policy(base) if mode == "lora" else twins.full_policy(base)
    frozen = None if mode == "lora" else twins.moved(base)
    more = {"peft_config": twins.peft_config()} if mode == "lora" else {"ref_model": twins.attending_by_products(adapters.sharing(frozen))}
    example = {"prompt": "a", "chosen": " b", "rejected": " c"}
    settings: dict[str, Any] = {"beta": BETA, "disable_dropout": True, "max_length": None}
    with twins.trainer("DPO", twins.full_policy(base), ours, tokenizer, example, more=more, **settings) as trainer:
        yield Policies(ours, frozen, trainer)


def ours(both: Policies, data: Data, tokenizer: Any, backend: str) -> Side:
    """Our step in the training loop, with that back end."""
    from accelerate import Accelerator

    model = LocalModel(both.ours, tokenizer, uri="bench")
    model.engine = Engine(both.ours, backend=backend)
    options = TrainOptions(lora_rank=16 if both.frozen is None else 0, clip=UNCLIPPED)
    updates = Updates(model, DPO(beta=BETA), options, Accelerator(cpu=True))
    frozen = model.engine if both.frozen is None else Engine(both.frozen, backend=backend)
    with lora.adapter_off(frozen.module):  # the loop makes the table before there is an adapter
        team = frozen.team(min(PAIRS, torch.get_num_threads()))
    chosen = range(PAIRS)

    def run() -> float:
        for p in updates.trainables.parameters:
            p.grad = None
        with lora.adapter_off(frozen.module):
            table = reference.logprobs(frozen, data.paths, fingerprint="", team=team)
        return updates.gradient(data, chosen, reference=data.parts.with_logp(data.place(chosen, table)))["loss"]

    return Side(run, updates.trainables.masters)


def theirs(trainer: Any, batch: Any) -> Side:
    """TRL's step."""
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}

    def run() -> float:
        loss = twins.peer_step(trainer, batch)
        torch.nn.utils.clip_grad_norm_(named.values(), UNCLIPPED)
        return loss

    return Side(run, named)


def data_of(asked: Sequence[Preference]) -> Data:
    """The pairs as the training loop has them."""
    groups = [Group(prompt=Prompt(messages=user("-")), completions=(Completion(text="-"),) * 2) for _ in asked]
    paths = Paths.of([(p + answer, len(p)) for p, *answers in asked for answer in answers], group=[n for n in range(len(asked)) for _ in range(2)])
    parts = layout(groups, [[len(answer) for answer in answers] for _, *answers in asked], None)
    return Data(groups, [str(n) for n in range(len(asked))], paths, [2 * n for n in range(len(asked))], parts)


def preferences(text: Text, setting: Setting) -> list[Preference]:
    """Pairs whose completions have 85 to 100 per cent of the longest length."""
    least = int(0.85 * setting.completion)
    return [(text.take(setting.prompt), text.take(least, setting.completion), text.take(least, setting.completion)) for _ in range(PAIRS)]


def sides_of(both: Policies, asked: Sequence[Preference]) -> dict[str, Side]:
    """What is timed, by name."""
    tokenizer = both.trainer.processing_class
    batch = both.trainer.data_collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in asked])
    return {"TRL": theirs(both.trainer, batch)} | {name: ours(both, data_of(asked), tokenizer, backend) for name, backend in BACK_ENDS.items()}


def outcome(side: Side) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one side."""
    loss = side.run()
    found = {name: p.grad.detach().float().clone() for name, p in side.named.items() if p.grad is not None}
    for p in side.named.values():
        p.grad = None
    return loss, found


def exact(both: Policies, asked: Sequence[Preference]) -> tuple[float, dict[str, torch.Tensor], dict[str, int | str]]:
    """In float32: the largest difference from TRL of both our back ends, TRL's gradient, and token counts."""
    sides = sides_of(both, asked)
    truth, gradient = outcome(sides["TRL"])
    losses, apart = [], []
    for name in BACK_ENDS:
        loss, found = outcome(sides[name])
        losses.append(abs(loss - truth))
        apart.append(twins.apart(found, gradient))
    paths = data_of(asked).paths
    rows = Engine(both.ours).plan(paths, grad=True)
    tokens = stats(paths, rows)
    padded = len(paths) * max(len(ids) for ids in paths.ids)
    counts: dict[str, int | str] = {"pairs": len(asked), "padded tokens": padded, "unique tokens": tokens.unique, "scored tokens": tokens.scored}
    counts["rows"] = " and ".join(sorted({row.form for row in rows}))
    parts = {"loss difference": f"{max(losses):.1e}", "gradient difference": f"{max(apart):.1e}"}
    return max(losses + apart), gradient, counts | parts


def measure(bench: Bench, loaded: Models, mode: str) -> None:
    """All lengths in one mode: float32 for exactness, then bfloat16 timed."""
    settings = SMALL if bench.small else SETTINGS
    asked = {setting.name: preferences(Text(loaded.tokenizer), setting) for setting in settings}
    known: dict[str, Any] = {}
    with policies(mode, loaded.modules["float32"], loaded.tokenizer) as both:
        for setting in settings:
            known[setting.name] = exact(both, asked[setting.name])
            if bench.small:
                bench.add(case(setting, mode, "float32", known[setting.name], {}, {}))
    if bench.small:
        return
    with policies(mode, loaded.modules["bfloat16"], loaded.tokenizer) as both:
        for setting in settings:
            sides = sides_of(both, asked[setting.name])
            errors = {name: twins.apart(outcome(side)[1], known[setting.name][1]) for name, side in sides.items()}
            times, _ = interleave({name: side.run for name, side in sides.items()}, bench.repetitions, warm=False)
            bench.add(case(setting, mode, "bfloat16", known[setting.name], times, errors))


def case(setting: Setting, mode: str, dtype: str, known: Any, times: Any, errors: dict[str, float]) -> Case:
    """The record of one length."""
    difference, _, counts = known
    same = counts["rows"] == "padded"
    claims = [Claim("tree", "TRL", setting.targets.get(mode)), Claim("padded", "TRL")] + [Claim("tree", "padded", setting.sharing)] * (not same)
    note = SAME if same else ""
    return Case(f"{mode}, {setting.name}", dtype, claims, times, difference, TOLERANCE, "loss; gradient, relative L2", errors, counts, note)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 0 if losses and gradients agree."""
    chosen = options(__doc__, argv)
    with Bench("dpo_step", chosen) as bench:
        loaded = models(small=bench.small)
        for mode in ("lora", "full"):
            measure(bench, loaded, mode)
        bench.notes.append("The float32 masters of our training loop are outside the time, as is TRL's optimizer.")
        bench.notes.append("Errors are relative L2 errors of the whole gradient against TRL's in float32 with the same weights.")
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
