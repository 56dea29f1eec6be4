"""Finds methods by reading their files, without importing them.

A card holds what `fiducial methods` and `fiducial explain` print: the docstring's headings, the role, the options. It comes from
the syntax tree, so listing is fast and never loads torch. Third parties add a package of methods by the entry point group
`fiducial.methods`; each file `<area>/<module>.py` below it is one method.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fiducial.core.errors import ConfigError, MethodError, nearest
from fiducial.core.roles import ROLES, Method

log = logging.getLogger(__name__)

AREAS = ("attack", "evaluate", "oversee", "audit", "align", "guard", "deliberate", "govern")
HEADINGS = ("What it does", "Use it when", "Formula", "Defaults", "Limits", "Source")
ENTRY_POINTS = "fiducial.methods"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method: a dataclass field with its annotation, default and docstring as written."""

    name: str
    type: str
    default: Any
    required: bool
    help: str

    @property
    def flag(self) -> str:
        """The option as typed on the command line."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of a method from its file alone."""

    name: str
    role: str
    title: str
    headings: dict[str, str]
    options: tuple[Option, ...]
    module: str
    cls: str
    path: Path
    constants: dict[str, Any] = field(default_factory=dict)
    """Literal class constants such as `family`, `maturity`, `tags`."""

    @property
    def area(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/")[0]


def methods() -> dict[str, Card]:
    """Every method that can be found, by name. What is wrong with a plug-in is a warning, and costs only that plug-in's methods."""
    own = (read(path, name=f"{area}/{path.stem}", module=module) for area, module, path in _files())
    found = {card.name: card for card in own if card is not None}
    for point in entry_points(group=ENTRY_POINTS):
        for card in _plugged(point):
            if card.name in found and found[card.name].path != card.path:
                _warn(f"the method '{card.name}' of the plug-in '{point.name}' is left out: {found[card.name].module} has that name")
                continue
            found[card.name] = card
    return dict(sorted(found.items()))


def card(name: str, *, role: str | None = None) -> Card:
    """The card of one method. Raises MethodError with the nearest name when there is none, or when its role is another."""
    known = methods()
    if name not in known:
        short = [n for n in known if n.split("/")[1] == name and role in (None, known[n].role)]
        if len(short) != 1:
            raise MethodError(f"no method '{name}'", hint=nearest(name, known))
        name = short[0]
    found = known[name]
    if role is not None and found.role != role:
        raise MethodError(
            f"'{name}' is of the role {found.role.lower()}, but a method of role {role.lower()} is needed",
            hint=nearest("", [n for n, c in known.items() if c.role == role]),
        )
    return found


def load(name: str) -> type[Method]:
    """Imports the method's class."""
    found = card(name)
    cls: type[Method] = getattr(importlib.import_module(found.module), found.cls)
    return cls


def create(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method with the given options; unknown ones raise ConfigError with the nearest name."""
    found = card(name)
    known = {o.name for o in found.options}
    for key in options or {}:
        if key not in known:
            raise ConfigError(f"{found.name} has no option '{key}'", hint=nearest(key, known) if known else "it has no options", key=(key,))
    try:
        return load(name)(**dict(options or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{found.name}: {error}", hint=f"see: fiducial explain {found.name}") from error


def read(path: Path, *, name: str, module: str) -> Card | None:
    """The card in one file; None when it holds no class with a role."""
    return _read(path, name, module, path.stat().st_mtime_ns)


@cache
def _read(path: Path, name: str, module: str, _changed: int) -> Card | None:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise MethodError(f"{path}:{error.lineno}: not valid Python: {error.msg}", hint="correct the file, or take it away") from error
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            role = _role(node)
            if role and any(isinstance(d, ast.Name) and d.id == "final" for d in node.decorator_list):
                doc = inspect.cleandoc(ast.get_docstring(tree) or "")
                title, headings = split_docstring(doc)
                options, constants = _members(node)
                return Card(name, role, title, headings, options, module, node.name, path, constants)
    return None


def options_in(module: str, cls: str) -> tuple[Option, ...]:
    """The fields of a dataclass that is no method (training options), read from the module's file without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ()
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"), filename=spec.origin)
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
    return _members(found[0])[0] if found else ()


def split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """First line, and the text under each of the fixed headings, unfolded to single spaces."""
    title, _, rest = doc.partition("\n")
    headings: dict[str, str] = {}
    current = ""
    for line in rest.splitlines():
        match = re.match(r"([A-Z][A-Za-z ]+):\s*(.*)", line)
        if match and match[1] in HEADINGS:
            current = match[1]
            headings[current] = match[2].strip()
        elif current and line.strip():
            headings[current] = f"{headings[current]} {line.strip()}".strip()
    return title.strip(), headings


def _role(node: ast.ClassDef) -> str:
    """The role named in the class statement, or the role that a base named `<Something><Role>` stands for (PairObjective)."""
    for base in node.bases:
        if isinstance(base, ast.Name):
            for role in ROLES:
                if base.id == role or base.id.endswith(role):
                    return role
    return ""


def _members(node: ast.ClassDef) -> tuple[tuple[Option, ...], dict[str, Any]]:
    options, constants = [], {}
    body = node.body
    for index, item in enumerate(body):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if "ClassVar" in annotation:
                constants[item.target.id] = _literal(item.value)
                continue
            after = body[index + 1] if index + 1 < len(body) else None
            doc = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str) else ""
            options.append(Option(item.target.id, annotation, _literal(item.value), item.value is None, " ".join(doc.split())))
        elif isinstance(item, ast.Assign) and len(item.targets) == 1 and isinstance(item.targets[0], ast.Name) and not item.targets[0].id.startswith("_"):
            constants[item.targets[0].id] = _literal(item.value)
    return tuple(options), constants


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Field", "field"):
        # only what stands there as `default=` is a default that can be shown
        return next((_literal(k.value) for k in node.keywords if k.arg == "default"), None)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _files() -> Iterator[tuple[str, str, Path]]:
    """(area, module, path) of every file of ours that may hold a method."""
    root = Path(__file__).parent.parent
    for area in AREAS:
        for path in _modules(root / area):
            yield area, f"fiducial.{area}.{path.stem}", path


def _plugged(point: EntryPoint) -> Iterator[Card]:
    """The methods of one plug-in that can be read."""
    try:
        spec = importlib.util.find_spec(point.value)
    except Exception as error:  # boundary: finding `a.b` runs the code of `a`, which is a stranger's
        _warn(f"the plug-in '{point.name}' cannot be used: {point.value}: {type(error).__name__}: {error}")
        return
    if spec is None:
        _warn(f"the plug-in '{point.name}' cannot be used: there is no package {point.value}")
        return
    for location in spec.submodule_search_locations or []:
        for area in AREAS:
            for path in _modules(Path(location) / area):
                try:
                    card = read(path, name=f"{area}/{path.stem}", module=f"{point.value}.{area}.{path.stem}")
                except (MethodError, ValueError, OSError, RecursionError) as error:
                    _warn(f"the file {path} of the plug-in '{point.name}' cannot be read: {error}")
                    continue
                if card is not None:
                    yield card


@cache
def _warn(message: str) -> None:
    """A warning, once in a process however often methods are listed."""
    log.warning(message)


def _modules(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.glob("*.py")) if p.stem not in ("__init__", "base")]
