"""The ledger: one append-only log of what happened to data and models, in which every event holds the hash of the one before.

    {"v":1,"number":1,"time":"2026-11-21T20:15:00.000+00:00","kind":"train","body":{"base":"9f...","model":"c1..."},"previous":"00...","hash":"5a..."}

An event's hash is SHA-256 over a zero byte and the JSON of the event without its hash (keys sorted, no spaces, ASCII), which is the leaf
hash of RFC 6962; `root` is the Merkle tree hash of that standard over all events. `ledger.head` beside the log holds the number, hash
and byte count of the last event, replaced after each append.

What this proves: with the head as it was, no event before it was changed, removed, inserted, doubled or moved, down to the byte; with
`ledger.head` in place, none was cut off the end. What it cannot prove: whoever can rewrite both files can build another chain that
verifies. So heads are to be published or signed elsewhere (a commit, a time stamp, a colleague's mailbox) and given to `verify`.
Nor does it prove that what was logged is true.

Events hold ids, hashes, names and figures, never the text of a prompt or an answer. Keys that `trace` and `alias_at` follow: `model`
(fingerprint), `base` (fingerprint it was trained from), `data` (hashes), `run`, `alias`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from fiducial.core.errors import LedgerError, StorageError
from fiducial.core.records import SCHEMA, Event, Record
from fiducial.core.store import Lock, write_atomic, write_whole

ZEROS = "0" * 64
"""What the first event gives as the hash before it."""
LONGEST = 500
"""Characters in one string of a body. Reasons fit; prompts and answers belong in the run, with their hash here."""
LARGEST = 1 << 16
"""Bytes of one event, newline and all; what is longer is no beginning of one."""
REST = re.compile(rb'[0-9T:.+-]*("(,[ -~]*)?)?')
"""How an event goes on after `"time":"`, however short it was cut: it is ASCII throughout."""
TEXT_KEYS = frozenset({"prompt", "prompts", "messages", "response", "completion", "content", "text", "sent", "rationale"})
"""Keys under which only hashes may stand."""
HASH = re.compile(r"[0-9a-f]{16,64}")


class Head(Record):
    """The end of a ledger."""

    n: int = 0
    """Number of the last event."""
    hash: str = ZEROS
    size: int = 0
    """Bytes of the log up to and with that event."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What `Ledger.verify` found."""

    ok: bool
    n: int
    """Events that fit, counted from the first."""
    head: str
    """Hash of the last event that fits."""
    line: int = 0
    """First line that does not fit; 0 when there is none."""
    problem: str = ""
    """What is wrong there, in one sentence."""
    note: str = ""
    """What an interruption left, which the next append puts right."""

    def __str__(self) -> str:
        if self.ok:
            return f"{self.n} events verified, head {self.head}" + (f"; {self.note}" if self.note else "")
        return f"line {self.line}: {self.problem}" if self.line else self.problem


