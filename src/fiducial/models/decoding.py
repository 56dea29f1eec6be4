"""Cached forwards of many rows of different lengths, and the check whether a model can be run that way.

Slots are positions: slot `j` of a row holds the key and the value of its token `j`. So rows of any length stand side by side
without padding between them, and masks with windows are exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fiducial.models.attention import products
from fiducial.models.limits import limits, setting

__all__ = ["Decoder", "base_of", "checked_length", "mask_style", "slot_bytes"]

log = logging.getLogger(__name__)

MaskStyle = Literal["one", "each"]
"""`one`: one mask for all layers. `each`: a mask for each kind of layer, by its name in `config.layer_types`."""

PREFILL_TOKENS = 1024
"""Padded prompt tokens per forward; on a CPU the time per token is flat from 400 to 1600."""
SLOTS_AHEAD = 32
"""Slots that are added to the cache at a time."""
CHECKED_WINDOW = 512
"""Attention windows up to this many tokens are put to the test; beyond them longer texts are left to the model's own `generate`."""
AGREEMENT = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Mean difference of logits, in their standard deviations, up to which two forwards are equal."""
AGREEMENT_16_BITS = 0.1
"""The same in 16 bits, where two plain forwards of different shape were 0.01 to 0.05 apart (SmolLM2-135M), as far as each from 32 bits."""

_REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
_styles: dict[tuple[object, ...], MaskStyle | None] = {}


def slot_bytes(module: Any) -> int:
    """Memory that a token takes in the cache, by the configuration."""
    base = base_of(module)
    config = base.config.get_text_config()
    width, heads = setting(config, "hidden_size") or 1, setting(config, "num_attention_heads") or 1
    values = (setting(config, "num_key_value_heads") or heads) * (setting(config, "head_dim") or width // heads)
    return 2 * int(setting(config, "num_hidden_layers") or 1) * int(values) * int(base.dtype.itemsize)


def base_of(module: Any) -> Any:
    """The causal language model itself, without peft's wrapper."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


