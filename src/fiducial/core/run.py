"""A run: the folder of one command, with what was asked, what was done, and everything needed to go on after an interruption.

    <id>/run.json              what was asked and how it ended (RunFacts)
    <id>/metrics.jsonl         figures as they came (Metrics)
    <id>/<name>.jsonl          records, from `run.lines`
    <id>/<name>/               files, from `run.folder`
    <id>/stages/<stage>.json   inputs of a stage and, once finished, its result
    <id>/stages/<stage>/       records and files of the stage; set aside under another name when its inputs change

Folders stand below `runs_root()`. Times are UTC.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import Field, ValidationError
from pydantic_core import to_jsonable_python

from fiducial.core.errors import ConfigError, DataError, FiducialError, StorageError, nearest
from fiducial.core.records import SCHEMA, Record, digest
from fiducial.core.store import Lines, Lock, R, write_atomic

log = logging.getLogger(__name__)

Status = Literal["running", "done", "interrupted", "failed"]
"""Interrupted is not failed: the same command with --resume goes on."""

PACKAGES = ("fiducial", "torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy", "openai", "trl")
"""Packages whose versions go into a run."""

NAMED = r"(?:api[-_]?key|secret|password|(?<!eos_)(?<!pad_)(?<!bos_)(?<!unk_)token)"
"""How the name of a secret ends. The special tokens of a vocabulary are none."""

SECRET = re.compile(rf"(^|[-_.]){NAMED}$", re.IGNORECASE)
"""Options whose value is never written down."""

USERINFO = re.compile(r"//[^/\s]*@")
"""Name and password in the address of a server."""

PART = re.compile(rf"(?<![\w.-])((?:[\w.-]*[-_.])?{NAMED})=[^\s&]+", re.IGNORECASE)
"""A secret as `key=value` inside a longer text."""


class RunFacts(Record):
    """What `run.json` holds."""

    name: str
    """The run's id, which is its folder's name."""
    command: str
    """For example `loop` or `attack/gcg`."""
    argv: tuple[str, ...] = ()
    """The command as typed, secrets masked."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Every option as resolved."""
    given: dict[str, Any] = Field(default_factory=dict)
    """Only those the user set, on the command line or in a recipe."""
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    """Of Python and of the packages that matter."""
    platform: dict[str, str] = Field(default_factory=dict)
    started: str = ""
    """UTC, ISO 8601."""
    finished: str = ""
    """UTC, ISO 8601; empty while it runs."""
    status: Status = "running"
    error: str = ""
    """Why it failed."""
    resumed: int = 0
    """How often it was taken up again."""


class Metrics(Record):
    """Figures at one point of a run."""

    step: int
    time: float
    """Seconds since 1970, UTC."""
    values: dict[str, float | None]
    """None where the figure was not a finite number."""


class StageState(Record):
    """What `stages/<stage>.json` holds."""

    name: str
    inputs: str
    """Hash of what the stage depends on."""
    finished: str = ""
    """UTC, ISO 8601; empty until finished."""
    result: dict[str, Any] | None = None


def runs_root() -> Path:
    """The folder of all runs: the environment variable FIDUCIAL_RUNS, else `./runs`."""
    return Path(os.environ.get("FIDUCIAL_RUNS") or "runs").expanduser()


def follows() -> bool:
    """Whether this is one of several processes of torchrun or accelerate launch and not the first, which alone keeps a run."""
    return several() and os.environ.get("RANK", "0") != "0"


