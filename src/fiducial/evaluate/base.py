"""What suites share: asking plainly, scores with their fingerprints, and the likelihood of answer options.

Likelihoods follow the rules of lm-evaluation-harness 0.4.13 (lm_eval/api/model.py, lm_eval/models/huggingface.py), so that figures
can be compared with it; the engine computes what options share only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from typing import Any, NamedTuple, TypeVar

from fiducial.core.errors import DataError, MethodError
from fiducial.core.intervals import Rate, mean
from fiducial.core.records import Attempt, Better, Prompt, Score, Verdict, digest
from fiducial.models.base import Model, WhiteBox

T = TypeVar("T")
CHUNK = 64
"""Items worked on together; after each chunk its records go to the sink."""


class Pair(NamedTuple):
    """One text to score after another, as tokens."""

    ids: list[int]
    """Tokens of context and continuation."""
    start: int
    """Index of the first token of the continuation, at least 1."""


class Likelihoods(NamedTuple):
    """Log-likelihoods of the options of one item."""

    logp: tuple[float, ...]
    """Sum over the option's tokens, in nats, per option."""
    greedy: tuple[bool, ...]
    """Whether greedy decoding would give the option, per option."""
    truncated: bool
    """Whether the beginning of some option's context had to be left out."""


def loglikelihood_pairs(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Tokens of `context` followed by `continuation`, and where the continuation starts.

    Trailing white space of the context goes to the continuation; both are tokenised together, and what follows the context's own
    tokens is the continuation. Special tokens are added as the tokenizer does by itself, unless the text begins with one. An empty
    context is the begin token (else the end token); when the continuation itself starts with it, that one token is the context.
    Raises DataError when no token is left to score.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if context:
        bare = context.startswith(tokenizer.decode([prefix]))
        before = tokenizer.encode(context, add_special_tokens=not bare)
        after = tokenizer.encode(context + continuation, add_special_tokens=not bare)[len(before) :]
    else:
        before, after = [prefix], tokenizer.encode(continuation, add_special_tokens=False)
        if after[:1] == before:
            after = after[1:]
    if not after:
        raise DataError(f"the option {continuation!r} has no token of its own", hint="leave empty options out")
    return Pair([*before, *after], len(before))


def likelihoods(model: WhiteBox, items: Sequence[tuple[str, Sequence[str]]], *, delimiter: str = " ") -> list[Likelihoods]:
    """Of (context, options) items, the log-likelihood of `delimiter` + option after the context, in order.

    A sequence longer than the model's context loses tokens at its beginning. Raises DataError for an option longer than the context.
    """
    from fiducial.models.forest import Paths

    limit = _context(model)
    pairs, group, cut = [], [], [False] * len(items)
    for index, (context, options) in enumerate(items):
        for option in options:
            pair = loglikelihood_pairs(model.tokenizer, context, delimiter + option)
            # the last token is scored but not read, hence one more than fits
            extra = max(0, len(pair.ids) - (limit + 1))
            if extra >= pair.start:
                raise DataError(f"an option of item {index} has {len(pair.ids) - pair.start} tokens, the model reads {limit}", hint="shorten it")
            cut[index] |= extra > 0
            pairs.append((pair.ids[extra:], pair.start - extra))
            group.append(index)
    scores = model.score(Paths.of(pairs, group=group))
    logp, greedy = iter(scores.path_logp.tolist()), iter(scores.is_greedy.tolist())
    return [Likelihoods(tuple(next(logp) for _ in options), tuple(next(greedy) for _ in options), cut[index]) for index, (_, options) in enumerate(items)]


def ask(model: Model, prompts: Sequence[Prompt], *, suite: str, max_tokens: int, seed: int = 0) -> list[Attempt]:
    """The model's likeliest answers, in the form that judges read."""
    answers = model.sample([p.messages for p in prompts], max_tokens=max_tokens, temperature=0.0, seed=seed)
    fingerprint = model.fingerprint
    return [
        Attempt(
            prompt=prompt,
            attack=suite,
            family="direct",
            parameters={"max_tokens": max_tokens},
            model=fingerprint,
            seed=seed,
            sent=prompt.messages,
            response=answer.text,
            decoded=answer.text if answer.text.strip() else None,
            finish=answer.finish,
            error=answer.error,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
        )
        for prompt, (answer, *_) in zip(prompts, answers, strict=True)
    ]


def refused(verdict: Verdict) -> bool | None:
    """Whether the verdict calls an answer a refusal; None where it was not scored or the label says something else, such as safe."""
    if verdict.outcome == "not_scored":
        return None
    if verdict.label:
        return {"refusal": True, "compliance": False}.get(verdict.label)
    return verdict.outcome == "failure"


def best(values: Sequence[float]) -> int:
    """Index of the largest value; the lowest index of several.

    >>> best([-2.0, -1.0, -1.0])
    1
    """
    return max(range(len(values)), key=lambda i: values[i])


def weights_of(model: Model, suite: str) -> WhiteBox:
    """The model as one whose weights are here; raises MethodError when it is not."""
    if not isinstance(model, WhiteBox):
        raise MethodError(f"{suite} reads token probabilities, which {model.uri} does not give", hint="use a local model")
    return model


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """`items` in pieces of 64."""
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def fingerprint(model: Model, *, data: Any, form: Any, scorer: str, scored: Sequence[str]) -> dict[str, str]:
    """What must agree for two figures to be comparable: hashes of the data and of the prompt format, the scorer, and the ids of the
    items that were scored (`items`: values of two figures pair up only where it agrees). `model` names who answered.
    """
    return {"data": digest(data), "format": digest(form), "scorer": scorer, "items": digest(list(scored)), "model": model.fingerprint}


def rate_score(hits: Sequence[bool], **fields: Any) -> Score:
    """Share of true values, with its Wilson interval and one item of 0 or 1 each; the worst value where there are none."""
    return Score.of_rate(Rate(sum(hits), len(hits)), items=tuple(float(h) for h in hits), **fields)


def mean_score(values: Sequence[float], *, bounds: tuple[float, float], better: Better = "higher", **fields: Any) -> Score:
    """Mean of values, each within `bounds`, with its normal interval cut to them; `bounds` themselves for fewer than two values.

    Without any value it is the worse of the bounds.
    """
    found = mean(values)
    low, high = bounds if isnan(found.se) else found.interval()
    value = found.value if values else bounds[better == "lower"]
    low, high = max(low, bounds[0]), min(high, bounds[1])
    return Score(value=value, n=found.n, low=low, high=high, interval="normal", better=better, items=tuple(values), **fields)


def _context(model: WhiteBox) -> int:
    """Most tokens that the model reads at once."""
    config: Any = model.module.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or model.tokenizer.model_max_length)
