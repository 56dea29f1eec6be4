"""What ends a block of a recipe before its last round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from fiducial.app.cli.runs import Figure, compared, figures
from fiducial.core.errors import ConfigError, nearest
from fiducial.core.run import Run


class Stop(BaseModel):
    """When a block ends: a figure of one of its steps is above or below a bound, or no better than it was a round ago."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    step: str
    """A step of the block that measures something."""
    figure: str
    """Which of its figures, for example growth, or harmful compliance."""
    above: float | None = None
    """The block ends when the figure is above this."""
    below: float | None = None
    """The block ends when the figure is below this."""
    against: str = ""
    """The block ends when the figure is not better than in the round before, with the whole 95 % interval of the difference; paired where both kept
    their items. The first round is held against this step, which stands before the block and measures the same."""

    @property
    def rules(self) -> int:
        """How many of the three it names; one is right."""
        return (self.above is not None) + (self.below is not None) + bool(self.against)


def reason(stop: Stop, block: str, number: int, made: Mapping[str, Mapping[str, Any]]) -> str:
    """Why the block ends after round `number`; empty when it goes on. `made` has the summaries of steps by label. Raises ConfigError."""
    here = f"{block}/{number}/{stop.step}"
    name, found = _figure(stop, block, here, made)
    if not stop.against:
        past = (stop.above is not None and found.value > stop.above) or (stop.below is not None and found.value < stop.below)
        return f"{stop.figure} is {found.value:.3g}" if past else ""
    before = f"{block}/{number - 1}/{stop.step}" if number > 1 else stop.against
    change = compared(name, _figure(stop, block, before, made)[1], found)
    if change["low"] is None:
        hint = "measure the same items in both, with the same options"
        raise ConfigError(f"{block}: {stop.figure} of {here} cannot be held against {before}: {change['how']}", hint=hint)
    gained = change["low"] > 0 if found.better == "higher" else change["high"] < 0
    return "" if gained else f"{stop.figure} changed by {change['difference']:+.3g} ({change['low']:+.3g} to {change['high']:+.3g}) since {before}"


def _figure(stop: Stop, block: str, label: str, made: Mapping[str, Mapping[str, Any]]) -> tuple[str, Figure]:
    """The figure that is meant, with its full name. Raises ConfigError where the step has none of that name."""
    found = dict(figures(Run.open(made[label]["run"])))
    name = next((n for n in found if n == stop.figure or n.endswith(f": {stop.figure}")), None)
    if name is None:
        hint = nearest(stop.figure, [n.rpartition(": ")[2] for n in found])
        raise ConfigError(f"{block}: {label.rpartition('/')[2]} has no figure '{stop.figure}'", hint=hint)
    return name, found[name]
