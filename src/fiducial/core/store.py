"""Files that survive being interrupted: record lines that are only ever appended, files that are replaced whole, and locks.

A process can be killed, and a disk can be full, between any two bytes. Each record is one write call, so that at most the last
line can be torn; a file that is replaced is either the old one or the new one, never half of each. POSIX only (`flock`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic, Self, TypeVar

from pydantic import ValidationError

from fiducial.core.errors import DataError, StorageError
from fiducial.core.records import Record

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


class Lines(Generic[R]):
    """Records of one type in a JSON Lines file, in the order in which they came. Appending is safe from several threads.

    One torn last line, as a kill leaves it, is passed over with a warning and cut off before the next append.
    """

    def __init__(self, path: str | Path, record: type[R]) -> None:
        self.path = Path(path)
        self.record = record
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def append(self, record: R) -> None:
        """Adds one record in a single write. Raises StorageError when the disk refuses, and then leaves no half of a line."""
        # half a surrogate pair, as hostile text may hold, becomes its JSON escape and is read back the same
        data = (record.line() + "\n").encode(errors="backslashreplace")
        with self._lock:
            try:
                if self._descriptor is None:
                    self._descriptor = self._open()
                write_whole(self._descriptor, data)
            except OSError as error:
                raise StorageError.from_os(error, self.path) from error

    def read(self) -> list[R]:
        """All records; none when the file does not exist. Raises DataError `file:line: ...` for any bad line but a torn last one."""
        *lines, tail = self._bytes().split(b"\n")
        records = [self._parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        if tail.strip():
            try:
                records.append(self._parse(tail, len(lines) + 1))
            except DataError:
                log.warning("%s:%d: the last line was not completed when the program was stopped; it is left out", self.path, len(lines) + 1)
        return records

    def replace(self, records: Iterable[R]) -> None:
        """Makes these all the records there are, in one step. Raises StorageError when the disk refuses; the file is then as it was."""
        self.close()
        write_atomic(self.path, "".join(record.line() + "\n" for record in records))

    def sync(self) -> None:
        """Waits until what was appended is on the disk."""
        with self._lock:
            if self._descriptor is not None:
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Syncs and closes; a later append opens the file again. Safe to call twice."""
        with self._lock:
            if self._descriptor is not None:
                descriptor, self._descriptor = self._descriptor, None
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}", hint="check that it is a file and that you may read it") from error

    def _parse(self, line: bytes, number: int) -> R:
        try:
            return self.record.parse(line.decode())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = f"{where}: {first['msg']}" if where else first["msg"]
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            reason = f"not a JSON object of this program ({error})"
        raise DataError(f"{self.path}:{number}: not a valid {self.record.__name__}: {reason}", hint="repair or remove this line")

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._mend(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _mend(self, descriptor: int) -> None:
        """Makes the file end with a newline: a whole last line gets one, a torn one is cut off."""
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return
        data = self._bytes()
        start = data.rfind(b"\n") + 1
        try:
            self._parse(data[start:], data.count(b"\n") + 1)
        except DataError:
            log.warning("%s: the last line was not completed when the program was stopped; it is removed", self.path)
            os.ftruncate(descriptor, start)
        else:
            write_whole(descriptor, b"\n")


def write_whole(descriptor: int, data: bytes) -> None:
    """Appends `data` in one write call; when only a part fits, the file is cut back to where it was and OSError is raised."""
    before = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        if os.fstat(descriptor).st_size != before:
            os.ftruncate(descriptor, before)
        raise


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Replaces the file at `path` as a whole, so that a reader or a crash finds either the old content or the new.

    Text is UTF-8; half a surrogate pair, as a file name or a foreign error may hold, becomes its escape.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError.from_os(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # the parent may be a file, and what went wrong first is the error to show
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the system refuses inside is a StorageError that names `path`, also where a library of another language only mentions its number."""
    try:
        yield
    except OSError as error:
        raise StorageError.from_os(error, path) from error
    except Exception as error:  # the boundary to such libraries: safetensors and tokenizers have a type of their own, and none
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise StorageError.from_os(OSError(int(number[1]), os.strerror(int(number[1]))), path) from error


def put_tree(new: Path, target: Path) -> None:
    """Renames the folder `new` to `target`; a folder already there goes away only after that."""
    old = new.with_name(new.name + ".old")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_tree(source: Path, target: Path) -> None:
    """Makes `target` a copy of the folder `source`, on the disk as a whole before it gets its name. Raises StorageError.

    Not by `shutil.copytree`, whose errors say no more what the system refused.
    """
    if not source.is_dir():
        raise StorageError(f"{source} is not there any more, so it cannot be copied", hint="start a new run")
    beside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        with disk_errors(target):
            beside.mkdir(parents=True)
            for path in sorted(source.rglob("*")):
                copy = beside / path.relative_to(source)
                copy.mkdir() if path.is_dir() else shutil.copyfile(path, copy)
            sync_tree(beside)
            put_tree(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` (new, renamed) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until every file and name below `folder` is on the disk: a name given to it later must not outlive its content."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hash_file(path: str | Path) -> str:
    """SHA-256 of the file's bytes, 64 hexadecimal digits."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", hint="check the path and that you may read it") from error


def hash_tree(folder: str | Path) -> str:
    """SHA-256 over the names and contents of all files below `folder`, 64 hexadecimal digits.

    Dates, permissions and empty folders do not count. A link to a file counts as that file, a link to a folder as its target's name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f"{folder} is not a folder", hint="check the path")
    found: dict[str, str] = {}
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        found |= {(here / name).relative_to(folder).as_posix(): hash_file(here / name) for name in files}
        links = [here / name for name in folders if (here / name).is_symlink()]
        found |= {link.relative_to(folder).as_posix(): hashlib.sha256(os.readlink(link).encode()).hexdigest() for link in links}
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(f"{name}\0{found[name]}\n".encode())
    return total.hexdigest()


class Lock:
    """An exclusive lock on a file, given back when the process ends however it ends. The file holds the owner's process id."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None

    def take(self, *, wait: float = 0.0) -> bool:
        """True when the lock is ours now; False when another still holds it after `wait` seconds."""
        import fcntl

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError.from_os(error, self.path) from error
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.02)
                    continue
                os.close(descriptor)
                return False
            self._descriptor = descriptor
            return True

    def free(self) -> bool:
        """Whether nobody holds the lock. Only reads, so that others' files can be asked too; one that cannot be read counts as free."""
        import fcntl

        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return True

    def sign(self) -> None:
        """Writes this process's id into the lock file, for those who find it taken."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def owner(self) -> str:
        """The process id written by `sign`; `?` when there is none."""
        try:
            return self.path.read_text(encoding="utf-8").strip() or "?"
        except OSError:
            return "?"

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def release(self) -> None:
        """Gives the lock back. Safe to call twice."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)
