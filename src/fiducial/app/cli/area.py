"""`fiducial AREA METHOD [MODEL]`: one command per method, made from its card. Nothing is edited to add one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import click
from click.core import ParameterSource

from fiducial.app.cli.commands import Command, Group, imported, output_of, runs_option
from fiducial.app.cli.job import DEFAULT_MODEL, Job, Stage, by_id, run_to_resume
from fiducial.app.cli.params import parameter
from fiducial.app.cli.progress import progress_for
from fiducial.app.model_options import REMOTE
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.registry import Card, options_in

if TYPE_CHECKING:
    from fiducial.app.cli.output import Output
    from fiducial.core.run import Run

STAGES = {
    "Attack": "fiducial.app.cli.finding:ATTACK",
    "Suite": "fiducial.app.cli.finding:SUITE",
    "Judge": "fiducial.app.cli.finding:JUDGE",
    "Inspector": "fiducial.app.cli.finding:INSPECTOR",
    "Maker": "fiducial.app.cli.making:MAKER",
    "Objective": "fiducial.app.cli.aligning:OBJECTIVE",
    "SampledObjective": "fiducial.app.cli.online:ONLINE",
    "Trainer": "fiducial.app.cli.trainer:TRAINER",
    "Reward": "fiducial.app.cli.making:REWARD",
    "Guard": "fiducial.app.cli.deciding:GUARD",
    "Gate": "fiducial.app.cli.deciding:GATE",
}
OWN = frozenset({"resume", "show_config", "exit_zero"})
"""Parameters that say what to do with the options, and are none themselves."""
MAY_CHANGE = frozenset({"threshold", "device", "minutes", "save_every", *REMOTE})
"""Options that leave what was recorded as it is."""


class AreaGroup(Group):
    """The methods of one area as commands."""

    kind: ClassVar[str] = "method"

    def __init__(self, area: str, **kwargs: Any) -> None:
        super().__init__(area, **kwargs)
        self._area = area

    def known(self) -> dict[str, str]:
        """Names without the area, with their first lines."""
        return {name.split("/")[1]: card.title for name, card in registry.methods().items() if card.area == self._area}

    def make(self, name: str) -> click.Command:
        """The command of one method."""
        return command(registry.card(f"{self._area}/{name}"))

    def sections(self) -> Iterable[tuple[str, Sequence[str]]]:
        """By what the methods are for."""
        roles: dict[str, list[str]] = {}
        for card in registry.methods().values():
            if card.area == self._area:
                roles.setdefault(card.role, []).append(card.name.split("/")[1])
        return [(f"{role}s", names) for role, names in sorted(roles.items())]


def stage_of(card: Card) -> Stage:
    """What is done with methods of the card's role; an objective that learns from its own samples alone takes no data."""
    stage: Stage = imported(STAGES["SampledObjective" if card.constants.get("on_policy") else card.role])
    return stage


def command(card: Card) -> click.Command:
    """The command of a method: its fields, then the options of its role that are not fields of the same name (one flag serves both)."""
    stage = stage_of(card)
    params: list[click.Parameter] = [click.Argument(["model"], default=DEFAULT_MODEL, required=False)] if stage.takes_model else []
    params += [parameter(option) for option in card.options]
    taken = {p.name for p in params}
    added = [*stage.options(), *(model_options() if stage.takes_model else [])]
    params += [p for p in added if p.name not in taken]
    params += [click.Option(["--exit-zero"], is_flag=True, help="Exit with 0 also when something was found.")]
    required = [p for p in params if isinstance(p, click.Option) and p.required]
    if stage.resumable:
        for option in required:
            # a resumed run has them already, so they are asked for in the callback
            option.required, option.help = False, f"{option.help} [required]"
        params.append(click.Option(["--resume"], metavar="RUN", help="Go on with this run, with its options."))
    params += [click.Option(["--show-config"], is_flag=True, help="Print the options with the origin of each, and stop."), runs_option()]
    return Command(card.name.split("/")[1], params=params, callback=_callback(card, required), help=_help(card), epilog=card.headings.get("Source"))


