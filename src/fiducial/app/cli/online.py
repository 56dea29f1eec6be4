"""What `fiducial align` does when it is given prompts and rewards instead of data: the model learns from its own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fiducial.app.cli import trained
from fiducial.app.cli.aligning import TRAINING
from fiducial.app.cli.job import Job, Stage, made
from fiducial.app.cli.making import groups_from, may_be_learnt_from
from fiducial.app.cli.output import Table
from fiducial.app.cli.params import Yaml, parameter
from fiducial.app.proving import proved
from fiducial.core import registry
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Group, Prompt, digest
from fiducial.core.registry import options_in
from fiducial.core.roles import Objective, Reward
from fiducial.core.run import follows

if TYPE_CHECKING:
    from fiducial.training.constraint import Multiplier
    from fiducial.training.online import OnlineResult
    from fiducial.training.online_options import OnlineOptions
    from fiducial.training.online_task import Task
    from fiducial.training.options import TrainOptions
    from fiducial.training.rewards import Part

SAMPLING = ("fiducial.training.online_options", "OnlineOptions")


def options(*, required: bool) -> list[click.Option]:
    """The options of learning from samples, without those of training."""
    asked = "Prompts to answer: a file, `shipped`, or refuse=FILE and comply=FILE to say what a good model does with them; may be repeated."
    scored = "What answers (or the parts of what --data gives) are scored by: a method, module:function, or {reward: NAME, weight: 0.5, name: x, ...}; "
    scored += "may be repeated, weight 0 is only watched."
    kept = "A reward whose higher values are worse, held below a limit: NAME or {reward: NAME, limit: 0, ...}."
    return [
        click.Option(["--prompts"], metavar="FILE", multiple=True, required=required, help=asked),
        click.Option(["--reward"], type=Yaml(), metavar="NAME|MODULE:FUNCTION", multiple=True, required=required, help=scored),
        click.Option(["--cost"], type=Yaml(), metavar="NAME|MODULE:FUNCTION", help=kept),
        click.Option(["--demonstrations"], metavar="FILE|RUN", help="Groups whose preferred completions are imitated besides."),
        *[parameter(o) for o in options_in(*SAMPLING)],
    ]


def _options() -> list[click.Option]:
    return [*options(required=True), *[parameter(o) for o in options_in(*TRAINING)], trained.prove()]


def refuse_options(job: Job) -> None:
    """Raises ConfigError for an option about samples in a command that learns from data."""
    own = {o.name for o in job.card.options}
    for name in ("prompts", "cost", "demonstrations", *(o.name for o in options_in(*SAMPLING))):
        if name in job.given and name not in own:
            raise ConfigError(f"--{name.replace('_', '-')} is about samples, but --data says what to learn from", hint="leave out the one or the other")


def ready(job: Job) -> None:
    """Raises ConfigError or DataError for options that cannot be used."""
    _options_of_both(job)
    if job.later.isdisjoint({"prompts", "reward", "cost", "demonstrations"}):
        _task(job)
    trained.refuse_proof(job)


def _options_of_both(job: Job) -> tuple[TrainOptions, OnlineOptions]:
    """How to train, and how to sample."""
    from fiducial.core.config import resolve
    from fiducial.training.online_options import OnlineOptions
    from fiducial.training.options import TrainOptions

    return resolve(TrainOptions, flags=_given(job, TRAINING))[0], resolve(OnlineOptions, flags=_given(job, SAMPLING))[0]


def learn(job: Job) -> int:
    """A model that has learnt from what it said to prompts; goes on from the last checkpoint when resumed."""
    from fiducial.training.online import learn as trained_by
    from fiducial.training.online_card import card
    from fiducial.training.online_task import bounds

    training, online = _options_of_both(job)
    task = _task(job)
    objective = cast(Objective, job.method())
    data = digest([p.id for p in task.prompts])
    trained.refuse_proof(job)
    if follows():
        with closing(job.local()) as model:
            trained_by(model, task, objective, training, online, folder=Path())
        return 0
    with job.start() as run:
        job.begun(run)
        what = {"prompts": data, "objective": [objective.name, objective.options()], "rewards": _plain(task), "model": job.values["model"]}
        stage = trained.begin(run, what | ({"demonstrations": digest([group.id for group in task.demonstrations])} if task.demonstrations else {}))
        proof = trained.proof(job, run)
        with closing(job.local()) as model:
            base = model.fingerprint
            if proof:
                proof.ask("before", model)
            lines = run.lines("groups", Group)
            known = {group.id for group in lines.read()}

            def keep(group: Group) -> None:
                if group.id not in known:  # a resumed run draws the groups since its checkpoint again
                    known.add(group.id)
                    lines.append(group)

            with job.progress.task(job.card.name) as progress:

                def report(step: int, steps: int, figures: dict[str, float]) -> None:
                    run.metrics(figures, step=step)
                    progress.advance(1, figure=f"step {step} of {steps}, reward {figures['reward']:.4g}, KL {figures['k3']:.3g}")

                result = trained_by(model, task, objective, training, online, folder=stage.folder("checkpoints"), report=report, sink=keep)
            folder, fingerprint = trained.save(run, model)
            if proof:
                proof.ask("after", model)
        # under a cost limit the model may be that of an earlier step, and what came later says nothing about it
        ended = result.best.step if result.best else result.steps
        seen = [figures for figures in result.history if figures["step"] <= ended]
        found = trained.whole(proved(card(seen, result.before, result.after, bounds(task, online), stop=result.stop), proof), run)
        learnt_from, more = f"{result.answers} answers to {result.prompts} prompts", {"rewards": _plain(task)}
        if result.best:
            found |= {"weights_of_step": ended}
            learnt_from, more = f"{learnt_from}; the weights are those of step {ended}", more | {"weights_of_step": ended}
        kept = trained.Kept(model.uri, base, [data], result.steps, result.planned, result.stop, learnt_from, result.tokens, result.seconds, more)
        place = trained.finish(job, run, stage, kept, found, fingerprint)
    return _report(job, f"run:{run.id}", result, task, folder, fingerprint, found, place)


def _given(job: Job, where: tuple[str, str]) -> dict[str, Any]:
    names = {o.name for o in options_in(*where)}
    return {name: value for name, value in job.given.items() if name in names}


def _task(job: Job) -> Task:
    """Prompts, rewards, cost and demonstrations of the command."""
    from fiducial.training.constraint import Multiplier
    from fiducial.training.online_task import Task
    from fiducial.training.rewards import Mixture

    if not job.values["prompts"] or not job.values["reward"]:
        raise ConfigError("there are no prompts or no rewards to learn from", hint="give --prompts FILE and --reward NAME, or --data FILE")
    cost, multiplier = None, Multiplier()
    if job.values["cost"]:
        cost, multiplier = _cost(job.values["cost"])
    shown = groups_from(job.values["demonstrations"]) if job.values["demonstrations"] else []
    if "mix" in job.given and not shown:
        raise ConfigError("--mix weighs demonstrations, and there are none", hint="give --demonstrations FILE")
    return Task(prompts(job, job.values["prompts"]), Mixture.of([part(spec) for spec in job.values["reward"]]), cost, multiplier, shown)


def prompts(job: Job, sources: Sequence[str]) -> list[Prompt]:
    """The prompts of all sources, each once; of the shipped goals only those that may be learnt from. Raises DataError when none is left."""
    from fiducial.data.load import named_source
    from fiducial.data.load import prompts as read

    found = [prompt for source in sources for prompt in read(*named_source(source, "answer"))]
    kept = list({p.id: p for p in found if may_be_learnt_from(p)}.values())
    if not kept:
        raise DataError("no prompt is left to learn from", hint="shipped goals outside the repair split are kept for the proof; give others")
    if len(found) > len(kept):
        job.output.note(f"{len(found) - len(kept)} prompts were left out: they stand there twice, or are kept for the proof")
    return kept


def part(spec: Any) -> Part:
    """One reward, from its name or from a mapping with its weight, its name in figures, and its own options."""
    from fiducial.training.rewards import Part

    values = _mapping(spec)
    weight, label = values.pop("weight", 1.0), values.pop("name", "")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"the weight of a reward is {weight!r}", hint="give a number")
    return Part(_reward(values), float(weight), str(label))


def _cost(spec: Any) -> tuple[Reward, Multiplier]:
    """The cost, and how it is held below its limit."""
    from fiducial.training.constraint import Multiplier

    values = _mapping(spec)
    own = {f.name for f in fields(Multiplier)} - {"recent"}
    control = {name: values.pop(name) for name in own if name in values}
    try:
        return _reward(values), Multiplier(**control)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--cost: {error}", hint="{reward: NAME, limit: -0.5, weight: 10, most: 20, rate: 0.1, delay: 1}") from error


def _mapping(spec: Any) -> dict[str, Any]:
    if isinstance(spec, str):
        return {"reward": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("reward"), str):
        raise ConfigError(f"a reward is a name or a mapping with `reward`, this is {spec!r}", hint="for example {reward: mine:short, weight: 0.5}")
    return dict(spec)


def _reward(values: dict[str, Any]) -> Reward:
    """The reward named by `reward`, with the other values as its options."""
    from fiducial.training.rewards import FunctionReward, is_function

    name, given = values["reward"], {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "reward"}
    if is_function(name):
        if given:
            raise ConfigError(f"the function {name} has no option '{next(iter(given))}'", hint="give the number another way, for example in its module")
        return FunctionReward(name)
    return cast(Reward, made(registry.card(name, role="Reward"), given))


def _plain(task: Task) -> list[Any]:
    parts = [[p.label, p.weight, p.reward.options()] for p in task.rewards.parts]
    return [*parts, ["cost", task.multiplier.limit, task.cost.options()]] if task.cost else parts


def _report(job: Job, uri: str, result: OnlineResult, task: Task, folder: Path, fingerprint: str, found: Mapping[str, Any], place: Path) -> int:
    """The report card in short; in full it is a file."""
    from fiducial.training.online_card import gained

    last = result.history[-1] if result.history else {}
    counts = {"steps": result.steps, "planned": result.planned, "answers": result.answers, "left_out": result.left_out, "tokens": result.tokens}
    counts["seconds"] = result.seconds
    best = {"best": result.best._asdict()} if result.best else {}
    cards = {"verdict": found["verdict"], "card": place}
    data = {"model": uri, "fingerprint": fingerprint, "folder": folder, **counts, "stop": result.stop, "last": last, **cards, **best}
    names = sorted(result.before.figures.keys() & result.after.figures.keys())
    table = Table(("figure", "before", "after"), [(name, f"{result.before.figures[name]:.4g}", f"{result.after.figures[name]:.4g}") for name in names])
    lines = [uri, f"{result.steps} of {result.planned} steps, {result.answers} answers ({result.left_out} taught nothing) in {result.seconds:.0f} s"]
    if result.prompts < len(task.prompts):
        lines.append(f"{len(task.prompts) - result.prompts} prompts did not fit and were left out")
    if result.demonstrations < len(task.demonstrations):
        lines.append(f"{len(task.demonstrations) - result.demonstrations} demonstrations could not be imitated and were left out")
    if result.stop:
        lines.append(f"stopped: {result.stop}")
    if result.best:
        lines.append(f"the model is the checkpoint of step {result.best.step}: reward {result.best.reward:.4g}, cost {result.best.cost:.4g}")
    lines.append(f"reward per prompt rose by {gained(result.before, result.after)}")
    lines += trained.verdict(found)
    lines.append(", ".join(f"{name} {last[name]:.4g}" for name in ("reward", "k1", "k3", "flat_share", "unscored", "clipped") if name in last))
    job.output.result(data, table, *lines)
    return job.done()


ONLINE = Stage(learn, ready, _options, resumable=True)
