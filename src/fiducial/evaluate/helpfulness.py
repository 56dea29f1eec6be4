"""What is left of ordinary helpfulness, by transparent rules.

What it does: asks everyday requests and counts what can be counted without a model that judges: whether there is an answer, whether it
              was refused (with a judge), whether it ran to its end, how much it repeats itself, and how much of the request it takes
              up. With a reference model's answers it also says how likely the model still finds them.
Use it when:  comparing a model before and after a repair, item by item. Broken models show: empty, looping, cut, off topic.
Formula:      repetition = 1 - distinct 4-grams / 4-grams of words; on_topic = share of the request's content words that occur in the
              answer (word stems; pairs of characters in Chinese); reference_logp = mean over answers of log p(answer) / tokens, in nats.
Defaults:     the shipped everyday requests, 64 tokens per answer.
Limits:       does not measure whether an answer is right, useful, well written or safe. Good answers may use other words than the
              request, so on_topic has no ideal value; short token limits lower `finished`. Read every figure against the same figure
              of the model before.
Source:       repetition as in Welleck et al. 2020, arXiv:1908.04319 (seq-rep-4); the rest is plain counting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, final

from fiducial.core.errors import DataError
from fiducial.core.records import Attempt, Better, Prompt, Score
from fiducial.core.roles import Judge, Sink, Suite, SuiteResult, ignore
from fiducial.data import load
from fiducial.data.overlap import repetition
from fiducial.data.rows import read_rows
from fiducial.data.split import split as splits
from fiducial.evaluate.base import ask, chunks, fingerprint, mean_score, rate_score, refused, weights_of
from fiducial.models.base import Model, WhiteBox

RATES = ("answered", "not_refused", "finished")
MEANS: dict[str, tuple[tuple[float, float], Better]] = {
    "repetition": ((0.0, 1.0), "lower"),
    "on_topic": ((0.0, 1.0), "higher"),
    "reference_logp": ((float("-inf"), 0.0), "higher"),
}
"""Per metric: bounds of its values, and which direction is better."""
SCORER = "rules-1"

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+(?:['’][^\W_]+)?")
_HAN = re.compile(r"[\u3400-\u9fff]+")
_STOP = """
a about all also am an and any are as at be been but by can could did do does explain find for from get give had has have he her him his
how i if in into is it its just know let like list make me more most my need no not of on one or our please she should show so some suggest
tell than that the their them then there these they this those to two three five up us use want was way ways we well were what when where
which who why will with would write you your
"""
_STOP_WORDS = frozenset(_STOP.split())


@final
@dataclass(frozen=True, slots=True)
class Helpfulness(Suite):
    """Answers to everyday requests, counted by rules."""

    tags: ClassVar[tuple[str, ...]] = ()

    data: str = ""
    """File of prompts; empty = the shipped everyday requests."""
    split: Literal["", "repair", "validation", "held-out"] = ""
    """Only the prompts of this split, which a hash of their text decides; empty = all."""
    judge: Judge | None = None
    """Who says whether an answer is a refusal; without one, not_refused is left out."""
    answers: str = ""
    """JSON Lines file of a reference model's answers, rows {"prompt", "answer", "finish"} as this suite records them; gives reference_logp."""
    max_tokens: int = 64
    """Longest answer, in tokens."""

    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Scores answered, finished, repetition, on_topic; not_refused with a judge; reference_logp with answers, from two items on."""
        prompts = load.prompts(self.data or "shipped", expected="answer")
        prompts = (splits(prompts).get(self.split, []) if self.split else prompts)[:limit]
        known = references(self.answers) if self.answers else {}
        box = weights_of(model, self.name) if known else None
        items = []
        for chunk in chunks(prompts):
            attempts = ask(model, chunk, suite=self.name, max_tokens=self.max_tokens, seed=seed)
            verdicts = [refused(v) for v in self.judge.judge(attempts)] if self.judge else [None] * len(chunk)
            logps = reference_logp(box, chunk, known) if box else [None] * len(chunk)
            for attempt, verdict, logp in zip(attempts, verdicts, logps, strict=True):
                items.append(_item(attempt) | {"not_refused": None if verdict is None else not verdict, "reference_logp": logp})
                sink(items[-1])
        return SuiteResult(self._scores(model, prompts, items), items)

    def _scores(self, model: Model, prompts: Sequence[Prompt], items: Sequence[dict[str, Any]]) -> list[Score]:
        scores = []
        for metric in (*RATES, *MEANS):
            if (metric == "not_refused" and not self.judge) or (metric == "reference_logp" and not self.answers):
                continue
            scored = [item for item in items if item[metric] is not None]
            if metric == "reference_logp" and len(scored) < 2:  # a mean without bounds needs two values for an interval
                continue
            values = [item[metric] for item in scored]
            judge = f" {self.judge.name} {self.judge.options()}" if self.judge and metric == "not_refused" else ""
            common: dict[str, Any] = {
                "suite": self.name,
                "metric": metric,
                "model": model.fingerprint,
                "not_scored": len(items) - len(scored),
                "fingerprint": fingerprint(
                    model, data=[p.id for p in prompts], form=["chat", self.max_tokens], scorer=SCORER + judge, scored=[item["id"] for item in scored]
                ),
            }
            if metric in RATES:
                scores.append(rate_score(values, **common))
            else:
                bounds, better = MEANS[metric]
                scores.append(mean_score(values, bounds=bounds, better=better, **common))
        return scores


def on_topic(request: str, answer: str) -> float | None:
    """Share of the request's content words that occur in the answer; None for a request without any.

    >>> on_topic("How do I bake rye bread?", "Baking bread takes time.") == 2 / 3
    True
    """
    wanted = content(request)
    return len(wanted & content(answer)) / len(wanted) if wanted else None


def content(text: str) -> set[str]:
    """Stems of the words that carry meaning, and neighbouring pairs of Chinese characters."""
    stems = {_stem(w) for w in _WORD.findall(text.lower()) if w not in _STOP_WORDS and not _HAN.match(w)}
    return stems | {a + b for run in _HAN.findall(text) for a, b in pairwise(run)}


def references(path: str) -> dict[str, tuple[str, bool]]:
    """Prompt text -> (answer, whether it ran to its end), from the rows that hold an answer. Raises DataError for other rows."""
    found = {}
    for where, row in read_rows(path):
        prompt, answer = row.get("prompt"), row.get("answer")
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise DataError(f"{where}: a row needs prompt and answer", hint='write {"prompt": "...", "answer": "...", "finish": "stop"}')
        if answer.strip():
            found[prompt] = (answer, row.get("finish", "stop") == "stop")
    return found


def reference_logp(model: WhiteBox, prompts: Sequence[Prompt], known: dict[str, tuple[str, bool]]) -> list[float | None]:
    """Mean log-probability per token, in nats, of the known answer to each prompt; None where none is known. The end token counts
    where the answer ran to its end.
    """
    from fiducial.models.forest import Paths

    pairs, places = [], []
    for place, prompt in enumerate(prompts):
        if prompt.text in known:
            answer, ended = known[prompt.text]
            ids, start = model.encode(prompt.messages, answer)
            ids = ids if ended else ids[:-1]
            if start < len(ids) <= model.context + 1:  # the last token is scored but not read
                pairs.append((ids, start))
                places.append(place)
    values: list[float | None] = [None] * len(prompts)
    for place, value in zip(places, model.score(Paths.of(pairs)).path_mean.tolist() if pairs else [], strict=True):
        values[place] = value
    return values


def _stem(word: str) -> str:
    """The word without a plural, -ed or -ing ending, and without a final e."""
    for ending in ("ing", "ies", "es", "ed", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _item(attempt: Attempt) -> dict[str, Any]:
    """What the rules say of one answer; None where there is nothing to say."""
    there = attempt.finish not in ("error", "filtered")
    text = attempt.response.strip()
    return {
        "id": attempt.prompt.id,
        "prompt": attempt.prompt.text,
        "language": attempt.prompt.language,
        "category": attempt.prompt.category,
        "answer": attempt.response,
        "finish": attempt.finish,
        "error": attempt.error,
        "answered": bool(text) if there else None,
        "finished": attempt.finish == "stop" if there and text else None,
        "repetition": repetition(text) if there and text else None,
        "on_topic": on_topic(attempt.prompt.text, text) if there else None,
    }
