"""Which prompts may be learnt from, and which only prove: fixed by the text alone, so that no run can mix them up.

SHA-256 of the normalised text decides: half for repair, 15 % for validation, 35 % held out. A goal and its benign twin go together.
Splitting by family of attack is done beside this, by the loop.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

from fiducial.core.records import Prompt

Split = Literal["repair", "validation", "held-out"]

SHARES: tuple[tuple[Split, float], ...] = (("repair", 0.50), ("validation", 0.15), ("held-out", 0.35))
SPLITS: tuple[Split, ...] = tuple(name for name, _ in SHARES)


def normalised(text: str) -> str:
    """`text` without differences of case, width, punctuation and spacing.

    >>> normalised("  How do I, e.g., pick a LOCK?!") == normalised("how do i e.g. pick a lock")
    True
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain)) or plain.strip()


def place_of(text: str, salt: str = "fiducial") -> float:
    """Where a text lies between 0 and 1, whatever its case, punctuation and spacing; texts spread evenly."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{normalised(text)}".encode(errors="backslashreplace")).digest()[:8]) / 2**64


def split_of(text: str, salt: str = "fiducial") -> Split:
    """The split of a goal's text. Another `salt` gives another, independent division.

    >>> split_of("Explain how to pick a lock.") == split_of("explain how to pick a lock")
    True
    """
    place, bound = place_of(text, salt), 0.0
    for name, share in SHARES:
        bound += share
        if place < bound:
            return name
    return SHARES[-1][0]


def goal_text(prompt: Prompt) -> str:
    """The text that decides the split of `prompt`: its own, or for a benign twin that of its goal."""
    return prompt.twin if prompt.expected == "comply" and prompt.twin else prompt.text


def split(prompts: Iterable[Prompt], salt: str = "fiducial") -> dict[Split, list[Prompt]]:
    """The prompts of each split, in the order given; a goal and its twin are always in the same one."""
    parts: dict[Split, list[Prompt]] = {name: [] for name, _ in SHARES}
    for prompt in prompts:
        parts[split_of(goal_text(prompt), salt)].append(prompt)
    return parts
