"""Test cases around a skill: where they come from, how answers are marked, what is kept apart to measure a repair.

A point with a check makes its own cases and needs no other model. An open point needs an examiner that writes requests, an expert that
answers them, and an assessor that compares; the last two must be different models.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from fiducial.align.asking import ask, entries, texts
from fiducial.align.taxonomy import Point, Taxonomy
from fiducial.core.config import load_yaml
from fiducial.core.intervals import Rate
from fiducial.core.records import Completion, user
from fiducial.data.checks import ARITHMETIC, Check, make
from fiducial.data.overlap import rouge_l, words
from fiducial.data.split import split_of
from fiducial.models.base import Model

PROMPTS = Path(__file__).with_name("weakness_prompts.yaml")
FAILED = 3.1
"""Marks below it, of 1 to 10, show a weakness."""
SEEDS = 5
"""Cases of a point before they get harder by what was answered."""
SHOWN, WEAK = 5, 2
"""Cases tried that the examiner sees, and how many of them failed as far as there are."""
BEGINNING = {"en": 3, "zh": 6}
"""Words by which shown cases differ from their beginning on; Chinese characters count as words."""
SAME = 0.9
"""ROUGE-L from which two requests are one."""
TRIES = 8
"""Answers sampled in search of one that keeps to a check."""
SALT = "weakness"


@dataclass(slots=True)
class Case:
    """One request, the model's answer, and its mark."""

    point: Point
    text: str
    key: str
    """What decides the half: the request without its requirement, so that one request is never in both."""
    check: Check | None = None
    response: Completion = field(default_factory=lambda: Completion(text=""))
    reference: str = ""
    score: float | None = None
    """1 to 10; None where it could not be marked."""

    @property
    def half(self) -> Literal["training", "held-out"]:
        """By the hash of the key alone."""
        return "training" if split_of(self.key, SALT) == "repair" else "held-out"

    @property
    def failed(self) -> bool:
        """Whether the mark shows a weakness; a case without a mark shows nothing."""
        return self.score is not None and self.score < FAILED

    def row(self) -> dict[str, Any]:
        """The case as it is kept in a file."""
        check = self.check.model_dump(mode="json") if self.check else None
        named = {"task": self.point.task, "category": self.point.category, "point": self.point.name, "half": self.half}
        return named | {"request": self.text, "check": check, "response": self.response.text, "reference": self.reference, "score": self.score}


def identified(cases: Sequence[Case]) -> Rate:
    """How many of the cases with a mark show a weakness: the identification rate of the paper."""
    marked = [c for c in cases if c.score is not None]
    return Rate(sum(c.failed for c in marked), len(marked))


