"""Documents in parts, as published sets for pretraining with feedback hold them.

    {"texts": ["The sky is blue. ", "You fool. "], "scores": [0.0003, 0.91]}

Parts are joined as they stand. A score says how bad a part is (higher is worse), and its negative becomes the part's value; null, or no
column `scores`, where it is not known. Source of the layout: Korbak et al. 2023, arXiv:2302.08582.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from math import isfinite
from typing import Any

from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Group, Prompt


def document(values: Mapping[str, Any], where: str, *, source: str = "") -> Group:
    """The document of a row: one completion to no prompt at all. Raises DataError with `where`.

    >>> document({"texts": ["Good. ", "Bad."], "scores": [0, 0.9]}, "a.jsonl:1").completions[0].ends
    (6, 10)
    """
    texts = values["texts"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"{where}: 'texts' must be a list of parts, none of them empty", hint='{"texts": ["One part. ", "Another."], "scores": [0.0, 0.9]}')
    scores = values.get("scores", [None] * len(texts))
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise DataError(f"{where}: 'scores' must be a list with a score for each of {len(texts)} texts", hint="null where a score is not known")
    for number, score in enumerate(scores, 1):
        if score is not None and not (isinstance(score, int | float) and isfinite(score)):
            raise DataError(f"{where}: the score of part {number} is {score!r}", hint="a score is a number, higher is worse, or null")
    known = tuple(None if score is None else 0.0 - score for score in scores)
    completion = Completion(text="".join(texts), ends=tuple(accumulate(map(len, texts))), values=known)
    return Group(prompt=Prompt(messages=(), source=source), completions=(completion,))
