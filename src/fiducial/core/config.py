"""Options from a recipe and the command line: one pydantic model says what there is, and each value knows where it came from.

Precedence: command line, then the recipe, then the default. Errors name the file, the line, the key and the nearest known key.

    train:
      epochs: 3            # recipe.yaml:2
      learning_rate: 1e-4  # a number, though YAML 1.1 would read text here
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from fiducial.core.errors import ConfigError, FiducialError, nearest

Key = tuple[str | int, ...]
"""Where a value stands: ("train", "epochs"), or ("steps", 0, "model") below a list."""

Marks = dict[Key, str]
"""`file:line` of each key of a recipe."""

Origins = dict[Key, str]
"""Where each value came from: `command line`, `recipe.yaml:7` or `default`."""

M = TypeVar("M", bound=BaseModel)

FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)")
INT = re.compile(r"[-+]?(?:0|[1-9][\d_]*)|0x[\da-fA-F]+")
VERSION_KEY, VERSION = "fiducial", 1
"""How a recipe says in which version of its form it is written, and the newest there is. One that says nothing is of version 1."""
MOST_KEYS = 100_000
"""A few lines of YAML aliases can stand for billions of values; a recipe has no use for them."""
KEEP = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
"""Resolvers kept from YAML 1.1. Dates, octal, base 60 and on/off/yes/no are not: they surprise more often than they serve."""


class _Loader(yaml.SafeLoader):
    """Safe YAML whose plain scalars are read as in YAML 1.2, and in which a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' stands twice", key.start_mark)
                seen.add(key.value if isinstance(key.value, str) else repr(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in KEEP] for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{FLOAT.pattern})\Z"), list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"(?:{INT.pattern})\Z"), list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back the same."""


_Dumper.yaml_implicit_resolvers = {
    first: [*resolvers, *[pair for pair in _Loader.yaml_implicit_resolvers.get(first, []) if pair[0].endswith(("float", "int"))]]
    for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}


def refuse_idle(options: Any, names: Sequence[str], *, when: str, hint: str) -> None:
    """Raises ConfigError for one of the named fields of a method or of options that is not at its default: `when` says why it would do nothing."""
    described = type(options).model_fields.items() if isinstance(options, BaseModel) else [(f.name, f) for f in fields(options)]
    defaults = {name: field.default for name, field in described}
    for name in names:
        value = getattr(options, name)
        if value != defaults[name]:
            raise ConfigError(f"{name} has no effect {when}, but it is set to {value}", hint=hint)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # single quotes would spread text with line breaks over several lines, and the comment after it needs one
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_str)


def load_yaml(path: str | Path) -> tuple[Any, Marks]:
    """The document in a YAML file, and `file:line` of every key in it. Raises ConfigError with file, line and column."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8", hint="save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> tuple[Any, Marks]:
    """Like `load_yaml`, for text; `name` stands for the file in messages."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: not valid YAML: the character U+{error.character:04X} is not allowed", hint="is this a text file?") from error
    try:
        node = loader.get_single_node()
        marks: Marks = {(): f"{name}:1"}
        if node is None:
            return None, marks
        data = loader.construct_document(node)
        for key, line in _lines(node, ()):
            marks[key] = f"{name}:{line}"
            if len(marks) > MOST_KEYS:
                raise ValueError(f"more than {MOST_KEYS} keys once its aliases are written out")
        return data, marks
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}", hint="check the indentation, colons and quotes there") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}", hint="is this a text file?") from error
    except (ValueError, RecursionError, TypeError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}", hint="check the values in it") from error
    finally:
        loader.dispose()


def load_recipe(path: str | Path, *, hint: str = "see: fiducial loop --show-config") -> tuple[dict[str, Any], Marks]:
    """The options in a recipe file: nested dictionaries, and `file:line` of every key. An empty file has none. `hint` says where to see one.

    The version of the file, `fiducial: 1`, is no option and is taken out. Raises ConfigError for a later one than this program reads.
    """
    data, marks = load_yaml(path)
    if data is None:
        return {}, marks
    if not isinstance(data, dict):
        raise ConfigError(f"{marks[()]}: a recipe is a list of `option: value` lines, this is {_named(data)}", hint=hint)
    if VERSION_KEY in data:
        _refuse_version(data[VERSION_KEY], marks.get((VERSION_KEY,), marks[()]))
    return {name: value for name, value in data.items() if name != VERSION_KEY}, marks


def _refuse_version(version: Any, where: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"{where}: the version of a recipe is a whole number, this is {_named(version)}", hint=f"write {VERSION_KEY}: {VERSION}, or nothing")
    if version > VERSION:
        what = f"this recipe is of version {version}, and versions up to {VERSION} are read here"
        raise ConfigError(f"{where}: {what}", hint="update fiducial: what the new version means would be ignored")


