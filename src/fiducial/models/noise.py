"""Noise on the input embeddings of sequences that are learnt from (NEFTune, Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fiducial.models.forest import Paths, Row


@dataclass(frozen=True, slots=True)
class Noise:
    """Of every path its own: uniform in [-1, 1] times alpha / sqrt(T d), with T the path's tokens and d the width of the embeddings.

    T counts all tokens of the path and no padding. A path's numbers follow from its seed alone: they are the same in whatever row it is
    run, on every device.
    """

    alpha: float
    """How strong; the paper tries 5, 10 and 15."""
    seeds: Sequence[int]
    """One per path."""

    def of(self, row: Row, paths: Paths, width: int) -> Tensor:
        """What is added at each node of a row, [N, D], float32. Raises ValueError for a row whose paths share nodes."""
        if row.form != "padded":
            raise ValueError("noise is of one path, and nodes of this row may be of several")
        drawn = [self._drawn(path, len(paths.ids[path]), width) for path in row.paths]
        return torch.stack([drawn[path][place] for path, place in zip(row.branch.tolist(), row.pos.tolist(), strict=True)])

    def _drawn(self, path: int, tokens: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seeds[path])
        return (2 * torch.rand(tokens, width, generator=generator) - 1) * (self.alpha / sqrt(tokens * width))
