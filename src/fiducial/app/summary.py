"""What a run of the loop or of a check comes to: everything the report shows, as one record.

Written as `summary.json` into the run. The report is drawn from it alone, so it can be drawn again without the model.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fiducial.core.intervals import Rate
from fiducial.core.records import Decision, Evidence, Record, Weakness


class Tally(Record):
    """Hits out of n trials that could be scored, and how many could not."""

    hits: int = 0
    n: int = 0
    not_scored: int = 0
    design: float = Field(default=1.0, ge=1)
    """Kish's design effect: above 1 where several trials share a goal and went alike."""

    @property
    def rate(self) -> Rate:
        """As a rate with intervals."""
        return Rate(self.hits, self.n, self.design)

    @property
    def share(self) -> float:
        """The rate when what could not be scored counts as failed: not scored is not safe."""
        total = self.n + self.not_scored
        return (self.hits + self.not_scored) / total if total else 1.0


class Slice(Record):
    """One row of the before/after tables. On harmful goals a hit is harmful compliance, on benign prompts a refusal: lower is better."""

    kind: Literal["total", "category", "family", "language"]
    name: str
    """For example `theft`, `persona`, `zh`; for totals a sentence such as `held-out goals, asked directly`."""
    expected: Literal["refuse", "comply", "answer"]
    """What a good model would do: refuse (harmful goals), comply (benign twins), answer (ordinary prompts)."""
    held_out: bool = True
    """Whether the attack family was kept out of the repair. Goals are held out in every slice."""
    before: Tally
    after: Tally | None = None
    """None in a check, which has one model."""


class Point(Record):
    """One model on the trade-off plot, measured on the validation split."""

    name: str
    """`base`, `round 1`, ..."""
    compliance: Tally
    """Harmful compliance, direct and under attack."""
    refusal: Tally
    """Harmless prompts refused: twins, asked directly or in attack wording, and ordinary prompts."""
    promoted: bool = False

    @property
    def badness(self) -> float:
        """What rounds are compared by: harmful compliance plus benign refusal. Refusing everything is as bad as refusing nothing."""
        return self.compliance.share + self.refusal.share


class Candidate(Record):
    """An objective that was tried, by a short training measured on validation prompts; or the base model on the same prompts, after no steps."""

    objective: str
    learning_rate: float | None = None
    steps: int = 0
    groups: int = 0
    compliance: Tally
    """Harmful goals complied with."""
    refusal: Tally
    """Benign twins and ordinary prompts refused."""
    failed: tuple[bool, ...] = ()
    """By prompt, in the same order for all candidates; what could not be scored counts as failed."""
    chosen: bool = False

    @property
    def badness(self) -> float:
        """What candidates are compared by, as rounds are."""
        return self.compliance.share + self.refusal.share


class Retried(Record):
    """Cases of discovered weaknesses, tried on the repaired model too. A hit is a case that failed: lower is better."""

    name: str
    before: Tally
    after: Tally


class Training(Record):
    """The training card of one round."""

    round: int
    objective: str
    options: dict[str, Any]
    groups: int
    left_out: int
    data: str
    """Hash of the groups."""
    steps: int
    planned: int
    tokens: int
    naive_tokens: int
    seconds: float
    stop: str
    """Why it ended early; empty when all steps were made."""
    loss: tuple[float | None, ...]
    """Per step; None where it was not a finite number."""
    figures: dict[str, float | None] = Field(default_factory=dict)
    """Measured on fresh samples at the end: k1 and k3 (nats per sequence), length and repetition against the base model."""
    verdicts: dict[str, tuple[Literal["pass", "fail", "not measured"], str]] = Field(default_factory=dict)
    """Outcome and reason of each stopping rule. A falling loss alone is no success."""


class Capability(Record):
    """Accuracy on the capability items of one category, the same items before and after."""

    name: str
    n: int
    before: float
    after: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    """Paired 95 % interval of the change."""


class Answers(Record):
    """One ordinary request and its whole answers, as text to be escaped."""

    request: str
    before: str
    after: str


class Example(Record):
    """One prompt and what came back, as text to be escaped."""

    kind: Literal["repaired", "still complies", "newly complies", "still refused", "newly refused", "kept"]
    attack: str
    category: str
    sent: str
    before: str
    after: str = ""


class Summary(Record):
    """Everything a report shows."""

    command: Literal["loop", "check"]
    run: str
    verdict: str
    """One sentence for the top of the page."""
    outcome: Literal["pass", "fail", "insufficient", "measured"]
    model: str
    model_fingerprint: str
    repaired: str = ""
    repaired_fingerprint: str = ""
    decision: Decision | None = None
    evidence: tuple[Evidence, ...] = ()
    weaknesses: tuple[Weakness, ...] = ()
    slices: tuple[Slice, ...] = ()
    points: tuple[Point, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    """The base model, and the objectives that were tried before the first round; none where one was asked for."""
    why: str = ""
    """Why the objective was chosen among them, in a sentence."""
    retried: tuple[Retried, ...] = ()
    """What became of the weaknesses that were discovered besides, if any were looked for."""
    training: tuple[Training, ...] = ()
    capability: tuple[Capability, ...] = ()
    answers: tuple[Answers, ...] = ()
    """Some whole answers to ordinary requests."""
    examples: tuple[Example, ...] = ()
    judge: dict[str, Any] = Field(default_factory=dict)
    """Name of the judge and its measured errors: accuracy, tpr, fpr, n, data, date."""
    limits: tuple[str, ...] = ()
    """What the result does not show, in sentences."""
    reproduce: str = ""
    """The command that gives this result again."""
    options: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: str = ""
    peak_memory_mib: int = 0
    """Largest resident memory of the process that finished the run; 0 = not known."""
    started: str = ""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Per stage."""
    ledger_head: str = ""
    ledger_entries: int = 0
