"""One piece of work of one method: its options as plain values, its model, its run. The same for a flag, a recipe and a resumed run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fiducial.app.cli.output import Output
from fiducial.app.cli.params import default, shape
from fiducial.app.cli.progress import NoProgress, Progress
from fiducial.app.model_options import opening
from fiducial.core import registry
from fiducial.core.errors import ConfigError, DataError, ModelError
from fiducial.core.records import Record
from fiducial.core.registry import Card, Option

if TYPE_CHECKING:
    from fiducial.core.roles import Method
    from fiducial.core.run import Run
    from fiducial.models.base import Model, WhiteBox
    from fiducial.models.local import LocalModel

R = TypeVar("R", bound=Record)

DEFAULT_MODEL = "smollm2"
RUN = re.compile(r"(run:|)(\S+)")
"""A reference to a run."""


@dataclass(slots=True)
class Job:
    """What a stage is given. `values` has every option of the role; `given` what was set by the user, for the role and the method alike."""

    card: Card
    values: dict[str, Any]
    given: dict[str, Any]
    output: Output = field(default_factory=Output)
    progress: Progress = field(default_factory=NoProgress)
    resumed: Run | None = None
    exit_zero: bool = False
    later: frozenset[str] = frozenset()
    """Options that an earlier step of a recipe is to give, and that are not there yet: only for `Stage.ready`."""
    _run: Run | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method: the given ones, and for a method that must be named the usual one."""
        own = {o.name for o in self.card.options}
        return _usual(self.card) | {name: value for name, value in self.given.items() if name in own}

    def method(self) -> Method:
        """The method, with every method that it takes as an option created too."""
        return made(self.card, self.options)

    def model(self) -> Model:
        """The model named by MODEL."""
        return self._open(self.values["model"])

    def white_box(self, uri: str | None = None) -> WhiteBox:
        """The model (or the one at `uri`), whose weights are needed. Raises ModelError when they are not here."""
        from fiducial.models.base import WhiteBox

        model = self.model() if uri is None else self._open(uri)
        if not isinstance(model, WhiteBox):
            raise ModelError(f"{self.card.name} looks into the model, but the weights of '{model.uri}' are not here", hint="give a model that runs here")
        return model

    def local(self) -> LocalModel:
        """The model, to be trained. Raises ModelError for one that cannot be."""
        from fiducial.models.local import LocalModel

        model = self.white_box()
        if not isinstance(model, LocalModel):
            raise ModelError(f"'{model.uri}' cannot be trained", hint="give smollm2, a folder, or a model of the hub")
        return model

    def _open(self, uri: str) -> Model:
        """With the options of the command for how to open it; an option that has no meaning for the model is an error."""
        from fiducial.models.open import open as opened

        return opened(uri, **opening(self.values))

    def openable(self, uri: str) -> None:
        """Raises ModelError or ConfigError where `uri` leads to no model, or to none with the options of the command."""
        from fiducial.models.open import ready

        ready(uri, **opening(self.values))

    def everything(self) -> dict[str, Any]:
        """Every option of the method and of its role, as plain values."""
        return {o.name: default(o) for o in self.card.options} | self.values | self.given

    def start(self) -> Run:
        """The run, made at the first call (or the one that is resumed). Raises ModelError, and makes none, where MODEL leads to no model."""
        from fiducial.core.run import Run

        if self._run is None and self.resumed is None and "model" in self.values:
            self.openable(self.values["model"])
        if self._run is None:
            self._run = self.resumed or Run.create(self.card.name, self.everything(), self.given, int(self.values.get("seed") or 0))
            self.output.run = self._run.id
            self.output.note(f"run {self._run.id}")
        return self._run

    def log(self, run: Run, kind: str, body: Mapping[str, Any]) -> None:
        """Enters an event of this run into the ledger, once, however often the run is taken up again."""
        from fiducial.app.cli.log import ledger

        stage = run.stage(f"ledger-{kind}", body)
        if not stage.done:
            event = ledger().append(kind, {**body, "method": self.card.name, "run": run.id}, once=True)
            stage.finish({"number": event.number})

    def begun(self, run: Run) -> None:
        """For use first inside `with run:`: an interruption names the command that goes on, and options that were changed at a resume are kept."""
        self.output.resume = self.output.to_resume(self.card.name.split("/"), run.id)
        if self.resumed is not None:
            run.revise(self.everything(), self.given, int(self.values.get("seed") or 0))

    def done(self, objected: bool = False) -> int:
        """The exit code of work that was done: 1 when something was found and --exit-zero was not given."""
        return int(objected and not self.exit_zero)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a command does with the methods of one role."""

    perform: Callable[[Job], int]
    """Does the work, prints the result, returns the exit code."""
    ready: Callable[[Job], object]
    """Raises what `perform` would for options that cannot be used, as far as that is known before earlier steps of a recipe are done. Changes nothing."""
    options: Callable[[], list[click.Option]] = list
    """Options that the role adds to those of the method."""
    takes_model: bool = True
    resumable: bool = False


def made(card: Card, options: Mapping[str, Any]) -> Method:
    """The method with these options, and with every method that it takes as an option created too."""
    return registry.create(card.name, _created(card.options, _usual(card) | dict(options)))


def _usual(card: Card) -> dict[str, Any]:
    return {o.name: default(o) for o in card.options if o.required and default(o) is not None}


def named(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method `name` with `options`, made when it is used."""
    return registry.create(name, options)


