"""The linear heads that train beside the weights: what an objective reads of a model besides log-probabilities.

One head for an objective that reads scores or values. Under a limit on cost there are two that read values, one of the reward and one of the
cost, so that what either has learnt holds whatever the cost weighs (Dai et al. 2023, arXiv:2310.12773).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fiducial.core.roles import Objective
from fiducial.models.local import LocalModel
from fiducial.models.scorehead import LAST, Better, ScoreHead
from fiducial.models.scoring import Scores

PLACES = {"scores": "leaf", "values": "before"}
"""By reading: at the last token of a completion, or before each of its tokens."""


class Heads:
    """The heads of a model in training. One that the model has and that means what the objective says trains on, another is replaced."""

    def __init__(self, model: LocalModel, objective: Objective, *, seed: int, costed: bool) -> None:
        self.place = next((PLACES[r] for r in objective.reads if r in PLACES), "")
        """Where states are read; nowhere when empty."""
        # the second is drawn with a seed of its own: critics that begin alike are less than two
        model.head = _head(model, model.head, objective, objective.higher_is, seed) if self.place else None
        model.cost_head = _head(model, model.cost_head, objective, "worse", seed + 1) if self.place == "before" and costed else None
        self.named = {name: head for name, head in (("score_head.weight", model.head), ("cost_head.weight", model.cost_head)) if head is not None}
        """By the name of their weight; that of the cost after the other."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """What trains of them."""
        return {name: head.weight for name, head in self.named.items()}

    @property
    def asked(self) -> dict[str, Any] | None:
        """What is asked of the engine for them."""
        return {"layers": LAST, "at": self.place} if self.place else None

    def read(self, scores: Scores) -> list[Tensor]:
        """What each says of the states of some paths, differentiable."""
        if not self.place:
            return []
        assert scores.hidden is not None
        return [head(scores.hidden[LAST]) for head in self.named.values()]


def _head(model: LocalModel, held: ScoreHead | None, objective: Objective, higher_is: Better, seed: int) -> ScoreHead:
    """The model's head if it means what the objective says, else a fresh one."""
    name, learns_from = objective.name, objective.learns_from
    if held is not None and (held.trained_by, held.learns_from, held.higher_is) == (name, learns_from, higher_is):
        return held
    return ScoreHead.fresh(model.width, seed=seed, higher_is=higher_is, trained_by=name, learns_from=learns_from, device=model.device)
