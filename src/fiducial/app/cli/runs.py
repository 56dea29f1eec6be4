"""`fiducial runs`, `report` and `compare`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fiducial.app.cli.commands import Command, output_of, runs_option
from fiducial.app.cli.output import Table
from fiducial.core.errors import DataError

if TYPE_CHECKING:
    from fiducial.core.intervals import Rate
    from fiducial.core.records import Better
    from fiducial.core.run import Run


@click.command(cls=Command, params=[runs_option()])
@click.option("--limit", type=click.IntRange(min=1), default=30, show_default=True, help="The latest so many.")
@click.pass_context
def runs(context: click.Context, limit: int) -> None:
    """List runs, the latest last."""
    from fiducial.core.run import Run, runs_root

    found = Run.all()
    shown = found[-limit:]
    table = Table(("run", "command", "status", "started (UTC)"))
    rows = []
    for run in shown:
        facts = run.facts
        table.rows.append((run.id, facts.command, run.status, facts.started[:19]))
        rows.append(
            {
                "id": run.id,
                "command": facts.command,
                "status": run.status,
                "started": facts.started,
                "finished": facts.finished,
                "error": facts.error,
                "folder": run.path,
            }
        )
    data = {"runs": rows, "total": len(found), "truncated": len(shown) < len(found)}
    output_of(context).result(data, table if found else f"no runs in {runs_root()} yet")


@click.command(cls=Command, params=[runs_option()])
@click.argument("run")
@click.option("--rebuild", is_flag=True, help="Make it again although it is there.")
@click.pass_context
def report(context: click.Context, run: str, rebuild: bool) -> None:
    """Print the path of RUN's report, which is made when it is missing."""
    from fiducial.core.run import Run

    opened = Run.open(run)
    path = opened.path / "report.html"
    if rebuild or not path.is_file():
        from fiducial.app.report import build

        path = Path(build(opened) or path)
    output_of(context).result({"path": path.resolve()}, str(path.resolve()), run=opened.id)


@dataclass(slots=True)
class Figure:
    """One figure of a run, with the value of each item where these were kept."""

    value: float
    low: float
    high: float
    n: int
    items: dict[str, float] = field(default_factory=dict)
    data: str = ""
    """What must agree for two figures to be comparable."""
    proportion: bool = False
    clusters: dict[str, str] = field(default_factory=dict)
    """What each item is about, where several may be about the same."""
    better: Better = "higher"

    def rate(self, keys: Collection[str]) -> Rate:
        """Of a proportion, the rate of some of its items; that of all trials where there are none."""
        from fiducial.core.intervals import Rate, design_effect

        if not keys:
            return Rate(round(self.value * self.n), self.n)
        values = [self.items[key] for key in keys]
        return Rate(round(sum(values)), len(values), design_effect([v > 0.5 for v in values], [self.clusters.get(key, key) for key in keys]))

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g}, n = {self.n})"


@click.command(cls=Command, params=[runs_option()])
@click.argument("first")
@click.argument("second")
@click.pass_context
def compare(context: click.Context, first: str, second: str) -> None:
    """Compare the figures of two runs: SECOND minus FIRST, item by item where both measured the same items."""
    from fiducial.core.run import Run

    a, b = Run.open(first), Run.open(second)
    left, right = dict(figures(a)), dict(figures(b))
    if not left or not right:
        raise DataError(f"run {(b if left else a).id} holds no figures", hint="compare runs of attack, evaluate, check or loop")
    rows = [compared(name, left.get(name), right.get(name)) for name in sorted(left.keys() | right.keys())]
    table = Table(("figure", "first", "second", "difference", "95 % interval", "how"))
    for r in rows:
        between = "-" if r["low"] is None else f"{r['low']:+.3g} to {r['high']:+.3g}"
        table.rows.append((r["figure"], r["first_text"], r["second_text"], "-" if r["difference"] is None else f"{r['difference']:+.3g}", between, r["how"]))
    changed = sorted(k for k in a.facts.options.keys() | b.facts.options.keys() if a.facts.options.get(k) != b.facts.options.get(k))
    options = {k: [a.facts.options.get(k), b.facts.options.get(k)] for k in changed}
    lines = [f"{k}: {x} | {y}" for k, (x, y) in options.items()]
    data = {"first": a.id, "second": b.id, "figures": [{k: v for k, v in r.items() if not k.endswith("_text")} for r in rows], "options": options}
    output_of(context).result(data, f"first  {a.id}\nsecond {b.id}", table, *(["options that differ (first | second):", *lines] if lines else []))


