"""The main job: find a model's weaknesses, repair them, prove the repair on what it was not trained on, gate, report.

Goals and attack families are split before anything runs. Rounds are chosen on the validation split; the held-out split is measured
once before and once after. Every stage keeps its records as they come and is not done again after an interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fiducial.app import card
from fiducial.app.cli.progress import Progress
from fiducial.app.discovery import discover, retry
from fiducial.app.loop_options import LoopOptions, LoopTraining
from fiducial.app.loop_setup import LoopSetup
from fiducial.app.making import make_groups, named_files
from fiducial.app.material import Material
from fiducial.app.measure import Measured, capability, tally, tried, whole_answers
from fiducial.app.summary import Candidate, Point, Retried
from fiducial.core import registry
from fiducial.core.errors import ModelError
from fiducial.core.ledger import Ledger
from fiducial.core.records import Attempt, Evidence, Group, Prompt, digest
from fiducial.core.roles import Attack, Objective
from fiducial.core.run import Run
from fiducial.core.store import copy_tree, write_atomic

if TYPE_CHECKING:
    from fiducial.models.base import Model
    from fiducial.models.local import LocalModel


WITH_ADAPTER = 1.25
"""What the same measurement takes on a model with an adapter, against the base model; 1.0 to 1.4 was seen, and what is set aside in vain is not trained."""
ANOTHER = 8.0
"""Minutes within which a second round must fit where no time was set."""
REST = 10.0
"""Seconds for what is no stage: importing, putting the adapter on, saving, the report."""


@dataclass(slots=True)
class Result:
    """What the command line prints."""

    exit_code: int
    lines: list[str]
    data: dict[str, Any]


def run_loop(options: LoopOptions, run: Run, progress: Progress) -> Result:
    """Runs or resumes the loop in `run`. Exit code 0 when the gate passes, 1 otherwise."""
    return Loop(options, run, progress).go()


class Loop(LoopSetup):
    """One run of the loop: a method per stage, in the order in which they happen."""

    def __init__(self, options: LoopOptions, run: Run, progress: Progress) -> None:
        super().__init__(options)
        self.run, self.progress = run, progress
        self.ledger = Ledger(run.path.parent / "ledger.jsonl")
        self.candidates: tuple[Candidate, ...] = ()
        self.retried: tuple[Retried, ...] = ()
        self.seconds: dict[str, float] = {}
        self.first: dict[tuple[str, str], Attempt] = {}
        self.untrained: list[Attempt] = []
        """What the base model did on the validation split."""

    def go(self) -> Result:
        """All stages."""
        base = self._open()
        self._log(
            "data", {"data": [digest([p.id for m in self.material.values() for p in m.direct])], "goals": sum(len(m.goals) for m in self.material.values())}
        )
        before = self._measured("before", base)
        self.untrained = self._validated(0, base)
        points = [self._point("base", self.untrained)]
        rounds: list[dict[str, Any]] = []
        model, best = base, 0
        for number in range(1, self.options.rounds + 1):
            if number > 1 and not self._decided(f"another-{number}", lambda: self._worth_another(points, rounds), gate=self.options.gate):
                break
            model, training = self._round(number, base, model)
            rounds.append(training)
            points.append(self._point(f"round {number}", self._validated(number, model)))
            best = self._best(points, rounds)
        points[best] = points[best].model_copy(update={"promoted": True})
        repaired = self._promote(best, base)
        after = self._measured("after", repaired) if best else before
        self.retried = retry(self, repaired) if best else ()
        return self._finish(base, repaired, before, after, points, rounds)

    # ---- stages

    def _open(self) -> LocalModel:
        from fiducial.models import adapters
        from fiducial.models.local import LocalModel
        from fiducial.models.open import open as opened

        began = time.monotonic()
        with self.progress.task("opening the model", 1) as task:
            model = opened(self.options.model)
            task.advance(1, figure=model.fingerprint)
        self.seconds.setdefault("opening", time.monotonic() - began)  # the embedded model is unpacked at its first use
        if not isinstance(model, LocalModel):
            raise ModelError(f"the weights of '{model.uri}' are not here, so it cannot be repaired", hint="use `fiducial check` for the finding half")
        if adapters.is_adapted(model.module):
            raise ModelError(
                f"'{model.uri}' carries an adapter already, and the loop puts on its own", hint="name its base model, or a run that trained all weights"
            )
        return model

    def _measured(self, name: str, model: LocalModel) -> Measured:
        """The held-out split: asked directly, under attacks that were trained on, under attacks that were not; capability; and whole answers."""
        held, count = self._held_out(), self.options.per_family
        trained, unseen = ([(attack, held.attacked(count, twins)) for attack in some] for some, twins in ((self.attacks, count // 4), (self.held_out, count)))
        attempts = self._trials(name, model, [(self.direct, held.direct), *trained, *unseen])
        how: dict[str, Any] = {"seed": self.options.seed, "progress": self.progress}
        scores, self.seconds[f"capability {name}"] = capability(self.run, name, model, items=self.options.capability_items, **how)
        limit, tokens = len(held.ordinary), self.options.whole_tokens
        answers, self.seconds[f"answers {name}"] = whole_answers(self.run, name, model, limit=limit, max_tokens=tokens, **how)
        return Measured(attempts, scores, answers)

    def _held_out(self) -> Material:
        """What proves: where near twins are learnt from, enough of them for a rate."""
        return self.material["held-out"].first(self.options.held_out_goals, near=0.7 if self.options.near_twins else 0.2)

    def validation(self) -> Material:
        """What rounds and objectives are chosen by. Near twins are shown, and nothing is chosen by them."""
        some = self.material["validation"].first(max(1, self.options.held_out_goals // 3))
        return Material(some.goals, some.twins, some.ordinary)

    def _validated(self, number: int, model: LocalModel) -> list[Attempt]:
        """A round's model, or as number 0 the base model, on the validation split; done once."""
        some, count = self.validation(), max(1, self.options.per_family // 8)
        return self._trials(f"validate-{number}", model, [(self.direct, some.direct), *((a, some.attacked(count, count)) for a in self.attacks)])

    def _round(self, number: int, base: LocalModel, model: LocalModel) -> tuple[LocalModel, dict[str, Any]]:
        """Finds failures on the repair split, makes groups of them, trains."""
        from fiducial.training import checkpoint

        began = model.fingerprint  # training moves the model it is given
        repair, count = self.material["repair"], self.options.per_family
        plan = [(self.direct, repair.learnt(self.options.near_twins)), *((a, repair.attacked(count, count)) for a in self.attacks)]
        attempts = self._trials(f"find-{number}", model, plan)
        if number == 1:
            self.first = {(a.prompt.id, a.attack): a for a in attempts}
        # what the repaired model refuses without need has no good answer of its own; the base model's is the one to go back to
        answered = [self.first[a.prompt.id, a.attack] if a.failed and a.prompt.expected != "refuse" else a for a in attempts]
        groups = [*self._groups(number, answered, model), *self._own_answers(base), *discover(self, number, attempts, model)]
        objective = self._chosen(base, groups)
        folder = self.run.path / "models" / f"round-{number}"
        stage = self.run.stage(f"train-{number}", self._training_inputs(groups, model, objective))
        if not stage.done:
            stage.finish(self._train(number, base, model, groups, objective, folder, stage.folder("state")))
        checkpoint.clear(stage.folder("state"))
        trained = self._adapted(base, folder)
        self.seconds[f"train {number}"] = stage.result["seconds"]
        data = [stage.result["data"]]
        self._log("data", {"data": data, "groups": len(groups), "round": number})
        self._log("train", {"model": trained.fingerprint, "base": began, "data": data, "round": number})
        return trained, stage.result

    def _chosen(self, base: LocalModel, groups: Sequence[Group]) -> Objective:
        """The objective of all rounds: the one asked for, or the best candidate in the first round."""
        from fiducial.app.choice import choose

        if self.objective is None:
            self.candidates = choose(self, base, groups)
            self.objective = cast(Objective, registry.create(next(c.objective for c in self.candidates if c.chosen)))
        return self.objective

    def _rated(self, objective: Objective) -> LoopTraining:
        """How to train for this objective."""
        train = self.options.train
        return train if train.learning_rate else train.model_copy(update={"learning_rate": self.options.candidates.get(objective.name)})

    def _training_inputs(self, groups: Sequence[Group], model: LocalModel, objective: Objective) -> dict[str, Any]:
        named = {"name": objective.name} | objective.options()
        return {"groups": digest([g.id for g in groups]), "model": model.fingerprint, "options": self._rated(objective), "objective": named}

    def _groups(self, number: int, attempts: Sequence[Attempt], model: Model) -> list[Group]:
        inputs = {"attempts": digest([a.id for a in attempts]), "maker": {"name": self.maker.name} | self.maker.options(), "seed": self.options.seed}
        stage = self.run.stage(f"make-{number}", inputs | {"files": named_files(self.maker.options())})
        how = {"seed": self.options.seed, "progress": self.progress, "name": f"making groups, round {number}"}
        found, self.seconds[f"make {number}"] = make_groups(stage, stage.lines("groups", Group), self.maker, attempts, model, **how)
        return list({g.id: g for g in found}.values())

    def _own_answers(self, base: LocalModel) -> list[Group]:
        """Whole answers of the base model to ordinary requests of the repair split, the same in all rounds: what repair is not to take from it."""
        if not self.options.own_answers:
            return []
        ordinary = {p.id for p in self.material["repair"].ordinary}
        answered = [a for a in self.first.values() if a.prompt.id in ordinary][: self.options.own_answers]
        inputs = {"attempts": digest([a.id for a in answered]), "maker": {"name": self.keeper.name} | self.keeper.options(), "model": base.fingerprint}
        stage = self.run.stage("make-own", inputs)
        how = {"seed": self.options.seed, "progress": self.progress, "name": "whole answers to keep"}
        found, self.seconds["make own"] = make_groups(stage, stage.lines("groups", Group), self.keeper, answered, base, **how)
        return found

    def _train(
        self, number: int, base: LocalModel, model: LocalModel, groups: Sequence[Group], objective: Objective, folder: Path, state: Path
    ) -> dict[str, Any]:
        from fiducial.training.loop import planned_steps, train
        from fiducial.training.reportcard import FreshSamples

        policy = model if model is not base else self.copied(base)
        minutes = self._decided(f"minutes-{number}", self._minutes_for_training)
        options = self._rated(objective).model_copy(update={"minutes": minutes, "seed": self.options.seed})
        watch = FreshSamples(policy, [p.messages for p in self.material["validation"].first(1).ordinary[:8]], base=base, seed=self.options.seed)
        steps = planned_steps(len(groups), options)
        with self.progress.task(f"repair, round {number}, {len(groups)} groups", steps) as task:
            done = [0]

            def report(step: int, _: int, figures: dict[str, float]) -> None:
                task.advance(step - done[0], figure=f"loss {figures['loss']:.3f}")  # a resumed training begins further on
                done[0] = step
                self.run.metrics({f"round-{number}/{k}": v for k, v in figures.items()}, step=step)

            result = train(policy, groups, objective, options, folder=state, report=report, watch=watch)
        policy.save(folder)
        figures = {k: v for k, v in (result.watched[-1] if result.watched else {}).items() if k != "step"}
        return {
            "round": number,
            "objective": objective.name,
            "options": objective.options() | options.model_dump(exclude={"minutes"}),
            "groups": result.groups,
            "left_out": result.left_out,
            "data": digest([g.id for g in groups]),
            "steps": result.steps,
            "planned": result.planned,
            "tokens": result.tokens,
            "naive_tokens": result.naive_tokens,
            "seconds": result.seconds,
            "stop": result.stop,
            "loss": [h["loss"] for h in result.history],
            "figures": figures,
            "verdicts": watch.rules(figures),
        }

    def _promote(self, best: int, base: LocalModel) -> LocalModel:
        """Puts the best round into the run's `model` folder; the base model stays what it is."""
        if not best:
            return base
        target, source = self.run.path / "model", self.run.path / "models" / f"round-{best}"
        stage = self.run.stage("promote", {"round": best, "model": digest([best, self.run.result(f"train-{best}")])})
        if not stage.done:
            copy_tree(source, target)
            stage.finish({"round": best})
        promoted = self._adapted(base, target)
        self._log("promote", {"model": promoted.fingerprint, "base": base.fingerprint, "alias": self.run.id, "round": best})
        return promoted

    def _finish(
        self,
        base: LocalModel,
        repaired: LocalModel,
        before: Measured,
        after: Measured,
        points: list[Point],
        rounds: list[dict[str, Any]],
    ) -> Result:
        """Evidence, decision, ledger, report."""
        from fiducial.app import evidence as proof
        from fiducial.app.report import build

        found = proof.evidence(before, after, {a.family for a in self.held_out}, source=self.run.id)
        decision = self.gate.decide(found)
        lines = self.run.lines("evidence", Evidence)
        lines.path.unlink(missing_ok=True)
        for item in found:
            lines.append(item)
        figures = {e.name: [e.value, e.low, e.high, e.n] for e in found}
        self._log("evaluate", {"model": repaired.fingerprint, "figures": figures})
        self._log("gate", {"model": repaired.fingerprint, "gate": decision.gate, "outcome": decision.outcome})
        summary = proof.summary(self, base, repaired, before, after, points, rounds, found, decision)
        write_atomic(self.run.path / "summary.json", summary.model_dump_json(indent=1))
        card.write(self.run, summary)
        page = build(self.run)
        where = "no round was better than the base model" if repaired is base else f"model: run:{self.run.id}"
        cut = [
            f"round {r['round']} made {r['steps']} of {r['planned']} steps; for all of them give it more time: minutes=N"
            for r in rounds
            if self.options.minutes and r["steps"] < r["planned"]
        ]
        checks = [f"  {c.outcome}: {c.rule}: {c.reason}" for c in decision.checks]
        lines_out = [summary.verdict, *checks, *(cut if decision.outcome != "pass" else []), where, f"report: {page}"]
        return Result(int(decision.outcome != "pass"), lines_out, {"outcome": decision.outcome, "report": str(page), "figures": figures})

    # ---- what stages share

    def _trials(self, name: str, model: Model, plan: Sequence[tuple[Attack, Sequence[Prompt]]]) -> list[Attempt]:
        how = {"seed": self.options.seed, "max_tokens": self.options.max_tokens, "progress": self.progress}
        found, self.seconds[name.replace("-", " ")] = tried(self.run, name, model, plan, self.judge, **how)
        return found

    def copied(self, base: LocalModel) -> LocalModel:
        """A model to train that leaves the base as it is. An adapter shares the base's weights; full training needs its own."""
        from fiducial.models.local import LocalModel

        if self.options.train.lora_rank:
            return LocalModel(base.module, base.tokenizer, uri=base.uri, base=base.base)
        return self._open()

    def _adapted(self, base: LocalModel, folder: Path) -> LocalModel:
        from fiducial.models.loading import load

        return base.with_adapter(folder) if self.options.train.lora_rank else load(folder)

    def _point(self, name: str, attempts: Sequence[Attempt]) -> Point:
        return Point(
            name=name,
            compliance=tally(attempts, lambda a: a.prompt.expected == "refuse"),
            refusal=tally(attempts, lambda a: a.prompt.expected != "refuse"),
        )

    def _best(self, points: Sequence[Point], rounds: Sequence[dict[str, Any]]) -> int:
        """The round to promote: of those that are better than the base model one that broke no stopping rule, and the best by the validation split."""
        better = [number for number in range(1, len(points)) if points[number].badness < points[0].badness]
        return min(better, key=lambda number: (_broken(rounds[number - 1]), points[number].badness, number), default=0)

    def _worth_another(self, points: Sequence[Point], rounds: Sequence[dict[str, Any]]) -> bool:
        """Whether the limits are not met on the validation split yet, the last round helped and broke no rule, and another one fits into the budget."""
        last = points[-1]
        limits = {k: getattr(self.gate, k) for k in ("max_direct_compliance", "max_benign_refusal")}
        if last.compliance.share <= limits["max_direct_compliance"] and last.refusal.share <= limits["max_benign_refusal"]:
            return False
        if last.badness > points[-2].badness or _broken(rounds[-1]):
            return False
        number = len(rounds)
        round_cost = sum(self.seconds.get(f"{stage} {number}", 0.0) for stage in ("find", "make", "discover", "train", "validate"))
        return self._spent() + round_cost + self._proof_seconds() < 60 * (self.options.minutes or ANOTHER)

    def _proof_seconds(self) -> float:
        """What the proof and the rest will take, from what the same took before."""
        cases = self.seconds.get("discover 1", 0.0) / 2  # finding them, one skill at a time and with repairs, takes longer than asking them again
        return WITH_ADAPTER * (sum(self.seconds.get(stage, 0.0) for stage in ("before", "capability before", "answers before")) + cases) + REST

    def _minutes_for_training(self) -> float | None:
        """What is left when the proof is set aside; at least a minute, so that there is something to prove. None where no time was set."""
        if self.options.minutes is None:
            return None
        aside = self._proof_seconds() + WITH_ADAPTER * self.seconds.get("validate 0", 0.0)
        left = 60 * self.options.minutes - self._spent() - aside
        return max(60.0, left) / 60

    def _spent(self) -> float:
        """Seconds of all stages so far, those before an interruption included but for what it cut a stage off at."""
        return sum(self.seconds.values())

    def _decided(self, name: str, decide: Callable[[], Any], **limits: Any) -> Any:
        """A decision that depends on the clock, taken once: a resumed run goes the way it had begun, unless it is given other limits."""
        stage = self.run.stage(name, {"seed": self.options.seed, "minutes": self.options.minutes} | limits)
        if not stage.done:
            stage.finish({"decision": decide()})
        return stage.result["decision"]

    def _log(self, kind: str, body: dict[str, Any]) -> None:
        """Enters an event of this run into the ledger, once, however often the run is taken up again."""
        stage = self.run.stage(f"ledger-{kind}-{digest(body)}", body)
        if not stage.done:
            stage.finish({"number": self.ledger.append(kind, body | {"run": self.run.id}, once=True).number})


def _broken(training: dict[str, Any]) -> bool:
    """Whether a round broke a stopping rule."""
    return any(outcome == "fail" for outcome, _ in training["verdicts"].values())
