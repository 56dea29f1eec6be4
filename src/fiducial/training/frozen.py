"""The frozen blocks below an adapter: what they make of the training data is computed once, however often the data is gone through."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fiducial.core.errors import FiducialError
from fiducial.models import abreast
from fiducial.models.forest import Paths, Row, Tokens
from fiducial.models.lower import Lower, chains
from fiducial.models.passes import Given, anatomy
from fiducial.models.scoring import Engine
from fiducial.training import lora

log = logging.getLogger(__name__)

MOST = 1 << 30
"""Bytes of states that are kept; of data that needs more, none."""
PASSES = 1.5
"""Passes through the data from which keeping them pays."""
CHECKED = 8
"""Paths by which the numbers with what was kept are compared with those without."""


def frozen_blocks(module: nn.Module) -> int:
    """How many of the first blocks of a causal language model do not change when it is trained; 0 where anything outside its blocks does."""
    blocks = list(anatomy(module).layers)
    block_of = {id(p): number for number, block in reversed(list(enumerate(blocks))) for p in block.parameters()}  # of shared weights the first
    return min((block_of.get(id(p), 0) for p in module.parameters() if p.requires_grad), default=0)


@contextmanager
def kept(engines: Sequence[Engine], paths: Paths, *, passes: float, keep_last: bool) -> Iterator[None]:
    """While inside, the engines, which hold one model, run the frozen blocks of these paths no more, where that pays and gives the same numbers.

    Nothing below the adapter may change inside. The same paths are laid out in the same way each time, so that whoever comes back computes the
    same bits. Raises DataError for a token outside the vocabulary.
    """
    blocks = frozen_blocks(engines[0].module) if passes >= PASSES else 0
    try:
        _hand(engines, _checked(engines, paths, blocks, keep_last=keep_last) if blocks else None)
        yield
    finally:
        _hand(engines, None)


def _hand(engines: Sequence[Engine], lower: Lower | None) -> None:
    for engine in engines:
        engine.lower = lower


def _checked(engines: Sequence[Engine], paths: Paths, blocks: int, *, keep_last: bool) -> Lower | None:
    """The states of all paths, if there is room for them and the model can begin with them."""
    # A boundary: an architecture may hand more from block to block than states, and object to their absence in any way it likes.
    try:
        found = _computed(engines, paths, blocks, keep_last=keep_last)
        if found is None or _agrees(engines[0], found, paths):
            return found
        reason = "it gives other numbers then"
    except (torch.OutOfMemoryError, MemoryError, FiducialError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    log.warning("%s runs its frozen blocks in every step, since it cannot begin above them: %s", type(anatomy(engines[0].module).causal).__name__, reason)
    return None


def _computed(engines: Sequence[Engine], paths: Paths, blocks: int, *, keep_last: bool) -> Lower | None:
    """The states of all paths; None where they are too many to be kept. Every engine takes its share of the rows."""
    rows = engines[0].plan(paths, grad=True, keep_last=keep_last)
    first = engines[0].begin(rows[0], blocks)
    total = sum(len(row.ids) for row in rows)
    if total * first.states[0].nbytes > MOST:
        return None
    states = torch.zeros(total, first.states.shape[1], dtype=first.states.dtype)
    states[: len(first.states)] = first.states.cpu()
    starts = torch.tensor([0, *(len(row.ids) for row in rows)]).cumsum(0).tolist()
    places: dict[Tokens, Tensor] = {}
    for start, row in zip(starts, rows, strict=False):  # in the order of the plan: of a path in two rows always the same one counts
        for tokens, chain in chains(row, paths).items():
            if len(chain) > len(places.get(tokens, ())):
                places[tokens] = chain + start
    shares = [range(1 + number, len(rows), len(engines)) for number in range(len(engines))]
    for number, given in abreast.abreast([partial(_begun, engine, rows, share, blocks) for engine, share in zip(engines, shares, strict=True)]):
        states[starts[number] : starts[number + 1]] = given.states.cpu()
    return Lower(blocks, states, places, first.bare)


def _begun(engine: Engine, rows: Sequence[Row], share: Sequence[int], blocks: int) -> Iterator[tuple[int, Given]]:
    for number in share:
        yield number, engine.begin(rows[number], blocks)


def _agrees(engine: Engine, lower: Lower, paths: Paths) -> bool:
    """Whether some paths, in rows of their own, get the numbers that they get from the whole model. Adapters, which move, have no say in it."""
    some = [paths.ids[i] for i in range(0, len(paths), max(1, len(paths) // CHECKED))][:CHECKED]
    every_token = Paths(some, [1] * len(some))
    with lora.adapter_off(engine.module):
        engine.score(Paths(some[:1], [1]))  # what the lower blocks may leave behind for the upper ones is of another row then
        engine.lower = lower
        again = engine.score(every_token).edge_logp
        engine.lower = None
        apart = (again - engine.score(every_token).edge_logp).abs()
    half = anatomy(engine.module).dtype.itemsize < 4
    return not len(apart) or bool((apart.mean() if half else apart.max()) <= engine.verdict.tolerance)