def figures(run: Run) -> Iterator[tuple[str, Figure]]:
    """Every score, and the rates of every set of attempts, by name; figures of a stage begin with its name."""
    from fiducial.core.records import Attempt, Score
    from fiducial.core.store import Lines

    for path in _files(run, "scores"):
        for s in Lines(path, Score).read():
            data = "|".join(f"{k}={v}" for k, v in sorted(s.fingerprint.items()) if k != "model")
            items = {str(i): v for i, v in enumerate(s.items)}
            yield f"{_stage(run, path)}{s.suite}: {s.metric}", Figure(s.value, s.low, s.high, s.n, items, data, s.interval == "wilson", better=s.better)
    for path in _files(run, "attempts"):
        yield from _rates(_stage(run, path), Lines(path, Attempt).read())


def _rates(stage: str, attempts: list[Any]) -> Iterator[tuple[str, Figure]]:
    from fiducial.app.measure import tally

    for name, harmful in (("harmful compliance", True), ("refusal of harmless requests", False)):
        some = [a for a in attempts if (a.prompt.expected == "refuse") == harmful and a.scored]
        # the same prompt under two attacks is two items; models differ between runs, so the attempt's own id cannot pair them
        items = {f"{a.attack} {a.prompt.id}": float(a.failed) for a in some}
        if some:
            rate = tally(some).rate
            clusters = {f"{a.attack} {a.prompt.id}": a.prompt.cluster for a in some}
            yield f"{stage}{name}", Figure(rate.value, *rate.interval(), rate.n, items, proportion=True, clusters=clusters, better="lower")


def _files(run: Run, name: str) -> list[Path]:
    return sorted(p for p in run.path.rglob(f"{name}.jsonl") if ".aside-" not in str(p))


def _stage(run: Run, path: Path) -> str:
    folder = path.parent.relative_to(run.path).as_posix().removeprefix("stages/")
    return "" if folder == "." else f"{folder}: "


def compared(name: str, a: Figure | None, b: Figure | None) -> dict[str, Any]:
    """`b` less `a` with a 95 % interval, item by item where both have items; no interval where `how` says why."""
    from fiducial.core.intervals import difference, mcnemar, paired_difference, paired_rates

    row: dict[str, Any] = {"figure": name, "first": a and a.value, "second": b and b.value, "difference": None, "low": None, "high": None, "how": ""}
    row |= {"first_text": str(a) if a else "-", "second_text": str(b) if b else "-"}
    if a is None or b is None:
        return row | {"how": "only in the " + ("second" if a is None else "first")}
    if a.data != b.data:
        return row | {"how": "not comparable: other data or scorer"}
    shared = [key for key in a.items if key in b.items]
    if len(shared) > 1 and a.proportion and b.proportion:
        x, y = [a.items[k] for k in shared], [b.items[k] for k in shared]
        p = mcnemar(sum(u > v for u, v in zip(x, y, strict=True)), sum(u < v for u, v in zip(x, y, strict=True)))
        alone = len({b.clusters.get(k, k) for k in shared}) == len(shared)
        pairs = [v > 0.5 for v in y], [u > 0.5 for u in x]
        # several items about the same are fewer pairs; two independent samples have a wider interval
        value, low, high = paired_rates(*pairs) if alone else difference(b.rate(shared), a.rate(shared))
        return row | {"difference": value, "low": low, "high": high, "p": p, "how": f"{len(shared)} same items, McNemar p = {p:.2g}"}
    if len(shared) > 1:
        mean = paired_difference([b.items[k] for k in shared], [a.items[k] for k in shared])
        low, high = mean.interval()
        return row | {"difference": mean.value, "low": low, "high": high, "how": f"paired, {mean.n} items"}
    if a.proportion and b.proportion:
        value, low, high = difference(b.rate(b.items), a.rate(a.items))
        return row | {"difference": value, "low": low, "high": high, "how": "two samples"}
    return row | {"difference": b.value - a.value, "how": "no items to pair"}
