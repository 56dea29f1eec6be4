"""Self-alignment from principles: the model writes requests, answers them by named rules, and is taught the answers without the rules.

What it does: proposes new requests by kind and topic, with the attempts' prompts as seeds; has the model think and answer under 16 principles
              with exemplars; filters by rules; keeps (request, answer) without principles and thoughts. With stage `verbose` it answers
              at length instead, for the last step, on the model trained in the first.
Use it when:  there are no labels and no stronger model. Train with align/sft; the model must be able to imitate the exemplars' form.
Defaults:     16 requests per language besides the seeds, ROUGE-L below 0.7 to every other one, temperature 0.7. The paper makes several
              hundred thousand. 5 exemplars, principles and kinds of our own, in English and Chinese (data/exemplars.yaml).
Limits:       answers are no better than the model; filters look at form, not truth. A run of 5 words (8 Chinese characters) from an exemplar, or one
              of the names listed with it, rejects an answer. Rejected rows go to the file `rejects` with their reasons; without it they are only counted.
Source:       Sun et al. 2023, arXiv:2305.03047, sections 3.1 to 3.4; self-instruct: Wang et al. 2022, arXiv:2212.10560.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, final

from fiducial.align.asking import ask, counted, entries, portions
from fiducial.core.records import Attempt, Completion, Group, Message, Prompt, user
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.core.store import write_atomic
from fiducial.data.exemplars import Texts, read_texts
from fiducial.data.languages import tongue
from fiducial.data.overlap import words
from fiducial.models.base import WhiteBox

if TYPE_CHECKING:
    from fiducial.models.base import Model

log = logging.getLogger(__name__)

EACH, ROUNDS = 4, 4
"""Requests asked for at once, and how often the model is asked again for those that are missing."""
Rejected = list[dict[str, str]]


@final
@dataclass(frozen=True, slots=True)
class SelfAlign(Maker):
    """Demonstrations that a model gives itself under principles."""

    stage: Literal["engrave", "verbose"] = "engrave"
    """Answers by the principles, or long answers of a model that has learnt them."""
    instructions: int = 16
    """New requests per language besides the seeds; 0 uses the seeds alone."""
    assistant: str = ""
    """Name that the model learns to give itself; with one, a few demonstrations of it are added."""
    principles: str = ""
    """YAML file in place of the shipped texts, with the same keys."""
    rejects: str = ""
    """File (JSON Lines) for rejected requests and answers, with the reason of each; it is replaced."""
    max_tokens: int = 256
    """Longest answer with its thoughts, in tokens."""
    temperature: float = 0.7
    """Of requests and answers."""

    def __post_init__(self) -> None:
        if self.stage not in ("engrave", "verbose") or self.instructions < 0 or self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(
                "stage is engrave or verbose, instructions and temperature at least 0, max_tokens at least 1; "
                f"got {self.stage}, {self.instructions}, {self.temperature}, {self.max_tokens}"
            )

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """One demonstration per request whose answer passes the filters: by language, the attempts' requests before the new ones."""
        seeds = list({a.prompt.text: a.prompt for a in attempts if a.scored and a.prompt.text.strip()}.values())
        groups: list[Group] = []
        rejected: Rejected = []
        try:
            for language in sorted({tongue(p.language) for p in seeds}):
                say = read_texts(self.principles, language, self.assistant)
                own = [p for p in seeds if tongue(p.language) == language]
                prompts = own + self._instruct(model, say, own, seed, rejected)
                for group in (g for some in portions(prompts) for g in self._answers(model, say, some, seed, rejected)):
                    groups.append(group)
                    sink(group)
                for group in self._identity(say) if self.assistant and self.stage == "engrave" else []:
                    groups.append(group)
                    sink(group)
        finally:
            if rejected:
                log.warning("rejected: %s", counted([row["reason"].partition(":")[0] for row in rejected]))
            if self.rejects:
                write_atomic(self.rejects, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected))
        return groups

    def _instruct(self, model: Model, say: Texts, seeds: Sequence[Prompt], seed: int, rejected: Rejected) -> list[Prompt]:
        """New requests: the model names topics for kinds of request, then writes requests on them."""
        rng = random.Random(f"{seed}:{say.language}")
        known = [words(p.text) for p in seeds]
        found: list[Prompt] = []
        for turn in range(ROUNDS):
            missing = self.instructions - len(found)
            if missing <= 0:
                break
            how: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": seed + turn}
            kinds = [rng.choice(say.kinds) for _ in range(ceil(missing / EACH))]
            asks = [user(say.propose.format(kind=k, topics=", ".join(rng.sample(say.topics, min(5, len(say.topics)))), count=EACH)) for k in kinds]
            topics = [rng.choice([t for t in entries(c) if 1 <= len(words(t)) <= 6] or say.topics) for (c,) in ask(model, asks, **how)]
            shown = [[p.text for p in rng.sample([*seeds, *found], min(3, len(seeds) + len(found)))] for _ in kinds]
            asks = [
                user(say.instruct.format(count=EACH, kind=k, topic=t, seeds="\n".join(f"- {s}" for s in some)))
                for k, t, some in zip(kinds, topics, shown, strict=True)
            ]
            for kind, topic, (reply,) in zip(kinds, topics, ask(model, asks, **how), strict=True):
                for line in entries(reply)[:EACH]:
                    if reason := say.unusable(line, known):
                        rejected.append({"stage": "request", "kind": kind, "topic": topic, "text": line, "reason": reason})
                    elif len(found) < self.instructions:
                        known.append(words(line))
                        found.append(Prompt(messages=user(line), language=say.language, category=topic, source=self.name))
        return found

    def _answers(self, model: Model, say: Texts, prompts: Sequence[Prompt], seed: int, rejected: Rejected) -> list[Group]:
        engrave = self.stage == "engrave"
        # a model whose answers can be begun starts in the slot of the thoughts; others have the exemplars to imitate
        begun = say.thoughts if engrave and isinstance(model, WhiteBox) else ""
        system = Message(role="system", content=say.named(say.verbose))
        conversations = [say.principled(p.text, begun) if engrave else (system, *user(p.text)) for p in prompts]
        groups = []
        for prompt, (raw,) in zip(prompts, ask(model, conversations, max_tokens=self.max_tokens, temperature=self.temperature, seed=seed), strict=True):
            text = f"{begun} {raw.text}" if begun else raw.text
            thought, answer, reason = say.read(text) if engrave else ("", raw.text, "")
            reason = "no answer came" if not raw.text or raw.finish in ("error", "filtered") else reason or say.fault(prompt.text, answer)
            if reason:
                rejected.append({"stage": self.stage, "request": prompt.text, "text": text, "reason": reason})
                continue
            # an answer that was cut at a further turn had come to its end before it
            finish = raw.finish if text.endswith(answer) else "stop"
            groups.append(
                Group(
                    prompt=prompt.model_copy(update={"messages": user(prompt.text)}),
                    completions=(Completion(text=answer, finish=finish),),
                    targets=(1.0,),
                    annotator=f"{self.name}: {self.stage}",
                    provenance={"stage": self.stage} | ({"thoughts": thought} if engrave else {}),
                )
            )
        return groups

    def _identity(self, say: Texts) -> list[Group]:
        return [
            Group(
                prompt=Prompt(messages=user(e.user), language=say.language, category="identity", source=self.name),
                completions=(Completion(text=say.named(e.answer)),),
                targets=(1.0,),
                annotator=f"{self.name}: identity",
            )
            for e in say.identity_set
        ]
