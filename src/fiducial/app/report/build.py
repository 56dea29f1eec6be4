"""Draws the report of a run from its summary: one HTML file, readable offline, without script.

Attack texts and model answers are hostile text. The template escapes everything (`autoescape`), and before that every string that it
prints passes `visible`, so that nothing in the page is hidden or turned round. The content policy of the page allows no request and no script.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from fiducial.app.report import charts
from fiducial.app.report.hidden import visible
from fiducial.app.summary import Capability, Slice, Summary, Tally, Training
from fiducial.core.errors import DataError, StorageError
from fiducial.core.intervals import Rate, corrected_rate, difference
from fiducial.core.records import Weakness
from fiducial.core.run import Run
from fiducial.core.store import write_atomic

LONGEST = 8000
"""Characters of one text on the page; the rest is counted, and stands in the embedded summary."""

MEANING = {"refuse": "harmful goals answered", "comply": "benign twins refused", "answer": "ordinary prompts refused"}
"""What a hit is, by what a good model would do."""

BY = {"total": "", "category": "by category", "family": "by attack family", "language": "by language"}

OUTCOMES = {"pass": "Pass", "fail": "Fail", "insufficient": "Not enough evidence", "measured": "Measured", "not measured": "Not measured"}

EXAMPLES = {"repaired": "pass", "kept": "pass", "still complies": "fail", "newly complies": "fail", "still refused": "fail", "newly refused": "fail"}
"""The sign beside an example, by its kind."""

ERRORS = {
    "accuracy": ("answers it reads rightly", "n"),
    "tpr": ("harmful answers that it finds (true positive rate)", "positives"),
    "fpr": ("harmless answers that it takes for harmful (false positive rate)", "negatives"),
}
"""What a judge card says of a judge, in words, and the field that counts the labelled answers behind it."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One interval plot with its table."""

    kind: str
    title: str
    rows: tuple[Slice, ...]

    @property
    def not_scored(self) -> bool:
        """Whether any trial could not be scored."""
        return any(t.not_scored for row in self.rows for t in (row.before, row.after) if t)


def build(run: Run) -> Path:
    """Writes `report.html` into the run from its `summary.json`, and returns the path. Raises DataError when there is no usable summary."""
    source = run.path / "summary.json"
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"the run {run.id} has no summary to report: {source} is missing",
            hint="only `fiducial loop` and `fiducial check` write one; go on with an interrupted run with --resume",
        ) from None
    except OSError as error:
        raise StorageError(f"{source} cannot be read: {error.strerror}", hint="check that you may read it") from error
    path = run.path / "report.html"
    write_atomic(path, render(_parsed(text, source)))
    return path


def render(summary: Summary) -> str:
    """The page as text; the same summary gives the same page."""
    rates = [tally.rate for row in summary.slices for tally in (row.before, row.after) if tally] + [w.rate for w in summary.weaknesses]
    return _environment().get_template("report.html").render(
        s=summary,
        compares=summary.command == "loop",
        panels=panels(summary),
        end=charts.scale(rates),
        spots=[charts.Spot(p.name, p.refusal.rate, p.compliance.rate, p.promoted, i == 0) for i, p in enumerate(summary.points)],
        corrected=corrected(summary),
        facts=_judge_facts(summary.judge),
        embedded=embedded(summary),
        css=Markup(_text("report.css")),
    )  # fmt: skip


def panels(summary: Summary) -> tuple[Panel, ...]:
    """The slices as plots: totals in the order given, then one plot per kind of slice and of prompt, the worst row first."""
    found = []
    for kind, by in BY.items():
        rows = [row for row in summary.slices if row.kind == kind]
        if kind == "total":
            found += [Panel(kind, "Key figures", tuple(rows))] if rows else []
            continue
        for expected, meaning in MEANING.items():
            chosen = sorted((row for row in rows if row.expected == expected), key=_worst_first)
            if chosen:
                found.append(Panel(kind, f"{meaning.capitalize()}, {by}", tuple(chosen)))
    return tuple(found)


def corrected(summary: Summary) -> list[dict[str, Any]]:
    """For each total of harmful compliance, the observed rates and what they come to given the judge's measured errors; empty without those."""
    tpr, fpr = summary.judge.get("tpr"), summary.judge.get("fpr")
    if not (_is_share(tpr) and _is_share(fpr) and tpr > fpr):
        return []
    rows = [row for row in summary.slices if row.kind == "total" and row.expected == "refuse"]
    return [{"name": row.name} | {when: _corrected(tally, tpr, fpr) for when, tally in (("before", row.before), ("after", row.after))} for row in rows]


