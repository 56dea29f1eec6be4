"""`fiducial run recipe.yaml`: several steps, each a method with its options; finished steps are not done again.

    model: smollm2
    steps:
      - method: attack/persona
        options: {split: repair, limit: 20}
      - name: pairs
        method: align/failure_pairs
        options: {attempts: step:attack/persona}
      - name: trained
        method: align/dpo
        options: {data: step:pairs, epochs: 2}
      - method: attack/persona
        model: step:trained

`step:NAME` stands for the run of an earlier step: as a model, the model it trained. A step without a name has its method's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ConfigDict, Field

from fiducial.app.cli.area import command, prepare, stage_of
from fiducial.app.cli.commands import Command, output_of, runs_option
from fiducial.app.cli.job import run_to_resume
from fiducial.app.cli.output import Output, Table
from fiducial.app.cli.params import from_recipe, parameter
from fiducial.app.cli.progress import Progress, progress_for
from fiducial.core import registry
from fiducial.core.errors import ConfigError, nearest
from fiducial.core.records import digest
from fiducial.core.run import Run
from fiducial.core.store import write_atomic

REFERENCE = "step:"


class Step(BaseModel):
    """One step of a recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    method: str
    """Its full name, for example attack/gcg."""
    name: str = ""
    """What later steps call it."""
    model: str | None = None
    """Where the recipe's model is not meant."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method and of its role, as on the command line."""

    @property
    def label(self) -> str:
        """The name, or else the method."""
        return self.name or self.method


class Recipe(BaseModel):
    """A recipe of steps."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    steps: list[Step]
    model: str | None = None
    """Model of the steps that name none."""
    seed: int = 0
    """Seed of the steps that set none."""


@click.command("run", cls=Command, params=[runs_option()])
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", metavar="RUN", help="Go on with this run; finished steps whose options did not change are kept.")
@click.option("--show-config", is_flag=True, help="Print the recipe with the origin of each value, and stop.")
@click.option("--exit-zero", is_flag=True, help="Exit with 0 also when a step found something.")
@click.pass_context
def run(context: click.Context, recipe: str, overrides: tuple[str, ...], resume: str | None, show_config: bool, exit_zero: bool) -> int:
    """Run the steps of RECIPE one after the other. A step that finds something does not stop the next."""
    from fiducial.core.config import given, load_recipe, resolve, show

    output = output_of(context)
    loaded, origins = resolve(Recipe, load_recipe(recipe), overrides)
    _check(loaded)
    if show_config:
        output.result({"options": loaded}, show(loaded, origins).rstrip("\n"))
        return 0
    whole = run_to_resume(resume, "run") if resume else Run.create("run", loaded.model_dump(mode="json"), given(loaded, origins), loaded.seed)
    output.run, output.resume = whole.id, output.to_resume(["run", recipe, *overrides], whole.id)
    progress = progress_for(quiet=output.quiet)
    with whole, progress.task("steps", total=len(loaded.steps)) as task:
        made: dict[str, dict[str, Any]] = {}
        for number, step in enumerate(loaded.steps):
            progress.note(f"step {step.label}")
            made[step.label] = _step(whole, loaded, number, made, output, progress)
            task.advance(1, figure=step.label)
    table = Table(("step", "method", "run", "exit code"), [(label, r["method"], r["run"], str(r["exit_code"])) for label, r in made.items()])
    output.result({"steps": [{"name": label, **r} for label, r in made.items()]}, table, run=whole.id)
    return 0 if exit_zero else max((r["exit_code"] for r in made.values()), default=0)


def _check(recipe: Recipe) -> None:
    """Everything that can be wrong with the names and options, before the first step runs."""
    labels: list[str] = []
    for step in recipe.steps:
        for name, value in [("model", step.model or recipe.model), *step.options.items()]:
            wanted = _referenced(value)
            if wanted and wanted not in labels:
                hint = nearest(wanted, labels) if labels else "this is the first step"
                raise ConfigError(f"{step.label}: {name} is '{value}', but no earlier step has that name", hint=hint)
        if step.label in labels:
            raise ConfigError(f"two steps are called '{step.label}'", hint="give one a name of its own with name: ...")
        _converted(step, {k: v for k, v in step.options.items() if not _referenced(v)})
        labels.append(step.label)
    if not labels:
        raise ConfigError("the recipe has no steps", hint="a step is `- method: attack/direct`")


def _converted(step: Step, options: dict[str, Any]) -> dict[str, Any]:
    """Options under the rules of the flags. Raises ConfigError for one that the method does not have, or a value that does not fit."""
    card = registry.card(step.method)
    known = {p.name: p for p in command(card).params if p.name and p.expose_value and p.name not in ("model", "resume", "show_config", "exit_zero")}
    context = click.Context(click.Command(card.name))
    converted = {}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{step.label}: {card.name} has no option '{name}'", hint=nearest(name, known))
        try:
            converted[name] = from_recipe(known[name], value, context)
        except click.BadParameter as error:
            raise ConfigError(f"{step.label}: {name}: {error.message}", hint=f"see: fiducial explain {card.name}") from error
    needed = [p for p in (*map(parameter, card.options), *stage_of(card).options()) if p.required]
    missing = [p.name for p in needed if p.name not in step.options]
    if missing:
        raise ConfigError(f"{step.label}: {card.name} needs the option '{missing[0]}'", hint=f"see: fiducial {card.name.replace('/', ' ')} --help")
    return converted


def _step(whole: Run, recipe: Recipe, number: int, made: dict[str, dict[str, Any]], output: Output, progress: Progress) -> dict[str, Any]:
    """Does one step in a run of its own, or takes over what was done with the same inputs; its summary."""
    step = recipe.steps[number]
    card = registry.card(step.method)
    options = {k: _resolved(v, made) for k, v in step.options.items()}
    model = _resolved(step.model or recipe.model, made, model=True)
    inputs = {"method": card.name, "options": options, "model": model, "seed": recipe.seed, "code": digest(Path(card.path).read_text(encoding="utf-8"))}
    stage = whole.stage(f"{number}-{card.name.replace('/', '-')}", inputs)
    if stage.done:
        return stage.result
    given = _converted(step, options)
    if model is not None and stage_of(card).takes_model:
        given["model"] = model
    if any(p.name == "seed" for p in command(card).params):
        given.setdefault("seed", recipe.seed)
    # one object on stdout: a step's own result goes into the summary
    inner = replace(output, captured={})
    begun = stage.folder(".") / "run"
    resumed = Run.open(begun.read_text(encoding="utf-8")) if stage_of(card).resumable and begun.exists() else None
    job = prepare(card, given, inner, resumed)
    job.progress = progress
    write_atomic(begun, job.start().id)
    code = stage_of(card).perform(job)
    return stage.finish({"method": card.name, "run": inner.run, "exit_code": code, "result": (inner.captured or {}).get("data")})


def _resolved(value: Any, made: dict[str, dict[str, Any]], *, model: bool = False) -> Any:
    """`step:NAME` as the id of its run; as a model, `run:ID`."""
    name = _referenced(value)
    if not name:
        return value
    return f"run:{made[name]['run']}" if model else made[name]["run"]


def _referenced(value: Any) -> str:
    """The NAME of `step:NAME`; empty for any other value."""
    return value.removeprefix(REFERENCE) if isinstance(value, str) and value.startswith(REFERENCE) else ""
