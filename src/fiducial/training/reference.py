"""Log-probabilities of the reference model: computed once, kept on disk under what they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fiducial.core.store import write_atomic
from fiducial.models import abreast
from fiducial.models.forest import Paths
from fiducial.models.scoring import Engine, Scores


def key(fingerprint: str, dtype: str, paths: Paths, *, tokens: bool = False, temperature: float = 1.0) -> str:
    """Identity of a table: weights, arithmetic, and every token with the place where scoring starts."""
    kind = ("tokens\0" if tokens else "") + (f"{temperature}\0" if temperature != 1 else "")
    h = hashlib.sha256(f"{fingerprint}\0{dtype}\0{kind}".encode())
    for ids, start in zip(paths.ids, paths.start, strict=True):
        h.update(f"{start}:{','.join(map(str, ids))};".encode())
    return h.hexdigest()[:32]


def logprobs(
    engine: Engine,
    paths: Paths,
    *,
    fingerprint: str,
    folder: Path | None = None,
    step: Callable[[int], object] | None = None,
    tokens: bool = False,
    temperature: float = 1.0,
    team: Sequence[Engine] = (),
) -> Tensor:
    """Summed log-probability of each path under the engine's model as it is now, [P], float32, on the CPU.

    With `tokens`, those of the E scored tokens, [E], ordered by path and position. With a folder, a table computed before is read
    instead, if weights, dtype and tokens are the same. `step` is told how many paths each row finished. The engines of `team` share the
    work, each in a thread of its own; by default as many as the work is worth.
    """
    from safetensors.torch import load_file, save

    dtype = str(next(engine.module.parameters()).dtype)
    name = key(fingerprint, dtype, paths, tokens=tokens, temperature=temperature)
    place = folder / f"reference-{name}.safetensors" if folder else None
    if place is not None and place.is_file():
        return load_file(place)["logp"]
    spans = paths.spans() if tokens else [range(i, i + 1) for i in range(len(paths))]
    table = torch.zeros(spans[-1].stop if spans else 0, dtype=torch.float32)
    for indices, scores in _rows(team or engine.team(_worth(engine, paths)), paths, temperature):
        at = torch.tensor([e for i in indices for e in spans[i]], dtype=torch.long)
        table[at] = (scores.edge_logp if tokens else scores.path_logp).float().cpu()
        if step:
            step(len(indices))
    if place is not None:
        write_atomic(place, save({"logp": table}))
    return table


def _worth(engine: Engine, paths: Paths) -> int:
    """Threads that some paths are worth."""
    device = next(engine.module.parameters()).device
    return abreast.threads(device, min(len(set(paths.group)), sum(map(len, paths.ids)) // abreast.TOKENS_EACH))


def _rows(team: Sequence[Engine], paths: Paths, temperature: float) -> Iterator[tuple[list[int], Scores]]:
    """Indices and scores of the paths of a row after another; each engine takes whole groups."""
    if len(team) == 1:
        return team[0].stream(paths, temperature=temperature)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(paths.group):
        members.setdefault(group, []).append(index)
    groups = list(members.values())
    parts = abreast.divided([sum(len(paths.ids[i]) for i in group) for group in groups], len(team))
    own = [[i for g in part for i in groups[g]] for part in parts]
    return abreast.abreast([partial(_share, engine, paths, some, temperature) for engine, some in zip(team, own, strict=True)])


def _share(engine: Engine, paths: Paths, some: list[int], temperature: float) -> Iterator[tuple[list[int], Scores]]:
    for indices, scores in engine.stream(paths.select(some), temperature=temperature):
        yield [some[i] for i in indices], scores
