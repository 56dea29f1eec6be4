"""What `fiducial align` does with a method that brings a training loop of its own: the same run as ours, around another library's training."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fiducial.app.cli import trained
from fiducial.app.cli.aligning import report_training
from fiducial.app.cli.job import Job, Stage
from fiducial.app.cli.making import groups_from
from fiducial.app.making import named_files
from fiducial.app.proving import proved
from fiducial.core.config import about
from fiducial.core.errors import ConfigError, DataError, ModelError
from fiducial.core.roles import Trainer

if TYPE_CHECKING:
    from fiducial.core.records import Group
    from fiducial.core.run import Run


def _options() -> list[click.Option]:
    text = "What to train on, in the library's own columns: a file, or a run that made groups. [default: what the configuration names]"
    return [click.Option(["--data"], metavar="FILE|RUN", help=text), trained.prove()]


def _named(job: Job) -> Trainer:
    """The method; MODEL and data that only its configuration names become those of the job. Raises ConfigError for options that cannot be used."""
    for name, field in (("dtype", "dtype=bfloat16"), ("device", "use_cpu=true")):
        if job.given.get(name) is not None and not job.resumed:
            hint = f"set its field, such as --override {field}"
            raise ConfigError(f"--{name} says nothing to {job.card.name}, which opens the model itself", hint=hint, key=(name,))
    method = cast(Trainer, job.method())
    named = method.usual()
    job.values |= {name: job.given.get(name) or named.get(name) or job.values[name] for name in ("model", "data")}
    if not job.values["data"] and "data" not in job.later:
        raise ConfigError("there is nothing to train on", hint="give --data FILE, or name a file in the configuration")
    trained.refuse_proof(job)
    return method


def _ready(job: Job) -> None:
    if job.later.isdisjoint({o.name for o in job.card.options}):
        _named(job)
    if job.values["data"]:
        with about("data"):
            _source(job)


def train(job: Job) -> int:
    """A model trained by another library; goes on from that library's last checkpoint when resumed."""
    from fiducial.core.store import hash_file
    from fiducial.models.local import LocalModel
    from fiducial.training import lora
    from fiducial.training.reportcard import FreshSamples, card

    method = _named(job)
    source = _source(job)
    with job.start() as run:
        job.begun(run)
        data = source if isinstance(source, Path) else _written(run, source)
        hashed = hash_file(data)
        inputs = {"data": hashed, "options": method.options(), "files": named_files(method.options()), "model": job.values["model"]}
        stage = trained.begin(run, inputs)
        proof = trained.proof(job, run)
        with closing(job.white_box()) as model:
            if not isinstance(model, LocalModel):
                raise ModelError(f"'{model.uri}' cannot be trained", hint="give smollm2, a folder, or a model of the hub")
            base = model.fingerprint
            model.module = lora.merge(model.module)  # an adapter is a part of what is trained on from
            watch = FreshSamples(model, trained.looked_at())
            if proof:
                proof.ask("before", model)
            with trained.reporting(job, run) as report:
                made, result, settings = method.train(model, data, folder=stage.folder("checkpoints"), report=report)
            folder, _ = trained.save(run, made)
            why = "the model was trained to score, and is not asked for answers" if made.head is not None else ""
            made.close()
        with closing(job.white_box(f"run:{run.id}")) as again:  # as everyone will open it, without what the library put around it
            assert isinstance(again, LocalModel)
            fingerprint, figures = again.fingerprint, {} if why else trained.look(job, watch, again, result.steps)
            if proof and not why:
                proof.ask("after", again)
        found = trained.whole(proved(card(None if why else watch, figures, result, why=why), proof, why=why), run)
        rows, cost = f"{result.groups} rows", (result.tokens, result.seconds)
        kept = trained.Kept(model.uri, base, [hashed], result.steps, result.planned, result.stop, rows, *cost, settings=settings)
        place = trained.finish(job, run, stage, kept, found, fingerprint)
    return report_training(job, result, f"run:{run.id}", folder, fingerprint, found, place)


def _source(job: Job) -> Path | list[Group]:
    """The data file that is named, or the groups of the run that is; those of a resumed run are as they were when it began."""
    reference = job.values["data"]
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    if path.suffix or "/" in reference:
        raise DataError(f"there is no file {reference}, and data sets of the hub are not fetched", hint="download it first, and give --data FILE")
    kept = job.resumed.path / "data" / "groups.jsonl" if job.resumed else None
    return kept if kept is not None and kept.is_file() else groups_from(reference)


def _written(run: Run, groups: list[Group]) -> Path:
    """Groups in the columns that training libraries read."""
    from fiducial.data.formats import write_groups

    target = run.folder("data") / "groups.jsonl"
    write_groups(target, groups)
    return target


TRAINER = Stage(train, _ready, _options, resumable=True)
