"""One DPO step, policy forward and backward and reference forward, against TRL's DPOTrainer and against our own padded back end.

    python bench/dpo_step.py [--repetitions N] [--threads N] [--small]

TRL runs `compute_loss` and `backward` on its own collated batch, with its padding and its metrics as they are; gradient checkpointing
is off and dropout is 0 on both sides, and attention is by plain products, on a CPU the fastest for both. Ours is the
engine's rows, each backward on its own, with the objective of align/dpo; planning the rows is inside the time, collating TRL's batch is
not. Neither side includes the optimizer. The reference is not the policy (a
random adapter, or one per cent of noise on the reference), so that the loss is not trivially log 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from protocol import TOLERANCE, Bench, Case, Claim, Models, Text, interleave, models, options  # isort: skip

import torch

import twins
from fiducial.align.dpo import DPO
from fiducial.models import adapters
from fiducial.models.forest import Paths
from fiducial.models.planning import stats
from fiducial.models.scoring import Engine
from fiducial.training import lora, reference
from fiducial.training.objective import GroupLogProbs

PAIRS = 2
BETA = 0.1
Preference = tuple[list[int], list[int], list[int]]
"""Prompt, chosen, rejected."""
SAME = "sharing would not pay at these lengths, so tree runs the rows of padded: their ratio is that of a thing to itself"


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


def ours(both: Policies, paths: Paths, engine: Engine, frozen: Engine) -> float:
    """Our loss; gradients are left in our policy."""
    objective, pairs = DPO(beta=BETA), len(paths) // 2

    def run() -> float:
        with lora.adapter_off(frozen.module):
            table = reference.logprobs(frozen, paths, fingerprint="")
        total = 0.0
        for indices, scores in engine.stream(paths, grad=True):
            order = sorted(range(len(indices)), key=lambda place: indices[place])
            logp = scores.path_logp[order].view(-1, 2)
            base = table[[indices[place] for place in order]].view(-1, 2)
            policy = _groups(logp, scores.path_len[order].view(-1, 2))
            loss = objective(policy, policy.with_logp(base)).sum() / pairs
            loss.backward()
            total += float(loss.detach())
        return total

    return twins.step(both.ours, run)


def _groups(logp: torch.Tensor, length: torch.Tensor) -> GroupLogProbs:
    chosen = torch.tensor([1.0, 0.0]).expand(len(logp), 2)
    return GroupLogProbs(logp, length, torch.ones_like(length, dtype=torch.bool), chosen, torch.full((len(logp), 2), torch.nan), torch.ones(len(logp)))


def preferences(text: Text, setting: Setting) -> list[Preference]:
    """Pairs whose completions have 85 to 100 per cent of the longest length."""
    least = int(0.85 * setting.completion)
    return [(text.take(setting.prompt), text.take(least, setting.completion), text.take(least, setting.completion)) for _ in range(PAIRS)]


def sides_of(both: Policies, asked: Sequence[Preference]) -> dict[str, Callable[[], float]]:
    """What is timed, by name."""
    paths = _paths(asked)
    batch = both.trainer.data_collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in asked])
    run: dict[str, Callable[[], float]] = {"TRL": lambda: twins.peer_step(both.trainer, batch)}
    for name, backend in (("tree", "auto"), ("padded", "padded")):
        engine: Any = Engine(both.ours, backend=backend)
        frozen: Any = engine if both.frozen is None else Engine(both.frozen, backend=backend)
        run[name] = lambda engine=engine, frozen=frozen: ours(both, paths, engine, frozen)
    return run


def _paths(asked: Sequence[Preference]) -> Paths:
    return Paths.of([(p + answer, len(p)) for p, *answers in asked for answer in answers], group=[n for n in range(len(asked)) for _ in range(2)])


def outcome(both: Policies, run: dict[str, Callable[[], float]], side: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one side."""
    loss = run[side]()
    module = both.trainer.model if side == "TRL" else both.ours
    found = twins.gradients(module)
    module.zero_grad(set_to_none=True)
    return loss, found


def exact(both: Policies, asked: Sequence[Preference]) -> tuple[float, dict[str, torch.Tensor], dict[str, int | str]]:
    """In float32: the largest difference from TRL of both our back ends, TRL's gradient, and token counts."""
    run = sides_of(both, asked)
    truth, gradient = outcome(both, run, "TRL")
    losses, apart = [], []
    for side in ("tree", "padded"):
        loss, found = outcome(both, run, side)
        losses.append(abs(loss - truth))
        apart.append(twins.apart(found, gradient))
    paths = _paths(asked)
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
            run = sides_of(both, asked[setting.name])
            errors = {side: twins.apart(outcome(both, run, side)[1], known[setting.name][1]) for side in run}
            times, _ = interleave(run, bench.repetitions, warm=False)
            bench.add(case(setting, mode, "bfloat16", known[setting.name], times, errors))


def case(setting: Setting, mode: str, dtype: str, known: Any, times: Any, errors: dict[str, float]) -> Case:
    """The record of one length."""
    difference, _, counts = known
    claims = [Claim("tree", "TRL", setting.targets.get(mode)), Claim("tree", "padded", setting.sharing), Claim("padded", "TRL")]
    note = SAME if counts["rows"] == "padded" else ""
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