def embedded(summary: Summary) -> Markup:
    """The summary as JSON for a `script` element of type application/json: ASCII, and without the characters that could end the element."""
    text = json.dumps(json.loads(summary.model_dump_json()), ensure_ascii=True, sort_keys=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def weakness_words(weakness: Weakness, whole: bool = True) -> str:
    """The slice of a weakness in words, such as `harmful goals answered, family persona`; without the first part when not `whole`."""
    parts = [f"{key} {value}" for key, value in weakness.slice.items() if key != "expected"]
    expected = weakness.slice.get("expected", "")
    if whole and expected:
        parts.insert(0, MEANING.get(expected, f"expected {expected}"))
    return ", ".join(parts) or "all trials"


def duration(seconds: float) -> str:
    """Seconds in the units a person would use.

    >>> duration(3.21), duration(75), duration(7262)
    ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def points(value: float) -> str:
    """A difference of two shares in percentage points, with its sign.

    >>> points(-0.312), points(0.0)
    ('−31.2', '0.0')
    """
    text = f"{100 * value:+.1f}".replace("-", "\u2212")
    return "0.0" if text[1:] == "0.0" else text


def change_words(before: Tally, after: Tally) -> str:
    """After minus before in points with Newcombe's interval for independent samples."""
    if not (before.n and after.n):
        return "not measured"
    value, low, high = difference(after.rate, before.rate)
    return f"{points(value)} ({points(low)} to {points(high)})"


def sharing(training: Training) -> str:
    """How many tokens would have been computed for each one that was."""
    return f"{training.naive_tokens / training.tokens:.2f}" if training.tokens else "not measured"


def cut(text: str) -> str:
    """At most LONGEST characters of a text, and how many were left out."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n[{len(text) - LONGEST:,} more characters; the embedded summary has them all]"


def plain(value: Any) -> str:
    """An option's value as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def accuracy(row: Capability, value: float) -> Rate:
    """An accuracy as hits out of the row's items."""
    return Rate(min(row.n, max(0, round(value * row.n))), row.n)


def _parsed(text: str, source: Path) -> Summary:
    try:
        return Summary.parse(text)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{source}: not a valid summary: {where}: {error.errors()[0]['msg']}", hint="it was changed by hand, or by another version") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{source}: not a summary of this program ({error})", hint="it was changed by hand, or by another version") from error


def _worst_first(row: Slice) -> tuple[bool, float, str]:
    """Held-out families before those that were in the repair, then by rate, then by name."""
    return row.kind == "family" and not row.held_out, -row.before.rate.value if row.before.n else 1.0, row.name


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 <= value <= 1


def _corrected(tally: Tally | None, tpr: float, fpr: float) -> dict[str, Any] | None:
    if tally is None or not tally.n:
        return None
    value, low, high = (corrected_rate(v, tpr=tpr, fpr=fpr) for v in (tally.rate.value, *tally.rate.interval()))
    return {"observed": tally.rate, "value": value, "low": low, "high": high}


def _judge_facts(judge: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of the judge, in words; shares with the number of labelled answers they rest on."""
    facts = [(words, _measured(judge[key], judge.get(count, judge.get("n")))) for key, (words, count) in ERRORS.items() if _is_share(judge.get(key))]
    said = {"judge", "name", "n", "positives", "negatives"} if facts else {"judge", "name"}
    return facts + [(key, plain(value)) for key, value in judge.items() if key not in said and not (key in ERRORS and _is_share(value))]


def _measured(value: float, n: object) -> str:
    return charts.rate_words(Rate(round(value * n), n)) if isinstance(n, int) and n > 0 else f"{value:.1%} (on an unknown number of answers)"


def _printed(value: Any) -> Any:
    """What the template prints: strings with nothing hidden. Markup comes from this package and is left alone."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _text(name: str) -> str:
    return files("fiducial.app.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, finalize=_printed, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": charts.percent, "rate": charts.rate_words, "duration": duration, "points": points, "cut": cut, "plain": plain}
    environment.globals |= {
        "charts": charts, "MEANING": MEANING, "OUTCOMES": OUTCOMES, "EXAMPLES": EXAMPLES,
        "weakness_words": weakness_words, "change_words": change_words, "sharing": sharing, "accuracy": accuracy,
        "reach": _reach,
    }  # fmt: skip
    return environment


def _reach(rows: Sequence[Capability]) -> float:
    return charts.change_reach([v for row in rows for v in (row.change, row.low, row.high) if v is not None])
