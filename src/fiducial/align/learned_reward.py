"""Reward of a trained reward, cost or process reward model.

What it does: scores completions with models that align/reward_model, align/cost_model or align/process_reward trained, one or several.
Use it when:  such a model has proved itself on held-out data and is to reward a policy, choose the best of N, or filter data.
Formula:      the score at the completion's last token, less the mean score of preferred answers that the model learnt from; a cost keeps its
              zero. Process models: product (or minimum, or last) over the steps of sigmoid(score at the step's end). Several members: each but a
              process model divided by the standard deviation of its scores there, then mean, min, or mean - spread_penalty * variance (over
              members, divided by their number). Mean and deviation are taken after training, on up to 128 groups of the data.
Defaults:     mean; steps combined by product (Lightman et al.), or the last after training on outcomes; spread_penalty 0.5 (best-of-N in Coste
              et al., who use 0.1 in PPO).
Limits:       a score is right where the training data was; a policy that is pushed leaves it. Members are best trained on the same data with
              another seed: their scales are those of their own data. A model whose scale was not kept gives scores as they are, alone and in a
              mean; min and penalised refuse it beside others. Members that err alike are as one. Completions that failed have no score. Learning
              from it is refused unless the held-out accuracy of every member lies, with its interval, above chance: in the report card of its
              training (--held-out 0.2), or in that of an evaluate/reward_card on other preferences. That is the least; length and edits
              (evaluate/reward_card) may still lead a policy astray.
Source:       Coste et al. 2023, arXiv:2310.02743; steps: Lightman et al. 2023, arXiv:2305.20050; minimum: Wang et al. 2023, arXiv:2312.08935.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal, final

from fiducial.core.config import refuse_idle
from fiducial.core.errors import ConfigError, ModelError
from fiducial.core.records import Completion, Group
from fiducial.core.roles import Reward
from fiducial.data.steps import beginnings, cut

if TYPE_CHECKING:
    from torch import Tensor

    from fiducial.models.local import LocalModel
    from fiducial.models.scorehead import Scale, ScoreHead

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class LearnedReward(Reward):
    """Scores of trained heads."""

    models: tuple[str, ...] = ()
    """Names of the trained models, for example run:ID; at least one."""
    combine: Literal["mean", "min", "penalised"] = "mean"
    """How the scores of several members become one."""
    spread_penalty: float = 0.5
    """Weight of the members' variance, for penalised."""
    steps: Literal["as_trained", "product", "min", "last"] = "as_trained"
    """How the steps of a solution become one score, for process reward models: as_trained is the product for one that learnt from labels of steps,
    and the last for one that learnt from outcomes."""
    separator: str = "\n"
    """What ends a step of a completion that does not say where its steps end."""
    higher_is: Literal["better", "worse"] = "better"
    """What a higher value is to mean: better for a reward, worse for a cost. A model that was trained otherwise is refused."""
    cards: tuple[str, ...] = ()
    """Runs of evaluate/reward_card that measured these models, which score whole answers, for learning from models whose training held nothing out."""
    unproven: bool = False
    """Learns from models whether or not anything shows that they order answers which they have not seen."""

    def __post_init__(self) -> None:
        if self.combine not in ("mean", "min", "penalised") or self.steps not in ("as_trained", "product", "min", "last") or not self.separator:
            raise ValueError("combine is mean, min or penalised, steps is as_trained, product, min or last, and separator is not empty")
        if not self.spread_penalty >= 0:
            raise ValueError(f"spread_penalty must be >= 0, got {self.spread_penalty}")
        if self.combine != "penalised":
            refuse_idle(self, ["spread_penalty"], when=f"when combine is {self.combine}", hint="leave it out, or give combine penalised")
        if self.unproven:
            refuse_idle(self, ["cards"], when="when unproven models are taken", hint="leave out one of the two")
        if len(self.models) == 1:
            refuse_idle(self, ["combine"], when="on the score of a single model", hint="leave it out, or name further models")

    def score(self, groups: Sequence[Group]) -> list[tuple[float | None, ...]]:
        """One value per completion.

        Raises ConfigError without models or for an option that does nothing to them, ModelError for a model that has no head or means the contrary.
        """
        from fiducial.models.scorehead import BY_STEPS

        if not self.models:
            raise ConfigError(f"{self.name} needs a trained model", hint="for example --models run:ID, with the id of a run of align reward_model")
        wanted = [(g, k) for g, group in enumerate(groups) for k, c in enumerate(group.completions) if c.finish != "error"]
        found: list[list[float | None]] = [[None] * len(group.completions) for group in groups]
        if wanted:
            asked, members = [(groups[g], groups[g].completions[k]) for g, k in wanted], self._members()
            if not any(head.trained_by == BY_STEPS for _, head in members):
                refuse_idle(self, ["steps", "separator"], when="on models that score whole answers", hint="leave it out, or name a process reward model")
            scales = self._scales([head for _, head in members])
            scores = [self._scaled(self._scores(model, head, asked), scale) for (model, head), scale in zip(members, scales, strict=True)]
            for (g, k), value in zip(wanted, self.combined(scores).tolist(), strict=True):
                found[g][k] = value
        return [tuple(values) for values in found]

    def doubts(self, groups: Sequence[Group]) -> list[tuple[bool | None, ...]]:
        """Whether process models that learnt from labels of steps call some step wrong, at a probability below 0.5; None of other models."""
        from fiducial.models.scorehead import BY_STEPS

        if not all(head.trained_by == BY_STEPS and head.learns_from != "outcome" for _, head in self._members()):
            return [(None,) * len(group.completions) for group in groups]
        return [tuple(None if least is None else least < 0.5 for least in values) for values in replace(self, steps="min").score(groups)]

    def refuse_unproven(self) -> None:
        """Raises MethodError for a member whose held-out accuracy is not known, or may be chance; nothing where `unproven` ones are taken."""
        from fiducial.training.headproof import refuse_unproven

        for name, (model, _) in zip(self.models, self._members(), strict=True) if not self.unproven else ():
            refuse_unproven(name, model, self.cards)

    def combined(self, members: Sequence[Tensor]) -> Tensor:
        """One score per completion, [N], from those of the members, [N] each. The careful side of a cost is the highest."""
        import torch

        scores = torch.stack(list(members))
        sign = 1 if self.higher_is == "better" else -1
        if self.combine == "min":
            return sign * (sign * scores).amin(0)
        return scores.mean(0) - (sign * self.spread_penalty * scores.var(0, correction=0) if self.combine == "penalised" else 0)

    def _members(self) -> list[tuple[LocalModel, ScoreHead]]:
        """The models with their heads. Raises ModelError for one without, one that means the contrary, and two that are read differently."""
        from fiducial.models.scorehead import BY_STEPS, BY_TOKENS

        found = []
        for name in self.models:
            model = opened(name)
            if model.head is None or model.head.trained_by in BY_TOKENS:
                what = "no score head" if model.head is None else "a head that values a policy's tokens, and none that scores answers"
                raise ModelError(f"{name} has {what}", hint="train one: fiducial align reward_model")
            if model.head.higher_is != self.higher_is:
                hint = f"give --higher-is {model.head.higher_is}, or another model"
                raise ModelError(f"a higher score of {name} is {model.head.higher_is}, but it is read as {self.higher_is}", hint=hint)
            found.append((model, model.head))
        if len({head.trained_by == BY_STEPS for _, head in found}) > 1:
            hint = "give members of one kind; in a mixture of rewards each kind can be a part"
            raise ModelError(f"some of {', '.join(self.models)} are read at every step and some at the end", hint=hint)
        return found

    def _scales(self, heads: Sequence[ScoreHead]) -> list[Scale | None]:
        """What each member's scores are to be put on one scale by; nothing for process models, or where not every member says."""
        from fiducial.models.scorehead import BY_STEPS

        silent = [name for name, head in zip(self.models, heads, strict=True) if head.scale is None and head.trained_by != BY_STEPS]
        if silent and len(heads) > 1:
            if self.combine != "mean":
                hint = "train it again, which keeps the scale, or take --combine mean"
                raise ModelError(f"{silent[0]} does not say on what scale its scores are, so {self.combine} over several members means nothing", hint=hint)
            _warn(f"{', '.join(silent)}: the scale of the scores was not kept, so the mean of {len(heads)} members is of scores as they are")
        return [None if silent or head.trained_by == BY_STEPS else head.scale for head in heads]

    def _scaled(self, scores: Tensor, scale: Scale | None) -> Tensor:
        """Scores [N] from the mean of preferred answers, where 0 means nothing else, and for several members in units of their spread."""
        if scale is None:
            return scores
        moved = scores - scale.location if self.higher_is == "better" else scores
        return moved / scale.spread if len(self.models) > 1 else moved

    def _scores(self, model: LocalModel, head: ScoreHead, asked: Sequence[tuple[Group, Completion]]) -> Tensor:
        """One member's scores as they are, [N]; for a process model from its steps."""
        import torch

        from fiducial.models.scorehead import BY_STEPS, scores

        by_steps = head.trained_by == BY_STEPS
        parts = [self._prefixes(c) if by_steps else [(c.text, c.finish != "length")] for _, c in asked]
        ids = [model.encode(g.prompt.messages, text, end=end)[0] for (g, _), texts in zip(asked, parts, strict=True) for text, end in texts]
        pieces = scores(model, ids).split([len(texts) for texts in parts])
        if not by_steps:
            return torch.cat(pieces)
        right = [torch.sigmoid(piece) for piece in pieces]
        by = ("last" if head.learns_from == "outcome" else "product") if self.steps == "as_trained" else self.steps
        return torch.stack([steps[-1] if by == "last" else steps.prod() if by == "product" else steps.amin() for steps in right])

    def _prefixes(self, completion: Completion) -> list[tuple[str, bool]]:
        """The text up to the end of each step, open and without blank lines as in training."""
        begun = [completion.text[:end] for end in completion.ends] or beginnings(cut(completion.text, self.separator), self.separator)
        return [(text, False) for text in begun or [completion.text]]


@cache
def _warn(message: str) -> None:
    """A warning, once in a process however often a policy is rewarded."""
    log.warning(message)


@lru_cache(maxsize=8)
def opened(name: str) -> LocalModel:
    """The model, kept open between batches. Raises ModelError where its weights are not here."""
    from fiducial.models.local import LocalModel
    from fiducial.models.open import open as open_model

    model = open_model(name)
    if not isinstance(model, LocalModel):
        raise ModelError(f"'{name}' has no weights here, and so no score head", hint="give a model that fiducial align reward_model trained")
    return model
