"""Completions of many prompts at once, on one causal language model.

A shared beginning of all prompts is computed once, every distinct prompt is computed once, and finished rows give their place
to waiting ones. Slots of the cache are positions: slot `j` of a row holds the key and the value of its token `j`, so that windowed
masks are exact and rows of any length stand side by side.

Architectures that this does not fit (state spaces, attention biases by row index, ...) are found out by comparison with plain
forwards and go through the model's own `generate`, one prompt at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from math import isnan
from typing import Any, Literal

import torch
from torch import Tensor

from fiducial.core.errors import ConfigError, DataError
from fiducial.models import abreast
from fiducial.models.decoding import Decoder, MaskStyle, base_of, checked_length, mask_style, slot_bytes
from fiducial.models.head import logsumexp

__all__ = ["Sampled", "generate"]

log = logging.getLogger(__name__)

BATCH_TOKENS = 24_576
"""Slots of the cache that are held at once, unless they need more memory than `CACHE`; 23 kB each for a model of 135M parameters in bfloat16."""
CACHE = 2 << 30
"""Bytes of the cache on a CPU; elsewhere it may take an eighth of the device's memory."""
ROWS_EACH = 16
"""Fewer rows are not worth a thread of their own."""
CACHED_ROWS = 16
"""Rows of logits whose sums are taken at once on a CPU; 256 of them took three times as long (vocabulary of 49,152)."""
SHARED_TOKENS = 64
"""A shared beginning is computed apart when that saves at least this many tokens."""

Arrived = Callable[[int, "list[Sampled]"], None]
StopCheck = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Sampled:
    """One completion."""

    tokens: tuple[int, ...]
    """Without the end token."""
    logprobs: tuple[float, ...]
    """In nats, one per token, under the distribution it was drawn from; for temperature 0 under the model's own (temperature 1)."""
    finish: Literal["stop", "length", "error"]
    """`stop`: an end token, or `stop_check` said so. `length`: `max_tokens` were reached. `error`: logits were no numbers, tokens are those before."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How tokens are chosen and when a completion ends; the arguments of `generate`."""

    max_tokens: int
    temperature: float
    top_p: float
    eos: frozenset[int]
    seed: int
    banned: frozenset[int] = frozenset()
    stop_check: StopCheck | None = None


