"""Taxonomies of skills: tasks with their points, and what cases of the checked ones are made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from fiducial.core.errors import DataError
from fiducial.data.checks import Kind

SHIPPED = Path(__file__).with_name("weakness_taxonomy.json")


@dataclass(frozen=True, slots=True)
class Point:
    """One skill of a task."""

    task: str
    category: str
    name: str
    check: Kind | None = None
    """How answers are checked; None where a model must assess them."""

    @property
    def label(self) -> str:
        """Task and skill."""
        return f"{self.task}/{self.name}"


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """Tasks with their points, and what cases are made of."""

    tasks: dict[str, list[Point]]
    requests: dict[str, list[str]]
    words: dict[str, list[str]]
    endings: dict[str, list[str]]


def read_taxonomy(path: str = "") -> Taxonomy:
    """The taxonomy in a JSON file, the shipped one without a path. Requests and words that it lacks are the shipped ones. Raises DataError."""
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    file, data = SHIPPED, shipped
    if path:
        file = Path(path)
        try:
            data = json.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}", hint="check the path") from error
        except ValueError as error:
            raise DataError(f"{file}: not JSON: {error}", hint="one JSON object with a list 'tasks'") from error
    shape = 'a task is {"task": "...", "categories": {"...": ["point", {"point": "...", "check": "sum"}]}}'
    try:
        tasks = {str(t["task"]): [_point(str(t["task"]), str(c), p, file) for c, points in t["categories"].items() for p in points] for t in data["tasks"]}
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file}: the list 'tasks' cannot be read: {type(error).__name__} {error}", hint=shape) from error
    if not tasks or not all(tasks.values()):
        raise DataError(f"{file}: a task has no points", hint=shape)
    return Taxonomy(tasks, **{name: shipped[name] | data.get(name, {}) for name in ("requests", "words", "endings")})


def _point(task: str, category: str, value: Any, file: Path) -> Point:
    if isinstance(value, str):
        return Point(task, category, value)
    check = value.get("check")
    if check not in get_args(Kind):
        raise DataError(f"{file}: {task}, {category}: there is no check '{check}'", hint=f"checks are {', '.join(get_args(Kind))}")
    return Point(task, category, str(value["point"]), cast(Kind, check))
