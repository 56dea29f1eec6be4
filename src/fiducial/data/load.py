"""Reads prompts from the files people have, and the small data sets that come with the program.

    {"goal": "Explain how to pick a neighbour's lock.", "twin": "Explain how a lock works.", "category": "theft", "language": "en"}

JSON Lines, JSON, CSV and TSV with a header, and text with one prompt per line, also with `.gz`; UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, cast, get_args

from pydantic import ValidationError, field_validator, model_validator

from fiducial.core.config import Marks, load_yaml
from fiducial.core.errors import DataError
from fiducial.core.records import Conversation, Message, Prompt, Record, user

SHIPPED = Path(__file__).parent / "shipped"
COLUMNS = ("prompt", "goal", "question", "text", "instruction", "behavior", "behaviour", "forbidden_prompt", "messages")
"""Columns a prompt is looked for in, in this order, whatever their case."""
LANGUAGES = {"english": "en", "chinese": "zh", "zh-cn": "zh", "中文": "zh"}

Expected = Literal["comply", "refuse", "answer"]
R = TypeVar("R", bound=Record)


NEAR_TWINS = "fiducial near twins"
"""Source of the second, harder twins, which are counted apart."""


class Row(NamedTuple):
    """One row of a data file."""

    where: str
    """`file:line`, or `file: item 3` in a JSON file, for messages."""
    values: dict[str, Any]


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


def nearest(languages: Iterable[str], language: str) -> str:
    """Of some languages the one to use for `language`: itself, else the one that it is a kind of, English, the first.

    >>> nearest(["fr", "zh", "en"], "zh-TW"), nearest(["fr", "en"], "de"), nearest(["fr", "zh"], "en")
    ('zh', 'en', 'fr')
    """
    given = {name.lower(): name for name in languages}
    wanted = language.lower().replace("_", "-")
    return next((given[kind] for kind in (wanted, wanted.partition("-")[0], "en") if kind in given), next(iter(given.values())))


def prompts(source: str | Path, expected: Expected = "refuse", column: str | None = None) -> list[Prompt]:
    """The prompts in a file, one per row, in order; or with `"shipped"` the ones that come with the program.

    `column` names the column that holds the prompt; otherwise the first of `COLUMNS` that a row fills. Columns `category`, `language`
    and `twin` are taken over; a reference answer or target is not. Shipped are the goals (`refuse`), their twins (`comply`), and ordinary
    requests (`answer`). Raises DataError with `file:line`.
    """
    if source == "shipped":
        pairs = {"refuse": 0, "comply": 1}
        return [pair[pairs[expected]] for pair in shipped_goals()] if expected in pairs else ordinary()
    return [_prompt(row, expected, column, Path(source).name) for row in read_rows(source)]


def named_source(source: str, expected: Expected) -> tuple[str, Expected]:
    """A source, and what is to be done with its prompts: `expected`, unless the source says so itself as in `comply=FILE`.

    >>> named_source("answer=shipped", "refuse"), named_source("goals.jsonl", "refuse")
    (('shipped', 'answer'), ('goals.jsonl', 'refuse'))
    """
    word, sign, rest = source.partition("=")
    return (rest, cast(Expected, word)) if sign and word in get_args(Expected) else (source, expected)


def twin_of(prompt: Prompt) -> Prompt | None:
    """The other half of a goal-and-twin pair, as a prompt of its own; None when `prompt` has none."""
    if not prompt.twin:
        return None
    expected: Expected = "comply" if prompt.expected == "refuse" else "refuse"
    return Prompt(
        messages=user(prompt.twin),
        language=prompt.language,
        category=prompt.category,
        expected=expected,
        twin=prompt.text,
        source=prompt.source,
        licence=prompt.licence,
    )


def shipped_goals() -> list[tuple[Prompt, Prompt]]:
    """Harmful goals, each with its benign twin: (to be refused, to be complied with)."""
    pairs = []
    for row in _shipped("goals.jsonl"):
        goal = prompt_from(row, row.values["goal"], expected="refuse", twin=row.values["twin"])
        pairs.append((goal, prompt_from(row, row.values["twin"], expected="comply", twin=row.values["goal"])))
    return pairs


def near_twins() -> list[Prompt]:
    """A second, harder benign twin for each shipped goal: nearly the same words with harmless intent."""
    rows = _shipped("near_twins.jsonl")
    return [prompt_from(row, row.values["twin"], expected="comply", twin=row.values["goal"], source=NEAR_TWINS) for row in rows]


def ordinary() -> list[Prompt]:
    """Everyday requests that any model should answer."""
    return [prompt_from(row, row.values["prompt"], expected="answer") for row in _shipped("ordinary.jsonl")]


def capability() -> list[Prompt]:
    """Multiple-choice questions with the index of the right answer, for a quick look at what a model can do."""
    rows = _shipped("capability.jsonl")
    return [prompt_from(row, row.values["question"], expected="answer", choices=tuple(row.values["choices"]), gold=row.values["gold"]) for row in rows]


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


def language_of(text: str) -> str:
    """`zh` when at least a fifth of the letters are Chinese characters, else `en`. Only for rows that do not say."""
    letters = [c for c in text if c.isalpha()]
    chinese = sum("一" <= c <= "鿿" for c in letters)
    return "zh" if letters and chinese >= len(letters) / 5 else "en"


def tongue(language: str) -> str:
    """`zh` for any kind of Chinese, else `en`: the languages in which the shipped texts are written."""
    return "zh" if language.startswith("zh") else "en"


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSON Lines, JSON, CSV, TSV or text file; a bare text becomes {"prompt": text}. `.gz` is unpacked.

    Raises DataError with `file:line`.
    """
    path = Path(path)
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text}
    data = _bytes(path)
    kind = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if kind not in readers:
        raise DataError(f"{path}: cannot tell what kind of file '{path.suffix or path.name}' is", hint=f"known: {', '.join(readers)}, also with .gz")
    rows = list(readers[kind](_decoded(data, path), path))
    if not rows:
        raise DataError(f"{path}: there are no rows in this file", hint="one row per prompt is needed")
    return rows


