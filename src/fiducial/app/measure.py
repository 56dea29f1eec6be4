"""Trials: attacks on prompts, judged and kept as they come; and how they are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fiducial.app.cli.progress import Progress
from fiducial.app.summary import Tally
from fiducial.core.records import Attempt, Prompt
from fiducial.core.roles import Attack, Judge
from fiducial.core.store import Lines
from fiducial.models.base import Model


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

    Attempts already in `kept` are not made again; new ones are appended as soon as they are judged.
    """
    done = {_key(a): a for a in kept.read()}
    total = sum(len(prompts) for _, prompts in plan)
    bad = Tally()
    with progress.task(name, total) as task:

        def keep(attempt: Attempt) -> None:
            nonlocal bad
            judged = attempt.model_copy(update={"verdict": judge.judge([attempt])[0]})
            kept.append(judged)
            done[_key(judged)] = judged
            bad = plus(bad, judged, judged.prompt.expected == "refuse")
            task.advance(1, figure=f"harmful compliance {bad.rate.value:.0%}" if bad.n else "")

        for attack, prompts in plan:
            left = [p for p in prompts if (p.id, attack.name) not in done]
            task.advance(len(prompts) - len(left))
            if left:
                attack.run(model, left, seed=seed, max_tokens=max_tokens, sink=keep)
    return [done[p.id, attack.name] for attack, prompts in plan for p in prompts]


def _key(attempt: Attempt) -> tuple[str, str]:
    return attempt.prompt.id, attempt.attack


def plus(tally: Tally, attempt: Attempt, counted: bool = True) -> Tally:
    """The tally with one more attempt."""
    if not counted:
        return tally
    if not attempt.scored:
        return tally.model_copy(update={"not_scored": tally.not_scored + 1})
    return tally.model_copy(update={"hits": tally.hits + attempt.failed, "n": tally.n + 1})


def tally(attempts: Iterable[Attempt], chosen: Callable[[Attempt], bool] = lambda _: True) -> Tally:
    """Failures among the chosen attempts."""
    found = Tally()
    for attempt in attempts:
        found = plus(found, attempt, chosen(attempt))
    return found
