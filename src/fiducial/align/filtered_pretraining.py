"""Filtering: pretraining on the better documents alone.

What it does: leaves out documents whose parts have too low a mean value, and learns the rest as align/sft does.
Use it when:  bad text is rare and nothing else is lost with it. The paper finds that it costs ability; align/conditional_pretraining keeps the
              text and marks it.
Formula:      documents with mean value >= threshold stay; loss = -sum over tokens of log p_t, divided by the step's number of tokens.
Defaults:     threshold 0 (paper: scores of at most 2.9e-4 to 2.4e-3, where a score is minus a value), learning rate 2e-5 for continued
              pretraining (paper, from scratch: 5e-4). For as many tokens as without filtering, raise epochs (paper).
Limits:       a document of unknown value stays out; a good mean can hide one bad part.
Source:       Korbak et al. 2023, arXiv:2302.08582, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, final

from fiducial.align.base import LikelihoodObjective
from fiducial.core.records import Group
from fiducial.training.objective import keep
from fiducial.training.segments import segments


@final
@dataclass(frozen=True, slots=True)
class FilteredPretraining(LikelihoodObjective):
    """Negative log-likelihood of completions of sufficient mean value."""

    learning_rate: ClassVar[float] = 2e-5

    threshold: float = 0.0
    """Mean value that a completion must have."""

    def prepare(self, group: Group) -> Group:
        """The completions that stay, as equal examples."""
        kept = keep(group, [k for k in range(len(group.completions)) if self._good(group, k)])
        return kept.model_copy(update={"targets": (1.0,) * len(kept.completions)})

    def _good(self, group: Group, k: int) -> bool:
        known = [value for _, value in segments(group, k) if value is not None]
        return bool(known) and fmean(known) >= self.threshold
