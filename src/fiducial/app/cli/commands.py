"""What every command has: the switches --json, --quiet and --debug, loading on demand, and nearest names for wrong ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import click

from fiducial.app.cli.output import Output
from fiducial.core.errors import nearest


class NoSuchName(click.UsageError):
    """A command, area or method that does not exist; `hint` offers the nearest."""

    def __init__(self, message: str, hint: str, ctx: click.Context) -> None:
        super().__init__(message, ctx)
        self.hint = hint


def switches() -> list[click.Parameter]:
    """Fresh options that every command accepts. Their values are read by `Output.of`, also when the rest does not parse."""
    return [
        click.Option(["--json"], is_flag=True, expose_value=False, help="Print one JSON object."),
        click.Option(["--quiet", "-q"], is_flag=True, expose_value=False, help="No progress and no remarks."),
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."),
    ]


class Command(click.Command):
    """A command with the common switches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(switches())


class Group(click.Group):
    """A group with the common switches whose subcommands are named in `known` and made by `make` when they are needed."""

    kind: ClassVar[str] = "command"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(switches())

    def known(self) -> dict[str, str]:
        """Names of the subcommands with a line about each."""
        return {name: command.get_short_help_str(100) for name, command in self.commands.items()}

    def make(self, name: str) -> click.Command | None:
        """The subcommand `name`."""
        return self.commands.get(name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The known names."""
        return list(self.known())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Made on demand; None when unknown."""
        return self.make(cmd_name) if cmd_name in self.known() else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises NoSuchName with the nearest name."""
        command = self.get_command(ctx, args[0])
        if command is None:
            raise NoSuchName(f"{ctx.command_path} has no {self.kind} '{args[0]}'", nearest(args[0], self.known()), ctx)
        return args[0], command, args[1:]

    def sections(self) -> Iterable[tuple[str, Sequence[str]]]:
        """Headings and the names under each, for --help."""
        return [(f"{self.kind.capitalize()}s", list(self.known()))]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sections, from the known lines: no subcommand is made for it."""
        known = self.known()
        for title, names in self.sections():
            if names:
                with formatter.section(title):
                    formatter.write_dl([(name, known[name]) for name in names])


def imported(target: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def output_of(context: click.Context) -> Output:
    """Where the command writes; an ordinary one when it is used without the root command."""
    return context.ensure_object(Output)


def runs_option() -> click.Option:
    """`--runs DIR`: for the time of the command, runs and the ledger live there."""
    return click.Option(
        ["--runs"], type=click.Path(file_okay=False), expose_value=False, callback=_use_runs, is_eager=True, help="Folder of runs [default: ./runs]"
    )


def _use_runs(context: click.Context, _: click.Parameter, value: str | None) -> None:
    import os

    if value is None:
        return
    before = os.environ.get("FIDUCIAL_RUNS")
    restore: Callable[[], Any] = (lambda: os.environ.pop("FIDUCIAL_RUNS", None)) if before is None else (lambda: os.environ.update(FIDUCIAL_RUNS=before))
    # models named `run:ID` and the ledger are found through the same variable
    os.environ["FIDUCIAL_RUNS"] = value
    output_of(context).runs = value
    context.call_on_close(restore)
