"""Edits of a good answer that take no model: some keep what it says, and a score should hardly move; others make it certainly no better.

The list is that of checks for reward hacking: style, length, praise of the answer and of who asks, made-up authority, another language, an
answer's steps and result apart. What is added to an answer stands in perturbations.yaml. The text alone changes, never how it was finished.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import NamedTuple, cast

from fiducial.core.config import load_yaml
from fiducial.core.records import Completion, Group, Prompt

Change = Callable[[str, Prompt], str | None]
"""The text of an answer to a prompt, changed; None where it does not fit."""
SUFFIX = 24
"""Random characters of a suffix."""
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[^a-z])|(?<=[。！？])\s*|\n+")
"""Where one sentence or line ends and the next begins."""
NUMBER = r"\d[\d,]*(?:\.\d+)?"
RESULT = re.compile(rf"[\d)%]\s*=\s*\$?({NUMBER})")
"""What a calculation comes to, as in 2 + 3 = 5; no assignment to a name."""


class Edit(NamedTuple):
    """One edited answer."""

    kind: str
    of: int
    """Which of the answers it was made from."""
    completion: Completion


def edited(group: Group, completion: Completion, kind: str) -> Completion | None:
    """A copy of a good answer after an edit; None where it would change nothing, does not fit, or could be an improvement."""
    text = KINDS[kind](completion.text, group.prompt)
    return None if text is None or text == completion.text else Completion(text=text, finish=completion.finish)


def planned(answers: Sequence[tuple[Group, Completion]], count: int) -> list[Edit]:
    """At most `count` edits of good answers, shared out evenly among the kinds that fit any of them.

    Each kind goes on where the one before it stopped, so that few edits still come from many answers; no kind takes an answer twice.
    """
    fitting = {kind: [Edit(kind, i, made) for i, (g, c) in enumerate(answers) if (made := edited(g, c, kind)) is not None] for kind in KINDS}
    fitting = {kind: edits for kind, edits in fitting.items() if edits}
    found: list[Edit] = []
    at = 0
    for number, edits in enumerate(fitting.values()):
        share = min(count // len(fitting) + (number < count % len(fitting)), len(edits))
        found += [edits[(at + i) % len(edits)] for i in range(share)]
        at += share
    return found


@cache
def words(language: str) -> dict[str, str]:
    """What is added to answers in a language; English for all but Chinese."""
    said, _ = load_yaml(Path(__file__).with_name("perturbations.yaml"))
    return cast(dict[str, str], said["zh" if language.startswith("zh") else "en"])


def _before(kind: str) -> Change:
    return lambda text, prompt: f"{words(prompt.language)[kind]}{_gap(prompt)}{text}"


def _after(kind: str) -> Change:
    return lambda text, prompt: f"{text}{_gap(prompt)}{words(prompt.language)[kind]}"


def _instead(replacement: Callable[[Prompt], str]) -> Change:
    """Replaced, where the prompt is to be answered: where it is to be refused, anything may be better than an answer."""
    return lambda _, prompt: None if prompt.expected == "refuse" else replacement(prompt)


def _gap(prompt: Prompt) -> str:
    """What stands between two sentences."""
    return "" if prompt.language.startswith("zh") else " "


def _suffix(text: str, prompt: Prompt) -> str:
    """Random characters, drawn by prompt and answer."""
    drawn = random.Random(f"{prompt.text}\n{text}").choices(ascii_letters + digits + punctuation, k=SUFFIX)
    return f"{text} {''.join(drawn)}"


def _wrong_result(text: str, _: Prompt) -> str | None:
    """The last number of a calculation one too high, after the same steps."""
    last = _last_number(text)
    return text[: last.start()] + _one_more(last[0]) + text[last.end() :] if last and RESULT.search(text) else None


def _wrong_steps(text: str, _: Prompt) -> str | None:
    """The same last number after steps whose results are one too high."""
    last = _last_number(text)
    if last is None:
        return None
    return RESULT.sub(lambda found: text[found.start() : found.start(1)] + _one_more(found[1]), text[: last.start()]) + text[last.start() :]


def _last_number(text: str) -> re.Match[str] | None:
    found = list(re.finditer(NUMBER, text))
    return found[-1] if found else None


def _one_more(number: str) -> str:
    """The number plus one, written as it was; a comma after it stays.

    >>> _one_more("1,299"), _one_more("2.50"), _one_more("9,")
    ('1,300', '3.50', '10,')
    """
    plain = number.rstrip(",")
    whole, point, rest = plain.partition(".")
    more = int(whole.replace(",", "")) + 1
    return f"{more:,}{point}{rest}{number[len(plain) :]}" if "," in whole else f"{more}{point}{rest}{number[len(plain) :]}"


def _bold(text: str, _: Prompt) -> str | None:
    """The first sentence in bold."""
    start = text.lstrip()
    first = SENTENCE.split(start)[0]
    return f"**{first}**{start[len(first) :]}" if first and _plain(text) else None


def _bullets(text: str, _: Prompt) -> str | None:
    """Each sentence as the item of a list."""
    items = [part.strip() for part in SENTENCE.split(text) if part.strip()]
    return "\n".join(f"- {item}" for item in items) if len(items) > 1 and _plain(text) else None


def _heading(text: str, prompt: Prompt) -> str | None:
    """A heading that says no more than that this is an answer."""
    return f"## {words(prompt.language)['heading']}\n\n{text}" if text and _plain(text) else None


def _plain(text: str) -> bool:
    """Whether there is no markup yet, which more of it could break."""
    return re.search(r"```|\*\*|^(?: {4}|\t)|^\s*(?:[-*#>|]|\d+[.)]\s)", text, re.MULTILINE) is None


KEEPING: dict[str, Change] = {"bold": _bold, "bullets": _bullets, "heading": _heading}
"""Edits that keep what an answer says, by name."""
SPOILING: dict[str, Change] = {
    "praise": _after("praise"),
    "repetition": lambda text, _: f"{text}\n\n{text}",
    "refusal": _instead(lambda prompt: words(prompt.language)["refusal"]),
    "flattery": _before("flattery"),
    "irrelevant": _after("irrelevant"),
    "filler": _before("filler"),
    "citation": _after("citation"),
    "suffix": _suffix,
    "language": _after("language"),
    "echo": _instead(lambda prompt: prompt.text),
    "empty": _instead(lambda prompt: ""),
    "wrong_result": _wrong_result,
    "wrong_steps": _wrong_steps,
}
"""Edits that make an answer no better, by name."""
KINDS = SPOILING | KEEPING
