"""Writes docs/reference/methods.md from the cards of the methods, which are read from their files.

python scripts/reference.py            writes the page
python scripts/reference.py --check    exit code 1 when the page is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from fiducial.app.cli.area import stage_of
from fiducial.app.cli.main import AREAS
from fiducial.app.cli.params import default_text
from fiducial.core import registry
from fiducial.core.registry import HEADINGS, Card, Option

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "methods.md"
INTRODUCTION = """# Methods

Written by `python scripts/reference.py` from the methods' files; do not edit. The same text is printed by `fiducial explain METHOD`, and
`fiducial AREA METHOD --help` adds the options that come with the method's role.
"""


def cards() -> list[Card]:
    """The methods of this program, by name; those of plug-ins are left out."""
    return [card for card in registry.methods().values() if card.module.startswith("fiducial.")]


def page() -> str:
    """The whole page as Markdown."""
    known = cards()
    parts = [INTRODUCTION, _contents(known)]
    for area, text in AREAS.items():
        some = [card for card in known if card.area == area]
        if some:
            parts += [f"## {area}\n\n{text}\n", *map(_method, some)]
    parts.append("## Training options\n\nEvery objective takes these besides its own.\n\n" + "\n".join(_table(_training())) + "\n")
    return "\n".join(parts)


def _contents(known: Iterable[Card]) -> str:
    rows = [f"| [{card.name}](#{_anchor(card.name)}) | {card.role.lower()} | {_cell(card.title)} |" for card in known]
    return "\n".join(["| method | role | what it is |", "|---|---|---|", *rows, ""])


def _method(card: Card) -> str:
    file = f"src/{card.module.replace('.', '/')}.py"
    lines = [f"### {card.name}", "", card.title, "", f"`{_usage(card)}`, [{file}](../../{file})", ""]
    lines += [f"- **{name}**: {_text(text)}" for name, text in _facts(card)]
    lines += ["", *_table(card.options)] if card.options else ["", "No options."]
    return "\n".join([*lines, ""])


def _usage(card: Card) -> str:
    """The shortest command line: what the role needs is named, MODEL and other options have defaults."""
    needed = [f"{option.opts[0]} {option.metavar}" for option in stage_of(card).options() if option.required]
    return " ".join(["fiducial", *card.name.split("/"), *needed])


def _facts(card: Card) -> Iterator[tuple[str, str]]:
    yield "Role", card.role.lower()
    if family := card.constants.get("family"):
        yield "Family", str(family)
    if tags := card.constants.get("tags"):
        yield "Tags", ", ".join(tags)
    if (maturity := card.constants.get("maturity", "stable")) != "stable":
        yield "Maturity", str(maturity)
    yield from ((name, card.headings[name]) for name in HEADINGS if card.headings.get(name))


def _table(options: Iterable[Option]) -> list[str]:
    rows = [f"| `{o.flag}` | {_cell(o.type)} | {'required' if o.required else _cell(default_text(o.default))} | {_cell(o.help)} |" for o in options]
    return ["| option | type | default | meaning |", "|---|---|---|---|", *rows]


def _training() -> tuple[Option, ...]:
    return registry.options_in("fiducial.training.options", "TrainOptions")


def _text(text: str) -> str:
    """Plain text that Markdown shows as it stands."""
    for character in "\\*_<>[]":
        text = text.replace(character, f"\\{character}")
    return text


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _anchor(name: str) -> str:
    return name.replace("/", "")


def main() -> int:
    """Writes or checks the page; the exit code."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.relative_to(ROOT)} is {'up to date' if same else 'out of date: run python scripts/reference.py'}")
        return int(not same)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(cards())} methods")
    return 0


if __name__ == "__main__":
    sys.exit(main())