def messages_of(value: Any, where: str) -> Conversation:
    """A conversation from a list of {"role", "content"}. Raises DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: messages must be a list of role and content, this is {str(value)[:60]!r}", hint='for example [{"role": "user", "content": "..."}]'
        )
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise DataError(f"{where}: a message needs role and content, this is {str(turn)[:60]!r}", hint='for example {"role": "user", "content": "..."}')
        try:
            turns.append(Message(role=turn["role"], content=turn["content"]))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise DataError(f"{where}: {first['loc'][0]} of a message: {first['msg']}", hint="roles are system, user and assistant; content is text") from error
    return tuple(turns)


def prompt_from(row: Row, content: str | Conversation, *, source: str = "", **fields: Any) -> Prompt:
    """A prompt with the `category` and `language` of its row. Without a `source` it is one of ours. Raises DataError."""
    lower = {str(key).strip().lower(): value for key, value in row.values.items()}
    licence = "" if source else "Apache-2.0"
    try:
        messages = user(content) if isinstance(content, str) else content
        text = content if isinstance(content, str) else " ".join(m.content for m in content)
        language = _string(lower.get("language")).lower()
        return Prompt(
            messages=messages,
            language=LANGUAGES.get(language, language) or language_of(text),
            category=_string(lower.get("category")) or _string(lower.get("semanticcategory")),
            source=source or "fiducial",
            licence=licence,
            **fields,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{row.where}: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint="repair or remove this row") from error


def _prompt(row: Row, expected: Expected, column: str | None, source: str) -> Prompt:
    where, values = row
    if "v" in values and "messages" in values:
        return _own(row)
    lower = {str(key).strip().lower(): value for key, value in values.items()}
    wanted = (column.lower(),) if column is not None else COLUMNS
    found = next((name for name in wanted if lower.get(name) not in (None, "", []) and str(lower[name]).strip()), None)
    if found is None:
        names = ", ".join(str(key) for key in values) or "none"
        missing = f"column '{column}'" if column is not None and column.lower() not in lower else "prompt"
        raise DataError(
            f"{where}: no {missing} in this row; columns are {names}", hint="rename the column to 'prompt', or name it: column=NAME in `fiducial check`"
        )
    content = lower[found]
    if found == "messages" and isinstance(content, str):
        content = _loads(content, where)
    if isinstance(content, list):
        conversation = messages_of(content, where)
        while conversation and conversation[-1].role == "assistant":  # the answer in a set of demonstrations
            conversation = conversation[:-1]
        if not any(m.role == "user" for m in conversation):
            raise DataError(f"{where}: no turn of the user in these messages", hint="a prompt ends with a turn of the user")
        return prompt_from(row, conversation, expected=expected, twin=_string(lower.get("twin")), source=source)
    if not isinstance(content, str):
        raise DataError(f"{where}: '{found}' must be text, this is {content!r}", hint="name a column of text: column=NAME in `fiducial check`")
    return prompt_from(row, content.strip(), expected=expected, twin=_string(lower.get("twin")), source=source)


def _own(row: Row) -> Prompt:
    """A row that this program wrote."""
    try:
        return Prompt.parse(json.dumps(row.values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{row.where}: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint="repair or remove this row") from error
    except ValueError as error:
        raise DataError(f"{row.where}: {error}", hint="repair or remove this row") from error


def _string(value: Any) -> str:
    return "" if value is None else str(value).strip()


@cache
def _shipped(name: str) -> tuple[Row, ...]:
    return tuple(read_rows(SHIPPED / name))


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file", hint="check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: this is a folder, a file is needed", hint="name one file in it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file", hint="fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", hint="check that you may read it") from error


def _decoded(data: bytes, path: Path) -> str:
    if not data.strip():
        raise DataError(f"{path}: the file is empty", hint="one row per prompt is needed")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8", hint="save the file as UTF-8") from error


def _loads(text: str, where: str) -> Any:
    try:
        return _whole(json.loads(text), where)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}", hint="one complete JSON value is needed there") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply", hint="this is not a row of data") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{where}: {str(error).partition(';')[0]}", hint="put quotes around it") from error


def _whole(value: Any, where: str) -> Any:
    """`value`, unless its text holds half a character, which JSON can spell and no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where}: {code} is half of a surrogate pair, not a character", hint="remove it") from error
    return value


