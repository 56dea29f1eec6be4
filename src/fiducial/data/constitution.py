"""Constitutions: principles by which a model criticises, revises and compares answers, and examples of how that is done.

    principles:
    - {id: honest, title: Be honest, critique: Find what is not true., revision: Say what is true., compare: Which answer is more honest?}

A YAML file. Each text is in one language, or given per language as {en: ..., zh: ...}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import ValidationError, field_validator, model_validator

from fiducial.core.config import Marks, load_yaml
from fiducial.core.errors import DataError
from fiducial.core.records import Conversation, Record
from fiducial.data.languages import nearest
from fiducial.data.load import SHIPPED

R = TypeVar("R", bound=Record)


class Principle(Record):
    """One rule of a constitution. Each text is given per language: {"en": ..., "zh": ...}."""

    name: str
    title: dict[str, str]
    critique: dict[str, str]
    """Asks a model to find where its answer breaks the rule."""
    revision: dict[str, str]
    """Asks a model to mend its answer."""
    compare: dict[str, str]
    """Asks which of two answers keeps the rule better."""

    @field_validator("title", "critique", "revision", "compare", mode="before")
    @classmethod
    def _one_language(cls, value: Any) -> Any:
        return {"en": value} if isinstance(value, str) else value

    @field_validator("title", "critique", "revision", "compare")
    @classmethod
    def _not_empty(cls, value: dict[str, str]) -> dict[str, str]:
        if not value or not all(text.strip() for text in value.values()):
            raise ValueError("a text is empty")
        return value

    def wording(self, part: Literal["title", "critique", "revision", "compare"], language: str = "en") -> str:
        """The text of one part in `language` or, where there is none, in the language that it is a kind of, in English, in the first one given."""
        texts: dict[str, str] = getattr(self, part)
        return texts[nearest(texts, language)]


class Example(Record):
    """A critique and a revision that show how it is done. Each part is given per language, and all in the same ones."""

    principle: str
    """The one whose requests stand before the critique and the revision."""
    conversation: dict[str, Conversation]
    """Turns of user and assistant; the last is the answer that is criticised."""
    critique: dict[str, str]
    revision: dict[str, str]

    @field_validator("conversation", "critique", "revision", mode="before")
    @classmethod
    def _one_language(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"en": value}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.conversation or not self.conversation.keys() == self.critique.keys() == self.revision.keys():
            raise ValueError("conversation, critique and revision are not given in the same languages")
        for language, turns in self.conversation.items():
            if len(turns) % 2 or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
                raise ValueError("the turns of a conversation are of user and assistant by turns, the last of the assistant")
            if not all(text.strip() for text in (*(t.content for t in turns), self.critique[language], self.revision[language])):
                raise ValueError("a text is empty")
        return self


def constitution(path: str | Path | None = None) -> list[Principle]:
    """The principles in a YAML file with a list `principles`; the shipped ones when `path` is None. Raises DataError or ConfigError."""
    file, data, marks = _law(path)
    rows = data.get("principles") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{file}: there is no list 'principles'", hint="each item needs id, title, critique, revision and compare")
    needs = "a principle needs id, title, critique, revision and compare"
    return [_item(Principle, row, marks[("principles", index)], needs) for index, row in enumerate(rows)]


def examples(path: str | Path | None = None) -> list[Example]:
    """The list `examples` of the same file, of critiques and revisions; empty where there is none. Raises DataError or ConfigError."""
    file, data, marks = _law(path)
    rows = data.get("examples", []) if isinstance(data, dict) else []
    needs = "an example needs principle, conversation, critique and revision"
    if not isinstance(rows, list):
        raise DataError(f"{file}: examples must be a list, this is {str(rows)[:60]!r}", hint=needs)
    found = [_item(Example, row, marks[("examples", index)], needs) for index, row in enumerate(rows)]
    known = {principle.name for principle in constitution(path)} if found else set()
    for index, example in enumerate(found):
        if example.principle not in known:
            raise DataError(f"{marks[('examples', index)]}: there is no principle '{example.principle}'", hint="name one by its id")
    return found


def _law(path: str | Path | None) -> tuple[Path, Any, Marks]:
    file = SHIPPED / "constitution.yaml" if path is None else Path(path)
    return file, *load_yaml(file)


def _item(kind: type[R], row: Any, where: str, needs: str) -> R:
    """One row of a constitution as a record."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: {needs.partition(' needs')[0]} is a mapping, this is {row!r}", hint=needs)
    try:
        return kind.model_validate({"name" if key == "id" else key: value for key, value in row.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"{'id' if key == 'name' else key}: " for key in first["loc"][:1])
        raise DataError(f"{where}: {place}{first['msg']}", hint=needs) from error
