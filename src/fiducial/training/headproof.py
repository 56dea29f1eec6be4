"""What shows that a trained score head orders answers which it has not seen: asked before anything is optimised against its scores.

The figures are those of the report card that its training left (`card.json`, where groups were held out), or of runs of evaluate/reward_card on other
preferences. Importing this loads no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fiducial.core.errors import MethodError
from fiducial.core.records import Score
from fiducial.core.run import Run

if TYPE_CHECKING:
    from fiducial.models.local import LocalModel

log = logging.getLogger(__name__)

CARD = "card.json"
"""The report card of a training, in the run's folder, beside that of the model."""
HELD_OUT = "held-out "
"""What the names of its figures on held-out groups begin with."""
SUITE = "evaluate/reward_card"
LENGTH = 0.5
"""Correlation of score and length, up or down, from which a policy is likely to learn length; ours."""
WAIVED = "or set unproven to learn from it all the same"


class Figure(NamedTuple):
    """A measured figure with its interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}, n={self.n})"


def refuse_unproven(name: str, model: LocalModel, runs: Sequence[str]) -> None:
    """Raises MethodError unless the interval of the held-out accuracy of `model`, opened by `name`, lies above chance; warns where scores follow length.

    `runs` of evaluate/reward_card count where they measured this very model, the last of them alone; without one its training does. Chance is one half;
    for steps, which are right or wrong by themselves, it is what calling all of them right or all of them wrong would give.
    """
    found = _measured(model, runs) or _trained(name)
    if "accuracy" not in found:
        said = f"; none of {', '.join(runs)} measured this very model" if runs else ""
        held = "train it with --held-out 0.2, or name with cards (where it scores whole answers) a run of evaluate/reward_card on preferences new to it"
        raise MethodError(f"nothing shows that {name} tells better answers from worse that it has not seen{said}", hint=f"{held}; {WAIVED}")
    accuracy, steps = found["accuracy"], found.get("right_steps")
    chance = max(0.5, steps.value, 1 - steps.value) if steps else 0.5
    if not accuracy.low > chance:
        said = f"the held-out accuracy of {name} is {accuracy}, which does not lie above the {chance:.2g} of chance"
        raise MethodError(f"{said}: a policy would learn its errors", hint=f"give it more or clearer preferences, or hold out more; {WAIVED}")
    length = found.get("length_correlation")
    if length and max(length.low, -length.high) > LENGTH:
        way = "longer" if length.value > 0 else "shorter"
        log.warning("%s scores %s answers higher: held-out length correlation %s, and a policy may learn no more than that", name, way, length)


def _measured(model: LocalModel, runs: Sequence[str]) -> dict[str, Figure]:
    """Figures of evaluate/reward_card on this very model, from the last of the runs that has some."""
    found: dict[str, Figure] = {}
    for reference in runs:
        scores = Run.open(reference).lines("scores", Score).read()
        said = {s.metric: Figure(s.value, s.low, s.high, s.n) for s in scores if s.suite == SUITE and s.model == model.fingerprint}
        found = said or found
    return found


def _trained(name: str) -> dict[str, Figure]:
    """Held-out figures of the report card that the model's training left; nothing where there is none."""
    place = _place(name)
    try:
        figures: Sequence[Mapping[str, object]] = json.loads(place.read_text(encoding="utf-8"))["figures"] if place else []
        return {str(f["name"]).removeprefix(HELD_OUT): _figure(f) for f in figures if str(f["name"]).startswith(HELD_OUT)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MethodError(f"the report card {place} cannot be read: {error}", hint="train the model again, or measure it with evaluate/reward_card") from error


def _figure(said: Mapping[str, object]) -> Figure:
    value, low, high, n = (said[key] for key in ("value", "low", "high", "n"))
    return Figure(float(value), float(low), float(high), int(n))  # type: ignore[call-overload, arg-type]  # what is no number raises


def _place(name: str) -> Path | None:
    """Where the report card of the model's training is: in the folder of its run, or beside the files of a model that was copied from there."""
    folder = Run.open(name, trained=True).path / "model" if name.startswith("run:") else Path(name).expanduser()
    near = [folder / CARD, *([folder.parent / CARD] if folder.name == "model" else [])]
    return next((place for place in near if place.is_file()), None)
