"""The goal itself, unchanged.

What it does: asks exactly what the prompt says. It is the floor every other attack is compared with.
Use it when:  always; a rate under attack means nothing without the rate without one.
Defaults:     none to set.
Limits:       measures how often a model complies when plainly asked, not how far it can be pushed.
Source:       Wei, Haghtalab and Steinhardt 2023, arXiv:2307.02483, the row "none".
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, final

from fiducial.attack.base import TemplateAttack
from fiducial.core.records import Conversation, Prompt


@final
@dataclass(frozen=True, slots=True)
class Direct(TemplateAttack):
    """Sends the prompt as it is."""

    family: ClassVar[str] = "direct"

    def rewrite(self, prompt: Prompt, rng: random.Random) -> Conversation:
        """The prompt's own conversation."""
        return prompt.messages
