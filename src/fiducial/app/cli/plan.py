"""What a training on data would take of memory, before any weight is loaded, and the cheapest ways to take less.

    fiducial align dpo Qwen/Qwen3-8B --data pairs.jsonl --plan

Of the model only configuration and tokenizer are read. What a step takes of time is measured, not planned: see --preview.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fiducial.app.cli.job import Job
from fiducial.app.cli.output import Table
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Group
from fiducial.core.roles import Objective

if TYPE_CHECKING:
    from fiducial.training.memory import Part
    from fiducial.training.options import TrainOptions

SHOWN = 3
"""Ways to take less that are shown."""
WORTH = 0.99
"""What is left of the largest part, at most, where a way counts."""


def plan(job: Job, groups: Sequence[Group], objective: Objective, options: TrainOptions) -> int:
    """Shows it; makes no run and loads no model."""
    if objective.controlled:
        raise ConfigError(f"--plan works from shapes, and {objective.name} adds tokens to the model that it trains", hint="use --preview, which measures")
    dtype = job.values["dtype"]
    parts, about = _planned(job, groups, objective, options, dtype)
    total, largest = sum(p.size for p in parts), max(parts, key=lambda p: p.size)
    ways = []
    for name, changed, other in _ways(options, dtype, about):
        try:
            found, _ = _planned(job, groups, objective, changed, other)
        except DataError:  # nothing is short enough
            continue
        if sum(p.size for p in found if p.name == largest.name) <= WORTH * largest.size:
            ways.append({"option": name, "bytes": sum(p.size for p in found)})
        if len(ways) == SHOWN:
            break
    table = Table(("what", "MiB", "why"), [(p.name, _mib(p.size), p.why) for p in parts], right=frozenset({"MiB"}))
    less = "; ".join(f"{way['option']}: {_mib(way['bytes'])} MiB in all" for way in ways)
    data = {
        "parts": [{"name": p.name, "bytes": p.size, "why": p.why} for p in parts],
        "bytes": total,
        "largest": largest.name,
        "ways": ways,
        **about,
    }
    job.output.result(
        data,
        table,
        f"in all {_mib(total)} MiB on {about['device']}, beside Python and its libraries; the largest part: {largest.name}",
        f"for less of it: {less}" if ways else f"no option lowers {largest.name}: a smaller model does",
        "nothing was loaded or trained; --preview measures memory and time of two real steps",
    )
    return 0


def _planned(job: Job, groups: Sequence[Group], objective: Objective, options: TrainOptions, dtype: str | None) -> tuple[list[Part], dict[str, Any]]:
    import torch

    from fiducial.models.outline import outline
    from fiducial.training.loop import read
    from fiducial.training.memory import parts
    from fiducial.training.scratch import begin_from_scratch
    from fiducial.training.weights import refuse_float16

    model, device = outline(job.values["model"], dtype=dtype, device=job.values["device"])
    refuse_float16(model.module)
    if options.from_scratch or options.sizes:
        with torch.device("meta"):
            begin_from_scratch(model, options)
    data, _ = read(model, groups, objective, options)
    about = {
        "device": device,
        "dtype": str(next(model.module.parameters()).dtype).removeprefix("torch."),
        "groups": len(data.groups),
        "left_out": data.left_out,
        "longest": max(map(len, data.paths.ids)),
    }
    return parts(model, data, objective, options, device=device), about


def _ways(options: TrainOptions, dtype: str | None, about: dict[str, Any]) -> Iterator[tuple[str, TrainOptions, str | None]]:
    """Options that may take less, those first that change least of what is learnt."""

    def other(**changes: Any) -> TrainOptions:
        return options.model_copy(update=changes)

    if about["dtype"] == "float32":
        yield "--dtype bfloat16", options, "bfloat16"
    if options.batch > 1:
        yield f"--batch {options.batch // 2}", other(batch=options.batch // 2), dtype
    if not options.lora_rank and not options.from_scratch:
        yield "--lora-rank 16", other(lora_rank=16), dtype
    if options.lora_rank and options.lora_depth > 0.5:
        yield "--lora-depth 0.5", other(lora_depth=0.5), dtype
    short = about["longest"] // 2
    yield f"--max-length {short}, which leaves longer groups out", other(max_length=max(short, 2)), dtype
    if options.lora_rank > 4:
        yield "--lora-rank 4", other(lora_rank=4), dtype


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f}"
