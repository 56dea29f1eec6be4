"""`fiducial run recipe.yaml`: several steps, each a method with its options; finished steps are not done again.

    fiducial: 1
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

`step:NAME` stands for the run of an earlier step: as a model, the model it trained. A step without a name has its method's. As an option
`recipe:model` is the recipe's model, for example as a judge that stays what it is.

A step may be a block of steps instead, done for several rounds, each with the model that the last training step of the round before made:

      - name: adversarial
        rounds: 3
        steps:
          - {method: attack/persona, options: {split: repair, twins: false}}
          - {name: repairs, method: align/failure_pairs, options: {attempts: step:attack/persona}}
          - {name: trained, method: align/sft, options: {data: step:repairs}}

Inside, `step:NAME` is the step of the same round; afterwards `step:adversarial` is the last round's training, and `step:adversarial/1/trained`
that of the first. With `stop: {step: found, figure: harmful compliance, below: 0.05}` a block ends after the round in which the figure of that step
is so, with `against: NAME` in the place of the bound after one in which it was not clearly better than in the round before (in the first: than in the
earlier step NAME); `stop` may be a list of such rules. Names of the rounds that are left out then mean the last one that was done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import click
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from fiducial.app.cli.area import command, prepare, runs_by_id, stage_of
from fiducial.app.cli.commands import Command, output_of, runs_option
from fiducial.app.cli.job import DEFAULT_MODEL, by_id, run_to_resume
from fiducial.app.cli.output import Output, Table
from fiducial.app.cli.params import from_recipe, parameter
from fiducial.app.cli.progress import Progress, progress_for
from fiducial.app.cli.runs import figures
from fiducial.app.cli.stopping import Stop, reason
from fiducial.core import registry
from fiducial.core.config import about
from fiducial.core.errors import ConfigError, FiducialError, nearest
from fiducial.core.records import digest
from fiducial.core.run import Run
from fiducial.core.store import write_atomic

REFERENCE = "step:"
MODEL = "recipe:model"
"""As an option: the model of the recipe."""
SHIPPED = Path(__file__).parent.parent / "recipes"
"""Recipes that come along, by the names of their files."""


class Step(BaseModel):
    """One step of a recipe: a method with its options, or a block of steps that is done for several rounds."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    method: str = ""
    """Its full name, for example attack/gcg."""
    name: str = ""
    """What later steps call it."""
    model: str | None = None
    """Where the recipe's model is not meant. Of a block, the model that its first round begins with."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method and of its role, as on the command line."""
    steps: list[Step] = Field(default_factory=list)
    """The steps of a block, in place of a method."""
    rounds: int = Field(default=1, ge=1)
    """How often the steps of a block are done."""
    stop: list[Stop] = Field(default_factory=list)
    """When a block ends before that: one rule, or a list of which any ends it."""
    _key: tuple[str | int, ...] = PrivateAttr(())
    """Where it stands in the recipe."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value] if value else []

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

    @model_validator(mode="after")
    def _keys(self) -> Self:
        for number, step in enumerate(self.steps):
            step._key = ("steps", number)
            for place, inner in enumerate(step.steps):
                inner._key = (*step._key, "steps", place)
        return self


@click.command("run", cls=Command, params=[runs_option()])
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", metavar="RUN", help="Go on with this run; finished steps whose options did not change are kept.")
@click.option("--show-config", is_flag=True, help="Print the recipe with the origin of each value, and stop.")
@click.option("--exit-zero", is_flag=True, help="Exit with 0 also when a step found something.")
@click.pass_context
def run(context: click.Context, recipe: str, overrides: tuple[str, ...], resume: str | None, show_config: bool, exit_zero: bool) -> int:
    """Run the steps of RECIPE one after the other. A step that finds something does not stop the next.

    RECIPE is a file, or one that comes along: adversarial_training (attack, collect, repair, repeat), constitutional_ai (revisions, then a
    policy rewarded by AI preferences), iterated_dpo (graded answers, round by round), persistence (does safety training remove a planted
    trigger?), self_alignment (principles, engraved and cloned), sft_dpo_exo (from demonstrations to preferences, measured and gated).
    """
    from fiducial.core.config import given, load_recipe, located, override, resolve, show

    output = output_of(context)
    data, marks = load_recipe(_place(recipe), hint="see: fiducial run sft_dpo_exo --show-config")
    loaded, origins = resolve(Recipe, (data, marks), overrides)
    with located(marks, override(data, overrides)[1]):
        steps = flat(loaded)
        _check(loaded, steps)
    if show_config:
        output.result({"options": loaded}, show(loaded, origins, recipe=True).rstrip("\n"))
        return 0
    resumed = run_to_resume(resume, "run") if resume else None
    loaded, steps = loaded.model_copy(update={"model": by_id(loaded.model, before=resumed)}), [_by_id(step, resumed) for step in steps]
    if resumed is None:  # what was done once need not be possible again
        with located(marks, override(data, overrides)[1]):
            _ready(loaded, steps)
    whole = resumed or Run.create("run", loaded.model_dump(mode="json"), given(loaded, origins), loaded.seed)
    output.run, output.resume = whole.id, output.to_resume(["run", recipe, *overrides], whole.id)
    progress = progress_for(quiet=output.quiet)
    with whole, progress.task("steps", total=len(steps)) as task:
        made: dict[str, dict[str, Any]] = {}
        instead: dict[str, str] = {}
        for number, step in enumerate(steps):
            if step.label in instead:
                made[step.label] = made[instead[step.label]]
            else:
                progress.note(f"step {step.label}")
                made[step.label] = _step(whole, loaded, number, step, made, output, progress)
                instead |= _left_out(loaded, step.label, made, progress)
            task.advance(1, figure=step.label)
        made = {label: r for label, r in made.items() if label not in instead}
    table = Table(("step", "method", "run", "exit code"), [(label, r["method"], r["run"], str(r["exit_code"])) for label, r in made.items()])
    measured = list(_measured(made))
    output.result({"steps": [{"name": label, **r} for label, r in made.items()], "figures": measured}, table, *_curve(measured), run=whole.id)
    return 0 if exit_zero else max((r["exit_code"] for r in made.values()), default=0)


def _place(recipe: str) -> Path:
    """The file, or the recipe of that name that comes along."""
    shipped = SHIPPED / f"{recipe}.yaml"
    return shipped if shipped.is_file() and not Path(recipe).exists() else Path(recipe)


def flat(recipe: Recipe) -> list[Step]:
    """The steps in the order in which they are done: blocks written out round by round, with the names that their references mean.

    Raises ConfigError for a step that is neither a method nor a block, and for rounds in which nothing is trained.
    """
    steps: list[Step] = []
    known: dict[str, str] = {}
    for step in recipe.steps:
        if bool(step.method) == bool(step.steps):
            raise ConfigError(f"the step '{step.label}' needs a method or steps, and not both", hint="a step is `- method: attack/direct`", key=step._key)
        if not step.steps:
            if step.stop:
                raise ConfigError(f"the step '{step.label}' has no rounds to stop", hint="stop belongs to a block of steps", key=(*step._key, "stop"))
            steps.append(_renamed(step, known))
            continue
        _check_stops(step, [s.label for s in steps])
        done = list(_rounds(step, known))
        known[step.name] = next((s.label for s in reversed(done) if _trains(s)), done[-1].label)
        steps += done
    return steps


def _rounds(block: Step, known: Mapping[str, str]) -> Iterator[Step]:
    """The steps of a block, round by round."""
    trained = [step.label for step in block.steps if step.method and _trains(step)]
    if not block.name or block.options or any(step.steps for step in block.steps):
        hint = "{name: repair, rounds: 3, steps: [...]}"
        raise ConfigError(f"the block '{block.label}' needs a name, and neither options nor blocks inside", hint=hint, key=block._key)
    if block.rounds > 1 and not trained:
        why = "nothing in these steps trains, so that every round would be the same"
        raise ConfigError(f"{block.name}: {why}", hint="leave out rounds", key=(*block._key, "rounds"))
    model = _rename(block.model, known)
    for number in range(1, block.rounds + 1):
        own = {step.label: f"{block.name}/{number}/{step.label}" for step in block.steps}
        for step in block.steps:
            yield _renamed(step, {**known, **own}).model_copy(update={"name": own[step.label]} | ({} if step.model else {"model": model}))
        model = f"{REFERENCE}{own[trained[-1]]}" if trained else model


def _check_stops(block: Step, earlier: Sequence[str]) -> None:
    """Raises ConfigError for a rule that names no step of the block, not one bound, or a step to begin with that is none of the `earlier` ones."""
    for stop in block.stop:
        if stop.step not in [s.label for s in block.steps] or stop.rules != 1:
            hint = "{step: NAME, figure: NAME, above: 0.2}, with a step of the block, and one of above, below and against"
            raise ConfigError(f"{block.name}: stop names no step of the block, or not one bound", hint=hint, key=(*block._key, "stop"))
        if stop.against and stop.against not in earlier:
            raise ConfigError(
                f"{block.name}: stop is against '{stop.against}', but no step before the block has that name",
                hint=nearest(stop.against, earlier),
                key=(*block._key, "stop"),
            )


def _trains(step: Step) -> bool:
    return _card(step).role in ("Objective", "Trainer")


def _card(step: Step) -> registry.Card:
    with about(*step._key, "method"):
        return registry.card(step.method)


def _renamed(step: Step, names: Mapping[str, str]) -> Step:
    return step.model_copy(update={"model": _rename(step.model, names), "options": {k: _rename(v, names) for k, v in step.options.items()}})


def _rename(value: Any, names: Mapping[str, str]) -> Any:
    """References to `names` under their full names."""
    if isinstance(value, list):
        return [_rename(v, names) for v in value]
    if isinstance(value, dict):
        return {k: _rename(v, names) for k, v in value.items()}
    return f"{REFERENCE}{names[name]}" if (name := _referenced(value)) in names else value


def _by_id(step: Step, resumed: Run | None) -> Step:
    """The step with every run that is not one of the recipe's own by its id."""
    options = runs_by_id(registry.card(step.method), step.options, before=resumed)
    return step.model_copy(update={"model": by_id(step.model, before=resumed), "options": options})


