"""How to learn from a model's own samples. Importing this loads no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class OnlineOptions(BaseModel):
    """How samples are drawn and used; `TrainOptions` holds besides, with prompts for groups: a step draws answers to `batch` prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    k: int = Field(default=4, ge=1)
    """Answers drawn for each prompt."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the samples and of every log-probability, so that what is learnt from is what is changed."""
    updates: int | None = Field(default=None, ge=1)
    """Optimizer steps on each batch of samples. Default: the objective's own."""
    end_penalty: float | None = None
    """Reward of an answer that was cut before its end; none = it is scored like any other."""
    kl_budget: float = Field(default=10.0, gt=0)
    """Distance from the model at the beginning at which training stops, in nats per answer (k3, summed over tokens)."""
    length_change: float | None = Field(default=0.5, gt=0)
    """Share by which the mean length of answers to the same prompts may change before training stops; none = it may do what it likes."""
    kl_target: float | None = Field(default=None, gt=0)
    """Distance at which the weight of the KL term is kept by moving it; none = the weight stays."""
    kl_horizon: float = Field(default=10_000.0, gt=0)
    """Answers over which a lasting error moves that weight by a factor of about e^0.2; fewer for short runs, for which the usual 10,000 does little."""
    mix: float = Field(default=1.0, ge=0)
    """Weight of the negative log-likelihood per token of demonstrations, where some are given."""