class _Prefill(Cache):  # type: ignore[misc]
    """Keeps new keys and values by layer, and puts those of a shared beginning (one row) before them."""

    def __init__(self, shared: dict[int, tuple[Tensor, Tensor]], length: int) -> None:
        super().__init__(layers=[])
        self.shared, self.length = shared, length
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new[layer_idx] = (key_states, value_states)
        if not self.shared:
            return key_states, value_states
        b = key_states.shape[0]
        key, value = self.shared[layer_idx]
        return torch.cat([key.expand(b, -1, -1, -1), key_states], 2), torch.cat([value.expand(b, -1, -1, -1), value_states], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def _joined(before: dict[int, tuple[Tensor, Tensor]], after: dict[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of each layer, one after the other."""
    return {layer: (torch.cat([before[layer][0], k], 2), torch.cat([before[layer][1], v], 2)) for layer, (k, v) in after.items()} if before else after


class _Slots(Cache):  # type: ignore[misc]
    """Keys and values [rows, heads, slots, width] by layer; they get more slots as rows grow, so that they are read whole, without a copy."""

    def __init__(self, rows: int, most: int) -> None:
        super().__init__(layers=[])
        self.rows, self.slots, self.most = rows, 0, most
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.at: Tensor = torch.empty(0)
        self.by_heads: dict[int, Tensor] = {}

    def reserve(self, slots: int) -> None:
        """Makes room for `slots` tokens a row, and some more."""
        if slots <= self.slots:
            return
        before, self.slots = self.slots, min(slots + SLOTS_AHEAD, self.most)
        for layer, pair in self.held.items():
            self.held[layer] = self._room(*pair)
            for held, old in zip(self.held[layer], pair, strict=True):
                held[:, :, :before] = old

    def _room(self, *like: Tensor) -> tuple[Tensor, Tensor]:
        # Zeros: slots not yet written are masked, but a chance NaN in them would not be.
        keys, values = (states.new_zeros(self.rows, states.shape[1], self.slots, states.shape[3]) for states in like)
        return keys, values

    def aim(self, positions: Tensor, longest: int) -> None:
        """The next `update` writes row `i` at `positions[i]`, `longest` being the largest of them."""
        self.reserve(longest + 1)
        self.at = positions
        self.by_heads.clear()

    def _index(self, heads: int) -> Tensor:
        if heads not in self.by_heads:
            line = torch.arange(len(self.at) * heads, device=self.at.device).view(-1, heads)
            self.by_heads[heads] = (line * self.slots + self.at[:, None]).flatten()
        return self.by_heads[heads]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.held[layer_idx]
        b, heads, _, width = key_states.shape
        at = self._index(heads)
        keys.view(-1, width).index_copy_(0, at, key_states.reshape(-1, width))
        values.view(-1, values.shape[-1]).index_copy_(0, at, value_states.reshape(-1, values.shape[-1]))
        return keys[:b], values[:b]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.slots - 1

    def put(self, layer: int, start: int, rows: Tensor, new: tuple[Tensor, Tensor], source: Tensor) -> None:
        """Row `rows[i]` gets, from slot `start` on, what `new` [b, heads, n, width] holds in row `source[i]`."""
        if layer not in self.held:
            self.held[layer] = self._room(*new)
        for held, states in zip(self.held[layer], new, strict=True):
            n = min(states.shape[2], self.slots - start)
            held[rows, :, start : start + n] = states[source, :, :n]

    def move(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copies the first `length` slots of rows over those of others; no row may be in both."""
        for pair in self.held.values():
            for held in pair:
                held[target, :, :length] = held[source, :, :length]


def _masks(config: Any, style: MaskStyle, positions: Tensor, keys: int, dtype: torch.dtype) -> Any:
    """Additive masks [B, 1, Q, keys] for queries at `positions` [B, Q]; key `j` stands at position `j`."""
    at, key = positions[:, None, :, None], torch.arange(keys, device=positions.device)
    known = limits(config)
    window, chunk = known.window, known.block

    def additive(kind: str) -> Tensor:
        hidden = key > at
        if kind == "sliding_attention" and window:
            hidden |= key <= at - window
        if kind == "chunked_attention" and chunk:
            hidden |= key // chunk != at // chunk
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)

    kinds = _layer_kinds(config)
    return additive(next(iter(kinds))) if style == "one" else {kind: additive(kind) for kind in sorted(kinds)}


def _layer_kinds(config: Any) -> set[str]:
    kinds = getattr(config, "layer_types", None)
    return set(kinds) if kinds else {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}


class Decoder:
    """Runs rows of token sequences side by side with a cache of `rows` x `slots` tokens."""

    def __init__(self, module: Any, style: MaskStyle, shared: Sequence[int], *, rows: int, slots: int) -> None:
        self.module, self.style = module, style
        base = base_of(module)
        self.config = base.config.get_text_config()
        self.dtype, self.device, self.head = base.dtype, base.device, base.get_output_embeddings()
        self.cache = _Slots(rows, slots)
        self.shared: dict[int, tuple[Tensor, Tensor]] = {}
        self.start = len(shared)
        if shared:
            _, self.shared = self._fed(torch.tensor([list(shared)]), torch.zeros(1, dtype=torch.long), 0)

    def prefill(self, prompts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> Iterator[tuple[range, Tensor]]:
        """Computes prompts (which all begin with `shared`), puts each in the cache rows `places[i]`, and gives (which of them, logits [n, V])."""
        first = 0
        while first < len(prompts):
            last, longest = first, 0
            while last < len(prompts):
                longest = max(longest, len(prompts[last]) - self.start)
                if last > first and longest * (last + 1 - first) > PREFILL_TOKENS:
                    break
                last += 1
            yield range(first, last), self._prefill(prompts[first:last], places[first:last])
            first = last

    def _prefill(self, prompts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> Tensor:
        rest = [list(prompt[self.start :]) for prompt in prompts]
        n = max(map(len, rest))
        ids = torch.tensor([row + [row[-1]] * (n - len(row)) for row in rest])
        logits, found = self._fed(ids, torch.tensor([len(row) - 1 for row in rest]), self.start)
        self.cache.reserve(self.start + n)
        rows = torch.tensor([row for group in places for row in group], device=self.device)
        source = torch.tensor([i for i, group in enumerate(places) for _ in group], device=self.device)
        for layer, new in found.items():
            if self.shared:
                self.cache.put(layer, 0, rows, self.shared[layer], torch.zeros_like(source))
            self.cache.put(layer, self.start, rows, new, source)
        return logits

    def _fed(self, ids: Tensor, last: Tensor, start: int) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Logits after token `last` of each row of `ids` [B, T], which follow the shared beginning, and keys and values of each layer.

        A row alone goes through in pieces, so that the mask of a long one stays small; `last` is its last token then.
        """
        n = ids.shape[1]
        size = n if len(ids) > 1 else PREFILL_TOKENS
        found: dict[int, tuple[Tensor, Tensor]] = {}
        held = self.shared
        for first in range(0, n, size):
            piece = ids[:, first : first + size]
            cache, end = _Prefill(held, start + first), start + first + piece.shape[1]
            positions = torch.arange(start + first, end).expand(piece.shape)
            logits = self._forward(cache, piece, positions, end, last if n <= size else torch.tensor([piece.shape[1] - 1]))
            found = _joined(found, cache.new)
            held = _joined(self.shared, found) if first + size < n else {}
        return logits, found

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Adds one token to each of the first `len(tokens)` rows, at its slot; logits [rows, V] of what comes next."""
        positions = torch.tensor(slots, device=self.device)
        self.cache.aim(positions, max(slots))
        last = torch.zeros(len(tokens), dtype=torch.long)
        return self._forward(self.cache, torch.tensor(tokens)[:, None], positions[:, None], self.cache.slots, last)

    def _forward(self, cache: Cache, ids: Tensor, positions: Tensor, keys: int, last: Tensor) -> Tensor:
        """Logits [B, V] after the query `last[i]` of each row; the head sees these positions only."""
        positions = positions.to(self.device)
        at = (torch.arange(len(last), device=self.device), last.to(self.device))

        def narrow(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][at][:, None], *args[1:])

        hook = self.head.register_forward_pre_hook(narrow) if ids.shape[1] > 1 else None
        try:
            mask = _masks(self.config, self.style, positions, keys, self.dtype)
            with products(self.config, self.device):
                out = self.module(input_ids=ids.to(self.device), attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        finally:
            if hook is not None:
                hook.remove()
        logits: Tensor = out.logits[:, -1]
        return logits


@torch.no_grad()
def mask_style(module: Any, length: int) -> MaskStyle | None:
    """How `module` takes masks for texts of up to `length` tokens, or None where a `Decoder` does not agree with plain forwards.

    Tried once for each model class, configuration, attention and dtype, on a few short texts.
    """
    base = base_of(module)
    config = base.config.get_text_config()
    limit = checked_length(module)
    if limit is not None and length > limit:
        return None
    key = (type(module), type(base), config.to_json_string(), config._attn_implementation, base.dtype, base.device.type)
    if key not in _styles:
        _styles[key] = _try_styles(module, config)
        if _styles[key] is None:
            log.warning(
                "%s: cached decoding does not agree with plain forwards, so completions come from its own generate, one prompt at a time", type(base).__name__
            )
    return _styles[key]


def checked_length(module: Any) -> int | None:
    """Texts longer than this are not covered by the check; None where length makes no difference."""
    config = base_of(module).config.get_text_config()
    kinds, known = _layer_kinds(config), limits(config)
    sizes = (("sliding_attention", known.window), ("chunked_attention", known.block))
    found = [size for kind, size in sizes if kind in kinds and size and size > CHECKED_WINDOW]
    # Frequencies of the whole batch change when its longest row passes `turn` or `drift`; `foreign` windows may count slots.
    found += [size for size in (known.foreign, known.turn, known.drift) if size]
    return min(found, default=None)


def _try_styles(module: Any, config: Any) -> MaskStyle | None:
    kinds = _layer_kinds(config)
    if not kinds <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return None
    known = limits(config)
    sizes = [size for size in (known.window, known.block) if size and size <= CHECKED_WINDOW]
    styles: tuple[MaskStyle, ...] = ("one", "each") if len(kinds) == 1 else ("each",)
    for style in styles:
        # The boundary to foreign model code: whatever it raises, it cannot be run this way.
        try:
            if _agrees(module, style, config.vocab_size, max(sizes, default=0)):
                return style
        except torch.OutOfMemoryError:  # a RuntimeError too, but of the machine, not of the architecture
            raise
        except _REFUSALS as error:
            log.debug("mask style %s: %s: %s", style, type(error).__name__, error)
    return None


def _agrees(module: Any, style: MaskStyle, vocabulary: int, window: int) -> bool:
    """Compares logits after prompts of three lengths with a shared beginning, and after two more tokens, with plain forwards."""
    texts = [[(7919 * (i + 1) * (1 if i < 3 else row + 2) + 13) % vocabulary for i in range(window + 9 + 2 * row)] for row in range(3)]
    decoder = Decoder(module, style, texts[0][:3], rows=3, slots=window + 13)
    prompts = [text[:-2] for text in texts]
    got = [torch.cat([logits for _, logits in decoder.prefill(prompts, [[0], [1], [2]])])]
    got += [decoder.step([text[at] for text in texts], [len(text) + at for text in texts]) for at in (-2, -1)]
    cached_TRV = torch.stack(got).float()

    def plain(ids: Tensor) -> Tensor:
        logits: Tensor = module(input_ids=ids.to(decoder.device), use_cache=False).logits
        return logits.float()

    plain_TRV = torch.stack([plain(torch.tensor([text]))[0, -3:] for text in texts], 1)
    apart = float((cached_TRV - plain_TRV).abs().mean() / plain_TRV.std())
    log.debug("mask style %s: %.2g standard deviations from plain forwards", style, apart)
    return apart <= AGREEMENT.get(decoder.dtype, AGREEMENT_16_BITS)