def _check(recipe: Recipe, steps: Sequence[Step]) -> None:
    """Everything that can be wrong with the names and options, before the first step runs."""
    labels: list[str] = []
    for step in steps:
        model = ((*step._key, "model") if step.model else ("model",), step.model or recipe.model)
        for key, value in [model, *(((*step._key, "options", name), value) for name, value in step.options.items())]:
            missing = next((v for v in _each(value) if _referenced(v) and _referenced(v) not in labels), None)
            if missing:
                hint = nearest(_referenced(missing), labels) if labels else "this is the first step"
                raise ConfigError(f"{step.label}: {key[-1]} is '{missing}', but no earlier step has that name", hint=hint, key=key)
        if step.label in labels:
            raise ConfigError(f"two steps are called '{step.label}'", hint="give one a name of its own with name: ...", key=(*step._key, "name"))
        _converted(step, {k: v for k, v in step.options.items() if not any(map(_referenced, _each(v)))})
        labels.append(step.label)
    if not labels:
        raise ConfigError("the recipe has no steps", hint="a step is `- method: attack/direct`")


def _ready(recipe: Recipe, steps: Sequence[Step]) -> None:
    """What each step would object to an hour later, but for what depends on the steps before it: values of options, data, names of models."""
    base, seen = recipe.model or DEFAULT_MODEL, set()
    for step in steps:
        card, model = _card(step), step.model or recipe.model
        later = frozenset(name for name, value in step.options.items() if any(map(_referenced, _each(value))))
        given = _converted(step, {name: _resolved(value, {}, base) for name, value in step.options.items() if name not in later})
        key = digest([card.name, given, sorted(later), model])
        if key in seen:  # rounds of a block are alike
            continue
        seen.add(key)
        with _of(step, "options"):
            job = prepare(card, given, Output(quiet=True, captured={}))
            job.later = later
            if later.isdisjoint(o.name for o in card.options):
                job.method()
            stage_of(card).ready(job)
        if model and not _referenced(model) and stage_of(card).takes_model:
            with _of(step, "model") if step.model else about("model"):
                job.openable(model)


