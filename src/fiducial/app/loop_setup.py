"""What the options of a loop name, made ready before there is a run: goals, methods, gate."""

from __future__ import annotations

from typing import Any, cast

from fiducial.app.discovery import maker
from fiducial.app.loop_options import DEFAULT_MAKER, LoopOptions
from fiducial.app.material import material
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.roles import Attack, Gate, Judge, Maker, Objective


class LoopSetup:
    """Goals and methods of a loop. Raises ConfigError or DataError for what cannot be used."""

    def __init__(self, options: LoopOptions) -> None:
        self.options = options
        self.judge = cast(Judge, registry.create(registry.card(options.judge, role="Judge").name))
        self.material = material(options.goals)
        if options.near_twins and not self.material["repair"].near:
            raise ConfigError(f"{options.goals} has no near twins, which only shipped goals have", hint="leave out near_twins, or take goals=shipped")
        self.maker = cast(Maker, registry.create(registry.card(options.maker, role="Maker").name, self._maker_options()))
        self.keeper = cast(Maker, registry.create("align/own_answers", {"max_tokens": options.whole_tokens}))
        self.objective: Objective | None = None
        self._named_objectives()
        if options.discover:
            maker(options, "")
        self.gate = cast(Gate, registry.create("govern/release", options.gate))
        self.direct = cast(Attack, registry.create("attack/direct"))
        self.attacks = [cast(Attack, registry.create(registry.card(name, role="Attack").name)) for name in options.attacks]
        self.held_out = [cast(Attack, registry.create(registry.card(name, role="Attack").name)) for name in options.held_out_attacks]
        families = [a.family for a in (self.direct, *self.attacks, *self.held_out)]
        twice = sorted({f for f in families if families.count(f) > 1})
        if twice:
            raise ConfigError(
                f"the attack families {twice} are named twice",
                hint="asking directly is always trained on; name each other family once, in one of the two lists",
            )

    def _maker_options(self) -> dict[str, Any]:
        """Those that were asked for, over what suits the default maker on this material."""
        suits = {"failure_weight": round(0.6 + 5 / 4 * self.options.near_twins, 2), "other_languages": 0.7}
        return (suits if self.options.maker == DEFAULT_MAKER else {}) | self.options.maker_options

    def _named_objectives(self) -> None:
        """The objective that was asked for, or a look at the names of those to choose among. Raises ConfigError."""
        asked = self.options
        if asked.objective == "auto":
            for name in asked.candidates:
                registry.card(name, role="Objective")
            if asked.objective_options:
                raise ConfigError("objective_options need an objective that is named", hint="add objective=align/dpo, for example")
        else:
            self.objective = cast(Objective, registry.create(registry.card(asked.objective, role="Objective").name, asked.objective_options))
