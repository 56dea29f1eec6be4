"""Where sharing pays and where it loses: a training step with every prompt computed once against padded rows, by ratio and number of completions.

    python bench/sweep.py [--repetitions N] [--threads N] [--small]

One prompt with K completions of equal length, prompt and completion together 96 tokens, ratio rho of the one to the other; LoRA, forward
and backward. `tree` shares whatever it costs; the engine's own choice, which the table names, need not. S = K (rho + 1) / (rho + K) is by how
many times fewer tokens go through the linear layers. Times differ from it by attention, by the head, which both sides run at scored
tokens alone, and by what a pass costs however short it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from protocol import TOLERANCE, Bench, Case, Claim, Models, Text, interleave, models, options  # isort: skip

import twins
from fiducial.models.forest import Paths
from fiducial.models.planning import stats
from fiducial.models.scoring import Engine
from overhead import train

LENGTH = 96
"""Tokens of a prompt and one completion."""
RATIOS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
COMPLETIONS = (1, 2, 4, 8, 16)
SMALL = ((4.0, 0.25), (1, 4))


def paths_of(text: Text, ratio: float, k: int) -> Paths:
    """A prompt and its completions."""
    completion = round(LENGTH / (1 + ratio))
    prompt = text.take(LENGTH - completion)
    return Paths.of([(prompt + text.take(completion), len(prompt)) for _ in range(k)], group=[0] * k)


def saved(ratio: float, k: int) -> float:
    """S: padded tokens over shared ones."""
    return k * (ratio + 1) / (ratio + k)


def outcome(module: Any, paths: Paths, backend: str) -> tuple[Any, Any]:
    """Log-probabilities and gradients of one side."""
    return train(module, paths, backend), twins.gradients(module)


def measure(bench: Bench, loaded: Models, policies: dict[str, Any], paths: Paths, ratio: float, k: int) -> dict[str, Any]:
    """One point: exactness in float32, times in bfloat16, and its row of the table."""
    (truth, gradient), (found, ours) = (outcome(policies["float32"], paths, backend) for backend in ("padded", "tree"))
    longest = max(len(ids) - start for ids, start in zip(paths.ids, paths.start, strict=True))
    off = max(float((truth - found).abs().max()) / longest, twins.apart(ours, gradient))
    dtype = "float32" if bench.small else "bfloat16"
    rows = Engine(policies["float32"], backend="tree").plan(paths, grad=True)
    counts = {"K": k, "padded tokens": sum(len(ids) - 1 for ids in paths.ids), "unique tokens": stats(paths, rows).unique}
    times, _ = interleave({backend: lambda b=backend: train(policies[dtype], paths, b) for backend in ("padded", "tree")}, bench.repetitions)
    of = "log-probability per token; gradient, relative L2"
    bench.add(case := Case(f"rho {ratio:g}, K {k}", dtype, [Claim("tree", "padded")], times, off, TOLERANCE, of, {}, counts))
    known = case.record()["ratios"]
    chosen = " and ".join(sorted({row.form for row in Engine(policies[dtype]).plan(paths, grad=True)}))
    seen = known[0]["wall"] if known else {"median": float("nan"), "low": float("nan"), "high": float("nan")}
    return {
        "rho": f"{ratio:g}",
        "K": k,
        "S": f"{saved(ratio, k):.2f}",
        "padded over tree": f"{seen['median']:.2f} ({seen['low']:.2f} to {seen['high']:.2f})",
        "sharing": known[0]["verdict"] if known else "-",
        "engine's choice": chosen,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 0 if both sides agree everywhere."""
    chosen = options(__doc__, argv)
    with Bench("sweep", chosen) as bench:
        loaded = models(small=bench.small)
        text = Text(loaded.tokenizer)
        policies = {dtype: twins.lora_policy(module) for dtype, module in loaded.modules.items()}
        ratios, completions = SMALL if bench.small else (RATIOS, COMPLETIONS)
        table = [measure(bench, loaded, policies, paths_of(text, ratio, k), ratio, k) for ratio in ratios for k in completions]
        bench.tables["Against the share of tokens saved"] = table
        lost = [f"rho {row['rho']}, K {row['K']}" for row in table if row["sharing"] == "slower"]
        bench.notes.append(f"Sharing was slower in all repetitions at: {'; '.join(lost) or 'no point'}.")
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
