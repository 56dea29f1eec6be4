"""Problems with a known final answer, and whether a solution reaches it.

{"problem": "What is 2 + 3 * 4?", "answer": 14}
"""

from __future__ import annotations

import re

from fiducial.core.errors import ConfigError, DataError
from fiducial.data.rows import read_rows

PROBLEM, ANSWER = ("prompt", "problem", "question"), ("answer", "reference", "target")
"""Columns of a file of problems, the first that is there."""
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def final(text: str, gold: str = "") -> str:
    """The final answer of a text, as solutions that agree have it: its last number, or its last line where `gold` is no number or there is none.

    >>> final("3 apples cost 1,200.", "7"), final("x = 4\\nThe capital is Paris.", "paris")
    ('1200.0', 'the capital is paris')
    """
    numbers = re.findall(NUMBER, text)
    if numbers and (not gold or _number(gold) is not None):
        return str(_number(numbers[-1]))
    lines = text.strip().splitlines()
    return lines[-1].strip().rstrip(".!。！").casefold() if lines else ""


def reaches(text: str, gold: str) -> bool:
    """Whether the last number of a text is the answer; where the answer is no number, whether the last line ends with it.

    >>> reaches("3 apples cost 1,200.", "1200"), reaches("so 12", "2"), reaches("x = 4\\nThe capital is Paris.", "paris")
    (True, False, True)
    """
    wanted, found = _number(gold), final(text, gold)
    return found == str(wanted) if wanted is not None else bool(found) and found.endswith(gold.strip().casefold())


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").strip().rstrip("."))
    except ValueError:
        return None


def known_answers(path: str) -> dict[str, str]:
    """The final answer of each problem in a file, in order. Raises ConfigError without a file, DataError for a row that lacks one of both."""
    if not path:
        raise ConfigError("the final answers of the problems are not known", hint="name a file with problems and answers")
    found = {}
    for where, values in read_rows(path):
        problem, answer = (next((str(values[c]).strip() for c in names if values.get(c) not in (None, "")), "") for names in (PROBLEM, ANSWER))
        if not problem or not answer:
            raise DataError(f"{where}: a problem and its answer are needed", hint=f"columns {' or '.join(PROBLEM)}, and {' or '.join(ANSWER)}")
        found[problem] = answer
    return found
