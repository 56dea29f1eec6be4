"""What commands do with objectives: a model trained on groups, with its cards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fiducial.app.cli import trained
from fiducial.app.cli.job import Job, Stage
from fiducial.app.cli.making import groups_from, hash_of
from fiducial.app.cli.params import parameter
from fiducial.app.cli.plan import plan
from fiducial.app.cli.preview import preview
from fiducial.app.proving import proved
from fiducial.core.config import about
from fiducial.core.errors import ConfigError
from fiducial.core.registry import options_in
from fiducial.core.roles import Objective
from fiducial.core.run import follows

if TYPE_CHECKING:
    from fiducial.training.loop import TrainResult
    from fiducial.training.options import TrainOptions

TRAINING = ("fiducial.training.options", "TrainOptions")
"""Where the options of training stand; read from the file, so that help loads no torch."""


def _training_options() -> list[click.Option]:
    from fiducial.app.cli import online

    text = "Groups to train on: a file (pairs, demonstrations, labels), or a run that made some; several are put together; or else --prompts."
    data = click.Option(["--data"], metavar="FILE|RUN", multiple=True, help=text)
    text = "Show what would be learnt from, and what a step takes, and train nothing. [default: off]"
    look = click.Option(["--preview"], is_flag=True, help=text)
    text = "Show what training takes of memory, by parts, and what takes less: from the model's configuration, without its weights. [default: off]"
    planned = click.Option(["--plan"], is_flag=True, help=text)
    # every training option has a default or is found out from the data, so none is asked for
    return [data, *online.options(required=False), *[cast(click.Option, parameter(o)) for o in options_in(*TRAINING)], trained.prove(), look, planned]


def _ready(job: Job) -> None:
    """Raises ConfigError or DataError for options that cannot be used."""
    from fiducial.app.cli import online

    _refuse_looks(job)
    if not job.values["data"] and "data" not in job.later:
        online.ready(job)
        return
    online.refuse_options(job)
    with about("data"):
        for reference in job.values["data"]:
            groups_from(reference)
    with about("reward"):
        for spec in job.values["reward"]:
            online.part(spec)
    _training(job)
    trained.refuse_proof(job)


def _refuse_looks(job: Job) -> None:
    asked = _asked(job)
    if asked and job.output.captured is not None:
        raise ConfigError(f"--{asked} trains nothing, and a recipe's step is to be done", hint="leave it out of the recipe", key=(asked,))


def _training(job: Job) -> TrainOptions:
    from fiducial.core.config import resolve
    from fiducial.training.options import TrainOptions

    names = {o.name for o in options_in(*TRAINING)}
    return resolve(TrainOptions, flags={name: value for name, value in job.given.items() if name in names})[0]


def align(job: Job) -> int:
    """A model trained on groups with the objective, or on its own samples where there are none; goes on from the last checkpoint when resumed."""
    from fiducial.app.cli import online
    from fiducial.training import reportcard
    from fiducial.training.loop import train
    from fiducial.training.reportcard import FreshSamples
    from fiducial.training.rewards import Mixture
    from fiducial.training.segments import scored

    if not job.values["data"]:
        if asked := _asked(job):
            raise ConfigError(f"--{asked} is about data, and there is none", hint="give --data FILE")
        return online.learn(job)
    online.refuse_options(job)
    groups = [group for reference in job.values["data"] for group in groups_from(reference)]
    if job.values["reward"] and job.values["plan"]:
        raise ConfigError("--plan gives no rewards to groups", hint="leave out --reward, or give groups that have rewards", key=("plan",))
    if job.values["reward"]:
        groups = scored(groups, Mixture.of([online.part(spec) for spec in job.values["reward"]]))
    options = _training(job)
    objective = cast(Objective, job.method())
    if asked := _asked(job):
        return {"preview": preview, "plan": plan}[asked](job, groups, objective, options)
    # what a model says that learns to score is not what it is for
    why = "the model was trained to score, and is not asked for answers" if "scores" in objective.reads else ""
    if options.from_scratch:
        why = "training began with random weights, and there is no model before it to compare with"
    trained.refuse_proof(job, why=why)
    if follows():
        with closing(job.local()) as model:
            train(model, groups, objective, options, folder=Path())
        return 0
    with job.start() as run:
        job.begun(run)
        stage = trained.begin(run, {"data": hash_of(groups), "objective": [objective.name, objective.options()], "model": job.values["model"]})
        proof = trained.proof(job, run)
        with closing(job.local()) as model, trained.beginning(job, model, wanted=not why) as before:
            base = model.fingerprint
            watch = None if why else FreshSamples(model, trained.looked_at(), base=before, seed=options.seed)
            if proof:
                proof.ask("before", model)
            with trained.reporting(job, run) as report:
                stops = watch if options.watch_every else None
                result = train(model, groups, objective, options, folder=stage.folder("checkpoints"), report=report, watch=stops)
            folder, fingerprint = trained.save(run, model)
            figures = trained.look(job, watch, model, result.steps)
            if proof:
                proof.ask("after", model)
        card = trained.whole(proved(reportcard.card(watch, figures, result, why=why), proof), run)
        kept = trained.Kept(
            model.uri, base, [hash_of(groups)], result.steps, result.planned, result.stop, f"{result.groups} groups", result.tokens, result.seconds
        )
        place = trained.finish(job, run, stage, kept, card, fingerprint)
    return report_training(job, result, f"run:{run.id}", folder, fingerprint, card, place)


def _asked(job: Job) -> str:
    """Which look at a training is asked for in its place; none when empty. Raises ConfigError for both."""
    asked = [name for name in ("preview", "plan") if job.values[name]]
    if len(asked) > 1:
        raise ConfigError("--preview measures what --plan reckons", hint="give one of them")
    return next(iter(asked), "")


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


OBJECTIVE = Stage(align, _ready, _training_options, resumable=True)
