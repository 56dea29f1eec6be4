"""What the engine costs where nothing is shared: its own choice of back end against plain padded rows, one path per prompt.

    python bench/overhead.py [--repetitions N] [--threads N] [--small]

Eight paths, scored and trained on. In float32 both are compared with a plain forward pass per path. The
self-check that the engine makes once per model falls into the warm-up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from protocol import Bench, Case, Claim, Models, Text, interleave, largest, models, options, summed_tolerance  # isort: skip

import torch
from torch import Tensor

import twins
from fiducial.models.forest import Paths
from fiducial.models.planning import stats
from fiducial.models.scoring import Engine

TARGET = 0.95
"""At most five per cent slower."""
LENGTHS = {"equal lengths (100)": (100, 100), "lengths of 20 to 300": (20, 300)}
SMALL = {"lengths of 5 to 40": (5, 40)}


def score(module: Any, paths: Paths, backend: str) -> Tensor:
    """Summed log-probability of each path, [P]."""
    chosen: Any = backend
    return Engine(module, backend=chosen).score(paths).path_logp


def train(module: Any, paths: Paths, backend: str) -> Tensor:
    """The same with a backward pass of the mean per row, as in training."""
    chosen: Any = backend
    found = torch.zeros(len(paths))
    module.zero_grad(set_to_none=True)
    for indices, scores in Engine(module, backend=chosen).stream(paths, grad=True):
        (-scores.path_mean.sum()).backward()
        found[torch.tensor(indices)] = scores.path_logp.detach()
    return found


@torch.no_grad()
def plain(module: Any, paths: Paths) -> Tensor:
    """The same by a forward pass per path of a float32 model, without the engine."""
    found = []
    for ids, start in zip(paths.ids, paths.start, strict=True):
        logp = torch.log_softmax(module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1], -1)
        found.append(logp.gather(-1, torch.tensor(ids[start:])[:, None]).sum())
    return torch.stack(found)


def measure(bench: Bench, loaded: Models, name: str, paths: Paths, run: Callable[[Any, Paths, str], Tensor]) -> None:
    """One set of paths: exactness in float32, times in bfloat16."""
    truth = plain(loaded.modules["float32"], paths)
    off = max(largest(run(twins.full_policy(loaded.modules["float32"]), paths, backend), truth) for backend in ("padded", "auto"))
    plan = stats(paths, Engine(loaded.modules["float32"]).plan(paths))
    counts = {"paths": len(paths), "naive tokens": plan.naive, "unique tokens": plan.unique, "scored tokens": plan.scored}
    allowed = summed_tolerance(max(len(ids) - start for ids, start in zip(paths.ids, paths.start, strict=True)))
    dtype = "float32" if bench.small else "bfloat16"
    module = twins.full_policy(loaded.modules[dtype])
    times, given = interleave({backend: lambda b=backend: run(module, paths, b) for backend in ("padded", "auto")}, bench.repetitions)
    errors = {} if bench.small else {backend: largest(given[backend], truth) for backend in given}
    bench.add(Case(name, dtype, [Claim("auto", "padded", TARGET)], times, off, allowed, "summed log-probability", errors, counts))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 0 if both back ends agree."""
    chosen = options(__doc__, argv)
    with Bench("overhead", chosen) as bench:
        loaded = models(small=bench.small)
        text = Text(loaded.tokenizer)
        for name, (least, most) in (SMALL if bench.small else LENGTHS).items():
            slices = [text.take(least, most) for _ in range(2 if bench.small else 8)]
            paths = Paths.of((ids, len(ids) // 2) for ids in slices)
            measure(bench, loaded, f"scoring, {name}", paths, score)
            measure(bench, loaded, f"forward and backward, {name}", paths, train)
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