@contextmanager
def _of(step: Step, part: str) -> Iterator[None]:
    """An error inside is about this part of the step, and says which step that is."""
    with about(*step._key, part):
        try:
            yield
        except FiducialError as error:
            said = error.message.removeprefix("command line: ")  # where options of training come from that are no recipe's
            error.message = said if said.startswith(step.label) else f"{step.label}: {said}"
            raise


def _each(value: Any) -> Iterator[Any]:
    """The single values in lists and mappings."""
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _each(inner)
    else:
        yield value


def _converted(step: Step, options: dict[str, Any]) -> dict[str, Any]:
    """Options under the rules of the flags. Raises ConfigError for one that the method does not have, or a value that does not fit."""
    card = _card(step)
    known = {p.name: p for p in command(card).params if p.name and p.expose_value and p.name not in ("model", "resume", "show_config", "exit_zero")}
    context = click.Context(click.Command(card.name))
    who = step.label if step.label.endswith(card.name) else f"{step.label}: {card.name}"  # a step without a name is called like its method
    converted = {}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{who} has no option '{name}'", hint=nearest(name, known), key=(*step._key, "options", name))
        try:
            converted[name] = from_recipe(known[name], value, context)
        except click.BadParameter as error:
            hint = f"see: fiducial explain {card.name}"
            raise ConfigError(f"{step.label}: {name}: {error.message}", hint=hint, key=(*step._key, "options", name)) from error
    needed = [p for p in (*map(parameter, card.options), *stage_of(card).options()) if p.required]
    missing = [p.name for p in needed if p.name not in step.options]
    if missing:
        hint = f"see: fiducial {card.name.replace('/', ' ')} --help"
        raise ConfigError(f"{who} needs the option '{missing[0]}'", hint=hint, key=(*step._key, "options"))
    return converted


