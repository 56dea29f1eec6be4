"""The nouns: what is written to disk, sent over a wire, or passed between areas.

Frozen pydantic models that forbid unknown fields. Each has a content-hash `id`: two equal records are one.
On disk they are JSON Lines whose first key is the schema version.
"""

from __future__ import annotations

import hashlib
import json
import math
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from fiducial.core.intervals import Rate

SCHEMA = 1
"""Version of the record layout; raised when a stored record would no longer be read the same way."""

Outcome = Literal["success", "failure", "not_scored"]
"""Of an attack trial: success = harmful compliance obtained; not_scored never counts as safe."""

Better = Literal["higher", "lower"]


def digest(value: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of `value` as canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


class Record(BaseModel):
    """Base of all records: immutable, strict about unknown fields, identified by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="null")
    identity: ClassVar[frozenset[str] | None] = None
    """Fields that make the identity; all of them when None. Measured by-products (seconds, cost) are left out this way."""

    @property
    def id(self) -> str:
        """Content hash, 16 hexadecimal digits."""
        content = self.model_dump(mode="json", include=set(self.identity) if self.identity else None)
        return digest(to_jsonable_python(content, inf_nan_mode="null"))

    def line(self) -> str:
        """One JSON line without newline; the first key is the schema version, defaults are left out. A number that is not finite is null."""
        content = {"v": SCHEMA} | self.model_dump(mode="json", exclude_defaults=True)
        try:
            return json.dumps(content, ensure_ascii=False, allow_nan=False)
        except ValueError:  # pydantic's `ser_json_inf_nan` says nothing to `model_dump`, and other readers know no NaN
            return json.dumps(to_jsonable_python(content, inf_nan_mode="null"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def parse(cls, line: str) -> Self:
        """The record in one JSON line written by `line`. Where a number must stand, null is one that was not finite, and becomes NaN."""
        row = json.loads(line)
        version = row.pop("v", SCHEMA)
        if version != SCHEMA:
            raise ValueError(f"{cls.__name__} of schema {version}; this program reads schema {SCHEMA}")
        try:
            return cls.model_validate(row)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            if any(problem["type"] != "float_type" or problem["input"] is not None for problem in problems):
                raise
            for problem in problems:
                *way, last = problem["loc"]
                place: Any = row
                for part in way:
                    place = place[part]
                place[last] = math.nan
            return cls.model_validate(row)


class Message(Record):
    """One turn of a conversation, in OpenAI's wire format."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = tuple[Message, ...]
"""Turns in order. A last turn of role `assistant` is the beginning of the answer, to be continued."""


def user(text: str) -> Conversation:
    """A conversation of one user turn."""
    return (Message(role="user", content=text),)


class Prompt(Record):
    """What is asked, and what a good model would do with it."""

    messages: Conversation
    language: str = "en"
    category: str = ""
    expected: Literal["comply", "refuse", "answer"] = "answer"
    """refuse = a harmful goal; comply = a benign twin that must not be refused; answer = anything ordinary."""
    reference: str = ""
    """A known good answer, if there is one."""
    choices: tuple[str, ...] = ()
    """Answer options of a multiple-choice item."""
    gold: int | None = None
    """Index of the right option."""
    twin: str = ""
    """Text of the counterpart: the benign twin of a goal, or the goal of a twin. One pair is one cluster."""
    source: str = ""
    licence: str = ""

    @property
    def text(self) -> str:
        """Content of the last user turn."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def cluster(self) -> str:
        """Identity of the goal-and-twin pair, the same for both."""
        return digest(sorted(t for t in (self.text, self.twin) if t))


class Completion(Record):
    """One answer of a model."""

    text: str
    finish: Literal["stop", "length", "filtered", "error"] = "stop"
    tokens: tuple[int, ...] = ()
    """Token ids where the model reveals them."""
    logprobs: tuple[float, ...] = ()
    """Log-probability in nats of each token under the distribution it was drawn from."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    """Why there is no answer, when finish is `error`."""
    ends: tuple[int, ...] = ()
    """Where each part of the text ends (a step, a sentence, a line), in characters, ascending."""
    values: tuple[float | None, ...] = ()
    """A number per part, higher is better; None = unknown."""

    @model_validator(mode="after")
    def _one_per_part(self) -> Self:
        if len(self.values) != len(self.ends):
            raise ValueError(f"{len(self.ends)} parts but {len(self.values)} values")
        if any(not before < after <= len(self.text) for before, after in pairwise((0, *self.ends))):
            raise ValueError(f"ends must rise from above 0 to at most the text's {len(self.text)} characters, got {list(self.ends)}")
        return self


class Group(Record):
    """One prompt with K completions and what is known about them. K = 1 is a demonstration, K = 2 a preference pair."""

    identity = frozenset({"prompt", "completions", "rewards", "targets", "weight", "annotator"})

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float | None, ...] | None = None
    """One per completion, higher is better; None = could not be scored."""
    targets: tuple[float, ...] | None = None
    """Soft label: probability that each completion is the best; sums to 1."""
    weight: float = 1.0
    """How much this group counts in the loss."""
    annotator: str = ""
    """Who or what said so: a person, a judge, a rule."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """How it came about, as plain JSON values: principles, critiques, votes, figures before they became the label."""

    @model_validator(mode="after")
    def _one_per_completion(self) -> Self:
        for name in ("rewards", "targets"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.completions):
                raise ValueError(f"{len(self.completions)} completions but {len(values)} {name}")
        if self.targets is not None and abs(sum(self.targets) - 1) > 1e-4:
            raise ValueError(f"targets must sum to 1, got {sum(self.targets)}")
        return self


class Verdict(Record):
    """What one judge said about one attempt or answer."""

    judge: str
    outcome: Outcome
    label: Literal["refusal", "compliance", "unclear", "safe", "unsafe", ""] = ""
    """What the answer is; the outcome is what that means for the trial."""
    score: float | None = None
    """In [0, 1], higher = more harmful compliance."""
    rationale: str = ""
    raw: str = ""


class Attempt(Record):
    """One trial of one attack on one goal (or its benign twin)."""

    identity = frozenset({"prompt", "attack", "parameters", "model", "seed"})

    prompt: Prompt
    attack: str
    family: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    model: str
    """Fingerprint of the model that was attacked."""
    seed: int = 0
    sent: Conversation = ()
    response: str = ""
    """What came back, as text."""
    decoded: str | None = None
    """The response after undoing the attack's encoding; None where nothing readable came out."""
    finish: Literal["stop", "length", "filtered", "error"] = "stop"
    error: str = ""
    verdict: Verdict | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def scored(self) -> bool:
        """Whether a judge could tell; what could not be scored counts neither as safe nor as unsafe."""
        return self.verdict is not None and self.verdict.outcome != "not_scored"

    @property
    def complied(self) -> bool:
        """Whether the answer was read as compliance."""
        return self.verdict is not None and self.verdict.outcome == "success"

    @property
    def refused(self) -> bool:
        """Whether the answer was read as a refusal."""
        return self.verdict is not None and self.verdict.label == "refusal"

    @property
    def failed(self) -> bool:
        """Whether the model did what it should not: complied with a harmful goal, or refused anything else."""
        return self.complied if self.prompt.expected == "refuse" else self.refused


class Score(Record):
    """One figure of a suite, with what it rests on."""

    suite: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    interval: str = "wilson"
    better: Better = "higher"
    model: str = ""
    fingerprint: dict[str, str] = Field(default_factory=dict)
    """Hashes of data, prompt format and model, scorer and its version: what must agree for two figures to be comparable."""
    items: tuple[float, ...] = ()
    """Value per item, in the order of the items, so that two models can be compared pair by pair."""
    not_scored: int = 0

    @classmethod
    def of_rate(cls, rate: Rate, **fields: Any) -> Self:
        """A score from hits out of n with its Wilson interval. With nothing scored the value is the worst there is, so that it never looks perfect."""
        low, high = rate.interval()
        worst = 1.0 if fields.get("better") == "lower" else 0.0
        return cls(value=rate.value if rate.n else worst, n=rate.n, low=low, high=high, interval="wilson", **fields)


class Finding(Record):
    """What an inspector noticed."""

    inspector: str
    what: str
    where: str = ""
    severity: Literal["info", "low", "medium", "high"] = "info"
    figures: tuple[Score, ...] = ()


class Weakness(Record):
    """A slice of trials in which the model fails, with how often."""

    slice: dict[str, str]
    """For example {"expected": "refuse", "family": "persona"}."""
    hits: int
    n: int
    design: float = Field(default=1.0, ge=1)
    """Kish's design effect: above 1 where several trials share a goal and went alike."""
    examples: tuple[str, ...] = ()
    """Ids of attempts that show it."""

    @property
    def rate(self) -> Rate:
        """Failures out of trials."""
        return Rate(self.hits, self.n, self.design)


class Evidence(Record):
    """A figure that a gate may use."""

    name: str
    value: float
    n: int
    low: float
    high: float
    better: Better = "lower"
    baseline: float | None = None
    baseline_low: float | None = None
    baseline_high: float | None = None
    baseline_n: int | None = None
    source: str = ""
    """Run and stage that measured it."""


class Check(Record):
    """One rule of a gate, applied."""

    rule: str
    outcome: Literal["pass", "fail", "insufficient"]
    reason: str


class Decision(Record):
    """What a gate decided, and why. `insufficient` means evidence is missing, and never counts as a pass."""

    gate: str
    outcome: Literal["pass", "fail", "insufficient"]
    checks: tuple[Check, ...]


class Event(Record):
    """One entry of the ledger."""

    number: int
    time: str
    """UTC, ISO 8601."""
    kind: str
    """data, train, evaluate, gate, promote, serve, rollback, run."""
    body: dict[str, Any]
    previous: str
    """Hash of the entry before; 64 zeros for the first."""
    hash: str
    """SHA-256 of this entry without this field."""
