"""Weakness discovery: tests the model skill by skill, goes where it fails, and makes repairs of the failures (AutoDetect).

What it does: for each point of a taxonomy puts cases that get harder, marks the answers from 1 to 10, lets an examiner propose further points,
              and pairs failing answers with good ones. Points with a check (length, format, keywords, arithmetic) need no other model.
Use it when:  you want to know what ordinary skills a model lacks and to train on exactly those. The attempts say the language, and their
              harmless prompts become requests. Train with align/sft or align/dpo; measure with evaluate/found_weaknesses.
Formula:      share found: failed cases / cases with a mark, per point and in all, with Wilson's interval.
Defaults:     the shipped taxonomy of 12 checked points in 4 tasks, at most 6 points per task, 15 cases per point of which 5 are seeds; a case
              fails below 3.1 (paper). A task also ends at [[Stop]] or after three rejected points.
Limits:       by the hash of its request, about half of the cases is held out and never becomes a group; without the file `results` it is
              lost. Open points need an examiner, an expert and an assessor, the last two different models. The share found is that of requests
              which were sought to fail, and not of those that users make.
Source:       Cheng et al. 2024, arXiv:2406.16714, section 3.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from fiducial.align.asking import helper
from fiducial.align.probing import Case, Prober, identified
from fiducial.align.taxonomy import Point, read_taxonomy
from fiducial.core.records import Attempt, Completion, Group, Prompt, user
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.core.store import write_atomic
from fiducial.data.languages import tongue

if TYPE_CHECKING:
    from fiducial.models.base import Model

log = logging.getLogger(__name__)

REJECTIONS = 3
"""Rejected points that end a task."""


@final
@dataclass(frozen=True, slots=True)
class WeaknessDiscovery(Maker):
    """Failing answers of discovered weaknesses, each with a good answer."""

    taxonomy: str = ""
    """JSON file of tasks, categories and points; the shipped one by default."""
    examiner: str = ""
    """Model that writes requests and proposes points, by name; without one there are only the checked points of the taxonomy."""
    expert: str = ""
    """Model that gives reference answers, by name; without one they come from the check, or the model's own tries that keep to it."""
    assessor: str = ""
    """Model that marks answers to open points against the expert's, by name; another one than the expert."""
    points: int = 6
    """Points per task at most."""
    cases: int = 15
    """Cases per point."""
    results: str = ""
    """File (JSON Lines) for every case with its mark and its half; it is replaced."""
    max_tokens: int = 160
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        if self.points < 1 or self.cases < 1 or self.max_tokens < 1:
            raise ValueError(f"points, cases and max_tokens must be at least 1, got {self.points}, {self.cases}, {self.max_tokens}")
        if self.assessor and self.assessor == self.expert:
            raise ValueError(f"expert and assessor are both '{self.expert}': who wrote the reference answer must not mark against it")

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """One group per failing case of the training half for which a good answer is known, by task and point."""
        scored = [a for a in attempts if a.scored]
        if not scored:
            return []
        taxonomy = read_taxonomy(self.taxonomy)
        language = Counter(tongue(a.prompt.language) for a in scored).most_common(1)[0][0]
        own = dict.fromkeys(a.prompt.text.strip() for a in scored if a.prompt.expected != "refuse" and tongue(a.prompt.language) == language)
        every: list[Case] = []
        groups: list[Group] = []
        with ExitStack() as stack:
            examiner, expert, assessor = (stack.enter_context(helper(u, model)) if u else None for u in (self.examiner, self.expert, self.assessor))
            requests = [*own, *taxonomy.requests[language]]
            prober = Prober(model, examiner, expert, assessor, language, requests, taxonomy, self.max_tokens, seed)
            try:
                for task, points in taxonomy.tasks.items():
                    every += (cases := self.explore(prober, task, points))
                    for case in cases:
                        group = self._repair(prober, case, cases)
                        if group is not None:
                            groups.append(group)
                            sink(group)
            finally:
                self._keep(every)
        _say(every)
        return groups

    def explore(self, prober: Prober, task: str, points: Sequence[Point]) -> list[Case]:
        """Every case of one task. Ends when nothing is left to try, at `points` points, at [[Stop]], or after three rejections."""
        queue = deque(p for p in points if prober.can_mark(p))
        if len(queue) < len(points):
            log.warning("%s: %d points are left out: they need an examiner, an expert and an assessor", task, len(points) - len(queue))
        tried: list[Point] = []
        cases: list[Case] = []
        rejected: list[Point] = []
        while True:
            while queue and len(tried) < self.points:
                tried.append(queue.popleft())
                cases += prober.probe(tried[-1], self.cases)
            if len(tried) >= self.points or prober.examiner is None:
                return cases
            point = prober.propose(task, cases, tried, rejected)
            if point is None:
                return cases
            if prober.accepts(point, tried):
                queue.append(point)
            else:
                rejected.append(point)
                if len(rejected) == REJECTIONS:
                    return cases

    def _repair(self, prober: Prober, case: Case, cases: Sequence[Case]) -> Group | None:
        """The group of a failing case; None for one that is held out, went well, or has no good answer."""
        if case.half != "training" or not case.failed:
            return None
        good = prober.reference(case)
        if not good or good == case.response.text:
            return None
        case.reference = good
        rate = identified([c for c in cases if c.point == case.point])
        completions = (Completion(text=good), *([case.response] if case.response.text else []))
        return Group(
            prompt=Prompt(messages=user(case.text), language=prober.language, category=case.point.label, reference=good, source=self.name),
            completions=completions,
            targets=(1.0, 0.0)[: len(completions)],
            annotator=f"{self.name}: {case.point.label}, failed {rate}",
            provenance=case.row(),
        )

    def _keep(self, cases: Sequence[Case]) -> None:
        if self.results:
            write_atomic(self.results, "".join(json.dumps(c.row(), ensure_ascii=False) + "\n" for c in cases))
        elif held := sum(c.failed and c.half == "held-out" for c in cases):
            log.warning("%d failing cases are held out to measure the repair, but kept nowhere: name a file with --results", held)


def _say(cases: Sequence[Case]) -> None:
    """How many cases failed, in all and by point."""
    points = dict.fromkeys(c.point for c in cases)
    each = "; ".join(f"{point.label} {identified([c for c in cases if c.point == point])}" for point in points)
    log.warning("failed of the cases with a mark: %s; %s", identified(cases), each)
