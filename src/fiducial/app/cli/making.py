"""What commands do with methods that give data: makers turn attempts into groups, rewards score the answers of groups."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from math import isfinite
from pathlib import Path
from typing import cast

import click

from fiducial.app.cli import trained
from fiducial.app.cli.job import Job, Stage, records, run_or_file
from fiducial.app.making import forget, make_groups, named_files
from fiducial.app.measure import in_parts
from fiducial.core.config import about
from fiducial.core.errors import DataError
from fiducial.core.intervals import mean
from fiducial.core.records import Attempt, Group, Prompt, digest
from fiducial.core.roles import Maker, Reward


def _maker_options() -> list[click.Option]:
    return [
        click.Option(
            ["--attempts"],
            metavar="FILE|RUN",
            multiple=True,
            required=True,
            help="Judged attempts to learn from: a file, or a run of an attack; may be repeated.",
        ),
        click.Option(["--seed"], type=int, default=0, help="[default: 0]"),
        click.Option(
            ["--any-split"],
            is_flag=True,
            help="Learn also from shipped goals outside the repair split; what they measure later proves nothing then. [default: off]",
        ),
    ]


def _ready_to_make(job: Job) -> None:
    with about("attempts"):
        if "attempts" not in job.later:
            _to_learn_from(job.values["attempts"], any_split=bool(job.values["any_split"]))


def make(job: Job) -> int:
    """Groups to train on, made from judged attempts; a resumed run makes them again from the answers that it has, and asks for the others."""
    attempts, left_out = _to_learn_from(job.values["attempts"], any_split=bool(job.values["any_split"]))
    if left_out:
        job.output.note(f"{left_out} attempts on goals that are kept for the proof were left out; --any-split takes them too")
    method = cast(Maker, job.method())
    inputs = {"attempts": digest([a.line() for a in attempts]), "maker": [method.name, method.options()], "model": job.values["model"]}
    with job.start() as run:
        job.begun(run)
        stage = trained.begin(run, inputs | {"seed": job.values["seed"]}, "make")
        lines = run.lines("groups", Group)
        if not stage.done:
            with closing(job.model()) as model:
                make_groups(stage, lines, method, attempts, model, seed=job.values["seed"], progress=job.progress, name=job.card.name)
        forget(stage)
        number = stage.result["groups"]
        job.log(run, "data", {"data": [stage.result["hash"]], "groups": number, "attempts": len(attempts)})
    data = {"groups": number, "attempts": len(attempts), "left_out": left_out, "file": lines.path, "folder": run.path}
    job.output.result(data, f"{number} groups from {len(attempts)} attempts: {lines.path}")
    return job.done()


def _to_learn_from(references: Sequence[str], *, any_split: bool) -> tuple[list[Attempt], int]:
    """Attempts that may be trained on, and how many were left out: those on shipped goals outside the repair split.

    Of a loop only what it collected to learn from, never its proof. Raises DataError when nothing is left.
    """
    attempts = [attempt for reference in references for attempt in _collected(reference)]
    kept = [a for a in attempts if any_split or may_be_learnt_from(a.prompt)]
    if not kept:
        raise DataError(
            f"{', '.join(references)}: all {len(attempts)} attempts are on shipped goals that are kept for the proof",
            hint="attack with --split repair, or take them all the same with --any-split",
        )
    return kept, len(attempts) - len(kept)


def _collected(reference: str) -> list[Attempt]:
    is_file = Path(reference).is_file() or Path(reference).suffix == ".jsonl"
    within = "stages/find-*" if not is_file and run_or_file(reference).facts.command == "loop" else "**"
    return records(reference, "attempts", Attempt, within=within)


def may_be_learnt_from(prompt: Prompt) -> bool:
    """Whether a prompt is not one of the shipped ones that are kept for the proof."""
    from fiducial.data.split import goal_text, split_of

    shipped = prompt.source == "fiducial" or prompt.source.startswith("fiducial ")
    return not shipped or split_of(goal_text(prompt)) == "repair"


def hash_of(groups: Sequence[Group]) -> str:
    """What stands for the groups in the ledger."""
    return digest([g.id for g in groups])


def groups_from(reference: str) -> list[Group]:
    """Groups from a file in any of the known layouts, or of a run."""
    from fiducial.data.formats import read_groups

    if Path(reference).is_file() or Path(reference).suffix:
        return read_groups(reference)
    return records(reference, "groups", Group)


def _reward_options() -> list[click.Option]:
    return [click.Option(["--data"], metavar="FILE|RUN", required=True, help="Groups whose completions are scored: a file, or a run that made some.")]


def _to_score(job: Job) -> list[Group]:
    """The groups; none yet where an earlier step is to make them."""
    with about("data"):
        return [] if "data" in job.later else groups_from(job.values["data"])


def reward(job: Job) -> int:
    """Groups with a reward for each completion; a resumed run scores only groups that have none."""
    groups = _to_score(job)
    method = cast(Reward, job.method())

    def rewarded(part: Sequence[Group]) -> list[Group]:
        changes = [{"rewards": rewards, "annotator": job.card.name} for rewards in method.score(part)]
        return [group.model_copy(update=change) for group, change in zip(part, changes, strict=True)]

    with job.start() as run:
        job.begun(run)
        inputs = {"groups": digest([g.line() for g in groups]), "reward": [method.name, method.options()], "files": named_files(method.options())}
        stage = trained.begin(run, inputs, "score")
        lines = run.lines("groups", Group)
        each = [g.rewards or () for g in in_parts(groups, lines, rewarded, progress=job.progress, name=job.card.name)]
        if not stage.done:
            stage.finish({"groups": len(each)})
    scored = [(v, g) for g, rewards in enumerate(each) for v in rewards if v is not None]
    # completions of one prompt are alike
    found = mean([v for v, _ in scored], [g for _, g in scored])
    low, high = found.interval()
    figures = {"mean": found.value, "low": low, "high": high}
    counts = {"groups": len(groups), "completions": sum(map(len, each)), "not_scored": sum(map(len, each)) - len(scored)}
    data = counts | {name: value if isfinite(value) else None for name, value in figures.items()} | {"file": lines.path}
    text = f"mean reward of the completions {found}, {counts['not_scored']} not scored" if scored else "nothing could be scored"
    job.output.result(data, f"{text}: {lines.path}")
    return job.done()


MAKER = Stage(make, _ready_to_make, _maker_options, resumable=True)
REWARD = Stage(reward, _to_score, _reward_options, takes_model=False, resumable=True)