def override(data: Mapping[str, Any], assignments: Iterable[str]) -> tuple[dict[str, Any], list[Key]]:
    """`data` with `train.epochs=3` and the like applied, values read as YAML; and the keys that were set. `data` is not changed.

    >>> override({"train": {"epochs": 1}}, ["train.epochs=3", "train.rate=1e-4"])
    ({'train': {'epochs': 3, 'rate': 0.0001}}, [('train', 'epochs'), ('train', 'rate')])
    """
    result, keys = _copy(data), []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"'{assignment}' is not of the form key=value", hint="for example train.epochs=3")
        value, _ = parse_yaml(text, name.strip())
        keys.append(_put(result, parts, value, assignment))
    return result, keys


def resolve(
    model: type[M],
    recipe: tuple[Mapping[str, Any], Marks] | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> tuple[M, Origins]:
    """The options: flags and overrides over the recipe over the defaults, with the origin of each.

    `recipe` is what `load_recipe` returns. `flags` are nested like the recipe or have dotted names; None stands for "not given".
    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    data, marks = recipe if recipe is not None else ({}, {})
    merged, typed = override(data, overrides)
    for name, value in (flags or {}).items():
        for key, leaf in _given((*name.split("."),), value):
            typed.append(_put(merged, list(map(str, key)), leaf, f"--{name}"))
    _refuse_unknown(model, merged, (), marks, typed)
    try:
        instance = model.model_validate(merged)
    except ValidationError as error:
        raise _explained(error, merged, marks, typed) from error
    origins = {key: _origin(key, merged, marks, typed) for key, _ in _leaves(_plain(instance), ())}
    return instance, origins


@contextmanager
def about(*key: str | int) -> Iterator[None]:
    """An error inside is about the option at `key`, or what it names stands below that."""
    try:
        yield
    except FiducialError as error:
        error.key = (*key, *error.key)
        raise


@contextmanager
def located(marks: Marks, typed: list[Key]) -> Iterator[None]:
    """An error inside that is about an option says the line of the recipe where that stands; not for one that was `typed`."""
    try:
        yield
    except FiducialError as error:
        line = "" if _where(error.key, marks, typed) == "command line" else _line(error.key, marks)
        if line:
            error.message = f"{line}: {error.message}"
        raise


def show(instance: BaseModel, origins: Origins, *, recipe: bool = False) -> str:
    """The options as YAML with the origin of each in a comment; loading it gives the same options. A `recipe` says its version first."""
    first = [f"{VERSION_KEY}: {VERSION}  # version of recipes"] if recipe else []
    return "\n".join([*first, *_shown(_plain(instance), (), origins, 0)]) + "\n"


def given(instance: BaseModel, origins: Origins) -> dict[str, Any]:
    """Only the options that the user set, nested like the model."""
    result: dict[str, Any] = {}
    for key, value in _leaves(_plain(instance), ()):
        if origins.get(key, "default") != "default":
            place: Any = result
            for part in key[:-1]:
                place = place.setdefault(part, {})
            place[key[-1]] = value
    return result


def _lines(node: yaml.Node, key: Key, depth: int = 0) -> Iterator[tuple[Key, int]]:
    if depth > 50:
        raise ValueError("nested more than 50 deep, or a part that contains itself")
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode):
                yield (*key, name.value), name.start_mark.line + 1
                yield from _lines(value, (*key, name.value), depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*key, index), value.start_mark.line + 1
            yield from _lines(value, (*key, index), depth + 1)


def _plain(instance: BaseModel) -> dict[str, Any]:
    """The options as values that YAML knows; infinity stays what it is."""
    plain: dict[str, Any] = to_jsonable_python(instance.model_dump(), inf_nan_mode="constants")
    return plain


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _put(data: dict[str, Any], parts: list[str], value: Any, said: str) -> Key:
    """Sets a nested value in place, making what is missing on the way; a number addresses an item of a list."""
    place: Any = data
    key: list[str | int] = []
    for part in parts[:-1]:
        if isinstance(place, list):
            place = place[_index(place, part, said)]
            key.append(int(part))
            if not isinstance(place, dict | list):
                raise ConfigError(f"'{said}': {'.'.join(map(str, key))} is {_named(place)}, which has no parts", hint=f"set {'.'.join(map(str, key))}=...")
        else:
            if not isinstance(place.get(part), dict | list):
                place[part] = {}
            place = place[part]
            key.append(part)
    last = parts[-1]
    if isinstance(place, list):
        place[_index(place, last, said)] = value
        return (*key, int(last))
    place[last] = value
    return (*key, last)


def _index(items: list[Any], part: str, said: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"'{said}': there is no item '{part}' in a list of {len(items)}", hint="items are counted from 0")
    return int(part)


def _given(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _given((*key, name), inner)
    elif value is not None:
        yield key, value


def _leaves(value: Any, key: Key) -> Iterator[tuple[Key, Any]]:
    """The values below `value` that are not mappings; an empty mapping is one."""
    if isinstance(value, dict) and (value or not key):
        for name, inner in value.items():
            yield from _leaves(inner, (*key, name))
    else:
        yield key, value


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model that an annotation holds: `Train`, `Train | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [m for m in map(_model_in, get_args(annotation)) if m is not None]
    return found[0] if len(found) == 1 else None


def _refuse_unknown(model: type[BaseModel], data: Mapping[str, Any], key: Key, marks: Marks, typed: list[Key]) -> None:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for name, value in data.items():
        here = (*key, name)
        if name not in fields:
            if model.model_config.get("extra") == "allow":
                continue
            group = f" in {'.'.join(map(str, key))}" if key else ""
            raise ConfigError(f"{_where(here, marks, typed)}: no option '{name}'{group}", hint=nearest(str(name), fields))
        annotation = fields[name].annotation
        inner = _model_in(annotation)
        if inner is not None and isinstance(value, dict) and not _is_mapping_of_models(annotation):
            _refuse_unknown(inner, value, here, marks, typed)
        elif inner is not None and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    _refuse_unknown(inner, item, (*here, index), marks, typed)


def _is_mapping_of_models(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) in (dict, Mapping)


def _explained(error: ValidationError, data: Mapping[str, Any], marks: Marks, typed: list[Key]) -> ConfigError:
    """The first thing pydantic objects to, with where the value was written."""
    first = error.errors(include_url=False)[0]
    *way, last = first["loc"] or ("",)
    key: list[str | int] = []
    value: Any = data
    for part in first["loc"]:
        inside = (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int) and part < len(value))
        if inside:  # otherwise a name of pydantic's for one branch of a union
            key.append(part)
            value = value[part]
    where = _where(tuple(key), marks, typed)
    if first["type"] == "missing":
        name = ".".join(map(str, [*key, last]))
        return ConfigError(f"{where}: the option '{name}' is needed", hint=f"set {name}=...")
    if first["type"] == "model_type":
        first["msg"] = "should be a group of options"
    what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "extra_forbidden":
        group = f" in {'.'.join(map(str, key[:-1]))}" if way else ""
        return ConfigError(f"{where}: no option '{last}'{group}", hint="see the result of --show-config")
    name = ".".join(map(str, key))
    if isinstance(value, dict) and first["type"] == "value_error":
        return ConfigError(f"{where}: {name}: {what}" if name else f"{where}: {what}", hint="change one of these options")
    return ConfigError(f"{where}: {name or 'the options'} is {_named(first['input'])}, but {what}", hint=f"change {name or 'the file'}")


def _where(key: Key, marks: Marks, typed: list[Key]) -> str:
    """Where a key, or else what it stands in, was written."""
    if any(key[: len(t)] == t for t in typed) or (key and key not in marks and any(t[: len(key)] == key for t in typed)):
        return "command line"
    for length in range(len(key), -1, -1):
        if key[:length] in marks:
            return marks[key[:length]]
    return "options"


def _origin(key: Key, merged: Mapping[str, Any], marks: Marks, typed: list[Key]) -> str:
    if any(key[: len(t)] == t or t[: len(key)] == key for t in typed):
        return "command line"
    value: Any = merged
    for part in key:
        if not isinstance(value, Mapping) or part not in value:
            return "default"
        value = value[part]
    return _line(key, marks) or "recipe"


def _line(key: Key, marks: Marks) -> str:
    """Where a key, or else the group or list that it stands in, is in the recipe; empty when it is not there."""
    return next((marks[key[:n]] for n in range(len(key), 0, -1) if key[:n] in marks), "")


def _named(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown(data: Mapping[str, Any], key: Key, origins: Origins, depth: int) -> Iterator[str]:
    for name, value in data.items():
        here = (*key, name)
        label = _inline(name)
        if isinstance(value, dict) and value:
            yield f"{'  ' * depth}{label}:"
            yield from _shown(value, here, origins, depth + 1)
        else:
            yield f"{'  ' * depth}{label}: {_inline(value)}  # {origins.get(here, 'default')}"


def _inline(value: Any) -> str:
    """One line of YAML for any value."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
