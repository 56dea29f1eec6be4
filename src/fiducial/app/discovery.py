"""Weaknesses beyond the goals that were given: a maker looks for them in every round, and its held-out cases are tried again in the proof."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from fiducial.app.making import forget, make_groups, named_files
from fiducial.app.measure import examined
from fiducial.app.summary import Retried, Tally
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Attempt, Group, digest
from fiducial.core.roles import Maker, Suite
from fiducial.core.store import hash_file
from fiducial.data.rows import read_rows

if TYPE_CHECKING:
    from fiducial.app.loop import Loop
    from fiducial.app.loop_options import LoopOptions
    from fiducial.models.local import LocalModel

RESULTS = "results"
"""The option by which a maker is told where to write its cases."""
CASES = "cases.jsonl"


def maker(options: LoopOptions, results: str) -> Maker:
    """The maker that looks for weaknesses. Raises ConfigError for one that keeps no cases, since nothing could be proved of its repairs."""
    card = registry.card(options.discover, role="Maker")
    if RESULTS not in {o.name for o in card.options}:
        raise ConfigError(f"{card.name} keeps no cases to prove a repair on", hint="name align/weakness_discovery, or give this one as the maker")
    if RESULTS in options.discover_options:
        raise ConfigError("discover_options.results is set by the loop", hint="the cases are in the run, at stages/discover-1/cases.jsonl")
    return cast(Maker, registry.create(card.name, options.discover_options | {RESULTS: results}))


def discover(loop: Loop, number: int, attempts: Sequence[Attempt], model: LocalModel) -> list[Group]:
    """Groups for what else the model fails at."""
    if not loop.options.discover:
        return []
    options = loop.options.discover_options
    asked = {"model": model.fingerprint, "attempts": digest([a.id for a in attempts]), "seed": loop.options.seed}
    stage = loop.run.stage(f"discover-{number}", asked | {"maker": loop.options.discover, "options": options, "files": named_files(options)})
    searching = maker(loop.options, str(stage.path / CASES))
    how = {"seed": loop.options.seed, "progress": loop.progress, "name": f"looking for weaknesses, round {number}"}
    found, loop.seconds[f"discover {number}"] = make_groups(stage, stage.lines("groups", Group), searching, attempts, model, **how)
    return found


def retry(loop: Loop, repaired: LocalModel) -> tuple[Retried, ...]:
    """The checked cases of the first search, which the base model was asked, put to the repaired model; both halves."""
    cases = loop.run.path / "stages" / "discover-1" / CASES
    if not loop.options.discover or not cases.exists() or not any(row.get("check") and row.get("score") is not None for _, row in read_rows(cases)):
        return ()
    length = {k: v for k, v in maker(loop.options, "").options().items() if k == "max_tokens"}  # answers as long as those they were found by
    stage = loop.run.stage("retry", {"model": repaired.fingerprint, "cases": hash_file(cases)} | length)
    if not stage.done:
        began = time.monotonic()
        suite = cast(Suite, registry.create("evaluate/found_weaknesses", {"data": str(cases)} | length))
        with loop.progress.task("found weaknesses, again", None) as task:
            found, _ = examined(stage, suite, repaired, seed=loop.options.seed, sink=lambda _: task.advance(1))
        stage.finish({"items": found.items, "seconds": time.monotonic() - began})
    forget(stage)
    loop.seconds["retry"] = stage.result["seconds"]
    items = stage.result["items"]
    rows = [
        ("failing cases of the half to train on", [i for i in items if i["failed_before"] and i["half"] == "training"]),
        ("failing cases of the held-out half", [i for i in items if i["failed_before"] and i["half"] == "held-out"]),
        ("cases that went well", [i for i in items if not i["failed_before"]]),
        *((skill, [i for i in items if i["category"] == skill]) for skill in dict.fromkeys(i["category"] for i in items)),
    ]
    return tuple(Retried(name=name, before=_failing(some, "failed_before"), after=_failing(some, "passed", False)) for name, some in rows if some)


def _failing(items: Sequence[dict[str, object]], field: str, failed: bool = True) -> Tally:
    known = [i[field] for i in items if i[field] is not None]
    return Tally(hits=sum(v == failed for v in known), n=len(known), not_scored=len(items) - len(known))
