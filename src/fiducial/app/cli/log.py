"""`fiducial log verify | show | trace MODEL`: the ledger beside the runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from fiducial.app.cli.commands import Command, Group, output_of, runs_option
from fiducial.app.cli.output import Table, one_line
from fiducial.core.errors import ConfigError

if TYPE_CHECKING:
    from fiducial.core.ledger import Ledger
    from fiducial.core.records import Event

LEDGER = "ledger.jsonl"
"""File of the ledger in the folder of runs."""


def ledger() -> Ledger:
    """The ledger of the folder of runs."""
    from fiducial.core.ledger import Ledger
    from fiducial.core.run import runs_root

    return Ledger(runs_root() / LEDGER)


log = Group("log", help="The ledger: what happened to which model, in a chain of hashes.")


@log.command(cls=Command, params=[runs_option()])
@click.option("--published", multiple=True, metavar="NUMBER:HASH", help="Hash of an event as it was published elsewhere; may be repeated.")
@click.pass_context
def verify(context: click.Context, published: tuple[str, ...]) -> int:
    """Check every event against the chain and the head file; exit code 1 when one does not fit."""
    known = {}
    for text in published:
        number, _, digest = text.partition(":")
        if not number.isdigit() or not digest:
            raise ConfigError(f"'{text}' is not NUMBER:HASH", hint="for example --published 12:5a0c...")
        known[int(number)] = digest
    found = ledger()
    if not found.path.exists() and not found.head_path.exists():
        raise ConfigError(f"there is no ledger in {found.path.parent}", hint="choose another folder with --runs or FIDUCIAL_RUNS")
    result = found.verify(known)
    data = {
        "verified": result.ok,
        "events": result.n,
        "head": result.head,
        "line": result.line,
        "problem": result.problem,
        "note": result.note,
        "file": found.path,
    }
    output_of(context).result(data, f"{'verified' if result.ok else 'does not verify'}: {result}")
    return int(not result.ok)


@log.command(cls=Command, params=[runs_option()])
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The last so many events.")
@click.option("--kind", help="Events of one kind only.")
@click.pass_context
def show(context: click.Context, limit: int, kind: str | None) -> None:
    """Show the last events."""
    events = [e for e in ledger().events() if kind in (None, e.kind)]
    _print(context, events[-limit:], len(events))


@log.command(cls=Command, params=[runs_option()])
@click.argument("model")
@click.pass_context
def trace(context: click.Context, model: str) -> None:
    """Show every event about MODEL (a fingerprint, its beginning, or run:RUN), its ancestors and the data they saw."""
    found = ledger()
    events = found.trace(_fingerprint(found, model))
    if not events:
        raise ConfigError(f"the ledger knows no model '{model}'", hint="give a fingerprint of at least 8 digits, or run:RUN; see: fiducial log show")
    _print(context, events, len(events))


def _fingerprint(found: Ledger, model: str) -> str:
    """The fingerprint of the model that a run made, or what was given. Raises ConfigError for a run that neither ledger nor folder knows."""
    from fiducial.core.run import Run

    reference = model.removeprefix("run:")
    if model.startswith("run:") and all(e.body.get("run") != reference for e in found.events()):
        reference = Run.open(reference).id
    made = [e.body["model"] for e in found.events() if e.body.get("run") == reference and e.kind == "train" and isinstance(e.body.get("model"), str)]
    return str(made[-1]) if made else model


def _print(context: click.Context, events: list[Event], total: int) -> None:
    table = Table(("number", "time", "kind", "what", "hash"), right=frozenset({"number"}))
    for e in events:
        what = ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in e.body.items())
        table.rows.append((str(e.number), e.time[:19], e.kind, one_line(what, 100), e.hash[:12]))
    data = {"events": [e.model_dump(mode="json") for e in events], "total": total, "truncated": len(events) < total}
    output_of(context).result(data, table if events else "the ledger is empty")
