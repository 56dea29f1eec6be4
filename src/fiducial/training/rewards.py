"""Rewards from anywhere: methods of the role, and plain Python functions; several of them put on one scale and added up.

    def short(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [-len(text.split()) for text in completions]

is the reward `my_rewards:short`, or `path/to/file.py:short`. A function is called with keyword arguments, those of `prompts` (the last
user turns), `completions` (the answers) and `rows` (the `Prompt` records, with category, expected behaviour, reference answer) that it
takes. It gives one number per completion, higher is better; None where it cannot say. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, final

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Group, digest
from fiducial.core.roles import Reward

OFFERED = ("prompts", "completions", "rows")
"""What a reward function can ask for, by the names of its parameters."""

Values = list[tuple[float | None, ...]]
"""A value, or None, for every completion of every group."""


@final
class FunctionReward(Reward):
    """A function of the user's as a reward. Its name is the path it was given by. Raises ConfigError when there is no such function."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.function = _function(path)
        self._takes = _parameters(self.function, path)

    @property
    def name(self) -> str:
        """`module:function`."""
        return self.path

    def options(self) -> dict[str, Any]:
        """Where the function is, and a hash of its source where that can be had."""
        try:
            source = digest(inspect.getsource(self.function))
        except (OSError, TypeError):
            source = ""
        return {"function": self.path, "source": source}

    def score(self, groups: Sequence[Group]) -> Values:
        """What the function says. Raises DataError when it fails, or gives anything but one number or None per completion."""
        owners = [g.prompt for g in groups for _ in g.completions]
        given = {"prompts": [p.text for p in owners], "completions": [c.text for g in groups for c in g.completions], "rows": owners}
        if not owners:
            return [() for _ in groups]
        try:
            said = self.function(**{name: given[name] for name in self._takes})
        except Exception as error:  # boundary: a stranger's function
            raise DataError(f"the reward {self.path} failed: {type(error).__name__}: {error}", hint="try it on a few answers by itself") from error
        return _by_group(_numbers(said, len(owners), self.path), groups)


class Part(NamedTuple):
    """One reward of several."""

    reward: Reward
    weight: float = 1.0
    """How much it counts; 0 = it is only watched."""
    name: str = ""
    """What it is called in figures; the reward's own name when empty."""

    @property
    def label(self) -> str:
        """Its name in figures: without area, folder or module."""
        return self.name or self.reward.name.rpartition("/")[2].rpartition(":")[2]