def several() -> bool:
    """Whether torchrun or accelerate launch has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class Run:
    """One run. `with run:` takes the lock, and records at the end whether it was done, interrupted or failed."""

    def __init__(self, path: Path, facts: RunFacts) -> None:
        self.path = path
        self.facts = facts
        self._lock = Lock(path / "lock")
        self._lines: dict[str, Lines[Any]] = {}

    @classmethod
    def create(cls, command: str, options: Mapping[str, Any], given: Mapping[str, Any], seed: int, root: str | Path | None = None) -> Run:
        """A new folder `YYYYMMDD-HHMMSS-<command>-<4 hex>`. Raises StorageError where it cannot be written, ConfigError in a process that follows."""
        if follows():
            raise ConfigError(f"{command} runs in one process, and several were started", hint="leave out torchrun or accelerate launch")
        base, now = Path(root) if root is not None else runs_root(), datetime.now(UTC)
        slug = re.sub(r"[^a-z0-9]+", "-", command.lower()).strip("-") or "run"
        name, path = _new_folder(base, f"{now:%Y%m%d-%H%M%S}-{slug}")
        facts = RunFacts(
            name=name,
            command=command,
            argv=_masked_argv(sys.argv),
            options=masked(options),
            given=masked(given),
            seed=seed,
            versions=_versions(),
            platform={"system": platform.platform(), "machine": platform.machine(), "cpus": str(os.cpu_count() or 1)},
            started=now.isoformat(timespec="microseconds"),
        )
        run = cls(path, facts)
        run._save()
        return run

    @classmethod
    def open(cls, reference: str | Path, root: str | Path | None = None, *, before: Run | None = None, trained: bool = False) -> Run:
        """The run named by its id, the beginning of its id, its last four digits, its folder, or `last`, each also after `run:`.

        With `before`, `last` and shortened ids are looked for among the runs that began earlier than that one. With `trained`, `last` is the
        last one that has a model, if there is any.
        """
        wanted = str(reference).removeprefix("run:")
        folder = Path(wanted)
        if (folder / "run.json").is_file():
            return cls(folder, _read_facts(folder))
        runs = {run.id: run for run in cls.all(root) if run.id == wanted or before is None or run.facts.started < before.facts.started}
        where = Path(root) if root is not None else runs_root()
        if not runs:
            raise ConfigError(f"no run '{wanted}': there are no runs in {where}", hint="choose another folder with --runs or FIDUCIAL_RUNS")
        if wanted == "last":
            models = [run for run in runs.values() if (run.path / "model").is_dir()] if trained else []
            return (models or list(runs.values()))[-1]
        found = [wanted] if wanted in runs else [name for name in runs if name.startswith(wanted) or name.endswith(f"-{wanted}")]
        if not wanted or not found:
            raise ConfigError(f"no run '{wanted}' in {where}", hint=nearest(wanted, runs, shown=list(runs)[::-1]))
        if len(found) > 1:
            raise ConfigError(f"'{wanted}' is the beginning of {len(found)} runs", hint="one of: " + ", ".join(found[-5:]))
        return runs[found[0]]

    @classmethod
    def all(cls, root: str | Path | None = None) -> list[Run]:
        """Every readable run, oldest first. A folder whose `run.json` is damaged is left out with a warning."""
        base = Path(root) if root is not None else runs_root()
        runs = []
        for path in sorted(base.glob("*/run.json")):
            try:
                runs.append(cls(path.parent, _read_facts(path.parent)))
            except FiducialError as error:
                log.warning("left out: %s", error)
        return sorted(runs, key=lambda run: (run.facts.started, run.id))

    @property
    def id(self) -> str:
        """The name of the folder, which other commands accept."""
        return self.facts.name

    @property
    def status(self) -> Status:
        """How it stands. A run that was killed, and so could not say so itself, is interrupted."""
        if self.facts.status != "running" or self._lock.held:
            return self.facts.status
        return "interrupted" if self._lock.free() else "running"

    def revise(self, options: Mapping[str, Any], given: Mapping[str, Any], seed: int) -> None:
        """Replaces the options: a run that goes on with other ones goes on with them the next time too. For use inside `with run:`."""
        self._save(options=masked(options), given=masked(given), seed=seed)

    def lines(self, name: str, record: type[R]) -> Lines[R]:
        """The records `<name>.jsonl` of this run; the same object each time, closed when the run ends."""
        if name not in self._lines:
            self._lines[name] = Lines(self.path / f"{name}.jsonl", record)
        return self._lines[name]

    def folder(self, name: str) -> Path:
        """The subfolder `name`, made if need be."""
        return _made(self.path / name)

    def metrics(self, values: Mapping[str, Any], *, step: int) -> None:
        """Appends figures to `metrics.jsonl`. What is not finite is stored as null."""
        numbers = {key: float(value) for key, value in values.items()}
        point = Metrics(step=step, time=time.time(), values={k: v if math.isfinite(v) else None for k, v in numbers.items()})
        self.lines("metrics", Metrics).append(point)

    def read_metrics(self) -> list[Metrics]:
        """What `metrics` appended."""
        return self.lines("metrics", Metrics).read()

    def result(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, whatever its inputs; None when it is not finished. For reading only: changes nothing."""
        file = self.path / "stages" / f"{stage}.json"
        return _read(file, StageState).result if file.exists() else None

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """The stage `name`, done when it was finished before with the same `inputs` (anything that can be written as JSON).

        When the inputs changed, what the stage had is set aside under another name, and it starts afresh.
        """
        return Stage(self, name, digest(to_jsonable_python(dict(inputs))))

    def __enter__(self) -> Self:
        again = self._lock.path.exists()
        # whoever asks for the status holds the lock for an instant
        if not self._lock.take(wait=1.0):
            raise StorageError(f"the run {self.id} is being written by process {self._lock.owner()}", hint="wait until it ends, or start a new run")
        try:
            self._lock.sign()
            self.facts = _read_facts(self.path)
            self._save(status="running", finished="", error="", resumed=self.facts.resumed + again)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for lines in self._lines.values():
                lines.close()
            reason = USERINFO.sub("//***@", f"{kind.__name__}: {error}") if kind is not None else ""
            status = _status(error)
            self._save(status=status, finished=_now(), error=reason if status == "failed" else "")
        except (StorageError, OSError) as second:
            if error is None:
                raise
            # the first error is the one to show
            log.warning("the end of the run could not be written: %s", second)
        finally:
            self._lock.release()

    def _save(self, **changes: Any) -> None:
        self.facts = self.facts.model_copy(update=changes)
        content = {"v": SCHEMA} | self.facts.model_dump(mode="json")
        write_atomic(self.path / "run.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


class Stage:
    """A part of a run that need not be done twice. Made by `run.stage`."""

    def __init__(self, run: Run, name: str, inputs: str) -> None:
        self.run = run
        self.name = name
        self.path = run.path / "stages" / name
        self._file = run.path / "stages" / f"{name}.json"
        self._state = self._known(inputs)

    @property
    def done(self) -> bool:
        """Whether it was finished with these inputs."""
        return self._state.result is not None

    @property
    def result(self) -> dict[str, Any]:
        """What `finish` was given. Raises ValueError before that."""
        if self._state.result is None:
            raise ValueError(f"the stage '{self.name}' is not finished")
        return self._state.result

    def lines(self, name: str, record: type[R]) -> Lines[R]:
        """Records of this stage, kept when an unfinished stage is taken up again with the same inputs."""
        return self.run.lines(f"stages/{self.name}/{name}", record)

    def folder(self, name: str) -> Path:
        """A folder of this stage."""
        return _made(self.path / name)

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Marks the stage done: its records are on the disk first, then the result, in one step. Returns the result as it will be read back."""
        for name, lines in self.run._lines.items():
            if name.startswith(f"stages/{self.name}/"):
                lines.close()
        plain: dict[str, Any] = to_jsonable_python(dict(result), inf_nan_mode="null")
        self._write(StageState(name=self.name, inputs=self._state.inputs, finished=_now(), result=plain))
        return plain

    def _known(self, inputs: str) -> StageState:
        fresh = StageState(name=self.name, inputs=inputs)
        if self._file.exists():
            state = _read(self._file, StageState)
            if state.inputs == inputs:
                return state
            self._set_aside(state.inputs)
        elif self.path.exists():
            self._set_aside("unknown")
        self._write(fresh)
        return fresh

    def _set_aside(self, inputs: str) -> None:
        """Renames the folder and the state of the stage, so that records of different inputs never stand in one file."""
        prefix = f"stages/{self.name}/"
        for name in [n for n in self.run._lines if n.startswith(prefix)]:
            self.run._lines.pop(name).close()
        stem, number = f"{self.path.name}.aside-{inputs}", 1
        while any(self.path.with_name(f"{stem}-{number}{end}").exists() for end in ("", ".json")):
            number += 1
        aside = f"{stem}-{number}"
        # the state first: killed between the two, records without a state are set aside the next time, but a state without its records
        # would be a finished stage of no records to whoever comes back with the old inputs
        for old, new in ((self._file, self._file.with_name(f"{aside}.json")), (self.path, self.path.with_name(aside))):
            if old.exists():
                try:
                    old.rename(new)
                except OSError as error:
                    raise StorageError.from_os(error, old) from error
        log.info("stage %s: its inputs changed; what it had is kept as %s", self.name, aside)

    def _write(self, state: StageState) -> None:
        self._state = state
        write_atomic(self._file, state.line() + "\n")


def _new_folder(base: Path, stem: str) -> tuple[str, Path]:
    while True:
        name = f"{stem}-{secrets.token_hex(2)}"
        try:
            (base / name).mkdir(parents=True)
        except FileExistsError:
            if not base.is_dir():
                what = "a link to nothing" if base.is_symlink() and not base.exists() else "a file"
                raise StorageError(f"{base} is {what}, not a folder for runs", hint="choose another folder with --runs or FIDUCIAL_RUNS") from None
            continue
        except OSError as error:
            raise StorageError.from_os(error, base) from error
        return name, base / name


def _made(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.from_os(error, path) from error
    return path


def _read_facts(folder: Path) -> RunFacts:
    return _read(folder / "run.json", RunFacts)


def _read(path: Path, record: type[R]) -> R:
    """The one record that fills a file."""
    try:
        return record.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", hint="check that you may read it") from error
    except ValidationError as error:
        raise DataError(f"{path}: not a valid {record.__name__}: {error.errors()[0]['msg']}", hint="it was changed by hand, or by another version") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: {error}", hint="it was changed by hand, or by another version") from error


def _status(error: BaseException | None) -> Status:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        # 1 is a completed run whose gate refused; 130 is what an interrupt exits with
        return {None: "done", 0: "done", 1: "done", 130: "interrupted"}.get(error.code, "failed")  # type: ignore[arg-type,return-value]
    return "done" if error is None else "failed"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _versions() -> dict[str, str]:
    """Versions from the installed packages' metadata, so that nothing is imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "fiducial" not in found:
        from fiducial import __version__

        found["fiducial"] = __version__
    return found


def masked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain values that may be written down: secrets are replaced by `***`."""
    plain: dict[str, Any] = to_jsonable_python(dict(options), inf_nan_mode="null")

    def mask(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: mask(k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [mask(name, item) for item in value]
        if not isinstance(value, str) or not value:
            return value
        return "***" if SECRET.search(name) else _masked_text(value)

    return {name: mask(name, value) for name, value in plain.items()}


def _masked_text(text: str) -> str:
    """A text without the secrets that stand in it as `key=value` or in an address."""
    name, equals, _ = text.partition("=")
    if equals and SECRET.search(name):  # the whole text is the assignment, so its value may hold spaces
        return f"{name}=***"
    return PART.sub(r"\1=***", USERINFO.sub("//***@", text))


def _masked_argv(argv: list[str]) -> tuple[str, ...]:
    masked = []
    for index, word in enumerate(argv):
        before = argv[index - 1] if index else ""
        named = before.startswith("-") and "=" not in before and SECRET.search(before.lstrip("-"))
        masked.append("***" if named else _masked_text(word))
    return tuple(masked)
