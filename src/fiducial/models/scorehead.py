"""A linear head that turns final hidden states into one number: what makes a language model a reward or a cost model.

The score of a text is read at its explicit last token, never at the first padding, and no padding is ever seen. Which way is up is
stored with the head: a cost model that is read as a reward model rewards the harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor

from fiducial.core.errors import ModelError, StorageError
from fiducial.core.store import write_atomic
from fiducial.models.forest import Paths

if TYPE_CHECKING:
    from fiducial.models.base import WhiteBox

FILE = "score_head.safetensors"
"""Beside the weights or the adapter that it belongs to."""
COST_FILE = "cost_head.safetensors"
"""The same for the head of the cost, of a model that learnt from rewards under a limit on it."""
SPREAD = 0.1
"""Standard deviation of a fresh head's scores of states of norm sqrt(D). Huang et al. 2024, arXiv:2403.17031, have 1; a few hundred
pairs should not have to unlearn random scores that large, and states of SmolLM2-135M are twice as long."""
Better = Literal["better", "worse"]
LAST = "last"
BY_STEPS = "align/process_reward"
"""The objective whose scores are read at every step."""
BY_TOKENS = ("align/ppo", "align/awr")
"""The objectives whose scores are read before every token, as values of a policy."""


class Scale(NamedTuple):
    """Where the scores of a head lie on the data that it was trained on."""

    location: float
    """Mean score of the preferred answers."""
    spread: float
    """Standard deviation of all scores, above 0."""

    @classmethod
    def of(cls, scores: Tensor, preferred: Tensor) -> Self | None:
        """From scores and the probability that each one's answer is the best, [P] each. None where the scores are all alike, or none is preferred."""
        spread, weight = float(scores.double().std(correction=0)), preferred.double()
        location = float((weight * scores).sum() / weight.sum())
        return cls(location, spread) if spread > 0 and isfinite(spread) and isfinite(location) else None

    @classmethod
    def read(cls, said: dict[str, str]) -> Self | None:
        """From a file's metadata; None where nothing is said. Raises ValueError for what is no scale."""
        if "location" not in said and "spread" not in said:
            return None
        location, spread = float(said.get("location", "nan")), float(said.get("spread", "nan"))
        if not (isfinite(location) and isfinite(spread) and spread > 0):
            raise ValueError(f"location {location} and spread {spread} are no scale")
        return cls(location, spread)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreHead:
    """One linear map, without bias, from D hidden features to a score."""

    weight: Tensor
    """[D], float32."""
    higher_is: Better
    """What a higher score means."""
    trained_by: str
    """The objective that the scores come from, such as align/reward_model."""
    scale: Scale | None = None
    """Of its scores after training; None in files that do not say."""
    learns_from: str = ""
    """Which of its objective's kinds of label it learnt from; empty where there is one kind, and in files that do not say."""

    @classmethod
    def fresh(cls, width: int, *, seed: int, higher_is: Better, trained_by: str, learns_from: str = "", device: torch.device | str = "cpu") -> ScoreHead:
        """A head drawn from N(0, SPREAD^2 / (D + 1)), so that first scores of states of norm sqrt(D) are of the order of SPREAD."""
        drawn = SPREAD * torch.randn(width, generator=torch.Generator().manual_seed(seed)) / sqrt(width + 1)
        return cls(drawn.to(device).requires_grad_(), higher_is, trained_by, learns_from=learns_from)

    @classmethod
    def read(cls, folder: Path, file: str = FILE, *, width: int, device: torch.device | str = "cpu") -> ScoreHead:
        """The head in a model's folder. Raises ModelError for one that is damaged, of another model, or does not say which way is up."""
        from safetensors import SafetensorError, safe_open

        place = folder / file
        try:
            with safe_open(place, framework="pt") as stored:
                weight, said = stored.get_tensor("weight"), stored.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{place} cannot be read: {error}", hint="train the model again") from error
        if weight.shape != (width,) or said.get("higher_is") not in ("better", "worse"):
            raise ModelError(f"{place} is no score head of a model of width {width} that says which way is up", hint="train the model again")
        try:
            scale = Scale.read(said)
        except ValueError as error:
            raise ModelError(f"{place}: {error}", hint="train the model again") from error
        return cls(weight.float().to(device).requires_grad_(), cast(Better, said["higher_is"]), said.get("trained_by", ""), scale, said.get("learns_from", ""))

    def save(self, folder: Path, file: str = FILE) -> None:
        """Writes the head into the folder. Raises StorageError."""
        from safetensors.torch import save

        said = {"higher_is": self.higher_is, "trained_by": self.trained_by} | ({"learns_from": self.learns_from} if self.learns_from else {})
        if self.scale is not None:
            said |= {name: repr(value) for name, value in self.scale._asdict().items()}
        try:
            write_atomic(folder / file, save({"weight": self.weight.detach().cpu().contiguous()}, said))
        except OSError as error:
            raise StorageError.from_os(error, folder / file) from error

    def __call__(self, states: Tensor) -> Tensor:
        """Scores [n] of states [n, D], in float32, differentiable."""
        return states.float() @ self.weight

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the weights and what they mean."""
        from hashlib import sha256

        meaning = [self.higher_is, self.trained_by, *(map(repr, self.scale) if self.scale is not None else ()), *filter(None, [self.learns_from])]
        return sha256(self.weight.detach().cpu().numpy().tobytes() + " ".join(meaning).encode()).hexdigest()[:16]


def scores(model: WhiteBox, ids: list[list[int]]) -> Tensor:
    """The score of each token sequence at its last token, [P], float32, on the CPU; shared beginnings are computed once.

    Raises ModelError for a model without a head.
    """
    if model.head is None:
        raise ModelError(f"{model.uri} has no score head", hint="train one: fiducial align reward_model")
    found = model.score(Paths(ids, [len(row) for row in ids]), hidden={"layers": LAST, "at": "leaf"})
    assert found.hidden is not None
    with torch.no_grad():
        return model.head(found.hidden[LAST]).cpu()
