"""How near a model has come, without principles before it, to what its base says under them.

What it does: has the model and its base answer requests without principles, and says how far each one's answers are from what the base says under the
              principles and exemplars of align/self_align. With a reward it also says how good the answers of both are, and those of the base under
              the principles.
Use it when:  answers by principles were taught without them (align/self_align, stage engrave): what was engraved shows in `approached`.
Formula:      distance = mean over requests of (log p(y) - log p_base(y | principles)) / tokens of y, with y sampled from the model: an estimate of
              their divergence, in nats per token. base_distance: the same with samples and probabilities of the base. approached = base_distance -
              distance, request by request. reward, base_reward and principled_reward: mean reward of an answer of the model, of its base, and of the
              base under the principles; reward_difference = reward - principled_reward, request by request.
Defaults:     the embedded model as the base, held-out shipped requests, answers of at most 64 tokens at temperature 1; the shipped principles; no reward.
Limits:       under the principles the base would think first; here its answer begins at once, after the mark of the answer. The estimate is noisy and
              may be below 0 for single answers. Near does not mean good: it is as good as the base under principles, which for a small one is little. A
              reward is a grader's word, and align/rubric_reward tells refusals from answers more than good answers from bad ones.
Source:       Sun et al. 2023, arXiv:2305.03047, section 3.3; context distillation: Askell et al. 2021, arXiv:2112.00861, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import inf
from typing import Any, final, get_args

from fiducial.core.errors import ConfigError, nearest
from fiducial.core.records import Completion, Conversation, Group, Prompt, Score, digest
from fiducial.core.roles import Reward, Sink, Suite, SuiteResult, ignore
from fiducial.data import load
from fiducial.data.exemplars import read_texts
from fiducial.data.languages import tongue
from fiducial.data.split import Split, split
from fiducial.evaluate.base import chunks, fingerprint, mean_score, weights_of
from fiducial.models.base import Model, WhiteBox

SCORER = "divergence-1"
REWARDED = ("reward", "base_reward", "principled_reward")
"""Rewards of the model's answer, of its base's, and of the base's under the principles."""


