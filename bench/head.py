"""The language-model head alone, forward and backward: memory and time of the selected head in tiles.

    python bench/head.py [--repetitions N] [--threads N] [--small]

2048 positions, 512 of them scored, the sizes of SmolLM2-135M (49152 tokens, width 576). The peers are a log-softmax over all positions
in float32, and TRL's chunked log-probabilities as its trainers call them on a CPU, on all positions with their metrics. Memory is the
rise of the resident high-water mark above the inputs, in a process of its own per variant.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import TOLERANCE, Bench, Case, Claim, interleave, largest, options, peak_above  # isort: skip

import torch
from torch import Tensor

from fiducial.models.head import selected_logprobs

MEMORY_TARGET = 100
PROCESSES = 3
ALL, TRL, SELECTED = "all positions", "TRL chunked", "selected, in tiles"
TRL_CHUNK = 32_768
"""Vocabulary entries per tile, as TRL's trainers set it."""
METRICS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL's DPO trainer asks for."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Hidden states [N, D], head weight [V, D], labels [N], and which positions count [S]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    scored: Tensor

    @classmethod
    def draw(cls, *, positions: int, scored: int, vocabulary: int, width: int, dtype: torch.dtype, weight_gradient: bool) -> Inputs:
        """Random ones, the same for the same sizes."""
        torch.manual_seed(0)
        hidden = torch.randn(positions, width).to(dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width) * 0.05).to(dtype).requires_grad_(weight_gradient)
        return cls(hidden, weight, torch.randint(vocabulary, (positions,)), torch.randperm(positions)[:scored].sort().values)


def all_positions(x: Inputs) -> Tensor:
    """Log-probabilities of the scored labels, [S], from a log-softmax over every position."""
    logp = torch.log_softmax((x.hidden @ x.weight.T).float(), -1)
    return logp.gather(-1, x.labels[:, None])[:, 0][x.scored]


def trl_chunked(x: Inputs) -> Tensor:
    """The same by TRL, which scores every position where there is no Triton."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.labels, 1.0, TRL_CHUNK, None, 1.0, METRICS)[0][x.scored]


def selected(x: Inputs) -> Tensor:
    """The same by our head."""
    return selected_logprobs(x.hidden[x.scored], x.weight, None, torch.arange(len(x.scored)), x.labels[x.scored]).logp


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {ALL: all_positions, TRL: trl_chunked, SELECTED: selected}


def step(variant: str, x: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the gradient of their negative sum with respect to the hidden states."""
    x.hidden.grad = x.weight.grad = None
    logp = VARIANTS[variant](x)
    (-logp.sum()).backward()
    assert x.hidden.grad is not None
    return logp.detach(), x.hidden.grad


def sizes(*, small: bool) -> dict[str, int]:
    """Positions, scored ones, vocabulary and width."""
    return {"positions": 32, "scored": 8, "vocabulary": 500, "width": 16} if small else {"positions": 2048, "scored": 512, "vocabulary": 49_152, "width": 576}


def exact(shape: dict[str, int]) -> float:
    """Largest difference of our float32 log-probabilities and gradients from both peers', on an eighth of the positions."""
    part = shape | {"positions": max(shape["positions"] // 8, 32), "scored": max(shape["scored"] // 8, 8)}
    x = Inputs.draw(**part, dtype=torch.float32, weight_gradient=False)
    logp, gradient = (t.clone() for t in step(SELECTED, x))
    off = []
    for variant in (ALL, TRL):
        theirs, pull = step(variant, x)
        off += [largest(logp, theirs), largest(gradient, pull)]
    return max(off)


def measure(bench: Bench) -> None:
    """Times of the three variants, with and without the weight's gradient."""
    shape = sizes(small=bench.small)
    off = exact(shape)
    for weight_gradient in (False, True):
        name = "with weight gradient" if weight_gradient else "no weight gradient"
        if bench.small:
            bench.add(Case(name, "float32", [], {}, off, TOLERANCE, "log-probability; hidden gradient", {}, shape))
            continue
        x = Inputs.draw(**shape, dtype=torch.bfloat16, weight_gradient=weight_gradient)
        wide = Inputs(x.hidden.detach().float().requires_grad_(), x.weight.detach().float(), x.labels, x.scored)
        truth, _ = step(SELECTED, wide)
        errors = {variant: largest(step(variant, x)[0], truth) for variant in VARIANTS}
        times, _ = interleave({variant: lambda v=variant, x=x: step(v, x) for variant in VARIANTS}, bench.repetitions, warm=False)
        claims = [Claim(SELECTED, TRL), Claim(SELECTED, ALL)]
        bench.add(Case(name, "bfloat16", claims, times, off, TOLERANCE, "log-probability; hidden gradient", errors, shape))


def memory(bench: Bench) -> None:
    """Peaks of the variants at 512 scored positions, and ours at more and fewer; of ours the highest of three processes."""
    runs = [(variant, 512, gradient) for gradient in (False, True) for variant in VARIANTS]
    runs += [(SELECTED, scored, False) for scored in (64, 2048, 8192)]
    rows = []
    for variant, scored, gradient in runs:
        asked = ["--child", variant, "--scored", str(scored), "--threads", str(bench.options.threads)] + ["--weight-gradient"] * gradient
        peak = max(_peak(asked) for _ in range(PROCESSES if variant == SELECTED else 1))
        row = {"variant": variant, "scored": scored, "weight gradient": "yes" if gradient else "no", "MiB above the inputs": peak}
        judged = variant == SELECTED and not gradient
        rows.append(row | {f"target <= {MEMORY_TARGET} MiB": ("reached" if peak <= MEMORY_TARGET else "missed") if judged else "-"})
    bench.tables["Peak memory, bfloat16, forward and backward"] = rows


def _peak(options: list[str]) -> int:
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), *options], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def child(chosen: argparse.Namespace) -> None:
    """Prints the peak of one variant."""
    torch.set_num_threads(chosen.threads)
    shape = sizes(small=False) | {"scored": chosen.scored, "positions": max(2048, chosen.scored)}
    x = Inputs.draw(**shape, dtype=torch.bfloat16, weight_gradient=chosen.weight_gradient)
    # libraries set themselves up at first use; that is not the variant's memory
    step(chosen.child, Inputs.draw(**sizes(small=True), dtype=torch.bfloat16, weight_gradient=False))
    print(round(peak_above(lambda: step(chosen.child, x))))


def _more(parser: argparse.ArgumentParser) -> Any:
    parser.add_argument("--child", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--scored", type=int, default=512, help=argparse.SUPPRESS)
    parser.add_argument("--weight-gradient", action="store_true", help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 0 if log-probabilities and gradients agree."""
    chosen = options(__doc__, argv, more=_more)
    if chosen.child:
        child(chosen)
        return 0
    with Bench("head", chosen) as bench:
        measure(bench)
        if not bench.small:
            memory(bench)
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
