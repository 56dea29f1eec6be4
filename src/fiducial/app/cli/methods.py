"""`fiducial methods`, `explain` and `cite`: everything from the method files, which are read and not imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from fiducial.app.cli.commands import Command, output_of, runs_option
from fiducial.app.cli.output import Table
from fiducial.app.cli.params import default_text
from fiducial.core import registry
from fiducial.core.errors import MethodError, nearest
from fiducial.core.registry import Card

if TYPE_CHECKING:
    from fiducial.core.run import Run


@click.command(cls=Command)
@click.argument("area", required=False)
@click.pass_context
def methods(context: click.Context, area: str | None) -> None:
    """List the methods of AREA, or all of them."""
    if area is not None and area not in registry.AREAS:
        raise MethodError(f"no area '{area}'", hint=nearest(area, registry.AREAS))
    cards = [c for c in registry.methods().values() if area in (None, c.area)]
    table = Table(("method", "role", "what it is"), [(c.name, c.role.lower(), c.title) for c in cards])
    data = {"methods": [_summary(c) for c in cards], "total": len(cards), "truncated": False}
    output_of(context).result(data, table if cards else f"no methods{' in ' + area if area else ''} yet")


@click.command(cls=Command)
@click.argument("method")
@click.pass_context
def explain(context: click.Context, method: str) -> None:
    """Say what METHOD does, when to use it, its options and its source."""
    card = registry.card(method)
    lines = [f"{card.name}: {card.title}", ""]
    lines += [f"{name}: {text}" for name, text in card.headings.items()]
    lines += ["", *(f"{key}: {text}" for key, text in _facts(card).items() if text), ""]
    lines += ["options:" if card.options else "options: none"]
    for option in card.options:
        default = "required" if option.required else f"default {default_text(option.default)}"
        lines.append(f"  {option.flag}  {option.type}, {default}")
        lines += [f"      {option.help}"] if option.help else []
    output_of(context).result(_detail(card), *lines, f"\nfiducial {card.area} {card.name.split('/')[1]} --help")


def _facts(card: Card) -> dict[str, str]:
    constants = card.constants
    tags = constants.get("tags")
    return {
        "role": card.role.lower(),
        "family": str(constants.get("family") or ""),
        "maturity": str(constants.get("maturity") or "stable"),
        "tags": " ".join(tags) if isinstance(tags, tuple | list) else "",
        "file": str(card.path),
    }


def _summary(card: Card) -> dict[str, Any]:
    return {"name": card.name, "role": card.role.lower(), "title": card.title}


def _detail(card: Card) -> dict[str, Any]:
    options = [{"name": o.name, "flag": o.flag, "type": o.type, "default": o.default, "required": o.required, "help": o.help} for o in card.options]
    facts: dict[str, Any] = _facts(card)
    return _summary(card) | facts | {"tags": facts["tags"].split(), "headings": card.headings, "options": options}


@click.command(cls=Command, params=[runs_option()])
@click.argument("run")
@click.pass_context
def cite(context: click.Context, run: str) -> None:
    """Print BibTeX for exactly the methods that RUN used."""
    from fiducial.core.run import Run

    opened = Run.open(run)
    entries: dict[str, str] = {}
    cards = used(opened)
    for card in cards:
        for key, text in bibtex(card):
            # two methods may rest on one paper: it is cited once, for the first
            entries.setdefault(key, text)
    output = output_of(context)
    output.result({"methods": [c.name for c in cards], "bibtex": list(entries.values())}, *entries.values(), run=opened.id)
    for card in cards:
        if not any(True for _ in bibtex(card)):
            output.note(f"{card.name} names no paper")


def used(run: Run) -> list[Card]:
    """Cards of the methods named in the run's command, its options, and the records it wrote, sorted by name."""
    known = registry.methods()
    named = {run.facts.command, *_strings(run.facts.options)}
    for path in run.path.rglob("*.jsonl"):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                named.update(_named(line))
    return [known[name] for name in sorted(named & known.keys())]


def _named(line: str) -> Iterator[str]:
    """Values under the keys by which records name methods. A torn last line is passed over."""
    try:
        row = json.loads(line)
    except ValueError:
        return
    if isinstance(row, dict):
        yield from (v for k in ("attack", "judge", "suite", "inspector", "gate", "annotator", "method", "objective") if isinstance(v := row.get(k), str))
        if isinstance(row.get("verdict"), dict):
            yield str(row["verdict"].get("judge", ""))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _all(value.values())
    elif isinstance(value, list | tuple):
        yield from _all(value)


def _all(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        yield from _strings(value)


ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d{7})")
AUTHORS = re.compile(r"((?:[A-Z][\w'’-]+(?: et al\.)?(?:, | and | & )?)+)\s*,?\s*\(?((?:19|20)\d{2})\)?[^;]*$")
LINK = re.compile(r"https?://[^\s,;)]+|doi:\S+[^\s.,;)]", re.IGNORECASE)


def bibtex(card: Card) -> Iterator[tuple[str, str]]:
    """(key, entry) of each paper in the card's Source heading: only what stands there, so no titles are invented.

    A source without an arXiv id is cited by its address, or in the words of the heading.
    """
    source = card.headings.get("Source", "")
    found = list(ARXIV.finditer(source))
    start = 0
    for match in found:
        before = source[start : match.start()]
        start = match.end()
        yield f"arxiv{match[1].replace('.', '_').replace('/', '_')}", _entry(card, source, before, eprint=match[1])
    if not found and source:
        link = LINK.search(source)
        where = {"howpublished": link[0]} if link else {}
        yield card.name.replace("/", "_"), _entry(card, source, source[: link.start()] if link else source, **where)


def _entry(card: Card, source: str, before: str, **where: str) -> str:
    """One @misc entry. `before` is the text in which authors and year may stand."""
    fields: dict[str, str] = {}
    authors = AUTHORS.search(before.rstrip(" ,.("))
    eprint = where.get("eprint", "")
    if authors:
        people = re.split(r", and |, | and | & ", authors[1].strip(" ,"))
        fields["author"] = " and ".join(people).replace(" et al.", " and others")
        fields["year"] = authors[2]
    elif re.match(r"\d{4}\.", eprint):
        fields["year"] = f"20{eprint[:2]}"
    fields |= where
    if eprint:
        fields |= {"archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{eprint}"}
    fields["note"] = f"{card.name} of fiducial: {source}"
    key = f"arxiv{eprint.replace('.', '_').replace('/', '_')}" if eprint else card.name.replace("/", "_")
    body = ",\n".join(f"  {name} = {{{_tex(text)}}}" for name, text in fields.items())
    return f"@misc{{{key},\n{body}\n}}"


def _tex(text: str) -> str:
    """BibTeX's special characters escaped; braces dropped, since unbalanced ones would end the field."""
    return re.sub(r"([&%$#_])", r"\\\1", text.replace("\\", "").replace("{", "").replace("}", "")) if "://" not in text[:8] else text