@final
@dataclass(frozen=True, slots=True)
class Engraving(Suite):
    """Divergence from the base under principles."""

    base: str = "smollm2"
    """Model that the training began with, by name."""
    principles: str = ""
    """YAML file in place of the shipped texts, as for align/self_align."""
    assistant: str = ""
    """Name of the assistant, as for align/self_align."""
    data: str = ""
    """File of prompts; empty = the shipped ordinary requests."""
    split: str = "held-out"
    """Takes only prompts of this split: repair, validation or held-out; empty = all."""
    max_tokens: int = 64
    """Longest answer, in tokens."""
    reward: Reward | None = None
    """Method that scores the answers, such as align/rubric_reward; without one they are not scored."""

    def __post_init__(self) -> None:
        if self.split and self.split not in get_args(Split):
            raise ConfigError(f"there is no split '{self.split}'", hint=nearest(self.split, get_args(Split)))

    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Scores distance, base_distance and approached, and with a reward those of it. Raises MethodError for models whose weights are not here."""
        prompts = load.prompts(self.data or "shipped", expected="answer")
        prompts = (split(prompts)[self.split] if self.split else prompts)[:limit]  # type: ignore[index]  # checked when made
        items: list[dict[str, Any]] = []
        with closing(model.beside(self.base)) as other:
            mine, base = weights_of(model, self.name), weights_of(other, self.name)
            for chunk in chunks(prompts):
                principled = [self._principled(p) for p in chunk]
                both = [distances(m, base, chunk, principled, max_tokens=self.max_tokens, seed=seed + len(items)) for m in (mine, base)]
                found: list[dict[str, Any]] = []
                for prompt, (answer, far), (base_answer, base_far) in zip(chunk, *both, strict=True):
                    facts = {"id": prompt.id, "prompt": prompt.text, "answer": answer.text, "base_answer": base_answer.text}
                    found.append(facts | {"distance": far, "base_distance": base_far})
                if self.reward:
                    under = base.sample(principled, max_tokens=self.max_tokens, temperature=1.0, seed=seed + len(items))
                    answers = [[answer, base_answer, row[0]] for (answer, _), (base_answer, _), row in zip(*both, under, strict=True)]
                    found = [f | r for f, r in zip(found, self._rewarded(self.reward, chunk, answers), strict=True)]
                for item in found:
                    items.append(item)
                    sink(item)
            return SuiteResult(self._scores(model, base.fingerprint, prompts, items), items)

    def _rewarded(self, reward: Reward, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> list[dict[str, Any]]:
        """Of each request the answer under the principles, and what the answers of all three are worth, to the request without principles."""
        values = reward.score([Group(prompt=p, completions=tuple(row)) for p, row in zip(prompts, answers, strict=True)])
        return [{"principled_answer": row[-1].text} | dict(zip(REWARDED, three, strict=True)) for row, three in zip(answers, values, strict=True)]

    def _principled(self, prompt: Prompt) -> Conversation:
        """The request under the principles, with the mark after which the answer stands."""
        say = read_texts(self.principles, tongue(prompt.language), self.assistant)
        return say.principled(prompt.text, f"{say.answer} ")

    def _scores(self, model: Model, base: str, prompts: Sequence[Prompt], items: Sequence[dict[str, Any]]) -> list[Score]:
        known = [i for i in items if i["distance"] is not None and i["base_distance"] is not None]
        form = ["chat", self.max_tokens, base, [[m.content for m in self._principled(p)] for p in prompts[:1]]]
        mark = fingerprint(model, data=[p.id for p in prompts], form=form, scorer=SCORER, scored=[i["id"] for i in known])
        common: dict[str, Any] = {"suite": self.name, "model": model.fingerprint, "fingerprint": mark, "not_scored": len(items) - len(known)}
        far, base_far = [i["distance"] for i in known], [i["base_distance"] for i in known]
        gained = [b - a for a, b in zip(far, base_far, strict=True)]
        return [
            mean_score(far, bounds=(-inf, inf), better="lower", metric="distance", **common),
            mean_score(base_far, bounds=(-inf, inf), better="lower", metric="base_distance", **common),
            mean_score(gained, bounds=(-inf, inf), metric="approached", **common),
            *self._rewards(items, common),
        ]

    def _rewards(self, items: Sequence[dict[str, Any]], common: dict[str, Any]) -> list[Score]:
        """Means over the requests whose three answers all have a reward."""
        if not self.reward:
            return []
        known = [i for i in items if all(i[name] is not None for name in REWARDED)]
        scorer = f"{SCORER} {self.reward.name} {self.reward.options()}"
        mark = common["fingerprint"] | {"scorer": scorer, "items": digest([i["id"] for i in known])}
        fields: dict[str, Any] = common | {"fingerprint": mark, "not_scored": len(items) - len(known), "bounds": (-inf, inf)}
        values = {name: [i[name] for i in known] for name in REWARDED}
        values["reward_difference"] = [i["reward"] - i["principled_reward"] for i in known]
        return [mean_score(each, metric=name, **fields) for name, each in values.items()]


def distances(
    model: WhiteBox, base: WhiteBox, prompts: Sequence[Prompt], principled: Sequence[Conversation], *, max_tokens: int, seed: int
) -> list[tuple[Completion, float | None]]:
    """Per prompt an answer of `model`, and how much likelier the model finds it than `base` under the principles, in nats per token; None without one."""
    answers = [row[0] for row in model.sample([p.messages for p in prompts], max_tokens=max_tokens, temperature=1.0, seed=seed)]
    there = [i for i, a in enumerate(answers) if a.text and a.finish in ("stop", "length")]
    own, tokens = _logp(model, [prompts[i].messages for i in there], [answers[i] for i in there])
    under, _ = _logp(base, [principled[i] for i in there], [answers[i] for i in there])
    found: list[float | None] = [None] * len(prompts)
    for i, a, b, n in zip(there, own, under, tokens, strict=True):
        found[i] = (a - b) / n
    return list(zip(answers, found, strict=True))


def _logp(model: WhiteBox, conversations: Sequence[Conversation], answers: Sequence[Completion]) -> tuple[list[float], list[int]]:
    """Log-probability of each answer, in nats, and its tokens; with its end where it came to one."""
    from fiducial.models.forest import Paths

    if not answers:
        return [], []
    paths = Paths.of([model.encode(c, a.text, end=a.finish == "stop") for c, a in zip(conversations, answers, strict=True)])
    scores = model.score(paths)
    return scores.path_logp.tolist(), scores.path_len.tolist()