@dataclass(slots=True)
class _Row:
    """A completion under way. `owners` are the (prompt, sample) it answers; several when the choice is not random."""

    prompt: tuple[int, ...]
    owners: list[tuple[int, int]]
    chance: list[float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length", "error"] | None = None

    def take(self, token: int, logprob: float, settings: Settings) -> None:
        if isnan(logprob):
            self.finish = "error"
            return
        if token in settings.eos:
            self.finish = "stop"
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if settings.stop_check is not None and settings.stop_check(self.tokens):
            self.finish = "stop"
        elif len(self.tokens) >= settings.max_tokens:
            self.finish = "length"

    @property
    def slot(self) -> int:
        """Where the key and value of the last token go."""
        return len(self.prompt) + len(self.tokens) - 1


def generate(
    module: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    numbers: Sequence[int] | None = None,
    k: int = 1,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos: Collection[int],
    banned: Collection[int] = (),
    seed: int = 0,
    arrived: Arrived | None = None,
    batch_tokens: int | None = None,
    stop_check: StopCheck | None = None,
) -> list[list[Sampled]]:
    """`k` completions of each prompt (token ids), in the order of the prompts; `arrived(index, completions)` as soon as they are there.

    `module` is a causal language model of transformers, in evaluation mode, wrapped by peft or not. Temperature 0 takes the
    likeliest token. A draw depends on `seed`, the number of the prompt and of the sample, not on what else is in the batch; `numbers`
    are those of the prompts where they are part of a larger list, 0, 1, ... by default.
    `banned` tokens have probability 0, and the others what they would have without them.
    `stop_check` sees the tokens so far, the newest included, and ends the completion after it. `batch_tokens` bounds the memory, by
    default as `BATCH_TOKENS` and `CACHE` say.

    Raises ConfigError for an option out of range, DataError for an empty prompt.
    """
    settings = Settings(max_tokens, temperature, top_p, frozenset(eos), seed, frozenset(banned), stop_check)
    batch_tokens = _batch_tokens(module) if batch_tokens is None else batch_tokens
    _validate(prompts, settings, k=k, batch_tokens=batch_tokens)
    results = _Results(len(prompts), k, arrived)
    rows = _rows(prompts, k, settings, range(len(prompts)) if numbers is None else numbers)
    with torch.no_grad():
        for row in _finished(module, rows, settings, batch_tokens):
            results.add(row)
    return results.completions


def _batch_tokens(module: torch.nn.Module) -> int:
    device = base_of(module).device
    room = torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else CACHE
    return max(1, min(BATCH_TOKENS, room // slot_bytes(module)))


def _validate(prompts: Sequence[Sequence[int]], settings: Settings, *, k: int, batch_tokens: int) -> None:
    for name, value, right in (
        ("k", k, k >= 1),
        ("max_tokens", settings.max_tokens, settings.max_tokens >= 1),
        ("temperature", settings.temperature, settings.temperature >= 0),
        ("top_p", settings.top_p, 0 < settings.top_p <= 1),
        ("batch_tokens", batch_tokens, batch_tokens >= 1),
    ):
        if not right:
            raise ConfigError(f"{name} is {value}", hint="k, max_tokens and batch_tokens are at least 1, temperature at least 0, top_p above 0 and at most 1")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {index} has no tokens", hint="give at least one token, such as the begin-of-text token")


class _Results:
    """Completions by prompt and sample, as they come."""

    def __init__(self, prompts: int, k: int, arrived: Arrived | None) -> None:
        self._slots: list[list[Sampled | None]] = [[None] * k for _ in range(prompts)]
        self._arrived = arrived

    def add(self, row: _Row) -> None:
        sampled = Sampled(tuple(row.tokens), tuple(row.logprobs), row.finish or "length")
        for prompt, sample in row.owners:
            self._slots[prompt][sample] = sampled
            if self._arrived is not None and None not in self._slots[prompt]:
                self._arrived(prompt, [each for each in self._slots[prompt] if each is not None])

    @property
    def completions(self) -> list[list[Sampled]]:
        return [[each for each in samples if each is not None] for samples in self._slots]


def _rows(prompts: Sequence[Sequence[int]], k: int, settings: Settings, numbers: Sequence[int]) -> list[_Row]:
    """What is to be computed, longest prompts first, equal prompts together; without chance, equal prompts are one row."""
    by_prompt: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(int(token) for token in prompt), []).extend((index, sample) for sample in range(k))
    rows = []
    for prompt, owners in sorted(by_prompt.items(), key=lambda item: -len(item[0])):
        if settings.temperature == 0:
            rows.append(_Row(prompt, owners, []))
        else:
            rows += [_Row(prompt, [(index, sample)], _chance(settings, numbers[index], sample)) for index, sample in owners]
    return rows


def _chance(settings: Settings, prompt: int, sample: int) -> list[float]:
    """One uniform number in [0, 1) per token, the same in every batch."""
    source = torch.Generator().manual_seed(hash((settings.seed, prompt, sample)) & 0xFFFF_FFFF_FFFF)
    numbers: list[float] = torch.rand(settings.max_tokens, generator=source).tolist()
    return numbers


def _finished(module: Any, rows: list[_Row], settings: Settings, batch_tokens: int) -> Iterator[_Row]:
    limit = checked_length(module)
    long = [row for row in rows if limit is not None and len(row.prompt) + settings.max_tokens > limit]
    if long:
        _tell(type(base_of(module)).__name__, limit)
        yield from _one_by_one(module, long, settings)
    rows = rows[len(long) :]
    if not rows:
        return
    slots = len(rows[0].prompt) + settings.max_tokens
    style = mask_style(module, slots)
    if style is None:
        yield from _one_by_one(module, rows, settings)
        return
    parts = _parts(rows, base_of(module).device)
    modules = abreast.twins(module, len(parts))
    if len(modules) == 1:
        parts = [rows]
    room = max(1, batch_tokens // slots // len(parts))
    jobs = [partial(_decoded, each, style, part, settings, min(room, len(part)), slots) for each, part in zip(modules, parts, strict=True)]
    for finished in jobs[0]() if len(jobs) == 1 else abreast.abreast(jobs):
        yield from finished


@cache
def _tell(name: str, limit: int) -> None:
    log.warning("%s: texts that may get longer than %d tokens come from its own generate, one at a time", name, limit)


def _parts(rows: list[_Row], device: torch.device) -> list[list[_Row]]:
    """Rows for each thread, equal prompts together."""
    parts: list[list[_Row]] = [[] for _ in range(abreast.threads(device, len(rows) // ROWS_EACH))]
    for _, equal in groupby(rows, key=lambda row: row.prompt):
        min(parts, key=len).extend(equal)
    return [part for part in parts if part]


@torch.no_grad()
def _decoded(module: Any, style: MaskStyle, rows: list[_Row], settings: Settings, room: int, slots: int) -> Iterator[list[_Row]]:
    """Rows that are finished, after every step."""
    decoder = Decoder(module, style, _shared([row.prompt for row in rows]), rows=room, slots=slots)
    active: list[_Row] = []
    while rows or active:
        if rows and len(active) <= room * 3 // 4:
            taken, rows = rows[: room - len(active)], rows[room - len(active) :]
            _admit(decoder, taken, len(active), settings)
            active += taken
        else:
            logits_RV = decoder.step([row.tokens[-1] for row in active], [row.slot for row in active])
            _choose(active, logits_RV, settings)
        yield list(_leave(decoder, active))


def _shared(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The beginning that all prompts share, if it is worth a forward of its own; at least one token of each remains."""
    distinct = set(prompts)
    first, last = min(distinct), max(distinct)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    length = min(length, min(map(len, distinct)) - 1)
    return first[:length] if length * (len(distinct) - 1) >= SHARED_TOKENS else ()


def _admit(decoder: Decoder, rows: list[_Row], first: int, settings: Settings) -> None:
    """Computes the prompts of `rows`, which stand together where equal, and chooses the first token of each."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.prompt, []).append(place)
    members = list(groups.values())
    for which, logits_NV in decoder.prefill(list(groups), [[first + place for place in group] for group in members]):
        places = [(n, place) for n, index in enumerate(which) for place in members[index]]
        logits_RV = logits_NV if len(places) == len(logits_NV) else logits_NV[[n for n, _ in places]]
        _choose([rows[place] for _, place in places], logits_RV, settings)


def _leave(decoder: Decoder, active: list[_Row]) -> Iterator[_Row]:
    """Takes finished rows out of `active`; the last rows fill the gaps, here and in the cache."""
    gaps = [place for place, row in enumerate(active) if row.finish]
    if not gaps:
        return
    finished = [active[place] for place in gaps]
    left = len(active) - len(gaps)
    target = [place for place in gaps if place < left]
    source = [place for place in range(left, len(active)) if not active[place].finish]
    if source:
        decoder.cache.move(source, target, max(active[place].slot for place in source))
    for a, b in zip(source, target, strict=True):
        active[b] = active[a]
    del active[left:]
    yield from finished


def _choose(rows: Sequence[_Row], logits_RV: Tensor, settings: Settings) -> None:
    """Appends one token to each row, or finishes it."""
    if settings.banned:
        logits_RV = logits_RV.index_fill(-1, torch.tensor(sorted(settings.banned), device=logits_RV.device), -torch.inf)
    if settings.temperature == 0:
        highest, tokens = logits_RV.max(-1)
        logprobs = highest.float() - _normaliser(logits_RV)
    else:
        logprobs_RV = torch.log_softmax(logits_RV.float() / settings.temperature, -1)
        chance = torch.tensor([row.chance[len(row.tokens)] for row in rows], dtype=torch.float64)
        tokens, logprobs = _draw(logprobs_RV, chance.to(logits_RV.device), settings.top_p)
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
        row.take(token, logprob, settings)


def _normaliser(logits_RV: Tensor) -> Tensor:
    """Log of the sum of what the logits of each row are the logarithms of, [R], float32; on a CPU few rows at a time, which its cache holds."""
    at_once = CACHED_ROWS if logits_RV.device.type == "cpu" else len(logits_RV)
    return torch.cat([logsumexp(logits_RV[first : first + at_once].float()) for first in range(0, len(logits_RV), at_once)])


def _draw(logprobs_RV: Tensor, chance: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative probability passes `chance` [R], and its log-probability among the likeliest of mass `top_p`."""
    if top_p < 1:
        sorted_RV, order_RV = logprobs_RV.sort(-1, descending=True)
        before_RV = sorted_RV.exp().cumsum(-1) - sorted_RV.exp()
        logprobs_RV = logprobs_RV.masked_fill((before_RV >= top_p).scatter(-1, order_RV, before_RV >= top_p), -torch.inf).log_softmax(-1)
    mass_RV = logprobs_RV.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(mass_RV, (chance * mass_RV[:, -1])[:, None], right=True)
    tokens.clamp_(max=logprobs_RV.shape[1] - 1)  # where nothing passes what is no number
    return tokens[:, 0], logprobs_RV.gather(-1, tokens)[:, 0]


class _NoNumber(Exception):  # noqa: N818  # it never leaves this file
    """Ends a `generate` in which logits were no numbers."""


def _one_by_one(module: Any, rows: Sequence[_Row], settings: Settings) -> Iterator[_Row]:
    """Completions from the model's own `generate`, a row at a time."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    def checked(_ids: Tensor, scores_RV: Tensor) -> Tensor:
        if scores_RV.isnan().any():
            raise _NoNumber
        return scores_RV

    def stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = ids[0, start:].tolist()
        return torch.tensor([settings.stop_check is not None and new[-1] not in settings.eos and settings.stop_check(new)], device=ids.device)

    random = settings.temperature > 0
    end = sorted(settings.eos)
    config = GenerationConfig(
        max_new_tokens=settings.max_tokens,
        do_sample=random,
        eos_token_id=end or None,
        pad_token_id=end[0] if end else 0,
        suppress_tokens=sorted(settings.banned) or None,
        output_scores=True,
        return_dict_in_generate=True,
        **({"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if random else {}),
    )
    base = base_of(module)
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        for row in rows:
            ids, start = torch.tensor([row.prompt], device=base.device), len(row.prompt)
            with torch.random.fork_rng():
                torch.manual_seed(int(row.chance[0] * 2**24) if random else 0)
                try:
                    out = module.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        generation_config=config,
                        logits_processor=LogitsProcessorList([checked]),
                        stopping_criteria=StoppingCriteriaList([stopped]),
                    )
                except _NoNumber:
                    row.finish = "error"
                    yield row
                    continue
            for token, scores_V in zip(out.sequences[0, start:].tolist(), out.scores, strict=True):
                row.take(token, float(torch.log_softmax(scores_V[0].float(), -1)[token]), settings)
            yield row
    finally:
        base.generation_config = own
