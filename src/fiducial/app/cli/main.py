"""The command `fiducial`. Subcommands are loaded when they are called: help imports neither models nor methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

import fiducial
from fiducial.app.cli.boundary import Program
from fiducial.app.cli.commands import imported

JOBS = {
    "loop": ("fiducial.app.cli.jobs:loop", "Find weaknesses, repair them, prove the repair, gate, report."),
    "check": ("fiducial.app.cli.jobs:check", "Find weaknesses only, and report."),
    "run": ("fiducial.app.cli.recipe:run", "Run the steps of a recipe."),
}
RECORDS = {
    "methods": ("fiducial.app.cli.methods:methods", "List methods."),
    "explain": ("fiducial.app.cli.methods:explain", "Say what a method does, and its options."),
    "cite": ("fiducial.app.cli.methods:cite", "BibTeX of the methods that a run used."),
    "runs": ("fiducial.app.cli.runs:runs", "List runs."),
    "report": ("fiducial.app.cli.runs:report", "Path of a run's report."),
    "compare": ("fiducial.app.cli.runs:compare", "Compare the figures of two runs."),
    "log": ("fiducial.app.cli.log:log", "The ledger: verify it, show it, trace a model."),
    "annotations": ("fiducial.app.cli.annotations:combine", "Combine the labels of several annotators."),
    "model": ("fiducial.app.cli.model:model", "The embedded model."),
}
AREAS = {
    "attack": "Try to obtain harmful answers.",
    "evaluate": "Measure capability and safety on fixed items.",
    "oversee": "Judge answers.",
    "audit": "Look into a model.",
    "align": "Make training data, train.",
    "guard": "Stand between a user and a model.",
    "deliberate": "Collect and combine the views of people.",
    "govern": "Decide from evidence.",
}


class Root(Program):
    """All commands, by section."""

    def known(self) -> dict[str, str]:
        """Jobs, areas that are installed, records."""
        home = Path(fiducial.__file__).parent
        areas = {name: text for name, text in AREAS.items() if (home / name).is_dir()}
        return {n: t for n, (_, t) in JOBS.items()} | areas | {n: t for n, (_, t) in RECORDS.items()}

    def sections(self) -> Iterable[tuple[str, Sequence[str]]]:
        """Three sections."""
        known = self.known()
        return [("Jobs", list(JOBS)), ("Areas (fiducial AREA METHOD [MODEL])", [a for a in AREAS if a in known]), ("Records", list(RECORDS))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Areas that only a plug-in fills are not in the help, but they are there."""
        return self.make(cmd_name) if cmd_name in AREAS else super().get_command(ctx, cmd_name)

    def make(self, name: str) -> click.Command:
        """Imports the module of one command."""
        if name in AREAS:
            return imported("fiducial.app.cli.area:AreaGroup")(name, help=AREAS[name])
        return imported((JOBS | RECORDS)[name][0])


def _version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        context.obj.result({"version": fiducial.__version__}, f"fiducial {fiducial.__version__}")
        context.exit()


cli = Root(
    name="fiducial",
    help="Find the weaknesses of a language model, repair them, prove the repair, gate and report.",
    epilog="Exit codes: 0 done, 1 a gate refused or a weakness was found, 2 could not run, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    params=[click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")],
)


def main() -> None:
    """Entry point of the console script."""
    cli.main()
