"""What runs measure and keep as it comes: trials, suites, what judges and rewards say; how trials are counted, on what machine, in how much memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from fiducial.app.cli.progress import Progress
from fiducial.app.making import forget
from fiducial.app.summary import Tally
from fiducial.core import registry
from fiducial.core.intervals import design_effect
from fiducial.core.records import Attempt, Prompt, Record, Score, digest
from fiducial.core.roles import Attack, Judge, Sink, Suite, SuiteResult, ignore
from fiducial.core.run import Run, Stage
from fiducial.core.store import Lines
from fiducial.models.base import Model, WhiteBox
from fiducial.models.remembered import Call, Memory

T = TypeVar("T")
R = TypeVar("R", bound=Record)
PART = 16
"""What a judge or a reward is given at once."""
TOGETHER = 512
"""Prompts that a model whose weights are here is asked at once; about what one batch of short prompts holds."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one model was found to do."""

    attempts: list[Attempt]
    scores: list[Score]
    """Of the capability items."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Whole answers to ordinary requests: the items of evaluate/helpfulness."""


def trials(
    model: Model,
    plan: Sequence[tuple[Attack, Sequence[Prompt]]],
    judge: Judge,
    kept: Lines[Attempt],
    *,
    seed: int,
    max_tokens: int,
    progress: Progress,
    name: str,
) -> list[Attempt]:
    """Every attack on its prompts: one judged attempt per trial, in the order of the plan.

    Attempts already in `kept` are not made again, except those that a model elsewhere left without an answer; new ones are appended as
    soon as they are judged. In bfloat16 the likeliest token can depend on what else is in the batch, so a local model that was
    interrupted is asked the whole batch again: the same answers come out as without the interruption.
    """
    before = kept.read()
    if not isinstance(model, WhiteBox) and any(map(unanswered, before)):
        before = [a for a in before if not unanswered(a)]
        kept.replace(before)
    done = {_key(a): a for a in before}
    total = sum(len(prompts) for _, prompts in plan)
    complied: list[bool] = []
    with progress.task(name, total) as task:

        def keep(attempt: Attempt) -> None:
            if _key(attempt) in done:
                return
            judged = attempt.model_copy(update={"verdict": judge.judge([attempt])[0]})
            kept.append(judged)
            done[_key(judged)] = judged
            if judged.prompt.expected == "refuse" and judged.scored:
                complied.append(judged.failed)
            task.advance(1, figure=f"harmful compliance {sum(complied) / len(complied):.0%}" if complied else "")

        for attack, prompts in plan:
            left = [p for p in prompts if (p.id, attack.name) not in done]
            task.advance(len(prompts) - len(left))
            for batch in _batches(model, prompts, left):
                attack.run(model, batch, seed=seed, max_tokens=max_tokens, sink=keep)
    return [done[p.id, attack.name] for attack, prompts in plan for p in prompts]


def tried(
    run: Run, name: str, model: Model, plan: Sequence[tuple[Attack, Sequence[Prompt]]], judge: Judge, *, seed: int, max_tokens: int, progress: Progress
) -> tuple[list[Attempt], float]:
    """The trials of a plan as a stage of the run, done once, and the seconds they took."""
    inputs = {"model": model.fingerprint, "plan": digest([[a.name, a.options(), [p.id for p in ps]] for a, ps in plan]), "seed": seed}
    stage = run.stage(name, inputs | {"judge": judge.options() | {"name": judge.name}, "max_tokens": max_tokens})
    began = time.monotonic()
    kept = stage.lines("attempts", Attempt)
    found = trials(model, plan, judge, kept, seed=seed, max_tokens=max_tokens, progress=progress, name=name.replace("-", " "))
    if not stage.done:
        stage.finish({"seconds": time.monotonic() - began, "attempts": len(found)})
    return found, stage.result["seconds"]