class Scale(NamedTuple):
    """Mean and standard deviation of a reward on the samples it is standardised on."""

    mean: float = 0.0
    spread: float = 1.0


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several rewards. With more than one that counts, each is standardised before it is weighed, by `fitted`.

    A reward that says None for a whole group has nothing to do with its prompt, and the others decide; one that says None for some
    answers of a group makes those answers unscorable.
    """

    parts: tuple[Part, ...]
    scales: Mapping[str, Scale]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Mixture:
        """Raises ConfigError unless at least one counts and no two have one name, MethodError for one that counts and is not proved to mean anything."""
        labels = [p.label for p in parts]
        if not any(p.weight for p in parts):
            raise ConfigError("no reward counts", hint="give at least one reward with a weight other than 0")
        twice = next((name for name in labels if labels.count(name) > 1), "")
        if twice:
            raise ConfigError(f"two rewards are called '{twice}'", hint="give one of them a name: {reward: ..., name: ...}")
        for part in parts:
            if part.weight:
                part.reward.refuse_unproven()
        return cls(tuple(parts), {})

    @property
    def is_mixed(self) -> bool:
        """Whether scales are needed."""
        return sum(1 for p in self.parts if p.weight) > 1

    def components(self, groups: Sequence[Group]) -> dict[str, Values]:
        """What each reward says, by label. Raises DataError when one gives another number of values than there are completions."""
        return {label: [values for values, _ in said] for label, said in self.audited(groups).items()}

    def audited(self, groups: Sequence[Group]) -> dict[str, list[tuple[tuple[float | None, ...], dict[str, Any]]]]:
        """The same with what each reward keeps of each group for audit."""
        found = {}
        for part in self.parts:
            said = part.reward.audited(groups)
            if [len(values) for values, _ in said] != [len(g.completions) for g in groups]:
                raise DataError(f"the reward {part.reward.name} does not give one value per completion", hint="see Reward.score")
            found[part.label] = said
        return found

    def fitted(self, components: Mapping[str, Values]) -> Mixture:
        """With the scale of each reward on these samples; those of one that says the same of all keep a spread of 1."""
        if not self.is_mixed:
            return self
        return Mixture(self.parts, {label: scale(values) for label, values in components.items()})

    def quiet(self, components: Mapping[str, Values], least: int) -> list[str]:
        """Of rewards that have to be put on one scale, those that scored fewer than `least` of these samples."""
        if not self.is_mixed:
            return []
        return [p.label for p in self.parts if p.weight and sum(v is not None for group in components[p.label] for v in group) < least]

    def total(self, components: Mapping[str, Values]) -> Values:
        """The weighed sum per completion; None where a reward that has to do with the prompt could not say."""
        counted = [(p.weight, self.scales.get(p.label, Scale()), components[p.label]) for p in self.parts if p.weight]
        groups: Values = []
        for g in range(len(counted[0][2])):
            about = [(w, s, values[g]) for w, s, values in counted if any(v is not None for v in values[g])]
            groups.append(tuple(_weighed(about, k) for k in range(len(counted[0][2][g]))))
        return groups


def without_end(values: Values, groups: Sequence[Group], penalty: float) -> Values:
    """The values where an answer that was cut off before its end has `penalty` instead; what was not scored stays so.

    Source: the "EOS trick", Huang et al. 2024, arXiv:2403.17031.
    """
    return [
        tuple(penalty if v is not None and c.finish != "stop" else v for v, c in zip(row, group.completions, strict=True))
        for row, group in zip(values, groups, strict=True)
    ]


def scale(values: Values) -> Scale:
    """Mean and standard deviation of what was scored."""
    known = [v for group in values for v in group if v is not None]
    spread = stdev(known) if len(known) > 1 else 0.0
    return Scale(fmean(known) if known else 0.0, spread if spread > 1e-6 else 1.0)


def mean(values: Values) -> float:
    """Mean of what was scored; NaN for nothing."""
    known = [v for group in values for v in group if v is not None]
    return fmean(known) if known else math.nan


def _weighed(about: Sequence[tuple[float, Scale, tuple[float | None, ...]]], k: int) -> float | None:
    total = 0.0
    for weight, size, values in about:
        value = values[k]
        if value is None:
            return None
        total += weight * (value - size.mean) / size.spread
    return total if about else None


def is_function(text: str) -> bool:
    """Whether this is written as `module:function`."""
    module, colon, name = text.rpartition(":")
    return bool(colon) and bool(module) and name.isidentifier()


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(":")
    if not module or not name:
        raise ConfigError(f"'{path}' names no function", hint="write module:function, or path/to/file.py:function")
    try:
        loaded = _file(Path(module)) if module.endswith(".py") else _module(module)
    except Exception as error:  # boundary: importing runs a stranger's code
        raise ConfigError(f"'{module}' cannot be imported: {type(error).__name__}: {error}", hint="check the name, and that it is in this folder") from error
    function = getattr(loaded, name, None)
    if not callable(function):
        raise ConfigError(f"{module} has no function '{name}'", hint="check the spelling")
    return function  # type: ignore[no-any-return]


def _module(name: str) -> Any:
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python` itself does; an installed command does not
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"fiducial_reward_{digest(str(path.resolve()))}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parameters(function: Callable[..., Any], path: str) -> tuple[str, ...]:
    """Which of the offered arguments the function takes. Raises ConfigError when it needs another, or no completions."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return OFFERED
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    foreign = [name for name in needed if name not in OFFERED]
    taken = tuple(name for name in OFFERED if name in {p.name for p in parameters})
    if foreign or "completions" not in taken:
        raise ConfigError(f"the reward {path} takes {needed}", hint=f"its parameters are completions and, if it likes, {' and '.join(OFFERED[::2])}")
    return taken


def _numbers(said: Any, count: int, path: str) -> list[float | None]:
    values = said.tolist() if hasattr(said, "tolist") else said
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        size = f"{len(values)} values" if isinstance(values, Sequence) else type(said).__name__
        raise DataError(f"the reward {path} gave {size} for {count} completions", hint="give a list with one number or None per completion")
    found: list[float | None] = []
    for value in values:
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            raise DataError(f"the reward {path} gave {value!r}", hint="a reward is a number, or None where it cannot say") from None
        if number is not None and math.isinf(number):
            raise DataError(f"the reward {path} gave {number}", hint="bound it, or give None")
        found.append(None if number is None or math.isnan(number) else number)
    return found


def _by_group(values: Sequence[float | None], groups: Sequence[Group]) -> Values:
    rest = iter(values)
    return [tuple(next(rest) for _ in g.completions) for g in groups]
