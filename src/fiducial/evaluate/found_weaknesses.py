"""Cases of discovered weaknesses, tried again: what a repair mended, what carried over, what it broke.

What it does: puts the checked cases that align/weakness_discovery kept to a model and counts which answers now keep to the requirement.
Use it when:  a model was trained on the repairs of found weaknesses. Run it on the model before and after, and compare the two runs: items are paired.
Formula:      repaired: failing cases of the training half that now pass; carried_over: the same for the held-out half, whose requests were
              never trained on; kept: cases that went well and still do. Each is a share with its Wilson interval.
Defaults:     answers of at most 160 tokens, as they were found with.
Limits:       only cases with a check; those that a model assessed are left out and counted. A case that passes once may fail in other words.
Source:       Cheng et al. 2024, arXiv:2406.16714, for the cases; held-out halves are our own addition.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Prompt, user
from fiducial.core.roles import Sink, Suite, SuiteResult, ignore
from fiducial.data.checks import Check, parsed
from fiducial.data.languages import language_of
from fiducial.data.rows import read_rows
from fiducial.evaluate.base import ask, chunks, fingerprint, rate_score
from fiducial.models.base import Model

log = logging.getLogger(__name__)

METRICS = {"repaired": (True, "training"), "carried_over": (True, "held-out"), "kept": (False, "")}
"""Per metric: whether the cases had failed, and of which half; both halves where none is named."""
FAILED = 3.1
SCORER = "checks-1"


class Found(NamedTuple):
    """One case as it was found."""

    prompt: Prompt
    check: Check
    half: str
    failed: bool


@final
@dataclass(frozen=True, slots=True)
class FoundWeaknesses(Suite):
    """Shares of found cases that pass."""

    data: str = ""
    """The file `results` of align/weakness_discovery."""
    max_tokens: int = 160
    """Longest answer, in tokens."""

    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Scores repaired, carried_over and kept, as far as there are such cases. Raises ConfigError without a file."""
        if not self.data:
            raise ConfigError(f"{self.name} needs the cases that were found", hint="name the file of --results of align/weakness_discovery with --data")
        found = cases(self.data)[:limit]
        items: list[dict[str, Any]] = []
        for chunk in chunks(found):
            for case, attempt in zip(chunk, ask(model, [c.prompt for c in chunk], suite=self.name, max_tokens=self.max_tokens, seed=seed), strict=True):
                there = attempt.finish not in ("error", "filtered")
                passed = case.check.holds(attempt.response) if there else None
                facts = {"id": case.prompt.id, "request": case.prompt.text, "category": case.prompt.category, "half": case.half, "failed_before": case.failed}
                items.append(facts | {"answer": attempt.response, "finish": attempt.finish, "passed": passed})
                sink(items[-1])
        return SuiteResult(self._scores(model, items), items)

    def _scores(self, model: Model, items: Sequence[dict[str, Any]]) -> list[Any]:
        scores = []
        for metric, (failed, half) in METRICS.items():
            some = [i for i in items if i["failed_before"] == failed and half in ("", i["half"])]
            known = [i for i in some if i["passed"] is not None]
            if not some:
                continue
            mark = fingerprint(model, data=[i["id"] for i in items], form=["chat", self.max_tokens], scorer=SCORER, scored=[i["id"] for i in known])
            values = [bool(i["passed"]) for i in known]
            scores.append(rate_score(values, suite=self.name, metric=metric, model=model.fingerprint, fingerprint=mark, not_scored=len(some) - len(known)))
        return scores


def cases(path: str) -> list[Found]:
    """The cases of a file that have a check and a mark, in order; a warning says how many have not. Raises DataError when there are none."""
    found, left_out = [], 0
    for where, row in read_rows(path):
        if not isinstance(row.get("request"), str) or row.get("half") not in ("training", "held-out") or "score" not in row:
            raise DataError(f"{where}: a case needs request, half and score", hint="give the file of --results of align/weakness_discovery")
        if row.get("check") and row["score"] is not None:
            text, category = row["request"], f"{row.get('task', '')}/{row.get('point', '')}"
            prompt = Prompt(messages=user(text), language=language_of(text), category=category, source=path)
            found.append(Found(prompt, parsed(row["check"], where), row["half"], row["score"] < FAILED))
        else:
            left_out += 1
    if not found:
        raise DataError(f"{path}: none of the cases has a check and a mark", hint="cases that only a model can assess are not tried again here")
    if left_out:
        log.warning("%d of %d cases of %s are left out: they have no check or no mark", left_out, left_out + len(found), path)
    return found
