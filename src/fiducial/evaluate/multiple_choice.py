"""Multiple-choice questions by likelihood.

What it does: takes the option that the model finds likeliest after the question, without generating anything.
Use it when:  looking whether a repair cost the model what it knew. Fast, free of parsing, and the same numbers as
              lm-evaluation-harness on the same rows and format.
Formula:      acc: argmax of sum log p(option | question); acc_norm: the same divided by the option's number of characters; acc_bytes:
              by its UTF-8 bytes. The space before the option counts in log p, not in the length. Ties go to the lowest index.
Defaults:     "Question: ...\\nAnswer:" and one space before each option; the shipped questions. With chat, the template's header takes
              the place of the space.
Limits:       likelihood is not what a chat user sees, and figures change with the format; compare only scores whose fingerprints agree.
              The shipped questions are easy and few: they notice damage, they do not rank models.
Source:       EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/api/task.py (process_results) and lm_eval/api/model.py (_encode_pair).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from fiducial.core.errors import ConfigError, DataError, MethodError
from fiducial.core.records import Prompt, user
from fiducial.core.roles import Sink, Suite, SuiteResult, ignore
from fiducial.data.load import capability
from fiducial.data.rows import read_rows
from fiducial.evaluate.base import Likelihoods, best, chunks, fingerprint, likelihoods, rate_score, weights_of
from fiducial.models.base import Model, WhiteBox

QUESTION = "{question}"
METRICS = ("acc", "acc_norm", "acc_bytes")
SCORER = "likelihood-1"


@final
@dataclass(frozen=True, slots=True)
class MultipleChoice(Suite):
    """Accuracy by the likelihood of each option."""

    tags: ClassVar[tuple[str, ...]] = ()

    data: str = ""
    """JSON Lines file with rows {"question", "choices", "gold"}; empty = the shipped questions."""
    format: str = "Question: {question}\nAnswer:"
    """Text before the option, with {question} in it."""
    chat: bool = False
    """Asks through the model's chat template."""

    def __post_init__(self) -> None:
        if QUESTION not in self.format:
            raise ConfigError(f"the format {self.format!r} has no place for the question", hint="write {question} where it belongs")

    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Scores acc, acc_norm and acc_bytes. Raises MethodError for a model that gives no probabilities."""
        box = weights_of(model, self.name)
        prompts = (questions(self.data) if self.data else capability())[:limit]
        items = []
        for chunk in chunks(prompts):
            pairs = [(self.context(box, p.text), p.choices) for p in chunk]
            for prompt, found in zip(chunk, likelihoods(box, pairs, delimiter="" if self.chat else " "), strict=True):
                items.append(_item(prompt, found))
                sink(items[-1])
        mark = fingerprint(
            model,
            data=[(p.text, p.choices, p.gold) for p in prompts],
            form=[self.format, box.tokenizer.chat_template if self.chat else None],
            scorer=SCORER,
            scored=[p.id for p in prompts],
        ) | {"dtype": str(box.module.dtype), "truncated": str(sum(item["truncated"] for item in items))}
        scores = [rate_score([item[m] for item in items], suite=self.name, metric=m, model=model.fingerprint, fingerprint=mark) for m in METRICS]
        return SuiteResult(scores, items)

    def context(self, model: WhiteBox, question: str) -> str:
        """The text before the option. Raises MethodError for chat with a model that has no template."""
        text = self.format.replace(QUESTION, question)
        if not self.chat:
            return text
        if not model.tokenizer.chat_template:
            raise MethodError(f"{model.uri} has no chat template", hint="leave --chat out")
        return str(model.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True))


def questions(path: str) -> list[Prompt]:
    """The questions in a file, in order. Raises DataError with the line of a row that is none."""
    found = []
    for where, row in read_rows(path):
        question, choices, gold = row.get("question"), row.get("choices"), row.get("gold")
        if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(f"{where}: a row needs a question and at least two choices", hint='write {"question": "...", "choices": ["...", "..."], "gold": 0}')
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise DataError(f"{where}: gold must be the index of the right choice, got {gold!r}", hint=f"a number from 0 to {len(choices) - 1}")
        found.append(Prompt(messages=user(question), choices=tuple(choices), gold=gold, language=str(row.get("language", "en")), source=path))
    return found


def correct(logp: Sequence[float], choices: Sequence[str], gold: int) -> dict[str, bool]:
    """Whether the gold option is chosen, by metric.

    >>> correct([-4.0, -5.0], ["no", "never ever"], 1)
    {'acc': False, 'acc_norm': True, 'acc_bytes': True}
    """
    by = {
        "acc": list(logp),
        "acc_norm": [v / len(c) for v, c in zip(logp, choices, strict=True)],
        "acc_bytes": [v / len(c.encode()) for v, c in zip(logp, choices, strict=True)],
    }
    return {metric: best(values) == gold for metric, values in by.items()}


def _item(prompt: Prompt, found: Likelihoods) -> dict[str, Any]:
    assert prompt.gold is not None
    return {
        "id": prompt.id,
        "question": prompt.text,
        "choices": list(prompt.choices),
        "gold": prompt.gold,
        "category": prompt.category,
        "language": prompt.language,
        "logp": list(found.logp),
        "greedy": list(found.greedy),
        "truncated": found.truncated,
        "chance": 1 / len(prompt.choices),
        **correct(found.logp, prompt.choices, prompt.gold),
    }