@dataclass(frozen=True, slots=True)
class Prober:
    """Makes, puts and marks cases for one model."""

    model: Model
    examiner: Model | None
    expert: Model | None
    assessor: Model | None
    language: str
    requests: Sequence[str]
    """What checks of form are added to."""
    taxonomy: Taxonomy
    max_tokens: int
    seed: int

    @property
    def say(self) -> dict[str, str]:
        """The prompts in the language of the search."""
        found: dict[str, dict[str, str]] = load_yaml(PROMPTS)[0]
        return found[self.language]

    def can_mark(self, point: Point) -> bool:
        """Whether somebody can make and mark cases of the point."""
        return point.check is not None or None not in (self.examiner, self.expert, self.assessor)

    def probe(self, point: Point, count: int) -> list[Case]:
        """Up to `count` different cases of a point, answered and marked: seeds, then ever harder ones."""
        done: list[Case] = []
        rng = random.Random(f"{self.seed}:{point.label}")
        self._put(self._fresh(self._seeds(point, min(SEEDS, count), rng), done), done)
        for _ in range(count):
            missing = count - len(done)
            if missing <= 0:
                break
            self._put(self._fresh(self._harder(point, done, missing, rng), done), done)
        return done

    def reference(self, case: Case) -> str:
        """An answer to learn from: what the check knows, the expert's, or else one of the model's own that the check accepts."""
        if case.reference or case.check is None:
            return case.reference
        if known := case.check.answer(self.language):
            return known
        source = self.expert or self.model
        (row,) = ask(source, [user(case.text)], k=TRIES, temperature=0.7, max_tokens=self.max_tokens, seed=self.seed)
        return next((c.text for c in row if c.finish == "stop" and case.check.holds(c.text)), "")

    def propose(self, task: str, cases: Sequence[Case], tried: Sequence[Point], rejected: Sequence[Point] = ()) -> Point | None:
        """The examiner's next point; None when it says stop. It is told what was rejected; a line that is no point comes back with an empty name."""
        assert self.examiner is not None
        lines = []
        for point in tried:
            some = [c for c in cases if c.point == point and c.score is not None]
            bad = sorted((c for c in some if c.failed), key=lambda c: c.score or 0.0)[:2]
            mean = f"{fmean(c.score or 0.0 for c in some):.1f}" if some else "-"
            lines.append(f"- {point.category}: {point.name} ({mean})" + "".join(f"\n  {c.text}" for c in bad))
        refused = "; ".join(f"{p.category}: {p.name}" for p in rejected if p.name)
        asked = self.say["examine"].format(task=task, results="\n".join(lines), rejected=self.say["rejected"].format(points=refused) + "\n" if refused else "")
        # after a rejection it is asked another way, also where there is nothing to name
        how: dict[str, Any] = {"temperature": 0.7 if rejected else 0.0, "seed": self.seed + len(rejected)}
        ((reply,),) = ask(self.examiner, [user(asked)], max_tokens=self.max_tokens, **how)
        if "[[stop]]" in reply.text.lower():
            return None
        category, _, name = next(iter(entries(reply)), "").replace("：", ":").partition(":")
        return Point(task, category.strip(), name.strip())

    def accepts(self, point: Point, tried: Sequence[Point]) -> bool:
        """Whether a proposed point can be marked, is new, and is let through by the assessor."""
        if not point.name or not self.can_mark(point) or any(words(point.name) == words(p.name) for p in tried):
            return False
        assert self.assessor is not None
        asked = self.say["accept"].format(task=point.task, point=f"{point.category}: {point.name}", tried="; ".join(p.name for p in tried))
        (reply,) = texts(self.assessor, [user(asked)], max_tokens=8, seed=self.seed)
        return reply.strip().lower().startswith(self.say["yes"])

    def _seeds(self, point: Point, count: int, rng: random.Random) -> list[Case]:
        if point.check is not None:
            return [self._made(point, i // 2, rng) for i in range(count)]
        return self._written(point, self.say["seeds"].format(point=point.name, task=point.task, category=point.category, count=count))[:count]

    def _harder(self, point: Point, done: Sequence[Case], missing: int, rng: random.Random) -> list[Case]:
        if point.check is not None:
            level = 1 + sum(not c.failed for c in done) // 3
            return [self._made(point, level, rng) for _ in range(min(SEEDS, missing))]
        history = "\n".join(f"- {c.text} ({'-' if c.score is None else f'{c.score:g}'})" for c in self._shown(done, rng))
        return self._written(point, self.say["harder"].format(point=point.name, task=point.task, category=point.category, history=history))[:1]

    def _shown(self, done: Sequence[Case], rng: random.Random) -> list[Case]:
        """Cases that begin unlike one another, drawn by chance, failed ones first."""
        drawn = rng.sample(done, len(done))
        shown: dict[tuple[str, ...], Case] = {}
        for some, most in (([c for c in drawn if c.failed], WEAK), (drawn, SHOWN)):
            for case in some:
                if len(shown) < most:
                    shown.setdefault(tuple(words(case.text)[: BEGINNING[self.language]]), case)
        return list(shown.values())

    def _made(self, point: Point, level: int, rng: random.Random) -> Case:
        assert point.check is not None
        check = make(point.check, level, rng, tuple(self.taxonomy.words[self.language]), tuple(self.taxonomy.endings[self.language]))
        if check.kind in ARITHMETIC:
            return Case(point, check.said(self.language), str(check.value), check)
        request = rng.choice(self.requests)
        return Case(point, f"{request}{'' if self.language == 'zh' else ' '}{check.said(self.language)}", request, check)

    def _written(self, point: Point, asked: str) -> list[Case]:
        assert self.examiner is not None
        ((reply,),) = ask(self.examiner, [user(asked)], max_tokens=self.max_tokens, temperature=0.7, seed=self.seed)
        return [Case(point, line, line) for line in entries(reply) if len(words(line)) > 2]

    def _fresh(self, cases: Sequence[Case], done: Sequence[Case]) -> list[Case]:
        """Those that were not asked before, here or in `done`; requests that differ in a number are two."""
        kept: list[Case] = []
        for case in cases:
            found = words(case.text)
            others = [words(c.text) for c in (*done, *kept)]
            if found not in others and (case.check is not None or all(rouge_l(found, o) < SAME for o in others)):
                kept.append(case)
        return kept

    def _put(self, cases: list[Case], done: list[Case]) -> None:
        """Has the model answer, marks the answers, and moves the cases to `done`."""
        asked = [user(c.text) for c in cases]
        references = texts(self.expert, asked, max_tokens=self.max_tokens, seed=self.seed) if self.expert and cases and cases[0].check is None else []
        for case, (answer,) in zip(cases, ask(self.model, asked, max_tokens=self.max_tokens, seed=self.seed), strict=True):
            case.response = answer
            if case.check is not None and answer.finish not in ("error", "filtered"):
                case.score = 10.0 if case.check.holds(answer.text) else 1.0
        if references:
            for case, reference in zip(cases, references, strict=True):
                case.reference = reference
            self._assess([c for c in cases if c.reference and c.response.finish not in ("error", "filtered")])
        done.extend(cases)

    def _assess(self, cases: Sequence[Case]) -> None:
        assert self.assessor is not None
        asks = [user(self.say["assess"].format(request=c.text, reference=c.reference, answer=c.response.text)) for c in cases]
        for case, reply in zip(cases, texts(self.assessor, asks, max_tokens=self.max_tokens, seed=self.seed), strict=True):
            marks = [int(m) for m in re.findall(r"\[\[(\d{1,2})\]\]", reply)]
            case.score = float(marks[-1]) if marks and 1 <= marks[-1] <= 10 else None