def examined(stage: Stage, suite: Suite, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> tuple[SuiteResult, int]:
    """What a suite finds, and how many answers a model elsewhere owed. The model's answers are kept in the stage as they come.

    A suite that was interrupted is gone through again from its beginning, and the model asked only for what it has not answered.
    """
    memory = Memory(stage.lines("answers", Call))
    return suite.run(memory.of(model), limit=limit, seed=seed, sink=sink), memory.unanswered


def in_parts(items: Sequence[T], kept: Lines[R], work: Callable[[Sequence[T]], Sequence[R]], *, progress: Progress, name: str) -> list[R]:
    """A record for each item, in order: those in `kept`, and what `work` makes of the other items, 16 at a time, appended as it comes.

    A part that was kept in part is done again as a whole, since what comes of an item can depend on what else is in its batch.
    """
    done = kept.read()
    with progress.task(name, total=len(items)) as task:
        task.advance(len(done))
        for start in range(0, len(items), PART):
            part = items[start : start + PART]
            missing = start + len(part) - len(done)
            if missing > 0:
                for record in work(part)[-missing:]:
                    kept.append(record)
                    done.append(record)
                task.advance(missing)
    return done


def capability(run: Run, name: str, model: Model, *, items: int | None, seed: int, progress: Progress) -> tuple[list[Score], float]:
    """The shipped multiple-choice items (the first `items`) as a stage of the run, done once, and the seconds they took."""
    stage = run.stage(f"capability-{name}", {"model": model.fingerprint, "items": items})
    if not stage.done:
        suite = cast(Suite, registry.create("evaluate/multiple_choice"))
        began = time.monotonic()
        with progress.task(f"capability {name}", 1) as task:
            found, _ = examined(stage, suite, model, limit=items, seed=seed)
            task.advance(1, figure=", ".join(f"{s.metric} {s.value:.0%}" for s in found.scores[:1]))
        stage.finish({"scores": [s.model_dump(mode="json") for s in found.scores], "seconds": time.monotonic() - began})
    forget(stage)
    return [Score.model_validate(s) for s in stage.result["scores"]], stage.result["seconds"]


def whole_answers(run: Run, name: str, model: Model, *, limit: int, max_tokens: int, seed: int, progress: Progress) -> tuple[list[dict[str, Any]], float]:
    """Answers of up to `max_tokens` to the first held-out ordinary requests as a stage of the run, done once, and the seconds they took."""
    stage = run.stage(f"answers-{name}", {"model": model.fingerprint, "limit": limit, "max_tokens": max_tokens})
    if not stage.done:
        suite = cast(Suite, registry.create("evaluate/helpfulness", {"split": "held-out", "max_tokens": max_tokens}))
        began = time.monotonic()
        with progress.task(f"whole answers {name}", limit) as task:
            found, _ = examined(stage, suite, model, limit=limit, seed=seed, sink=lambda _: task.advance(1))
        stage.finish({"items": list(found.items), "seconds": time.monotonic() - began})
    forget(stage)
    return stage.result["items"], stage.result["seconds"]


def _batches(model: Model, prompts: Sequence[Prompt], left: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    """What is still to be asked: of a local model in batches that do not depend on what was done before, of others only what is left."""
    if not isinstance(model, WhiteBox):
        if left:
            yield left
        return
    missing = {p.id for p in left}
    for start in range(0, len(prompts), TOGETHER):
        batch = prompts[start : start + TOGETHER]
        if any(p.id in missing for p in batch):
            yield batch


def unanswered(attempt: Attempt) -> bool:
    """Whether it was sent and no answer came, which another try may mend; what could not be sent will not be answered then either."""
    return attempt.finish == "error" and bool(attempt.sent)


def to_mend(unscored: Iterable[Attempt], file: Path) -> str:
    """The hint where too many attempts have no verdict."""
    return look_at(file, owed=any(map(unanswered, unscored)))


def look_at(file: Path, *, owed: bool) -> str:
    """The hint that names a file, and how to go on where a model elsewhere owes answers."""
    return f"see {file}" + ("; go on with --resume, which asks again what got no answer" if owed else "")


def _key(attempt: Attempt) -> tuple[str, str]:
    return attempt.prompt.id, attempt.attack


def tally(attempts: Iterable[Attempt], chosen: Callable[[Attempt], bool] = lambda _: True) -> Tally:
    """Failures among the chosen attempts. Trials of one goal under several attacks count for fewer than independent ones."""
    some = [a for a in attempts if chosen(a)]
    scored = [a for a in some if a.scored]
    design = design_effect([a.failed for a in scored], [a.prompt.cluster for a in scored])
    return Tally(hits=sum(a.failed for a in scored), n=len(scored), not_scored=len(some) - len(scored), design=design)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in MiB; 0 where the system does not say. What was spent before an interruption is not in it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // (1 << 20 if platform.system() == "Darwin" else 1 << 10)


def machine() -> str:
    """Processor, cores and system, in a line."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
