"""Multiple choice: log-likelihoods of four answers to each question, against lm-eval's HFLM at its best batch size.

    python bench/multiple_choice.py [--repetitions N] [--threads N] [--small]

Both sides get the same token ids and the same weights. lm-eval's batch size is swept over 1, 4 and 8 on part of the questions.
One-token answers are the case that lm-eval shares by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol import Bench, Case, Claim, Models, Text, interleave, largest, models, once, options, quiet, summed_tolerance  # isort: skip

import torch
from torch import Tensor

from fiducial.models.forest import Paths
from fiducial.models.planning import stats
from fiducial.models.scoring import Engine

BATCHES = (1, 4, 8, 16, 32)
CHOICES = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """Questions of one kind, and the ratio to reach per dtype."""

    name: str
    answer: tuple[int, int]
    targets: dict[str, float]


SETTINGS = (
    Setting("answers of 3 to 8 tokens", (3, 8), {"bfloat16": 3.4, "float32": 3.8}),
    Setting("answers of 16 to 32 tokens", (16, 32), {"bfloat16": 2.9}),
    Setting("answers of 1 token", (1, 1), {"bfloat16": 1.0}),
)


def questions(text: Text, *, items: int, prompt: tuple[int, int], answer: tuple[int, int]) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts, each with its answers."""
    return [(text.take(*prompt), [text.take(*answer) for _ in range(CHOICES)]) for _ in range(items)]


def ours(module: Any, asked: Sequence[tuple[list[int], list[list[int]]]]) -> Tensor:
    """Summed log-probability of each answer, [items * 4]."""
    return Engine(module).score(_paths(asked)).path_logp


def peer(module: Any, tokenizer: Any, asked: Sequence[tuple[list[int], list[list[int]]]], *, batch: int) -> Tensor:
    """The same by lm-eval."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        model = HFLM(pretrained=module, tokenizer=tokenizer, device="cpu", batch_size=batch)
        found = model._loglikelihood_tokens([(("", ""), prompt, answer) for prompt, answers in asked for answer in answers], disable_tqdm=True)
    return torch.tensor([logp for logp, _ in found])


def _paths(asked: Sequence[tuple[list[int], list[list[int]]]]) -> Paths:
    pairs = [(prompt + answer, len(prompt)) for prompt, answers in asked for answer in answers]
    return Paths.of(pairs, group=[number for number in range(len(asked)) for _ in range(CHOICES)])


def measure(bench: Bench, loaded: Models, setting: Setting) -> None:
    """One kind of questions in every dtype it has a target for."""
    items, prompt = (2, (20, 40)) if bench.small else (5, (200, 400))
    asked = questions(Text(loaded.tokenizer), items=items, prompt=prompt, answer=setting.answer)
    plan = stats(_paths(asked), Engine(loaded.modules["float32"]).plan(_paths(asked)))
    counts: dict[str, int | str] = {"items": items, "naive tokens": plan.naive, "unique tokens": plan.unique, "scored tokens": plan.scored}
    truth = our_truth = torch.zeros(0)
    for dtype in ("float32", "bfloat16"):
        if dtype not in loaded.modules:
            continue
        module = loaded.modules[dtype]
        timed = bench.repetitions if dtype in setting.targets else 0
        best = _best_batch(module, loaded.tokenizer, asked[: max(1, items // 2)]) if timed else 4
        side = f"lm-eval, batch {best}"
        sides = {side: lambda m=module, b=best: peer(m, loaded.tokenizer, asked, batch=b), "tree": lambda m=module: ours(m, asked)}
        times, given = interleave(sides, timed)
        if dtype == "float32":
            truth, our_truth = given[side], given["tree"]
        if not timed and not bench.small:
            continue
        errors = {"lm-eval": largest(given[side], truth), "tree": largest(given["tree"], truth)} if dtype != "float32" else {}
        claim = Claim("tree", side, setting.targets.get(dtype))
        allowed = summed_tolerance(setting.answer[1])
        bench.add(Case(setting.name, dtype, [claim], times, largest(our_truth, truth), allowed, "summed log-probability", errors, counts))


def _best_batch(module: Any, tokenizer: Any, asked: Sequence[tuple[list[int], list[list[int]]]]) -> int:
    seconds = {batch: once(lambda b=batch: peer(module, tokenizer, asked, batch=b)) for batch in BATCHES}
    return min(BATCHES, key=lambda batch: seconds[batch])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 0 if the outputs agree."""
    chosen = options(__doc__, argv)
    with Bench("multiple_choice", chosen) as bench:
        loaded = models(small=bench.small)
        for setting in SETTINGS:
            measure(bench, loaded, setting)
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
