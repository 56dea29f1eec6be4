"""What commands do with methods that decide: guards over texts, gates over evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import click

from fiducial.app.cli.finding import Item
from fiducial.app.cli.job import Job, Stage, records
from fiducial.app.cli.output import Table, one_line
from fiducial.app.measure import Measured, tally
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Attempt, Decision, Evidence, Prompt, Score, Verdict, user
from fiducial.core.roles import Gate, Guard


def _guard_options() -> list[click.Option]:
    return [
        click.Option(["--text"], multiple=True, help="A text of the user to check; may be repeated."),
        click.Option(["--prompts"], metavar="FILE", help="A file of prompts to check."),
    ]


def _to_check(job: Job) -> list[Prompt]:
    """Texts and prompts. Raises ConfigError where there are none, DataError for a file that cannot be read."""
    prompts = [Prompt(messages=user(text)) for text in job.values["text"] or ()]
    if job.values["prompts"]:
        from fiducial.data.load import prompts as read

        prompts += read(job.values["prompts"], expected="answer")
    if not prompts and job.later.isdisjoint({"text", "prompts"}):
        raise ConfigError("there is nothing to check", hint="give --text TEXT or --prompts FILE")
    return prompts


def guard(job: Job) -> int:
    """Verdicts of a guard on conversations; 1 when it objects to one."""
    prompts = _to_check(job)
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


def _to_weigh(job: Job) -> list[Evidence]:
    """The evidence; none yet where earlier steps are to measure it."""
    after, before = job.values["evidence"], job.values["base"]
    if job.later & {"evidence", "base"}:
        return []
    return _compared(before, after) if before else _each_once([e for reference in after for e in _evidence(reference)])


def govern(job: Job) -> int:
    """The decision of a gate; 1 unless it is a pass."""
    evidence = _to_weigh(job)
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

    def found(references: Sequence[str]) -> Measured:
        some = [_measured(r) for r in references]
        return Measured([a for m in some for a in m.attempts], [s for m in some for s in m.scores], [item for m in some for item in m.answers])

    then, now = found(before), found(after)
    return evidence(then, now, {a.family for a in now.attempts} - {"direct"}, source=", ".join(after))


def _measured(reference: str) -> Measured:
    """Attempts, scores and whole answers of a run or a file, without those of its stages. Raises DataError when there are none."""
    found: dict[str, list[Any]] = {}
    for kind, record in (("attempts", Attempt), ("scores", Score), ("items", Item)):
        try:
            found[kind] = records(reference, kind, record, within=".")
        except DataError:
            found[kind] = []
    if not any(found.values()):
        raise DataError(
            f"{reference}: there is nothing a gate could decide on", hint="give a run of attack or evaluate, a finished loop, or a file of evidence"
        )
    items = [item.model_dump() for item in found["items"]]
    return Measured(found["attempts"], found["scores"], [item for item in items if "repetition" in item])


def _evidence(reference: str) -> list[Evidence]:
    """Evidence as it was written, or else what the scores and attempts of a run amount to.

    Stages of a run are not summed up: those of a loop hold training material and several models.
    """
    try:
        return records(reference, "evidence", Evidence, within=".")
    except DataError:
        if Path(reference).is_file() or Path(reference).suffix == ".jsonl":
            raise
    measured = _measured(reference)
    return [*(_of_score(s, reference) for s in measured.scores), *_of_attempts(measured.attempts, reference)]


def _of_score(s: Score, source: str) -> Evidence:
    return Evidence(name=f"{s.suite}.{s.metric}", value=s.value, n=s.n, low=s.low, high=s.high, better=s.better, source=source)


def _of_attempts(attempts: Sequence[Attempt], source: str) -> Iterator[Evidence]:
    for name, harmful in (("harmful_compliance", True), ("benign_refusal", False)):
        rate = tally(a for a in attempts if (a.prompt.expected == "refuse") == harmful).rate
        if rate.n:
            low, high = rate.interval()
            yield Evidence(name=name, value=rate.value, n=rate.n, low=low, high=high, better="lower", source=source)


GUARD = Stage(guard, _to_check, _guard_options, takes_model=False)
GATE = Stage(govern, _to_weigh, _gate_options, takes_model=False)
