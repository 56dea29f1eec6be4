"""Command line options from the fields of methods: an annotation as written becomes a click parameter, without importing the method.

Values stay plain (numbers, text, lists; a method by its name), so that what a flag, a recipe and a run's record hold is the same.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import click

from fiducial.core.registry import Option
from fiducial.core.roles import ROLES

SEQUENCES = frozenset({"tuple", "list", "Sequence", "set", "frozenset", "Iterable"})


@final
class MethodName(click.ParamType):
    """The name of a method of one role; the value is its full name."""

    name = "method"

    def __init__(self, role: str) -> None:
        self.role = role

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """The role in capitals."""
        return self.role.upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Raises MethodError with the nearest name when there is no such method of this role."""
        from fiducial.core import registry

        return registry.card(str(value), role=self.role).name

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """The names of the role's methods."""
        from click.shell_completion import CompletionItem

        from fiducial.core import registry

        return [CompletionItem(c.name) for c in registry.methods().values() if c.role == self.role and c.name.startswith(incomplete)]


@final
class Yaml(click.ParamType):
    """Anything that can be written as YAML: the type of fields for which no simpler one fits."""

    name = "yaml"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The parsed value, by the rules of recipes. Raises ConfigError."""
        from fiducial.core.config import parse_yaml

        name = f"--{(param.name if param else self.name or '').replace('_', '-')}"
        return parse_yaml(value, name)[0] if isinstance(value, str) else value


@final
class OrNone(click.ParamType):
    """Another type, or the word `none`."""

    def __init__(self, inner: click.ParamType) -> None:
        self.inner, self.name = inner, inner.name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """That of the other type."""
        return self.inner.get_metavar(param, ctx)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """None for `none`."""
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return self.inner.convert(value, param, ctx)


@final
class Literals(click.Choice):
    """One of a few values, which may be numbers."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__([str(v) for v in values])
        self.values = {str(v): v for v in values}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value itself, not its spelling."""
        return self.values[super().convert(str(value), param, ctx)]


@dataclass(frozen=True, slots=True)
class Shape:
    """How an annotation is given on the command line."""

    type: click.ParamType
    many: bool = False
    """The flag may be repeated."""
    nargs: int = 1
    optional: bool = False
    """None is a value of its own."""

    @property
    def is_flag(self) -> bool:
        """Whether it is `--x/--no-x`."""
        return self.type is click.BOOL and not self.many and not self.optional

    @property
    def role(self) -> str:
        """The role whose method is named; empty when it is an ordinary value."""
        return self.type.role if isinstance(self.type, MethodName) else ""


USUAL = {"Judge": "oversee/compliance"}
"""The method of a role that is taken where none is named."""

_PLAIN = {"int": click.INT, "float": click.FLOAT, "bool": click.BOOL, "str": click.STRING, "Path": click.STRING}


def shape(annotation: str) -> Shape:
    """The shape of an annotation as it stands in the source.

    >>> shape("tuple[int, ...]").many, shape("float | None").optional, shape("Judge").role
    (True, True, 'Judge')
    """
    return _shape(ast.parse(annotation, mode="eval").body)


def _shape(node: ast.expr) -> Shape:
    match node:
        case ast.Constant(value=str(inner)):
            return shape(inner)
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return Shape(MethodName(name)) if name in ROLES else Shape(_PLAIN.get(name, Yaml()))
        case ast.BinOp(op=ast.BitOr()):
            return _union(_members(node))
        case ast.Subscript(value=ast.Name(id=head) | ast.Attribute(attr=head), slice=inside):
            return _subscript(head, inside.elts if isinstance(inside, ast.Tuple) else [inside])
    return Shape(Yaml())


def _subscript(head: str, parts: list[ast.expr]) -> Shape:
    if head in ("Optional", "Union"):
        return _union([*parts, ast.Constant(None)] if head == "Optional" else parts)
    if head == "Annotated":
        return _shape(parts[0])
    if head == "Literal":
        values = [p.value for p in parts if isinstance(p, ast.Constant)]
        return Shape(Literals([v for v in values if v is not None]), optional=None in values)
    if head in SEQUENCES:
        return _sequence(head, parts)
    return Shape(Yaml())


def _sequence(head: str, parts: list[ast.expr]) -> Shape:
    variadic = head != "tuple" or (isinstance(parts[-1], ast.Constant) and parts[-1].value is ...)
    inner = [_shape(p) for p in parts if not (isinstance(p, ast.Constant) and p.value is ...)]
    if any(i.many or i.nargs > 1 for i in inner):
        return Shape(Yaml())
    if variadic:
        return Shape(inner[0].type, many=True)
    return Shape(click.Tuple([i.type for i in inner]), nargs=len(inner)) if len(inner) > 1 else Shape(inner[0].type, many=True)


def _members(node: ast.expr) -> list[ast.expr]:
    return [*_members(node.left), *_members(node.right)] if isinstance(node, ast.BinOp) else [node]


def _union(parts: list[ast.expr]) -> Shape:
    shapes = [_shape(p) for p in parts if not (isinstance(p, ast.Constant) and p.value is None)]
    optional = len(shapes) < len(parts)
    if len(shapes) != 1:
        return Shape(Yaml(), optional=optional)
    return replace(shapes[0], optional=optional or shapes[0].optional)


def parameter(option: Option) -> click.Option:
    """The click option of one field. It has no default of its own: what is not given is left to the method."""
    kind, filled = shape(option.type), default(option)
    names = [f"{option.flag}/--no-{option.flag[2:]}" if kind.is_flag else option.flag, option.name]
    required = option.required and filled is None
    text = option.help + ("" if required else f" [default: {default_text(filled)}]")
    if kind.is_flag:
        return click.Option(names, type=click.BOOL, default=None, required=required, help=text)
    wrapped = OrNone(kind.type) if kind.optional and kind.nargs == 1 else kind.type
    return click.Option(names, type=wrapped, multiple=kind.many, nargs=kind.nargs, required=required, help=text)


def default(option: Option) -> Any:
    """The field's default; for a required method, the one that serves in most cases, where there is one. Otherwise None."""
    return USUAL.get(shape(option.type).role) if option.required else option.default


def default_text(value: Any) -> str:
    """A default as help shows it.

    >>> default_text(("a", "b")), default_text(None), default_text(0.1), default_text(False)
    ('a b', 'none', '0.1', 'off')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return " ".join(str(v) for v in value) or "empty"
    return str(value) or "empty"


def from_recipe(parameter: click.Parameter, value: Any, context: click.Context) -> Any:
    """A recipe's value under the same rules as the flag: text and numbers are spelled out, so that 1.5 is no whole number."""
    if isinstance(parameter, click.Option) and parameter.multiple:
        value = [value] if not isinstance(value, list | tuple) else value
        return tuple(parameter.type.convert(_spelled(v), parameter, context) for v in value)
    if parameter.nargs > 1:
        return parameter.type.convert(value, parameter, context)
    return None if value is None else parameter.type.convert(_spelled(value), parameter, context)


def _spelled(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value
