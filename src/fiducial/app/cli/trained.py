"""What every command that trained a model ends with: the model in the run's folder, its report card and model card, the stage, the ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fiducial.app.cli.job import Job
from fiducial.app.proving import LEAST, Proof
from fiducial.core.errors import ConfigError
from fiducial.core.run import masked, several
from fiducial.core.store import write_atomic

if TYPE_CHECKING:
    from fiducial.core.records import Conversation
    from fiducial.core.run import Run, Stage
    from fiducial.models.local import LocalModel
    from fiducial.training.reportcard import FreshSamples

LOOKED_AT = 20
"""Harmless requests that a model trained on data is asked before and after."""
LEFT_TO_OTHERS = {"harmful compliance": "check", "over-refusal": "check", "capability": "evaluate multiple_choice"}
"""What a training run measures when it is asked to, and the command that does afterwards."""
ON_MODEL_CARDS = {"harmful compliance": "harmful compliance", "over-refusal": "refusal of harmless requests", "capability": "general capability"}
"""The same as model cards call it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is said of a training run besides its figures."""

    base: str
    """How the model that was trained is opened."""
    base_fingerprint: str
    data: list[str]
    """Hashes of what was learnt from."""
    steps: int
    planned: int
    stop: str
    learnt_from: str
    """For example `12 groups`."""
    tokens: int
    """That the network saw in training."""
    seconds: float
    """That training took."""
    log: Mapping[str, Any] = field(default_factory=dict)
    """More for the ledger."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those of another library's loop."""


def prove() -> click.Option:
    """The option that every kind of training has."""
    text = "Ask so many held-out goals (35 or more, as far as there are such), their twins, ordinary prompts and the capability items before and after "
    text += "training, for the report card; with 100 a rate is known to about ten points. [default: 0, not measured]"
    return click.Option(["--prove"], type=click.IntRange(min=0), default=0, metavar="N", help=text)


def refuse_proof(job: Job, *, why: str = "") -> None:
    """Raises ConfigError where --prove asks too little, or where `why` says that the model cannot be asked. For use before there is a run."""
    count = job.values["prove"]
    if 0 < count < LEAST:
        raise ConfigError(f"--prove {count} asks too little to measure anything", hint=f"give {LEAST} or more; with 100 a rate is known to about ten points")
    if count and (why or several()):
        raise ConfigError(f"--prove asks the model before and after training, but {why or 'several processes train here'}", hint="leave it out")


def proof(job: Job, run: Run) -> Proof | None:
    """What --prove asks; None without it."""
    return Proof(run, job.values["prove"], seed=int(job.values.get("seed") or 0), progress=job.progress) if job.values["prove"] else None


@contextmanager
def reporting(job: Job, run: Run) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """What a loop on data is given to report its steps by: the figures go into the run, the step and the loss into the progress."""
    with job.progress.task(job.card.name) as task:

        def report(step: int, steps: int, figures: dict[str, float]) -> None:
            run.metrics(figures, step=step)
            task.advance(1, figure=f"step {step} of {steps}, loss {figures['loss']:.4g}")

        yield report


def begin(run: Run, inputs: Mapping[str, Any], name: str = "train") -> Stage:
    """The stage of the work. Raises ConfigError where a resumed run would go on with other inputs; secrets are neither kept nor compared."""
    plain = masked(inputs)
    place, text = run.path / "inputs.json", json.dumps(plain, indent=1, sort_keys=True) + "\n"
    if place.is_file() and place.read_text(encoding="utf-8") != text:
        raise ConfigError(f"the data or the configuration of run {run.id} has changed since it began", hint="put it back, or start a new run")
    write_atomic(place, text)
    return run.stage(name, plain)


def looked_at() -> Sequence[Conversation]:
    """Shipped ordinary requests of the validation split, which nothing is trained on."""
    from fiducial.data.load import ordinary
    from fiducial.data.split import split

    return [p.messages for p in split(ordinary())["validation"][:LOOKED_AT]]