def _step(whole: Run, recipe: Recipe, number: int, step: Step, made: dict[str, dict[str, Any]], output: Output, progress: Progress) -> dict[str, Any]:
    """Does one step in a run of its own, or takes over what was done with the same inputs; its summary."""
    card = registry.card(step.method)
    base = recipe.model or DEFAULT_MODEL
    options = {k: _resolved(v, made, base) for k, v in step.options.items()}
    model = _resolved(step.model or recipe.model, made, base)
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
    result = (inner.captured or {}).get("data")
    # what the recipe has trained the model on so far: its own tokens, and those of the steps that made the model it began with
    before = next((r["tokens"] for r in made.values() if model == f"run:{r['run']}"), 0)
    tokens = before + ((result or {}).get("tokens") or 0) if stage_of(card).takes_model else None
    return stage.finish({"method": card.name, "run": inner.run, "exit_code": code, "tokens": tokens, "result": result})


def _left_out(recipe: Recipe, label: str, made: Mapping[str, Mapping[str, Any]], progress: Progress) -> dict[str, str]:
    """When `label` ends a round after which its block stops: the steps of later rounds, with those of this one that they stand for."""
    for block in (b for b in recipe.steps if b.stop):
        for number in range(1, block.rounds):  # after the last round there is nothing left to stop
            if label != f"{block.name}/{number}/{block.steps[-1].label}":
                continue
            why = next(filter(None, (reason(stop, block.name, number, made) for stop in block.stop)), "")
            if not why:
                return {}
            progress.note(f"{block.name} ends after round {number}: {why}")
            later = range(number + 1, block.rounds + 1)
            return {f"{block.name}/{n}/{s.label}": f"{block.name}/{number}/{s.label}" for n in later for s in block.steps}
    return {}


def _measured(made: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every figure of every step, with its interval, after how many tokens of training; None for steps that ask no model."""
    for label, step in made.items():
        for name, figure in figures(Run.open(step["run"])):
            yield {"step": label, "tokens": step["tokens"], "figure": name} | {k: getattr(figure, k) for k in ("value", "low", "high", "n")}


def _curve(measured: Sequence[Mapping[str, Any]]) -> list[Table]:
    columns = ("step", "tokens trained", "figure", "value", "95 % interval", "n")
    table = Table(columns, title="figures", right=frozenset({columns[1], *columns[3:]}))
    for m in measured:
        trained = "-" if m["tokens"] is None else str(m["tokens"])
        table.rows.append((m["step"], trained, m["figure"], f"{m['value']:.3g}", f"{m['low']:.3g} to {m['high']:.3g}", str(m["n"])))
    return [table] if measured else []


def _resolved(value: Any, made: dict[str, dict[str, Any]], base: str) -> Any:
    """The value with `run:ID` in the place of `step:NAME`, good for a model and for whatever takes a run, and `base` in that of `recipe:model`."""
    if isinstance(value, list):
        return [_resolved(v, made, base) for v in value]
    if isinstance(value, dict):
        return {k: _resolved(v, made, base) for k, v in value.items()}
    if value == MODEL:
        return base
    name = _referenced(value)
    return f"run:{made[name]['run']}" if name else value


def _referenced(value: Any) -> str:
    """The NAME of `step:NAME`; empty for any other value."""
    return value.removeprefix(REFERENCE) if isinstance(value, str) and value.startswith(REFERENCE) else ""
