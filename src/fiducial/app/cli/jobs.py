"""`fiducial loop` and `fiducial check`: commands whose options are one pydantic model, given as `key.sub=value`, flags or a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, get_origin

import click

from fiducial.app.cli.commands import Command, imported, output_of, runs_option
from fiducial.app.cli.job import by_id, run_to_resume
from fiducial.app.cli.output import Output, Table
from fiducial.app.cli.params import default_text
from fiducial.app.cli.progress import progress_for
from fiducial.core.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fiducial.core.config import Marks
    from fiducial.core.run import Run

ASSIGNMENT = re.compile(r"[A-Za-z_][\w.-]*=")
FLAGS = ("minutes", "seed", "goals")
"""Options of the model that also have a flag of their own."""


class Outcome(Protocol):
    """What a runner returns."""

    exit_code: int
    lines: Sequence[str | Table]
    """The result for people."""
    data: dict[str, Any]
    """The result for --json."""


class OptionsCommand(Command):
    """A command whose help lists the fields of a pydantic model, which is imported only then."""

    def __init__(self, *args: Any, model_path: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._model_path = model_path

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Every key with its default and description."""
        with formatter.section("Keys (KEY=VALUE, or in a recipe)"):
            formatter.write_dl(list(keys(imported(self._model_path))))


def keys(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, description with default) of every option, nested sections included."""
    from pydantic import BaseModel

    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{before}{name}.")
        else:
            default = "required" if info.is_required() else f"default: {default_text(info.get_default(call_default_factory=True))}"
            yield f"{before}{name}", f"{' '.join((info.description or '').split())} [{default}]".strip()


def options_command(name: str, model_path: str, ready_path: str, runner_path: str, text: str, *, budgeted: bool = True) -> click.Command:
    """The command `name`. `model_path`, `ready_path` and `runner_path` are `module:attribute`, imported when they are needed.

    The runner is called as `runner(options, run, progress)` inside the run and returns an Outcome. Before that, and before there is a run,
    `ready(options)` raises for what cannot be used.
    """
    params: list[click.Parameter] = [
        click.Argument(["words"], nargs=-1, metavar="[MODEL] [KEY=VALUE]..."),
        *([click.Option(["--minutes"], type=float, help="Time to spend.")] if budgeted else []),
        click.Option(["--seed"], type=int),
        click.Option(["--goals"], metavar="FILE", help="Goals to use in place of those that come along."),
        click.Option(["--recipe"], metavar="FILE", help="YAML file with options; the command line goes first."),
        click.Option(["--resume"], metavar="RUN", help="Go on with this run, with its options."),
        click.Option(["--show-config"], is_flag=True, help="Print the options with the origin of each, and stop."),
        click.Option(["--exit-zero"], is_flag=True, help="Exit with 0 also when a gate refused or a weakness was found."),
        runs_option(),
    ]

    @click.pass_context
    def callback(context: click.Context, /, **values: Any) -> int:
        return _perform(name, imported(model_path), (ready_path, runner_path), output_of(context), values)

    return OptionsCommand(name, params=params, callback=callback, help=text, model_path=model_path)


def _perform(name: str, model: type[BaseModel], paths: tuple[str, str], output: Output, values: dict[str, Any]) -> int:
    from fiducial.core.config import given, load_recipe, located, resolve, show
    from fiducial.core.run import Run

    uri, overrides = _split(values["words"])
    flags = {flag: values[flag] for flag in FLAGS if flag in values} | {"model": uri}
    resumed = run_to_resume(values["resume"], name) if values["resume"] else None
    if resumed is not None and values["recipe"]:
        raise ConfigError("--recipe and --resume cannot go together", hint="a resumed run has its options; change single ones with KEY=VALUE")
    recipe = _stored(resumed) if resumed else load_recipe(values["recipe"], hint=f"see: fiducial {name} --show-config") if values["recipe"] else None
    options, origins = resolve(model, recipe, [_listed(model, word) for word in overrides], flags)
    options = model.model_validate(by_id(options.model_dump(exclude_unset=True), before=resumed))
    asked = given(options, origins)
    if values["show_config"]:
        output.result({"options": options, "given": asked}, show(options, origins, recipe=True).rstrip("\n"))
        return 0
    ready, runner = map(imported, paths)
    with located(recipe[1] if recipe else {}, [key for key, origin in origins.items() if origin == "command line"]):
        ready(options)
    run = resumed or Run.create(name, options.model_dump(mode="json"), asked, int(getattr(options, "seed", 0)))
    output.run, output.resume = run.id, output.to_resume([name], run.id)
    progress = progress_for(quiet=output.quiet)
    progress.note(f"run {run.id}")
    with run:
        if resumed:
            run.revise(options.model_dump(mode="json"), asked, int(getattr(options, "seed", 0)))
        outcome: Outcome = runner(options, run, progress)
    output.result(outcome.data, *outcome.lines)
    return 0 if values["exit_zero"] else outcome.exit_code


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model, if one is named, and the assignments."""
    overrides = [w for w in words if ASSIGNMENT.match(w)]
    models = [w for w in words if not ASSIGNMENT.match(w)]
    if len(models) > 1:
        raise ConfigError(f"'{models[1]}' is neither MODEL nor KEY=VALUE", hint=f"the model is '{models[0]}'; options are written train.epochs=3")
    return (models[0] if models else None), overrides


def _listed(model: type[BaseModel], assignment: str) -> str:
    """`attacks=a,b` as `attacks=[a,b]` where the option holds several values; anything else as it is."""
    key, _, value = assignment.partition("=")
    kind: Any = model
    for name in key.split("."):
        fields = getattr(kind, "model_fields", {})
        kind = fields[name].annotation if name in fields else None
    return f"{key}=[{value}]" if get_origin(kind) is tuple and value.strip() and not value.lstrip().startswith("[") else assignment


def _stored(run: Run) -> tuple[dict[str, Any], Marks]:
    """The options that a run was started with, as a recipe; those the user set then are marked with the run as their origin."""
    return run.facts.given, {(): f"run {run.id}", **dict.fromkeys(_paths(run.facts.given, ()), f"run {run.id}")}


def _paths(value: Any, key: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield (*key, name)
        yield from _paths(inner, (*key, name))


loop = options_command(
    "loop",
    "fiducial.app.loop_options:LoopOptions",
    "fiducial.app.loop_setup:LoopSetup",
    "fiducial.app.loop:run_loop",
    "Find the weaknesses of MODEL (the embedded one by default), repair them, prove the repair on held-out goals and attacks, decide at a gate, and report.",
)
check = options_command(
    "check",
    "fiducial.app.check:CheckOptions",
    "fiducial.app.check:ready",
    "fiducial.app.check:run_check",
    "Find the weaknesses of MODEL (the embedded one by default), and report. Exit code 1 when there are some.",
    budgeted=False,
)
