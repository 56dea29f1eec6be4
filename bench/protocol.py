"""How every timing here is taken, checked and written down.

Peer and ours run in one process on the same token ids and the same weights: one warm-up each, then repetitions in turn, in another order
every time. A ratio is the peer's time over ours within one repetition; the median and the range of these are reported, for
wall seconds and for CPU seconds (all threads of the process), and a target counts as reached only if both medians reach it. A ratio
stands beside the largest difference of the two outputs in a float32 run, and a record whose difference reaches its tolerance is
invalid: the script then exits with 1.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from itertools import cycle, islice, permutations
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "300000")  # as GNU OpenMP waits by itself, and so the peer without us

import torch

import fiducial

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "LICENSE"
SEED = 0
TOLERANCE = 1e-4
"""Largest difference allowed in a float32 run, per scored token or for a loss."""
WAITED = 1.2
"""Wall over CPU seconds beyond which a repetition of this work, which never sleeps, had to wait for a processor."""
PACKAGES = ("torch", "transformers", "trl", "lm-eval", "peft", "fiducial")
FALL = 0.15
"""Share of a stored ratio that may be lost."""
FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def _keep_memory() -> None:
    """Freed memory stays with the process: glibc gives it back or not by what was allocated before, and new pages cost the peer more than us."""
    if platform.libc_ver()[0] != "glibc":
        sys.exit("--keep-memory needs glibc; leave it out")
    for setting, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        ctypes.CDLL(None).mallopt(setting, value)


def summed_tolerance(tokens: int) -> float:
    """What is allowed for a sum of that many log-probabilities: 1e-4 (1 + tokens / 10), since rounding adds up."""
    return TOLERANCE * (1 + tokens / 10)


def options(description: str | None, argv: Sequence[str] | None, *, more: Callable[[argparse.ArgumentParser], object] | None = None) -> argparse.Namespace:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions after the warm-up (default 5)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads of torch (default: the free cores, at most OMP_NUM_THREADS)")
    parser.add_argument("--small", action="store_true", help="a tiny random model and two items: token counts and exactness, no times")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record (default results, or results/one_thread; with --small none)")
    parser.add_argument("--keep-memory", action="store_true", help="let freed memory stay with the process; the record goes to results/kept_memory")
    parser.add_argument("--compare", action="store_true", help="write nothing; exit code 1 where a ratio is more than 15 %% below the stored one")
    parser.add_argument("--note", default="", help="a remark that goes into the record")
    if more:
        more(parser)
    chosen = parser.parse_args(argv)
    if chosen.repetitions < 1 or chosen.threads < 1:
        parser.error("--repetitions and --threads are at least 1")
    return chosen


def default_threads() -> int:
    """Cores this process may use, at most OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(os.environ.get("OMP_NUM_THREADS", cores)))


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each repetition of one side."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Claim:
    """`side` takes at most 1 / `target` of the time of `over`, wall and CPU; without a target the ratio is reported only."""

    side: str
    over: str
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One workload in one dtype."""

    name: str
    dtype: str
    claims: Sequence[Claim]
    times: Mapping[str, Times]
    difference: float
    """Largest difference between ours and the peer in a float32 run."""
    tolerance: float
    of: str
    """What `difference` and `errors` are differences of."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Side -> its error against float32, for 16-bit runs."""
    counts: Mapping[str, int | str] = field(default_factory=dict)
    note: str = ""
    """Why no more can be expected here."""

    @property
    def valid(self) -> bool:
        """Whether the outputs agree; a difference that is no number does not."""
        return self.difference < self.tolerance

    def record(self) -> dict[str, Any]:
        """The case for the JSON file, ratios first."""
        return {
            "case": self.name,
            "dtype": self.dtype,
            "ratios": [self._ratio(claim) for claim in self.claims] if self.times else [],
            "valid": self.valid,
            "max_abs_difference_float32": self.difference,
            "allowed": self.tolerance,
            "difference_of": self.of,
            "errors_against_float32": dict(self.errors),
            "counts": dict(self.counts),
            "note": self.note,
            "seconds": {side: {"wall": _rounded(t.wall), "cpu": _rounded(t.cpu)} for side, t in self.times.items()},
        }

    def _ratio(self, claim: Claim) -> dict[str, Any]:
        side, over = self.times[claim.side], self.times[claim.over]
        wall, cpu = _spread(over.wall, side.wall), _spread(over.cpu, side.cpu)
        reached = None if claim.target is None else self.valid and min(wall["median"], cpu["median"]) >= claim.target
        waited = sum(max(_wait(side, i), _wait(over, i)) > WAITED for i in range(len(side.wall)))
        found = {"side": claim.side, "over": claim.over, "wall": wall, "cpu": cpu, "target": claim.target, "reached": reached, "waited": waited}
        return found | {"verdict": _verdict(wall, cpu) if self.valid else "invalid"}


