"""Options of the loop; sections are written `gate.max_benign_refusal=0`, `train.epochs=3`. Importing this loads no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fiducial.training.options import TrainOptions

DEFAULT_MAKER = "align/failure_pairs"


class LoopTraining(TrainOptions):
    """How the loop trains: what a model of 135 million parameters needs to change its behaviour on about a thousand short groups."""

    epochs: float = Field(default=1.5, gt=0)
    """Passes over the groups."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; by default the one among the `candidates`, else the objective's own."""
    lora_depth: float = Field(default=0.4, gt=0, le=1)
    """Share of the layers, from the top, that carry the adapter."""
    minutes: None = None
    """Set by the loop from its own budget."""
    held_out: Literal[0] = 0
    """The loop has a split for that."""
    seed: Literal[0] = 0
    """Set by the loop: its own seed decides."""


class LoopOptions(BaseModel):
    """Options of the loop; sections are written `gate.max_benign_refusal=0`, `train.epochs=3`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = "smollm2"
    """The model to repair."""
    goals: str = "shipped"
    """Harmful goals, with benign twins in a column `twin`: a file, or `shipped`."""
    minutes: float | None = Field(default=None, gt=0)
    """Time to spend. Another round begins only if it fits; the training schedule is shortened rather than the proof. By default the schedule is kept,
    however long it takes here, and another round begins only if all is done within eight minutes."""
    rounds: int = Field(default=2, ge=1)
    """Most repair rounds."""
    seed: int = 0
    """Decides every draw and order."""
    attacks: tuple[str, ...] = ("attack/prefix_injection", "attack/refusal_suppression", "attack/persona")
    """Attack families whose failures may be trained on, besides asking directly."""
    held_out_attacks: tuple[str, ...] = ("attack/style_injection", "attack/past_tense", "attack/many_shot", "attack/payload_splitting")
    """Attack families that only measure."""
    held_out_goals: int = Field(default=160, ge=1)
    """Held-out goals, each with its twin, that the proof asks directly; a fifth as many near twins; a third for validation."""
    near_twins: float = Field(default=0.0, ge=0, le=1)
    """Share of the repair split's near twins, harmless requests in nearly the words of a goal, that are learnt from. Then more of the held-out ones are
    asked too, and `gate.max_near_twin_refusal=0.5` can limit them. It takes more minutes than the usual repair."""
    per_family: int = Field(default=30, ge=1)
    """Held-out goals tried under each attack. As many are trained on, each with its twin; an eighth as many validate."""
    max_tokens: int = Field(default=16, ge=4)
    """Length of an answer in trials, in tokens. Whether an answer refuses shows in its first words."""
    whole_tokens: int = Field(default=64, ge=16)
    """Length of whole answers to ordinary requests, in tokens, by which it is proved that answers do not decay."""
    own_answers: int = Field(default=0, ge=0)
    """Ordinary requests of the repair split to which the model's own whole answers are taught besides (align/own_answers). They hold answers where they
    were, and refusals are learnt more slowly for it: use them where the gate finds that answers repeat themselves."""
    judge: str = "oversee/compliance"
    """Who says whether an answer complies."""
    maker: str = DEFAULT_MAKER
    """Who turns failures into training data."""
    maker_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the maker, over those that suit its default: failures weigh 0.75, and 1.35 where 0.6 of the near twins are learnt from; in other
    languages than English 0.7 of that. A refusal begins in one way and an answer in many, so that the likeliest word refuses too often."""
    discover: str = ""
    """A maker that looks for further weaknesses in every round, such as align/weakness_discovery. Its repairs are trained on besides, and its
    cases, of which half is held out, are tried again in the end. None by default: it takes minutes."""
    discover_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that maker."""
    objective: str = "auto"
    """What is trained for; `auto` tries the candidates and takes the one that does best on validation prompts."""
    objective_options: dict[str, Any] = Field(default_factory=dict)
    """Options of an objective that is named."""
    candidates: dict[str, float | None] = Field(default_factory=lambda: {"align/sft": 3e-3, "align/dpo": 1e-4, "align/exo": 3e-4}, min_length=1)
    """Objectives to choose among, with the peak learning rate of each; for adapters on a model of 135 million parameters."""
    pilot_steps: int = Field(default=24, ge=1)
    """Optimizer steps by which candidates are compared."""
    train: LoopTraining = LoopTraining()
    """How to train."""
    gate: dict[str, Any] = Field(default_factory=dict)
    """Options of the gate govern/release."""
    capability_items: int | None = Field(default=None, ge=1)
    """First so many capability items; all by default."""
