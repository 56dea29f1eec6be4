"""Measures which back ends give a model's true numbers; the name of an architecture is never trusted.

Some architectures ignore a tree mask, apply their own window on top, or read distances from row indices, and answer with plausible
wrong numbers. A small trie is scored in every form and compared with single forward passes of the whole model. The verdict is kept
for the life of the process per classes of the parts, configuration, attention implementation, dtype, device and size of the weights, with
adapters or without: of weights as small as a random start has them, some layers say so little that a wrong mask does not show. One on a
model that had code put on it holds for that model and that code.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fiducial.core.errors import ModelError
from fiducial.models import adapters
from fiducial.models.forest import Paths, Row
from fiducial.models.head import logsumexp, module_logprobs
from fiducial.models.passes import Anatomy, Mask, Wanted, anatomy, run
from fiducial.models.planning import plan

log = logging.getLogger(__name__)

LONGEST_CHECKED_WINDOW = 512
"""Windows up to this many positions are checked with a longer path; larger ones limit the length of packed paths instead."""
FP32_TOLERANCE = 1e-4
"""Smallest tolerance of the largest difference for float32 and wider, in nats per scored token."""
HALF_FLOOR = 0.02
"""Smallest tolerance of the mean difference for 16-bit weights, in nats: what rounding alone does to small models."""
SHARE_OF_A_TOKEN = 0.1
"""The floor is at most this share of what another token of the prompt changes: right masks were below 0.03 of it, in 16 bits."""
LOOKED_AT = 256
"""Values of each matrix that tell its size."""
MASKLESS = ("torch", "peft")
"""Packages whose layers see no attention mask, so that an adapter needs no verdict of its own."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a model may be run with."""

    tree_mask: Mask | None
    """Form in which it takes a tree mask; None if it must not be given one."""
    kv: bool
    """Whether continuing from a repeated cache is exact (without gradients)."""
    padded: Literal["causal", "masked"]
    """Whether right padding needs a 2D mask."""
    head: Literal["known", "logits"]
    """Whether its logits are the head's with the configured scale and cap; otherwise the model's own logits are used."""
    longest: int | None
    """Longest path, in tokens, for which packed rows were shown right; None for any."""
    reason: str
    """Why the tree mask was refused, or which form was accepted, in one line."""
    tolerance: float
    """Largest difference accepted, nats per token; of the mean over tokens for 16-bit weights."""
    differences: dict[str, float | str] = field(default_factory=dict)
    """Form -> difference from single forward passes, nats per token, or the error it raised."""


_verdicts: dict[tuple[Hashable, ...], Verdict] = {}
_own: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Hashable, ...], Verdict]] = weakref.WeakKeyDictionary()
"""Verdicts on models that had code put on them; they hold for that model and that code."""


def check(module: nn.Module) -> Verdict:
    """The verdict on a causal language model, measured at the first call. Raises ModelError if not even padding is exact.

    The tolerance follows the difference that rounding every block's output anew makes: 1.5 times its mean for 16-bit weights, at
    least `HALF_FLOOR` or `SHARE_OF_A_TOKEN` of what another token in the shared part makes; 5 times its largest for wider ones, whose
    products round more than their outputs, at least `FP32_TOLERANCE`. A tree mask must also pass an isolation test: a token changed in
    one branch changes another's numbers by less than a third of the tolerance.
    """
    part = anatomy(module)
    put = _put_on(part)
    known = _own.setdefault(part.causal, {}) if put else _verdicts
    kinds: Any = frozenset(kind for kind in set(map(type, part.causal.modules())) if kind.__module__.partition(".")[0] not in MASKLESS)
    key: tuple[Hashable, ...] = (
        *put,
        kinds,
        sha256(part.causal.config.to_json_string(use_diff=False).encode()).hexdigest(),
        part.attention,
        str(part.dtype),
        part.device.type,
        _sizes(part),
    )
    if key not in known:
        known[key] = _found(module, part)
    return known[key]


