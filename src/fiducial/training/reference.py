"""Log-probabilities of the reference model: computed once, kept on disk under what they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fiducial.core.store import write_atomic
from fiducial.models.forest import Paths
from fiducial.models.scoring import Engine


def key(fingerprint: str, dtype: str, paths: Paths) -> str:
    """Identity of a table: weights, arithmetic, and every token with the place where scoring starts."""
    h = hashlib.sha256(f"{fingerprint}\0{dtype}\0".encode())
    for ids, start in zip(paths.ids, paths.start, strict=True):
        h.update(f"{start}:{','.join(map(str, ids))};".encode())
    return h.hexdigest()[:32]


def logprobs(engine: Engine, paths: Paths, *, fingerprint: str, folder: Path | None = None, step: Callable[[int], object] | None = None) -> Tensor:
    """Summed log-probability of each path under the engine's model as it is now, [P], float32, on the CPU.

    With a folder, a table computed before is read instead, if weights, dtype and tokens are the same. `step` is told how many paths
    each row finished.
    """
    from safetensors.torch import load_file, save

    dtype = str(next(engine.module.parameters()).dtype)
    place = folder / f"reference-{key(fingerprint, dtype, paths)}.safetensors" if folder else None
    if place is not None and place.is_file():
        return load_file(place)["logp"]
    table = torch.zeros(len(paths), dtype=torch.float32)
    for indices, scores in engine.stream(paths):
        table[torch.tensor(indices)] = scores.path_logp.float().cpu()
        if step:
            step(len(indices))
    if place is not None:
        write_atomic(place, save({"logp": table}))
    return table


def frozen(paths: Sequence[int], table: Tensor) -> Tensor:
    """The rows of the table for some paths."""
    return table[torch.as_tensor(list(paths), dtype=torch.long)]