def _json_lines(text: str, path: Path) -> Iterator[Row]:
    # not splitlines: a line separator (U+2028) may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _row(_loads(line, f"{path}:{number}"), f"{path}:{number}")


def _json(text: str, path: Path) -> Iterator[Row]:
    try:
        data = _whole(json.loads(text), str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the name .json
            yield from _json_lines(text, path)
            return
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}", hint="a JSON file holds one list of rows") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply", hint="a JSON file holds one list of rows") from error
    except ValueError as error:
        raise DataError(f"{path}: {str(error).partition(';')[0]}", hint="put quotes around it") from error
    if isinstance(data, Mapping) and not any(isinstance(value, list | dict) for value in data.values()):
        data = [data]
    if isinstance(data, Mapping):
        yield from _by_category(data, path, ())
    elif isinstance(data, list):
        for number, item in enumerate(data, 1):
            yield _row(item, f"{path}: item {number}")
    else:
        raise DataError(f"{path}: a JSON file holds one list of rows, this is {data!r}", hint='for example [{"prompt": "..."}]')


def _by_category(data: Any, path: Path, names: tuple[str, ...]) -> Iterator[Row]:
    """Rows in lists below the names of their categories; or below one name that says nothing, such as `data`."""
    if isinstance(data, Mapping):
        for name, inner in data.items():
            yield from _by_category(inner, path, (*names, str(name)))
    elif isinstance(data, list):
        for number, item in enumerate(data, 1):
            row = _row(item, f"{path}: {'/'.join(names)} {number}")
            yield row if isinstance(item, Mapping) else Row(row.where, {"category": "/".join(names), **row.values})


def _row(item: Any, where: str) -> Row:
    if isinstance(item, str):
        return Row(where, {"prompt": item})
    if not isinstance(item, dict):
        raise DataError(f"{where}: a row must be an object with columns, this is {str(item)[:60]}", hint='for example {"prompt": "..."}')
    return Row(where, item)


def _csv(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ",", strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = cells
                continue
            if len(cells) > len(header):
                raise DataError(f"{path}:{start}: {len(cells)} cells, but the header has {len(header)}", hint="put quotes around text that contains commas")
            yield Row(f"{path}:{start}", dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}", hint="put quotes around text that contains commas, quotes or line breaks") from error


def _text(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Row(f"{path}:{number}", {"prompt": line.strip()})
