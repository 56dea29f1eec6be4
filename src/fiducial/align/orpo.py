"""Odds ratio preference optimisation.

What it does: supervised fine-tuning on the preferred completions with a term that raises their odds over the rejected ones; no reference.
Use it when:  one stage should teach both the format and the preference, starting from a base model.
Formula:      loss = -w - beta * log sigmoid(odds(w) - odds(l)), odds(a) = a - log(1 - exp(a)), with w = mean log-probability per token
              of the preferred completion and l that of the other, in nats; groups of one completion have the first term alone.
              With mean=token the first term of a step is minus the sum over its preferred tokens, divided by their number. With
              likelihood=text the first term is over the prompt's tokens too, the second never.
Defaults:     beta 0.1 and learning rate 8e-6 (paper, where beta is lambda). The first term is over completions, as written in the paper; its code,
              unless told otherwise, and TRL take it over prompt and completion, each token of a batch alike: likelihood=text with mean=token.
Limits:       the odds term is weak beside the first: by itself it does not make a model unlearn. With likelihood=text the model learns to ask
              what it is asked, and long prompts outweigh their answers.
Source:       Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from fiducial.align.base import PairObjective, likelihood, per_token, preference_metrics
from fiducial.core.roles import Reading
from fiducial.training.objective import GroupLogProbs

CERTAIN = -1e-6
"""Mean log-probability from which a completion counts as certain: its odds are infinite at 0, and float32 knows them no better."""


@final
@dataclass(frozen=True, slots=True)
class ORPO(PairObjective):
    """Negative log-likelihood plus a logistic loss on the difference of log-odds."""

    least: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 8e-6

    beta: float = 0.1
    """Weight of the odds ratio; > 0."""
    mean: Literal["sequence", "token"] = "sequence"
    """What counts alike in the first term: each completion (the paper), or each token of a step, so that long ones count more."""
    likelihood: Literal["completion", "text"] = "completion"
    """Of what the first term is the likelihood: the completion, or the whole text with the prompt."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")
        if self.mean not in ("sequence", "token") or self.likelihood not in ("completion", "text"):
            raise ValueError(f"mean must be sequence or token, likelihood completion or text, got {self.mean} and {self.likelihood}")

    @property
    def reads(self) -> tuple[Reading, ...]:
        """The single tokens of prompts where they are needed."""
        return ("tokens", "prompt") if self.likelihood == "text" else ()

    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> Tensor:
        """Loss per group, [G], in nats."""
        return self.contrast(self._answers(policy)) - likelihood(policy, self.mean)

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """See `align.base.preference_metrics`; of completions alone."""
        answers = self._answers(policy)
        return preference_metrics(self.score(answers, None), answers, None, better=answers.targets)

    def _answers(self, policy: GroupLogProbs) -> GroupLogProbs:
        """The groups without the tokens of prompts."""
        if self.likelihood == "completion":
            return policy
        answer = policy.known("answer")
        return replace(policy, logp=policy.summed(answer * policy.per_token), length=policy.summed(answer).long())

    def score(self, policy: GroupLogProbs, reference: GroupLogProbs | None) -> Tensor:
        """Log-odds of the mean log-probability per token, [G, K]."""
        mean = per_token(policy.logp, policy).clamp(max=CERTAIN)
        return mean - torch.log(-torch.expm1(mean))

    def loss(self, better: Tensor, worse: Tensor) -> Tensor:
        """Weighted logistic loss on the log odds ratio, [G]."""
        return -self.beta * F.logsigmoid(better - worse)
