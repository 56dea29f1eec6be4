"""Completions as parts with a value each: the stream that pretraining with feedback learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fiducial.core.records import Completion, Group
from fiducial.training.objective import sides, unscored
from fiducial.training.rewards import Mixture


class Segment(NamedTuple):
    """One part of a completion."""

    text: str
    value: float | None
    """Higher is better; None = unknown."""


def segments(group: Group, k: int) -> list[Segment]:
    """The parts of completion `k`, which together are its text; what follows the last one belongs to it. The whole is one part where it has none."""
    completion = group.completions[k]
    if not completion.ends:
        return [Segment(completion.text, worth(group, k))]
    bounds = [0, *completion.ends[:-1], len(completion.text)]
    return [Segment(completion.text[a:b], value) for a, b, value in zip(bounds[:-1], bounds[1:], completion.values, strict=True)]


def worth(group: Group, k: int) -> float | None:
    """The value of a completion as a whole: its reward. Where there is but a preference or a label, 1 if it is the good one, -1 if not, None on a tie."""
    if group.rewards is None:
        return sides(group)[k]
    reward = group.rewards[k]
    return 2 * reward - 1 if reward is not None and unscored(group) else reward


def scored(groups: Sequence[Group], rewards: Mixture) -> list[Group]:
    """The groups with a value for every part of their completions, and a reward for every completion without parts, from `rewards`."""
    asked = [
        group.model_copy(
            update={
                "completions": tuple(Completion(text=s.text) for k in range(len(group.completions)) for s in segments(group, k)),
                "rewards": None,
                "targets": None,
            }
        )
        for group in groups
    ]
    components = rewards.components(asked)
    return [_valued(group, values) for group, values in zip(groups, rewards.fitted(components).total(components), strict=True)]


def _valued(group: Group, values: Sequence[float | None]) -> Group:
    completions, whole, at = [], [], 0
    for completion in group.completions:
        parts = values[at : at + (len(completion.ends) or 1)]
        at += len(parts)
        completions.append(completion.model_copy(update={"values": tuple(parts)}) if completion.ends else completion)
        whole.append(None if completion.ends else parts[0])
    rewards = tuple(whole) if any(w is not None for w in whole) else None
    return group.model_copy(update={"completions": tuple(completions), "rewards": rewards, "provenance": group.provenance | {"scored": True}})
