"""Principles with exemplars: the prompt made of them, how an answer under them is read, and what makes an answer unusable.

A file holds them per language (`en`, `zh`), with the keys of `Texts`; the shipped one is exemplars.yaml.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fiducial.core.config import load_yaml
from fiducial.core.errors import DataError
from fiducial.core.records import Conversation, Message, Record
from fiducial.data.languages import language_of, tongue
from fiducial.data.overlap import ngrams, rouge_l, words

SHIPPED = Path(__file__).with_name("exemplars.yaml")
SIMILAR = 0.7
"""ROUGE-L from which a request is another one over again."""
LEAK = {"en": 5, "zh": 8}
"""Words in a row from an exemplar that betray it; Chinese characters count as words."""
SHORTEST = {"en": 160, "zh": 60}
"""Characters that an answer must have when it was cut at a turn that the model invented."""
CLAUSE = 5
"""Words of a clause that an answer may not say twice."""


class Exemplar(Record):
    """A request, what is to be thought of it, and its answer."""

    user: str
    thoughts: str = ""
    answer: str
    names: tuple[str, ...] = ()
    """Names and words of its topic that betray it in the answer to another request, however short they are."""


class Texts(Record):
    """The texts of one language."""

    language: str
    assistant: str
    """What the assistant is called; fills {assistant} in the other texts."""
    opening: str
    """Sentence with which every thought begins."""
    thoughts: str
    """Mark before the thoughts."""
    answer: str
    """Mark before the answer."""
    user: str
    """How a turn of the user begins when a model writes one itself."""
    intro: str
    form: str
    principles: tuple[str, ...]
    exemplars: tuple[Exemplar, ...]
    identity_set: tuple[Exemplar, ...]
    """Questions about who the assistant is, with answers."""
    kinds: tuple[str, ...]
    """Kinds of request, for proposing new ones."""
    topics: tuple[str, ...]
    propose: str
    """Asks for topics, with {kind}, {topics} and {count}."""
    instruct: str
    """Asks for requests, with {kind}, {topic}, {seeds} and {count}."""
    verbose: str

    def named(self, text: str) -> str:
        """`text` with the assistant's name in it."""
        return text.replace("{assistant}", self.assistant)

    def principled(self, request: str, begun: str = "") -> Conversation:
        """Principles, exemplars and the request; `begun` is how the answer begins."""
        rules = "\n".join(f"{i}. {text}" for i, text in enumerate(self.principles, 1))
        turns = [Message(role="system", content=f"{self.named(self.intro)}\n{rules}\n{self.form}")]
        for e in self.exemplars:
            shown = f"{self.thoughts} {self.named(self.opening)} {e.thoughts}\n{self.answer} {e.answer}"
            turns += [Message(role="user", content=e.user), Message(role="assistant", content=shown)]
        turns.append(Message(role="user", content=request))
        return (*turns, Message(role="assistant", content=begun)) if begun else tuple(turns)

    def read(self, text: str) -> tuple[str, str, str]:
        """(thoughts, answer, why it cannot be used) of what a model wrote under the principles."""
        body = re.sub(rf"^\s*{_mark(self.thoughts)}\s*", "", text)
        thought, *rest = re.split(_mark(self.answer), body, maxsplit=1)
        thought = thought.strip()
        if not thought.startswith(self.named(self.opening)):
            return thought, "", "no identification"
        if not any(1 <= int(n) <= len(self.principles) for n in re.findall(r"\d{1,4}", thought)):
            return thought, "", "no principle named"
        if not rest:
            return thought, "", "no answer after the thoughts"
        further = re.search(rf"\n\s*(?:{re.escape(self.user)}|{_mark(self.thoughts)}|{_mark(self.answer)})", rest[0])
        answer = rest[0][: further.start()].strip() if further else rest[0].strip()
        if further and len(answer) < SHORTEST[tongue(self.language)]:
            return thought, answer, "cut short at a further turn"
        spoken = re.search(r"\bprinciples? \d|原则\s?\d", answer, re.IGNORECASE)
        return thought, answer, "speaks of the principles" if spoken else ""

    @cached_property
    def blacklist(self) -> frozenset[tuple[str, ...]]:
        """Runs of words that only one exemplar has, and its names; what several share is style."""
        counts = Counter(run for e in self.exemplars for run in ngrams(words(f"{e.user} {e.answer}"), LEAK[tongue(self.language)]))
        return frozenset(run for run, n in counts.items() if n == 1) | {tuple(words(name)) for e in self.exemplars for name in e.names}

    def fault(self, request: str, answer: str) -> str:
        """Why an answer is not taught, whatever it was written under; empty when it is."""
        spoken = words(answer)
        if not spoken:
            return "empty"
        clauses = Counter(tuple(words(c)) for c in re.split(r"[.!?;,\n。！？；，]", answer))
        if any(n > 1 and len(clause) >= CLAUSE for clause, n in clauses.items()):
            return "repeats itself"
        if len(request) > 16 and request.casefold() in answer.casefold():
            return "repeats the request"
        lengths = {len(run) for run in self.blacklist}
        asked, said = ({run for n in lengths for run in ngrams(w, n)} for w in (words(request), spoken))
        leaked = sorted(" ".join(run) for run in (self.blacklist & said) - asked)
        return f"words of an exemplar: {leaked[0]}" if leaked else ""

    def unusable(self, line: str, known: list[list[str]]) -> str:
        """Why a proposed request is not taken, given the words of those there are; empty when it is."""
        found = words(line)
        if not 3 <= len(found) <= 80:
            return "too short" if len(found) < 3 else "too long"
        if tongue(language_of(line)) != tongue(self.language):
            return "other language"
        return "like another request" if any(rouge_l(found, other) >= SIMILAR for other in known) else ""


def read_texts(path: str, language: str, assistant: str = "") -> Texts:
    """The texts of `language` in the file, or the shipped ones; `assistant` replaces the name in them. Raises DataError, ConfigError."""
    file = Path(path) if path else SHIPPED
    data, marks = load_yaml(file)
    found: Any = data.get(language) if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise DataError(f"{file}: there are no texts for '{language}'", hint=f"add them under '{language}:', with the keys of the shipped file")
    try:
        return Texts.model_validate({**found, "language": language, "assistant": assistant or found.get("assistant")})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = (language, *first["loc"])
        where = next((marks[key[:n]] for n in range(len(key), 0, -1) if key[:n] in marks), str(file))
        raise DataError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint="see the keys of the shipped file") from error


def _mark(text: str) -> str:
    """A pattern for a mark, with round brackets of either width."""
    return re.sub(r"\\\(|（", "[(（]", re.sub(r"\\\)|）", "[)）]", re.escape(text)))
