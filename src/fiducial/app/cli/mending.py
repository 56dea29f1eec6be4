"""What commands do with methods that repair, protect or decide: makers, objectives, rewards, guards, gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fiducial.app.cli import trained
from fiducial.app.cli.job import Job, Stage, records
from fiducial.app.cli.output import Table, one_line
from fiducial.app.cli.params import parameter
from fiducial.app.measure import tally
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.intervals import mean
from fiducial.core.records import Attempt, Decision, Evidence, Group, Prompt, Score, Verdict, digest, user
from fiducial.core.registry import options_in
from fiducial.core.roles import Gate, Guard, Maker, Objective, Reward
from fiducial.core.run import follows

if TYPE_CHECKING:
    from fiducial.training.loop import TrainResult

TRAINING = ("fiducial.training.options", "TrainOptions")
"""Where the options of training stand; read from the file, so that help loads no torch."""


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


def make(job: Job) -> int:
    """Groups to train on, made from judged attempts."""
    attempts, left_out = _to_learn_from(job.values["attempts"], any_split=bool(job.values["any_split"]))
    if left_out:
        job.output.note(f"{left_out} attempts on goals that are kept for the proof were left out; --any-split takes them too")
    method = cast(Maker, job.method())
    with job.start() as run:
        lines = run.lines("groups", Group)
        with job.progress.task(job.card.name, total=len(attempts)) as task, closing(job.model()) as model:

            def keep(group: Group) -> None:
                lines.append(group)
                task.advance()

            groups = method.make(attempts, model, seed=job.values["seed"], sink=keep)
        if groups and not lines.path.exists():
            for group in groups:
                lines.append(group)
        job.log(run, "data", {"data": [_hash(groups)], "groups": len(groups), "attempts": len(attempts)})
    data = {"groups": len(groups), "attempts": len(attempts), "left_out": left_out, "file": lines.path, "folder": run.path}
    job.output.result(data, f"{len(groups)} groups from {len(attempts)} attempts: {lines.path}")
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
    from fiducial.core.run import Run

    is_file = Path(reference).is_file() or Path(reference).suffix == ".jsonl"
    within = "stages/find-*" if not is_file and Run.open(reference).facts.command == "loop" else "**"
    return records(reference, "attempts", Attempt, within=within)


def may_be_learnt_from(prompt: Prompt) -> bool:
    """Whether a prompt is not one of the shipped ones that are kept for the proof."""
    from fiducial.data.split import goal_text, split_of

    shipped = prompt.source == "fiducial" or prompt.source.startswith("fiducial ")
    return not shipped or split_of(goal_text(prompt)) == "repair"


def _hash(groups: Sequence[Group]) -> str:
    return digest([g.id for g in groups])


def groups_from(reference: str) -> list[Group]:
    """Groups from a file in any of the known layouts, or of a run."""
    from fiducial.data.formats import read_groups

    if Path(reference).is_file() or Path(reference).suffix:
        return read_groups(reference)
    return records(reference, "groups", Group)


def _training_options() -> list[click.Option]:
    from fiducial.app.cli import online

    text = "Groups to train on: a file (pairs, demonstrations, labels), or a run that made some; several are put together; or else --prompts."
    data = click.Option(["--data"], metavar="FILE|RUN", multiple=True, help=text)
    # every training option has a default or is found out from the data, so none is asked for
    return [data, *online.options(required=False), *[cast(click.Option, parameter(o)) for o in options_in(*TRAINING)]]


def align(job: Job) -> int:
    """A model trained on groups with the objective, or on its own samples where there are none; goes on from the last checkpoint when resumed."""
    from fiducial.app.cli import online
    from fiducial.core.config import resolve
    from fiducial.training import reportcard
    from fiducial.training.loop import TrainOptions, train
    from fiducial.training.reportcard import FreshSamples
    from fiducial.training.rewards import Mixture
    from fiducial.training.segments import scored

    if not job.values["data"]:
        return online.learn(job)
    online.refuse_options(job)
    groups = [group for reference in job.values["data"] for group in groups_from(reference)]
    if job.values["reward"]:
        groups = scored(groups, Mixture.of([online.part(spec) for spec in job.values["reward"]]))
    names = {o.name for o in options_in(*TRAINING)}
    options, _ = resolve(TrainOptions, flags={name: value for name, value in job.given.items() if name in names})
    objective = cast(Objective, job.method())
    if follows():
        with closing(job.local()) as model:
            train(model, groups, objective, options, folder=Path())
        return 0
    with job.start() as run:
        job.begun(run)
        stage = trained.begin(run, {"data": _hash(groups), "objective": [objective.name, objective.options()], "model": job.values["model"]})
        # what a model says that learns to score is not what it is for
        why = "the model was trained to score, and is not asked for answers" if "scores" in objective.reads else ""
        if options.from_scratch:
            why = "training began with random weights, and there is no model before it to compare with"
        with closing(job.local()) as model, trained.beginning(job, model, wanted=not why) as before, job.progress.task(job.card.name) as task:
            base = model.fingerprint
            watch = None if why else FreshSamples(model, trained.looked_at(), base=before, seed=options.seed)

            def report(step: int, steps: int, figures: dict[str, float]) -> None:
                run.metrics(figures, step=step)
                task.advance(1, figure=f"step {step} of {steps}, loss {figures['loss']:.4g}")

            stops = watch if options.watch_every else None
            result = train(model, groups, objective, options, folder=stage.folder("checkpoints"), report=report, watch=stops)
            folder, fingerprint = trained.save(run, model)
            figures = trained.look(job, watch, model, result.steps)
        card = reportcard.card(watch, figures, stop=result.stop, history=result.history, why=why)
        kept = trained.Kept(
            model.uri, base, [_hash(groups)], result.steps, result.planned, result.stop, f"{result.groups} groups", result.tokens, result.seconds
        )
        place = trained.finish(job, run, stage, kept, card, fingerprint)
    return report_training(job, result, f"run:{run.id}", folder, fingerprint, card, place)


def report_training(job: Job, result: TrainResult, uri: str, folder: Path, fingerprint: str, card: Mapping[str, Any], place: Path) -> int:
    """What came of a training run on data."""
    last = result.history[-1] if result.history else {}
    figures = {"steps": result.steps, "planned": result.planned, "groups": result.groups, "left_out": result.left_out, "tokens": result.tokens}
    figures["seconds"] = result.seconds
    data = {"model": uri, "fingerprint": fingerprint, "folder": folder, **figures, "stop": result.stop, "last": last, "verdict": card["verdict"], "card": place}
    lines = [uri, f"{result.steps} of {result.planned} steps on {result.groups} groups ({result.left_out} left out) in {result.seconds:.0f} s"]
    if result.stop:
        lines.append(f"stopped: {result.stop}")
    lines.append(", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step"))
    job.output.result(data, *lines, *trained.verdict(card))
    return job.done()


def _reward_options() -> list[click.Option]:
    return [click.Option(["--data"], metavar="FILE|RUN", required=True, help="Groups whose completions are scored: a file, or a run that made some.")]


def reward(job: Job) -> int:
    """Groups with a reward for each completion."""
    groups = groups_from(job.values["data"])
    method = cast(Reward, job.method())
    with job.start() as run:
        lines = run.lines("groups", Group)
        each: list[tuple[float | None, ...]] = []
        with job.progress.task(job.card.name, total=len(groups)) as task:
            for start in range(0, len(groups), 16):
                part = groups[start : start + 16]
                for group, rewards in zip(part, method.score(part), strict=True):
                    lines.append(group.model_copy(update={"rewards": rewards, "annotator": job.card.name}))
                    each.append(rewards)
                task.advance(len(part))
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


def _guard_options() -> list[click.Option]:
    return [
        click.Option(["--text"], multiple=True, help="A text of the user to check; may be repeated."),
        click.Option(["--prompts"], metavar="FILE", help="A file of prompts to check."),
    ]


def guard(job: Job) -> int:
    """Verdicts of a guard on conversations; 1 when it objects to one."""
    prompts = [Prompt(messages=user(text)) for text in job.values["text"] or ()]
    if job.values["prompts"]:
        from fiducial.data.load import prompts as read

        prompts += read(job.values["prompts"], expected="answer")
    if not prompts:
        raise ConfigError("there is nothing to check", hint="give --text TEXT or --prompts FILE")
    method = cast(Guard, job.method())
    table = Table(("verdict", "score", "text", "rationale"), title=job.card.name)
    with job.start() as run:
        verdicts = []
        for prompt in prompts:
            verdict, _ = method.check(prompt.messages)
            run.lines("verdicts", Verdict).append(verdict)
            verdicts.append(verdict)
            table.rows.append(
                (
                    verdict.label or verdict.outcome,
                    "-" if verdict.score is None else f"{verdict.score:.2f}",
                    one_line(prompt.text, 50),
                    one_line(verdict.rationale, 60),
                )
            )
    job.output.result({"verdicts": verdicts, "folder": run.path}, table)
    # what could not be judged is not let through either
    return job.done(any(v.outcome != "failure" for v in verdicts))


def _gate_options() -> list[click.Option]:
    return [
        click.Option(
            ["--evidence"], metavar="FILE|RUN", multiple=True, required=True, help="Figures to decide on: a file of evidence, or a run; may be repeated."
        ),
        click.Option(
            ["--base"],
            metavar="RUN",
            multiple=True,
            help="The same runs of attack and evaluate on the model before: what govern/release compares with. Attacks other than attack/direct must not "
            "have been trained on. May be repeated.",
        ),
    ]


def govern(job: Job) -> int:
    """The decision of a gate; 1 unless it is a pass."""
    after, before = job.values["evidence"], job.values["base"]
    evidence = _compared(before, after) if before else _each_once([e for reference in after for e in _evidence(reference)])
    decision = cast(Gate, job.method()).decide(evidence)
    with job.start() as run:
        for e in evidence:
            run.lines("evidence", Evidence).append(e)
        run.lines("decisions", Decision).append(decision)
        job.log(run, "gate", {"outcome": decision.outcome, "evidence": [e.id for e in evidence]})
    table = Table(("rule", "outcome", "reason"), [(c.rule, c.outcome, c.reason) for c in decision.checks])
    job.output.result(
        {"decision": decision, "evidence": len(evidence), "folder": run.path}, table, f"{decision.outcome}: {job.card.name} on {len(evidence)} figures"
    )
    return job.done(decision.outcome != "pass")


def _each_once(evidence: list[Evidence]) -> list[Evidence]:
    """The same list. Raises ConfigError for two figures of one name, since a gate could read either."""
    seen: dict[str, Evidence] = {}
    for e in evidence:
        if e.name in seen:
            where = f"{seen[e.name].source or 'a file'} and {e.source or 'a file'}"
            raise ConfigError(f"the evidence '{e.name}' is given twice, by {where}", hint="give --evidence with each figure once")
        seen[e.name] = e
    return evidence


def _compared(before: Sequence[str], after: Sequence[str]) -> list[Evidence]:
    """The figures that a loop measures before and after, from runs that measured them one by one."""
    from fiducial.app.evidence import evidence

    def found(references: Sequence[str]) -> tuple[list[Attempt], list[Score]]:
        measured = [_measured(r) for r in references]
        return [a for attempts, _ in measured for a in attempts], [s for _, scores in measured for s in scores]

    then, now = found(before), found(after)
    return evidence(then, now, {a.family for a in now[0]} - {"direct"}, source=", ".join(after))


def _measured(reference: str) -> tuple[list[Attempt], list[Score]]:
    """Attempts and scores of a run or a file, without those of its stages. Raises DataError when there are none."""
    found: dict[str, list[Any]] = {}
    for kind, record in (("attempts", Attempt), ("scores", Score)):
        try:
            found[kind] = records(reference, kind, record, within=".")
        except DataError:
            found[kind] = []
    if not any(found.values()):
        raise DataError(
            f"{reference}: there is nothing a gate could decide on", hint="give a run of attack or evaluate, a finished loop, or a file of evidence"
        )
    return found["attempts"], found["scores"]


def _evidence(reference: str) -> list[Evidence]:
    """Evidence as it was written, or else what the scores and attempts of a run amount to.

    Stages of a run are not summed up: those of a loop hold training material and several models.
    """
    try:
        return records(reference, "evidence", Evidence, within=".")
    except DataError:
        if Path(reference).is_file() or Path(reference).suffix == ".jsonl":
            raise
    attempts, scores = _measured(reference)
    return [*(_of_score(s, reference) for s in scores), *_of_attempts(attempts, reference)]


def _of_score(s: Score, source: str) -> Evidence:
    return Evidence(name=f"{s.suite}.{s.metric}", value=s.value, n=s.n, low=s.low, high=s.high, better=s.better, source=source)


def _of_attempts(attempts: Sequence[Attempt], source: str) -> Iterator[Evidence]:
    for name, harmful in (("harmful_compliance", True), ("benign_refusal", False)):
        rate = tally(a for a in attempts if (a.prompt.expected == "refuse") == harmful).rate
        if rate.n:
            low, high = rate.interval()
            yield Evidence(name=name, value=rate.value, n=rate.n, low=low, high=high, better="lower", source=source)


MAKER = Stage(make, _maker_options)
OBJECTIVE = Stage(align, _training_options, resumable=True)
REWARD = Stage(reward, _reward_options, takes_model=False)
GUARD = Stage(guard, _guard_options, takes_model=False)
GATE = Stage(govern, _gate_options, takes_model=False)
