"""The known reward of the trends: a plain function of the text, so that what is true of an answer is known exactly."""

from __future__ import annotations

import re
from pathlib import Path

PLAIN = f"{Path(__file__).resolve()}:plain"
"""`plain` as `fiducial.training.rewards.FunctionReward` names it."""
LEAST = 3
"""Words below which an answer is no answer."""
WORST = -10.0
MEAN = -4.8
"""About the mean of `plain` over answers of SmolLM2-135M-Instruct, from seed 0."""
CENTRED = f"{Path(__file__).resolve()}:centred"


def plain(completions: list[str]) -> list[float]:
    """Short words: minus the mean letters per word, from -10 to -1; -10 for fewer than three words."""
    words = [re.findall(r"[^\W\d_]+", text) for text in completions]
    return [max(WORST, -sum(map(len, found)) / len(found)) if len(found) >= LEAST else WORST for found in words]


def centred(completions: list[str]) -> list[float]:
    """The same about 0, for a value head that begins at 0: what is far from it would be learnt as the length of the answer."""
    return [reward - MEAN for reward in plain(completions)]