def _sizes(part: Anatomy) -> str:
    """Root mean square of every matrix of the blocks to the nearest power of two: other ones than those the verdict was measured on are told by it."""
    looked = []
    for name, weights in part.layers.named_parameters():
        if weights.ndim > 1 and weights.device.type != "meta" and "lora_" not in name:
            values = weights.detach().reshape(-1)
            looked.append(values[:: max(1, len(values) // LOOKED_AT)].float().square().mean().sqrt().log2().round().to(part.device))
    return " ".join(map(str, torch.stack(looked).tolist())) if looked else ""


def _put_on(part: Anatomy) -> tuple[Hashable, ...]:
    """What was put on this model that models of its class do not have: forward passes of its own in any part, and hooks on the whole.

    Hooks on blocks and below are taken to leave masks alone, as steering does; the passes that this package gives to adapters do.
    """
    hooks = (number for module in (part.causal, part.backbone) for number in (*module._forward_hooks, *module._forward_pre_hooks))
    own = [module.__dict__["forward"] for module in part.causal.modules() if "forward" in module.__dict__]
    return *hooks, *(_reference(forward) for forward in own if getattr(getattr(forward, "__func__", forward), "__module__", None) != adapters.__name__)


def _reference(forward: Any) -> Hashable:
    """Equal for the same function as long as that is there; never for another one at the same address."""
    try:
        return weakref.ref(forward)
    except TypeError:  # of a class that takes no weak references
        return object()


def _found(module: nn.Module, part: Anatomy) -> Verdict:
    # the verdict is on the model, and stays: not on what happens to be switched on around the first call
    with torch.no_grad(), _evaluation(module), torch.autocast(part.device.type, enabled=False):
        verdict = _measure(part)
    if verdict.tree_mask is None:
        log.warning("%s is scored without shared rows: %s", type(part.causal).__name__, verdict.reason)
    return verdict


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _measure(part: Anatomy) -> Verdict:
    paths, checked = _trial(part)
    truth = torch.cat([_alone(part, tuple(ids))[start - 1 :] for ids, start in zip(paths.ids, paths.start, strict=True)])
    tolerance = _tolerance(part, paths, truth)
    found: dict[str, float | str] = {}
    head, padded = _padding(part, paths, truth, tolerance, found)
    logits = head == "logits"
    kv = _accepts(found, "kv", partial(_difference, part, paths, "kv", truth, logits=logits), tolerance)
    mask = next((form for form in _forms(part, checked) if _tree(part, paths, form, truth, tolerance, found, logits=logits)), None)
    longest = None if checked or mask is None else min(size for size in (part.window, part.block) if size is not None)
    tried = ", ".join(f"{form} {value if isinstance(value, str) else format(value, '.1e')}" for form, value in found.items())
    reason = f"tree mask accepted as {mask}" if mask else f"no tree mask gives the true numbers within {tolerance:.1e} nats: {tried or 'none was tried'}"
    return Verdict(mask, kv, padded, head, longest, reason, tolerance, found)


def _trial(part: Anatomy) -> tuple[Paths, bool]:
    """Three paths that branch at two levels, longer than every window where that is affordable, and whether they are."""
    limits = [size for size in (part.window, part.block) if size is not None]
    checked = not limits or max(limits) <= LONGEST_CHECKED_WINDOW
    length = max(limits) + 3 if limits and checked else 9
    draw = torch.Generator().manual_seed(1)
    size = part.embedding.num_embeddings
    tokens = torch.randint(size // 8, size, (length + 25,), generator=draw).tolist()
    trunk, limb, a, b, c = tokens[:length], tokens[length : length + 4], tokens[-21:-15], tokens[-15:-8], tokens[-8:]
    # The branch that the isolation test changes stands first in a row: what leaks by index leaks onwards.
    c[0], limb[0] = sorted((c[0], limb[0]))
    return Paths([trunk + limb + a, trunk + limb + b, trunk + c], [length - 2] * 3, [0, 0, 0]), checked


def _alone(part: Anatomy, ids: tuple[int, ...], *, copies: int = 1, tail: int = 0) -> Tensor:
    """Log-probability of every token but the first, [T - 1], by one plain forward pass of the whole model."""
    batch = torch.tensor([ids + ids[:1] * tail], device=part.device).expand(copies, -1)
    logits: Tensor = part.causal(input_ids=batch, use_cache=False).logits[0, : len(ids) - 1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, batch[0, 1 : len(ids), None])[:, 0] - logsumexp(wide)


def _gap(part: Anatomy, a: Tensor, b: Tensor) -> float:
    """Largest difference; for 16-bit weights the mean one, since single tokens stray far by rounding alone."""
    apart = (a - b).abs()
    return float(apart.mean() if part.dtype.itemsize < 4 else apart.max())


def _tolerance(part: Anatomy, paths: Paths, truth: Tensor) -> float:
    with _rounding(part):
        again = _alone(part, tuple(paths.ids[0]))[paths.start[0] - 1 :]
    noise = _gap(part, truth[: len(again)], again)
    if part.dtype.itemsize >= 4:
        return max(5.0 * noise, FP32_TOLERANCE)
    return max(1.5 * noise, min(HALF_FLOOR, SHARE_OF_A_TOKEN * _sensitivity(part, paths, truth)))


def _sensitivity(part: Anatomy, paths: Paths, truth: Tensor) -> float:
    """How far the first path's numbers are from those after another token at the end of its shared part."""
    ids, at = list(paths.ids[0]), paths.start[0] + 2
    ids[at] = (ids[at] + 1) % part.embedding.num_embeddings
    after = _alone(part, tuple(ids))[at:]
    return _gap(part, truth[at + 1 - paths.start[0] :][: len(after)], after)


@contextmanager
def _rounding(part: Anatomy) -> Iterator[None]:
    """Blocks whose outputs are off by up to half a unit in the last place, as another order of summation would leave them.

    Two batch shapes are no measure of that: some kernels give them equal bits.
    """
    draw = torch.Generator().manual_seed(2)
    size = torch.finfo(part.dtype).eps / 2

    def shake(_module: nn.Module, _args: object, output: Any) -> Any:
        states = output if isinstance(output, Tensor) else output[0]
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        noise = size * (2.0 * torch.rand(states.shape, generator=draw).to(states.device) - 1.0)
        shaken = (wide + wide * noise).to(states.dtype)
        return shaken if isinstance(output, Tensor) else (shaken, *output[1:])

    handles = [layer.register_forward_hook(shake) for layer in part.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _padding(
    part: Anatomy, paths: Paths, truth: Tensor, tolerance: float, found: dict[str, float | str]
) -> tuple[Literal["known", "logits"], Literal["causal", "masked"]]:
    for head in ("known", "logits"):
        for padded in ("causal", "masked"):
            measure = partial(_difference, part, paths, "padded", truth, masked=padded == "masked", logits=head == "logits")
            if _accepts(found, f"padded {padded} {head}", measure, tolerance):
                return head, padded
    raise ModelError(
        f"{type(part.causal).__name__} gives other numbers in a right-padded batch than alone: {found}",
        hint="it cannot be scored; is it a causal language model?",
    )


def _forms(part: Anatomy, checked: bool) -> list[Mask]:
    if part.attention.startswith("flex"):
        # Under flex attention a dense mask corrupts memory on the CPU; block masks exist on CUDA only.
        return ["flex"] if part.device.type == "cuda" and part.window is None and part.block is None else []
    if "flash" in part.attention or "paged" in part.attention:
        return []
    if part.window is None and part.block is None:
        return ["additive", "bool", "dict"]
    return ["dict", "windowed", "additive"] if checked else ["dict", "windowed"]


def _tree(part: Anatomy, paths: Paths, form: Mask, truth: Tensor, tolerance: float, found: dict[str, float | str], *, logits: bool) -> bool:
    """Whether a mask form gives the true numbers and keeps branches apart."""
    last = paths.ids[-1]
    other = (*last[:-2], (last[-2] + 1) % part.embedding.num_embeddings, last[-1])
    changed = Paths([*paths.ids[:-1], other], paths.start, paths.group)
    same = len(truth) - (len(last) - paths.start[-1])

    def measure() -> float:
        first, second = (_scored(part, plan(some, budget=1 << 20)[0], mask=form, logits=logits) for some in (paths, changed))
        # Not bitwise: experts see batches of another size when a token of another branch changes.
        return max(_gap(part, first, truth), 3.0 * _gap(part, first[:same], second[:same]))

    return _accepts(found, form, measure, tolerance)


def _accepts(found: dict[str, float | str], name: str, measure: Callable[[], float], tolerance: float) -> bool:
    # A boundary: an architecture may object to a mask, a dict or a cache in any way it likes, and that is the answer sought.
    try:
        difference = measure()
    except (torch.OutOfMemoryError, MemoryError):  # says nothing about the architecture, and the verdict would stay
        raise
    except Exception as error:
        found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        return False
    found[name] = difference
    return bool(difference <= tolerance)


def _difference(part: Anatomy, paths: Paths, form: str, truth: Tensor, *, mask: Mask | None = None, masked: bool = False, logits: bool = False) -> float:
    rows = plan(paths, budget=1 << 20, backend=form)
    return _gap(part, _scored(part, rows[0], mask=mask, masked=masked, logits=logits), truth)


def _scored(part: Anatomy, row: Row, *, mask: Mask | None = None, masked: bool = False, logits: bool = False) -> Tensor:
    row = row.to(part.device)
    states = run(part, row, Wanted(row.unique_parents, logits=logits), mask=mask, masked=masked)
    head = nn.Identity() if logits else part.head
    scale, softcap = (1.0, None) if logits else (part.scale, part.softcap)
    return module_logprobs(states.final, head, row.edge_u, row.edge_target, scale=scale, softcap=softcap).logp