def model_options() -> list[click.Option]:
    """How MODEL is opened."""
    return [
        click.Option(["--dtype"], help="bfloat16, float16 or float32. [default: what the machine is fast at]"),
        click.Option(["--device"], help="cpu, cuda, cuda:1, mps. [default: the best there is]"),
        *(parameter(o) for o in options_in("fiducial.app.model_options", "ModelOptions") if o.name in REMOTE),
    ]


def _help(card: Card) -> str:
    # \f would cut a help text short, \b would keep it from being wrapped
    parts = [card.title, *(f"{name}: {text}" for name, text in card.headings.items() if name in ("What it does", "Use it when", "Limits"))]
    return "\n\n".join(parts).replace("\f", " ").replace("\b", " ")


def _callback(card: Card, required: list[click.Option]) -> Any:
    @click.pass_context
    def callback(context: click.Context, /, **params: Any) -> int:
        typed = {name: value for name, value in params.items() if context.get_parameter_source(name) is ParameterSource.COMMANDLINE and name not in OWN}
        resumed = _resumed(card, params.get("resume"), typed)
        for option in required if resumed is None else ():
            if option.name not in typed:
                raise click.MissingParameter(ctx=context, param=option)
        given = ({name: _tupled(value) for name, value in resumed.facts.given.items()} if resumed else {}) | typed
        job = prepare(card, given, output_of(context), resumed)
        job.exit_zero = params["exit_zero"]
        return _show(job, typed) if params["show_config"] else stage_of(card).perform(job)

    return callback


def prepare(card: Card, given: dict[str, Any], output: Output, resumed: Run | None = None) -> Job:
    """The job for what was given; the options of the role that were not get their defaults."""
    stage = stage_of(card)
    given = runs_by_id(card, given, before=resumed)
    added = [click.Argument(["model"], default=DEFAULT_MODEL, required=False), *stage.options(), *model_options()] if stage.takes_model else stage.options()
    defaults = click.Command(card.name, params=added).make_context(card.name, [], resilient_parsing=True).params
    values = {name: given.get(name, default) for name, default in defaults.items()}
    return Job(card, values, given, output, progress_for(quiet=output.quiet), resumed)


def runs_by_id(card: Card, given: Mapping[str, Any], *, before: Run | None = None) -> dict[str, Any]:
    """The options with every run by its id: see `by_id`. Options of the role that are plain values, such as a text to check, stay as they are."""
    places = {o.name: o.metavar.split("|") for o in stage_of(card).options() if o.name and o.metavar}
    named = {"model", *places, *(o.name for o in card.options)}
    return {name: by_id(value, bare="RUN" in places.get(name, ()), before=before) if name in named else value for name, value in given.items()}


def _resumed(card: Card, reference: str | None, typed: dict[str, Any]) -> Run | None:
    """The run to go on with. Raises ConfigError when it is another method's, or an option would change under it."""
    if reference is None:
        return None
    run = run_to_resume(reference, card.name)
    for name, value in runs_by_id(card, typed, before=run).items():
        stored = runs_by_id(card, {name: _tupled(run.facts.options.get(name))}, before=run)[name]
        if value != stored and name not in MAY_CHANGE:
            raise ConfigError(
                f"run {run.id} was started with {name} {stored!r}; it cannot go on with {value!r}", hint="leave the option out, or start a new run"
            )
    return run


def _tupled(value: Any) -> Any:
    """Lists as tuples: JSON knows only lists, and fields that hold several values are tuples."""
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value


def _show(job: Job, typed: dict[str, Any]) -> int:
    """Options as YAML that a recipe step accepts, with the origin of each."""
    from pydantic import RootModel

    from fiducial.core.config import show

    everything = job.everything()
    before = f"run {job.resumed.id}" if job.resumed else "default"
    origins: dict[tuple[str | int, ...], str] = {(name,): "command line" if name in typed else before for name in job.given}
    job.output.result({"options": everything, "given": typed}, show(RootModel[dict[str, Any]](everything), origins).rstrip("\n"))
    return 0