def _created(fields: tuple[Option, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Names replaced by methods where a field's annotation is a role."""
    created = dict(options)
    for option in fields:
        kind = shape(option.type)
        if not kind.role or created.get(option.name) is None:
            continue
        value = created[option.name]
        created[option.name] = tuple(made(registry.card(v), {}) for v in value) if kind.many else made(registry.card(value), {})
    return created


def records(reference: str, name: str, record: type[R], *, within: str = "**") -> list[R]:
    """Records from a JSON Lines file, or all files `<name>.jsonl` of a run in folders that match `within`. Raises DataError when there are none."""
    from fiducial.core.store import Lines

    path = Path(reference)
    if path.is_file():
        files = [path]
    elif path.suffix == ".jsonl":
        raise DataError(f"{path}: there is no such file", hint="check the path, or give a run")
    else:
        files = sorted(f for f in run_or_file(reference).path.glob(f"{within}/{name}.jsonl") if ".aside-" not in str(f))
    found = [r for file in files for r in Lines(file, record).read()]
    if not found:
        raise DataError(f"{reference}: there are no {name}", hint=f"give a file with {name}, or a run that made some (see: fiducial runs)")
    return found


def run_or_file(reference: str) -> Run:
    """The run that is named where a file may be named too, and is not there. Raises ConfigError that says both."""
    from fiducial.core.run import Run

    try:
        return Run.open(reference)
    except ConfigError as error:
        if reference.startswith("run:"):
            raise
        raise ConfigError(f"there is no file {reference}, and {error.message}", hint=error.hint) from error


def by_id(value: Any, *, bare: bool = False, before: Run | None = None) -> Any:
    """The value, with every run that it names (as `run:REFERENCE`, with `bare` also without) named by its id, in lists and mappings too.

    Asked for before a run is made: `last` would be that run. Where only a model can be meant (not `bare`), it is the last run that trained
    one. A file or folder stays what it is. With `before` it is as when that run began.
    Raises ConfigError for `run:REFERENCE` where there is no such run.
    """
    from fiducial.core.run import Run

    if isinstance(value, Mapping):
        return {name: by_id(inner, before=before) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(by_id(inner, bare=bare, before=before) for inner in value)
    scheme, reference = RUN.fullmatch(value).groups() if isinstance(value, str) and RUN.fullmatch(value) else ("", "")
    if not (scheme or bare) or not reference or Path(reference).exists():
        return value
    try:
        return scheme + Run.open(reference, before=before, trained=not bare).id
    except ConfigError:
        if scheme:
            raise
        return value  # whoever reads it says what it is not


def run_to_resume(reference: str, command: str) -> Run:
    """The run of `command` to go on with; `last` is the last one of this command. Raises ConfigError when it is of another."""
    from fiducial.core.run import Run

    if reference == "last":
        reference = next((run.id for run in reversed(Run.all()) if run.facts.command == command), reference)
    run = Run.open(reference)
    if run.facts.command != command:
        raise ConfigError(f"run {run.id} is of {run.facts.command}, not of {command}", hint=f"fiducial {run.facts.command.replace('/', ' ')} --resume {run.id}")
    return run


def positive(value: float | int | None, name: str) -> None:
    """Raises ConfigError for a number that is not positive; None is allowed."""
    if value is not None and not value > 0:
        raise ConfigError(f"--{name} is {value}", hint="it must be above 0", key=(name.replace("-", "_"),))