@contextmanager
def beginning(job: Job, model: LocalModel, *, wanted: bool) -> Iterator[LocalModel | None]:
    """The model that training begins with, opened once more where it carries an adapter: that adapter trains, and what lies below it is another model.

    None where there is no adapter, or no model is `wanted`.
    """
    from fiducial.models import adapters

    if not wanted or not adapters.is_adapted(model.module):
        yield None
        return
    with closing(job.local()) as again:
        yield again


def save(run: Run, model: LocalModel) -> tuple[Path, str]:
    """Puts the model where `run:ID` finds it; its folder and fingerprint."""
    folder = model.save(run.path / "model")
    return folder, model.fingerprint


def look(job: Job, watch: FreshSamples | None, model: LocalModel, step: int) -> dict[str, float]:
    """Figures of the trained model on fresh samples. Where all weights were trained, the model as it was is opened again to compare with."""
    from fiducial.models import adapters
    from fiducial.models.local import LocalModel

    if watch is None:
        return {}
    if watch.reference is not None or adapters.is_adapted(model.module):
        return watch(step, model)[0]
    with closing(job.white_box()) as base:
        assert isinstance(base, LocalModel)
        watch.reference = base
        return watch(step, model)[0]


def whole(card: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The report card with what this run has not measured, and the commands that do."""
    from fiducial.training import reportcard

    unknown = {name: f"measure it with: fiducial {how} run:{run.id}" for name, how in LEFT_TO_OTHERS.items() if name not in _known(card)}
    if card.get("looks") == []:
        unknown["held-out groups"] = "hold some out of training, and measure on them; our own trainers do with --held-out 0.1"
    return reportcard.unmeasured(card, unknown)


def finish(job: Job, run: Run, stage: Stage, kept: Kept, card: Mapping[str, Any], fingerprint: str) -> Path:
    """Writes the cards beside a saved model, and finishes stage and ledger. The place of the report card."""
    from fiducial.core.records import Evidence, digest
    from fiducial.training import modelcard

    place = run.path / "card.json"
    known = _known(card)
    about = {
        "run": run.id,
        "method": job.card.name,
        "options": digest(masked(run.facts.options)),
        "seed": kept.settings.get("seed", run.facts.seed),
        "versions": run.facts.versions,
        "data": kept.data,
        "base": kept.base_fingerprint,
        "model": fingerprint,
        "tokens": kept.tokens,
        "seconds": kept.seconds,
        "cpu_seconds_of_the_process": round(time.process_time(), 1),
    }
    text = json.dumps(_finite({**card, "about": about}), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(place, text + "\n")
    facts = modelcard.Facts(
        run=run.facts,
        method=job.card.name,
        base=kept.base,
        base_fingerprint=kept.base_fingerprint,
        fingerprint=fingerprint,
        data=kept.data,
        steps=f"{kept.steps} of {kept.planned} steps on {kept.learnt_from}" + (f"; stopped: {kept.stop}" if kept.stop else ""),
        figures=[Evidence(**figure) for figure in card["figures"]],
        settings=kept.settings,
        rules={name: (rule["outcome"], rule["sentence"]) for name, rule in card["rules"].items()},
        measured=frozenset(said for name, said in ON_MODEL_CARDS.items() if name in known),
    )
    modelcard.write(run.path / "model", facts)
    stage.finish({"fingerprint": fingerprint, "steps": kept.steps, "planned": kept.planned, "stop": kept.stop, "verdict": card["verdict"]})
    job.log(run, "train", {"base": kept.base_fingerprint, "model": fingerprint, "data": kept.data, **kept.log})
    return place


def verdict(card: Mapping[str, Any]) -> list[str]:
    """The rules and what they come to, as lines."""
    rules = (f"{name}: {rule['outcome']} ({rule['sentence']})" for name, rule in card["rules"].items())
    return [*rules, *card.get("remarks", ()), f"report card: {card['says']}"]


def _known(card: Mapping[str, Any]) -> set[str]:
    """Names of the rules that were measured."""
    return {name for name, rule in card["rules"].items() if rule["outcome"] != "not measured"}


def _finite(value: Any) -> Any:
    """The same with null for what is no finite number, which JSON does not know."""
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, inf_nan_mode="null")
