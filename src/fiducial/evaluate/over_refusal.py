"""How often a model refuses what it should answer.

What it does: asks benign requests that look like harmful ones (the twins of the shipped goals, or your own) and counts refusals, as a
              judge sees them.
Use it when:  always beside attack success: a model that refuses everything resists every attack.
Formula:      refusals / answers that could be judged, lower is better; what could not be judged is counted apart.
Defaults:     all shipped twins, 32 tokens per answer, since refusals show at the start.
Limits:       as good as the judge: its two errors go straight into the rate. An answer that helps badly is no refusal; evaluate/helpfulness
              looks at that. Twins differ from goals in more than harm, so small differences between topics mean little.
Source:       Röttger et al. 2024, XSTest, arXiv:2308.01263, for pairing safe prompts with unsafe ones of like wording.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final, get_args

from fiducial.core.errors import ConfigError, nearest
from fiducial.core.records import Attempt, Prompt, Verdict
from fiducial.core.roles import Judge, Sink, Suite, SuiteResult, ignore
from fiducial.data import load
from fiducial.data.split import Split, split
from fiducial.evaluate.base import ask, chunks, fingerprint, rate_score, refused
from fiducial.models.base import Model


@final
@dataclass(frozen=True, slots=True)
class OverRefusal(Suite):
    """Refusal rate on benign requests."""

    tags: ClassVar[tuple[str, ...]] = ()

    judge: Judge
    """Who says whether an answer is a refusal."""
    data: str = ""
    """File of benign prompts; empty = the shipped twins."""
    split: str = ""
    """Takes only prompts of this split: repair, validation or held-out; empty = all."""
    max_tokens: int = 32
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        if self.split and self.split not in get_args(Split):
            raise ConfigError(f"there is no split '{self.split}'", hint=nearest(self.split, get_args(Split)))

    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Scores refusal_rate, lower is better."""
        prompts = self._prompts()[:limit]
        items = []
        for chunk in chunks(prompts):
            attempts = ask(model, chunk, suite=self.name, max_tokens=self.max_tokens, seed=seed)
            for attempt, verdict in zip(attempts, self.judge.judge(attempts), strict=True):
                items.append(_item(attempt, verdict))
                sink(items[-1])
        scored = [item for item in items if item["refused"] is not None]
        score = rate_score(
            [item["refused"] for item in scored],
            suite=self.name,
            metric="refusal_rate",
            better="lower",
            model=model.fingerprint,
            not_scored=len(items) - len(scored),
            fingerprint=fingerprint(
                model,
                data=[p.id for p in prompts],
                form=["chat", self.max_tokens],
                scorer=f"{self.judge.name} {self.judge.options()}",
                scored=[item["id"] for item in scored],
            ),
        )
        return SuiteResult([score], items)

    def _prompts(self) -> list[Prompt]:
        found = load.prompts(self.data or "shipped", expected="comply")
        return split(found)[self.split] if self.split else found  # type: ignore[index]  # checked above


def _item(attempt: Attempt, verdict: Verdict) -> dict[str, Any]:
    """One item's record; errored and unjudged answers have `refused` None."""
    return {
        "id": attempt.prompt.id,
        "prompt": attempt.prompt.text,
        "language": attempt.prompt.language,
        "category": attempt.prompt.category,
        "answer": attempt.response,
        "finish": attempt.finish,
        "refused": refused(verdict),
        "reason": attempt.error or verdict.rationale,
    }
