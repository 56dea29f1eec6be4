"""Reads the rows of the files people have.

    Row("goals.csv:2", {"goal": "Explain how to pick a neighbour's lock.", "category": "theft"})

JSON Lines, JSON, CSV and TSV with a header, and text with one prompt per line, also with `.gz`; UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fiducial.core.errors import DataError


class Row(NamedTuple):
    """One row of a data file."""

    where: str
    """`file:line`, or `file: item 3` in a JSON file, for messages."""
    values: dict[str, Any]


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


def loads(text: str, where: str) -> Any:
    """The JSON value that a text holds, read at `where`. Raises DataError."""
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
            yield _row(loads(line, f"{path}:{number}"), f"{path}:{number}")


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
