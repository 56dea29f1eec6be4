"""What the options of a loop name, made ready before there is a run: goals, methods, gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fiducial.app.discovery import maker
from fiducial.app.loop_options import DEFAULT_MAKER, LoopOptions
from fiducial.app.material import material
from fiducial.core import registry
from fiducial.core.config import about
from fiducial.core.errors import ConfigError
from fiducial.core.roles import Attack, Gate, Judge, Maker, Method, Objective


class LoopSetup:
    """Goals and methods of a loop. Raises ConfigError, DataError or ModelError for what cannot be used."""

    def __init__(self, options: LoopOptions) -> None:
        self.options = options
        self.judge = cast(Judge, _named("judge", options.judge, "Judge"))
        with about("goals"):
            self.material = material(options.goals)
        if options.near_twins and not self.material["repair"].near:
            hint = "leave out near_twins, or take goals=shipped"
            raise ConfigError(f"{options.goals} has no near twins, which only shipped goals have", hint=hint, key=("near_twins",))
        self.maker = cast(Maker, _named("maker", options.maker, "Maker", self._maker_options()))
        self.keeper = cast(Maker, registry.create("align/own_answers", {"max_tokens": options.whole_tokens}))
        self.objective: Objective | None = None
        self._named_objectives()
        if options.discover:
            with about("discover"):
                maker(options, "")
        with about("gate"):
            self.gate = cast(Gate, registry.create("govern/release", options.gate))
        self.direct = cast(Attack, registry.create("attack/direct"))
        self.attacks = [cast(Attack, _named("attacks", name, "Attack", at=i)) for i, name in enumerate(options.attacks)]
        self.held_out = [cast(Attack, _named("held_out_attacks", name, "Attack", at=i)) for i, name in enumerate(options.held_out_attacks)]
        families = [a.family for a in (self.direct, *self.attacks, *self.held_out)]
        twice = sorted({f for f in families if families.count(f) > 1})
        if twice:
            raise ConfigError(
                f"the attack families {twice} are named twice",
                hint="asking directly is always trained on; name each other family once, in one of the two lists",
                key=("attacks",),
            )
        from fiducial.models.open import ready as openable

        with about("model"):
            openable(options.model)

    def _maker_options(self) -> dict[str, Any]:
        """Those that were asked for, over what suits the default maker on this material."""
        suits = {"failure_weight": round(0.75 + self.options.near_twins, 2), "other_languages": 0.7}
        return (suits if self.options.maker == DEFAULT_MAKER else {}) | self.options.maker_options

    def _named_objectives(self) -> None:
        """The objective that was asked for, or a look at the names of those to choose among. Raises ConfigError."""
        asked = self.options
        if asked.objective == "auto":
            for number, name in enumerate(asked.candidates):
                with about("candidates", number):
                    registry.card(name, role="Objective")
            if asked.objective_options:
                hint = "add objective=align/dpo, for example"
                raise ConfigError("objective_options need an objective that is named", hint=hint, key=("objective_options",))
        else:
            self.objective = cast(Objective, _named("objective", asked.objective, "Objective", asked.objective_options))


def _named(option: str, name: str, role: str, options: Mapping[str, Any] | None = None, *, at: int | None = None) -> Method:
    """The method that `option` names, as number `at` of several, with what `option`_options say. An error says which of the two it is about."""
    with about(option, *([] if at is None else [at])):
        found = registry.card(name, role=role)
    with about(f"{option}_options" if options else option):
        return registry.create(found.name, options)
