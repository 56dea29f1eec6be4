"""Groups made of attempts, as a stage of a run that goes on after an interruption."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fiducial.app.cli.progress import Progress
from fiducial.core.records import Attempt, Group, digest
from fiducial.core.roles import Maker
from fiducial.core.run import Stage
from fiducial.core.store import Lines, hash_file
from fiducial.models.base import Model
from fiducial.models.remembered import Call, Memory


def named_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files that options name, by option: what was made of a file is made anew when it has changed."""
    return {name: hash_file(value) for name, value in options.items() if isinstance(value, str) and Path(value).is_file()}


def forget(stage: Stage) -> None:
    """Drops the answers that work was made of which is complete."""
    stage.lines("answers", Call).path.unlink(missing_ok=True)


def make_groups(
    stage: Stage, lines: Lines[Group], maker: Maker, attempts: Sequence[Attempt], model: Model, *, seed: int, progress: Progress, name: str
) -> tuple[list[Group], float]:
    """The groups that a maker makes of attempts, as a stage of the run, and the seconds they took; each is written into `lines` as it comes.

    A maker may decide by all that it saw before, so that one that was interrupted makes its groups again, from the answers that were kept.
    """
    if not stage.done:
        began = time.monotonic()
        lines.path.unlink(missing_ok=True)
        with progress.task(name) as task:  # groups are fewer than attempts, or more

            def keep(group: Group) -> None:
                lines.append(group)
                task.advance(1, figure=group.prompt.category)

            groups = maker.make(attempts, Memory(stage.lines("answers", Call)).of(model), seed=seed, sink=keep)
            if not lines.path.exists():  # a maker need not use the sink
                for group in groups:
                    keep(group)
        stage.finish({"groups": len(groups), "hash": digest([g.id for g in groups]), "seconds": time.monotonic() - began})
    forget(stage)
    return lines.read(), stage.result.get("seconds", 0.0)