def _wait(times: Times, repetition: int) -> float:
    return times.wall[repetition] / max(times.cpu[repetition], 1e-9)


def _verdict(wall: Mapping[str, float], cpu: Mapping[str, float]) -> str:
    """What the ranges of both ratios allow to be said."""
    if min(wall["low"], cpu["low"]) > 1:
        return "faster"
    return "slower" if max(wall["high"], cpu["high"]) < 1 else "equal within range"


def _spread(over: Sequence[float], side: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(over, side, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [round(s, 4) for s in seconds]


def interleave(sides: Mapping[str, Callable[[], Any]], repetitions: int, *, warm: bool = True) -> tuple[dict[str, Times], dict[str, Any]]:
    """Times of the sides, and what each gave in its warm-up; 0 repetitions only warm up. `warm` is off where they ran before.

    Repetitions go through all orders of the sides, so that none always follows the same other, whose memory it would find.
    """
    given = {name: run() for name, run in sides.items()} if warm else {}
    times = {name: Times() for name in sides}
    for order in islice(cycle(permutations(sides)), repetitions):
        for name in order:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
    return (times if repetitions else {}), given


def once(run: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class Bench:
    """One run of one script: sets threads and seed, collects cases, writes the record; a partial run replaces no record of a whole one."""

    def __init__(self, name: str, chosen: argparse.Namespace, *, partial: bool = False) -> None:
        self.name, self.options = name, chosen
        self.small: bool = chosen.small
        self.partial = partial
        self.repetitions: int = 0 if chosen.small else chosen.repetitions
        self.cases: list[Case] = []
        self._taken: list[dict[str, Any]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = [chosen.note] if chosen.note else []
        self.usual = HERE / "results" / ("kept_memory" if chosen.keep_memory else "one_thread" if chosen.threads == 1 else "")
        self._stored = _stored(self.usual / f"{name}.json", chosen) if chosen.compare else {}
        self._before = (os.getloadavg(), datetime.now().astimezone(), torch.get_num_threads())

    def __enter__(self) -> Self:
        torch.set_num_threads(self.options.threads)
        if self.options.keep_memory:
            _keep_memory()
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before[2])

    def add(self, case: Case) -> None:
        """Takes a case and prints its line."""
        self.cases.append(case)
        ratios = "".join(f", {r['side']} over {r['over']} {r['wall']['median']}x (CPU {r['cpu']['median']}x)" for r in case.record()["ratios"])
        print(f"{case.name}, {case.dtype}: difference {case.difference:.2e} of {case.tolerance:.0e} allowed{ratios}; {dict(case.counts)}", flush=True)

    def take(self, record: Mapping[str, Any]) -> None:
        """The cases and tables of a run of the same script in a process of its own."""
        self._taken += record["cases"]
        for title, rows in record["tables"].items():
            self.tables.setdefault(title, []).extend(rows)

    def finish(self) -> int:
        """Writes NAME.json and NAME.md; 0 if all cases are valid, 1 otherwise."""
        folder = self.options.out or (None if self.small or self.partial else self.usual)
        record = self.record()
        if self.options.compare:
            compared, lost = fallen(record, self._stored)
            print("\n".join([*lost, f"{len(lost)} of {compared} ratios are more than {FALL:.0%} below the stored ones"]), flush=True)
            return 1 if lost or not compared or not all(case["valid"] for case in record["cases"]) else 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{self.name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            (folder / f"{self.name}.md").write_text(page(record), encoding="utf-8")
        return 0 if all(case["valid"] for case in record["cases"]) else 1

    def record(self) -> dict[str, Any]:
        """Everything that was measured, and under what circumstances."""
        load, began, _ = self._before
        return {
            "benchmark": self.name,
            "date": began.isoformat(timespec="seconds"),
            "minutes": round((datetime.now().astimezone() - began).total_seconds() / 60, 1),
            "cases": self._taken + [case.record() for case in self.cases],
            "tables": self.tables,
            "notes": self.notes,
            "small": self.small,
            "repetitions": self.repetitions,
            "threads": self.options.threads,
            "niceness": os.nice(0),
            "keep_memory": self.options.keep_memory,
            "openmp_spins": os.environ["GOMP_SPINCOUNT"],
            "load": {"before": [round(x, 2) for x in load], "after": [round(x, 2) for x in os.getloadavg()]},
            "machine": machine(),
            "versions": versions(),
            "gpu": "not measured on GPU",
        }


def _stored(path: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """The record to compare with. Ends the program where there is none, or none of so many threads."""
    if not path.exists():
        sys.exit(f"there is no record {path} to compare with")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["threads"] != chosen.threads:
        sys.exit(f"{path} was measured with {found['threads']} threads; add --threads {found['threads']}")
    return found


def fallen(record: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How many ratios, in wall seconds, both records have, and those that are more than FALL below the stored one."""

    def ratios(of: Mapping[str, Any]) -> dict[tuple[str, str, str, str], float]:
        return {(case["case"], case["dtype"], r["side"], r["over"]): r["wall"]["median"] for case in of["cases"] for r in case["ratios"]}

    now, before = ratios(record), ratios(stored)
    both = now.keys() & before.keys()
    lost = [at for at in both if now[at] < (1 - FALL) * before[at]]
    return len(both), [f"{case}, {dtype}: {side} over {over} was {before[at]}x and is {now[at]}x" for at in lost for case, dtype, side, over in [at]]


def machine() -> dict[str, Any]:
    """Processor, which of the instructions that matter it has, cores and memory."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    lines = dict((part.strip() for part in line.split(":", 1)) for line in info.splitlines() if ":" in line)
    flags = set(lines.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    known = {flag: flag in flags for flag in FLAGS}
    return {"cpu": lines.get("model name") or platform.processor(), "flags": known, "cores": os.cpu_count(), "memory_gib": round(memory, 1)}


def versions() -> dict[str, str]:
    """Of Python, the product and the peers that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def page(record: Mapping[str, Any]) -> str:
    """The record as Markdown: ratios, then seconds and counts, then circumstances."""
    lines = [f"# {record['benchmark']}", "", *_circumstances(record), "", "## Ratios (time of the peer over ours)", ""]
    lines += [
        "| case | dtype | ours over peer | wall, median (range) | CPU, median (range) | verdict | target | difference fp32 (allowed) | error against fp32 |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for case in record["cases"]:
        lines += [_ratio_line(case, ratio) for ratio in case["ratios"] or [None]]
    lines += ["", "## Seconds (median) and counts", "", "| case | dtype | side | wall | CPU | counts |", "|---|---|---|---|---|---|"]
    for case in record["cases"]:
        counts = ", ".join(f"{name} {value}" for name, value in case["counts"].items())
        for side, seconds in case["seconds"].items() or [("-", {"wall": [0.0], "cpu": [0.0]})]:
            wall, cpu = statistics.median(seconds["wall"]), statistics.median(seconds["cpu"])
            lines.append(f"| {case['case']} | {case['dtype']} | {side} | {wall:.2f} | {cpu:.2f} | {counts} |")
    for title, rows in record["tables"].items():
        lines += ["", f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    if record["notes"]:
        lines += ["", "## Remarks", "", *(f"- {note}" for note in record["notes"])]
    return "\n".join(lines) + "\n"


def _ratio_line(case: Mapping[str, Any], ratio: Mapping[str, Any] | None) -> str:
    def span(values: Mapping[str, float]) -> str:
        return f"**{values['median']:.2f}x** ({values['low']:.2f} to {values['high']:.2f})"

    if ratio is None:
        claim, wall, cpu, verdict, target = "-", "-", "-", "-", "-"
    else:
        claim, wall, cpu = f"{ratio['side']} over {ratio['over']}", span(ratio["wall"]), span(ratio["cpu"])
        verdict = ratio["verdict"]
        target = "-" if ratio["target"] is None else f">= {ratio['target']}x: " + ("reached" if ratio["reached"] else "missed")
        wall += f"; {ratio['waited']} waited for a processor" if ratio["waited"] else ""
    verdict += f"; {case['note']}" if case["note"] else ""
    exact = f"{case['max_abs_difference_float32']:.1e} ({case['allowed']:.1e}), {case['difference_of']}" + ("" if case["valid"] else " INVALID")
    errors = ", ".join(f"{side} {value:.3g}" for side, value in case["errors_against_float32"].items()) or "-"
    return f"| {case['case']} | {case['dtype']} | {claim} | {wall} | {cpu} | {verdict} | {target} | {exact} | {errors} |"


def _circumstances(record: Mapping[str, Any]) -> list[str]:
    cpu, load = record["machine"], record["load"]
    flags = ", ".join(f"{flag} {'yes' if there else 'no'}" for flag, there in cpu["flags"].items())
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    kind = f"{record['repetitions']} interleaved repetitions after one warm-up, {record['minutes']} minutes"
    kind = "Tiny random model, no times" if record["small"] else kind
    kept = record["keep_memory"]
    threads = f"Threads {record['threads']}, waiting for {record['openmp_spins']} turns, niceness {record['niceness']}{'; freed memory is kept' * kept}."
    again = f"python bench/{record['benchmark']}.py --threads {record['threads']} --repetitions {record['repetitions']}{' --keep-memory' * kept}"
    return [
        f"{record['date']}. {cpu['cpu']}, {cpu['cores']} cores, {cpu['memory_gib']} GiB; {flags}. {threads}",
        f"{kind}. Load (1, 5, 15 minutes) before {load['before']}, after {load['after']}. GPU: {record['gpu']}.",
        f"{packages}. Reproduce: `{again}`.",
    ]


@dataclass(frozen=True, slots=True)
class Models:
    """The same weights in the dtypes to measure; float32 is always there, as the 16-bit weights widened."""

    tokenizer: Any
    modules: dict[str, Any]


def models(*, small: bool, dtypes: Sequence[str] = ("bfloat16", "float32")) -> Models:
    """SmolLM2-135M-Instruct, or the tiny random model in float32 alone."""
    if small:
        tiny: Any = fiducial.open("tiny")
        return Models(tiny.tokenizer, {"float32": tiny.module})
    narrow: Any = fiducial.open("smollm2", dtype="bfloat16", device="cpu")
    modules = {"bfloat16": narrow.module}
    if "float32" in dtypes:
        modules["float32"] = copy.deepcopy(narrow.module).float()
    return Models(narrow.tokenizer, modules)


class Text:
    """Slices of this project's licence as token ids, drawn with a fixed seed."""

    def __init__(self, tokenizer: Any, *, seed: int = SEED) -> None:
        self._ids: list[int] = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
        self._draw = random.Random(seed)

    def take(self, least: int, most: int | None = None) -> list[int]:
        """A slice of `least` to `most` tokens from anywhere."""
        length = self._draw.randint(least, most or least)
        at = self._draw.randrange(len(self._ids) - length)
        return self._ids[at : at + length]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars of the peers."""
    import logging

    from fiducial.models.embedded import quiet as quiet_transformers

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        yield


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference, taken in float64."""
    return float((a.detach().double() - b.detach().double()).abs().max())


def peak_above(run: Callable[[], Any]) -> float:
    """MiB by which the resident memory of this process rises above where it stood, at the most, while `run` works (Linux)."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # ru_maxrss would hide small peaks behind that of the imports; 5 resets the high-water mark
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return float(line.split()[1])
    raise KeyError(name)