class Ledger:
    """The log at `path`. Several processes may append; each append waits for its turn and for the disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.head_path = self.path.with_suffix(".head")
        self._lock = Lock(self.path.with_suffix(".lock"))

    @property
    def head(self) -> Head:
        """The last event as the head file tells it; number 0 and zeros when there is none. Raises LedgerError when it is damaged or missing."""
        head, problem = self._head_in(self._head_bytes())
        if head is None:
            raise LedgerError(problem, hint="see: fiducial log verify")
        return head

    def append(self, kind: str, body: Mapping[str, Any], *, once: bool = False) -> Event:
        """Adds an event and returns it as soon as it is on the disk. With `once`, one of this kind and body that stands there already is returned instead:
        a run that was killed before it could note what it had entered enters it no second time.

        Kinds in use: data, train, evaluate, gate, promote, serve, rollback, run. Raises LedgerError when the end of the log does not fit
        its head, or when `body` holds text that does not belong here, and StorageError when the disk refuses.
        """
        plain = _plain(body)
        if not self._lock.take(wait=30.0):
            raise StorageError.passed(f"{self.path} is in use by process {self._lock.owner()}", hint="wait until it ends")
        try:
            self._lock.sign()
            head = self._recovered()
            if once and (known := self._known(kind, plain)) is not None:
                return known
            event = _event(head.n + 1, datetime.now(UTC).isoformat(timespec="milliseconds"), kind, plain, head.hash)
            line = _line(event)
            if len(line) > LARGEST:
                raise LedgerError(f"this event has {len(line)} bytes, more than {LARGEST}", hint="keep it in the run and give its hash here")
            self._write(line)
            self._move(Head(n=event.number, hash=event.hash, size=head.size + len(line)))
            return event
        except OSError as error:
            raise StorageError.from_os(error, self.path) from error
        finally:
            self._lock.release()

    def _known(self, kind: str, body: dict[str, Any]) -> Event | None:
        mark = json.dumps(body.get("run", "")).encode()
        for line in reversed(self._bytes().split(b"\n")):
            if mark not in line:
                continue
            try:
                event = _parsed(line)
            except ValueError:  # a damaged line, which is for `verify` to find
                continue
            if (event.kind, event.body) == (kind, body) and not _problem(line, event.number, event.previous):
                return event
        return None

    def events(self) -> list[Event]:
        """Every event, in order. Raises LedgerError at the first that does not verify."""
        result = self.verify()
        if not result.ok:
            raise LedgerError(f"{self.path}: {result}", hint="events before that line still hold; restore the rest from a copy")
        return [_parsed(line) for line in self._bytes().split(b"\n")[: result.n]]

    def verify(self, published: Mapping[int, str] | None = None) -> Verification:
        """Checks every byte of the log and its head file, and `published` hashes by event number. Changes nothing."""
        data, head = self._snapshot()
        *lines, tail = data.split(b"\n")
        previous, n, problem = ZEROS, 0, ""
        hashes = []
        for line in lines:
            problem = _problem(line, n + 1, previous) or self._unpublished(line, n + 1, published)
            if problem:
                return Verification(False, n, previous, n + 1, problem)
            n, previous = n + 1, _parsed(line).hash
            hashes.append(previous)
        return self._against_head(lines, tail, hashes, head, published or {})

    def root(self) -> str:
        """Merkle tree hash of RFC 6962 over all events: a summary in which single events can be proved present."""
        return merkle_root([event.hash for event in self.events()])

    def trace(self, model: str) -> list[Event]:
        """Every event about a model, about the models it was trained from, and about the data they saw.

        `model` is a fingerprint, or at least its first eight digits.
        """
        events, models = self.events(), {model}
        while True:
            mine = [e for e in events if any(_same(m, wanted) for m in _strings(e.body.get("model")) for wanted in models)]
            bases = {base for e in mine for base in _strings(e.body.get("base"))}
            if bases <= models:
                break
            models |= bases
        numbers = {e.number for e in mine}
        data = {d for e in mine for d in _strings(e.body.get("data"))}
        return [e for e in events if e.number in numbers or (e.kind == "data" and data & set(_strings(e.body.get("data"))))]

    def alias_at(self, alias: str, when: datetime | None = None) -> Event | None:
        """The event that decided what `alias` meant at `when` (now if None): the last promotion or rollback before it."""
        moment = when or datetime.now(UTC)
        events = [e for e in self.events() if e.kind in ("promote", "rollback") and e.body.get("alias") == alias]
        return next((e for e in reversed(events) if datetime.fromisoformat(e.time) <= moment), None)

    def _against_head(self, lines: list[bytes], tail: bytes, hashes: list[str], raw: bytes | None, published: Mapping[int, str]) -> Verification:
        n, last = len(hashes), hashes[-1] if hashes else ZEROS
        head, problem = self._head_in(raw)
        size = sum(len(line) + 1 for line in lines)
        beyond = [number for number in published if number > n]
        if head is None:
            return Verification(False, n, last, 0, problem)
        if head.n > n:
            what = "is torn, though it was completed once" if tail else f"and after: {head.n - n} event(s) are missing from the end"
            return Verification(False, n, last, n + 1, f"event {n + 1} {what}")
        if beyond:
            return Verification(False, n, last, n + 1, f"event {max(beyond)} was published, but the log ends before it")
        if n > head.n + 1:
            return Verification(False, n, last, head.n + 2, f"the head file stands at event {head.n}, but {n} events follow one another here")
        known = hashes[head.n - 1] if head.n else ZEROS
        if head.hash != known or head.size != size - (len(lines[-1]) + 1 if n > head.n else 0):
            return Verification(False, n, last, head.n, f"the head file has another hash or length for event {head.n}")
        if tail and (n > head.n or not _torn(tail, n + 1)):
            return Verification(False, n, last, n + 1, "bytes were added after the last event")
        torn = f"the last line was never completed: {len(tail)} bytes, which the next append removes" if tail else ""
        note = "the program was stopped before the head file was replaced" if n > head.n else torn
        return Verification(True, n, last, note=note)

    def _unpublished(self, line: bytes, number: int, published: Mapping[int, str] | None) -> str:
        if not published or number not in published or _parsed(line).hash == published[number]:
            return ""
        return f"event {number} is not the one that was published"

    def _recovered(self) -> Head:
        """The head to append to, after putting right what an interrupted append left. Looks at the end of the log only."""
        head = self.head
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == head.size:
            if not size:
                self._move(head)  # before the first event, so that a ledger without its head file is always one that lost it
            return head
        if size < head.size:
            raise LedgerError(f"{self.path} is {head.size - size} bytes shorter than it was", hint="see: fiducial log verify")
        with open(self.path, "rb") as file:
            file.seek(head.size)
            extra = file.read()
        if extra.count(b"\n") == 1 and extra.endswith(b"\n") and not _problem(extra[:-1], head.n + 1, head.hash):
            moved = Head(n=head.n + 1, hash=_parsed(extra[:-1]).hash, size=size)
            self._move(moved)
            return moved
        if not _torn(extra, head.n + 1):
            raise LedgerError(f"{self.path}: bytes were added after event {head.n}", hint="see: fiducial log verify")
        os.truncate(self.path, head.size)
        return head

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            write_whole(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _move(self, head: Head) -> None:
        write_atomic(self.head_path, _head_line(head))

    def _snapshot(self) -> tuple[bytes, bytes | None]:
        """Log and head file as they stood together. When another process appends in between, both as they were before."""
        before, data, after = self._head_bytes(), self._bytes(), self._head_bytes()
        if before == after:
            return data, after
        if before is None:
            return self._snapshot()  # the first event came just now
        head, _ = self._head_in(before)
        return (data if head is None else data[: head.size]), before

    def _head_in(self, text: bytes | None) -> tuple[Head | None, str]:
        """The head in the bytes of its file, or None and why there is none. An empty ledger needs no file."""
        if text is None:
            if self.path.exists() and self.path.stat().st_size:
                return None, f"{self.head_path} is missing, so it cannot be told whether events were cut off the end"
            return Head(), ""
        try:
            head = Head.parse(text.decode())
            if _head_line(head).encode() == text:
                return head, ""
        except (ValueError, AttributeError, TypeError):
            pass
        return None, f"{self.head_path} was changed: it is not the head of a ledger"

    def _head_bytes(self) -> bytes | None:
        try:
            return self.head_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self.head_path} cannot be read: {error.strerror}", hint="check that you may read it") from error

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}", hint="check that you may read it") from error


def merkle_root(hashes: list[str]) -> str:
    """Merkle tree hash of RFC 6962, section 2.1, over leaf hashes in hexadecimal."""
    if not hashes:
        return hashlib.sha256(b"").hexdigest()
    if len(hashes) == 1:
        return hashes[0]
    half = 1 << (len(hashes) - 1).bit_length() - 1  # the largest power of two below their number
    return hashlib.sha256(b"\x01" + bytes.fromhex(merkle_root(hashes[:half])) + bytes.fromhex(merkle_root(hashes[half:]))).hexdigest()


def _event(number: int, time: str, kind: str, body: dict[str, Any], previous: str) -> Event:
    content = {"v": SCHEMA, "number": number, "time": time, "kind": kind, "body": body, "previous": previous}
    return Event(number=number, time=time, kind=kind, body=body, previous=previous, hash=hashlib.sha256(b"\x00" + _canonical(content).encode()).hexdigest())


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _line(event: Event) -> bytes:
    """The one way in which an event may stand in the file, newline and all."""
    content = {"v": SCHEMA, "number": event.number, "time": event.time, "kind": event.kind, "body": json.loads(_canonical(event.body))}
    return (json.dumps(content | {"previous": event.previous, "hash": event.hash}, separators=(",", ":")) + "\n").encode()


def _head_line(head: Head) -> str:
    return json.dumps({"v": SCHEMA, "n": head.n, "hash": head.hash, "size": head.size}) + "\n"


def _parsed(line: bytes) -> Event:
    return Event.parse(line.decode())


def _problem(line: bytes, number: int, previous: str) -> str:
    """Why `line` cannot be event `number` after the hash `previous`; empty when it is."""
    try:
        event = _parsed(line)
        right = _event(event.number, event.time, event.kind, event.body, event.previous)
        same = _line(event) == line + b"\n"
    except ValidationError as error:
        return f"not an event: {error.errors(include_url=False)[0]['msg']}"
    except (ValueError, AttributeError, TypeError, RecursionError):
        return "not an event: the line cannot be read"
    if right.hash != event.hash:
        return f"event {event.number} was changed: its hash does not fit its content"
    if not same:
        return f"event {event.number} was changed: it is not written as this program writes"
    if event.number != number:
        return f"event {number} belongs here, but event {event.number} stands here"
    if event.previous != previous:
        return f"event {number} does not follow the event before it"
    return ""


def _torn(tail: bytes, number: int) -> bool:
    """Whether `tail` can be the beginning of event `number`, as a kill in the middle of a write leaves it."""
    start = f'{{"v":{SCHEMA},"number":{number},"time":"'.encode()
    if start.startswith(tail):
        return True
    return len(tail) < LARGEST and tail.startswith(start) and REST.fullmatch(tail, len(start)) is not None


def _plain(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` as JSON values. Raises LedgerError for text that does not belong in a ledger."""
    try:
        plain: dict[str, Any] = to_jsonable_python(dict(body), inf_nan_mode="null")
    except PydanticSerializationError as error:
        raise LedgerError(f"an event cannot hold this: {error}", hint="give ids, hashes, names and figures") from error
    for key, text in _texts(plain, ""):
        if len(text) > LONGEST or (key in TEXT_KEYS and not HASH.fullmatch(text)):
            raise LedgerError(f"'{key}' of an event is a text of {len(text)} characters", hint="keep the text in the run and give its hash here")
    return plain


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(name, "key")
            yield from _texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def _strings(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _same(fingerprint: str, wanted: str) -> bool:
    return fingerprint == wanted or (len(wanted) >= 8 and fingerprint.startswith(wanted))
