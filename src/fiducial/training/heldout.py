"""What a run has learnt on groups that it does not train on: loss and the objective's metrics, and whether they get worse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from statistics import fmean

from fiducial.core.errors import ConfigError
from fiducial.core.intervals import Mean, Rate, bootstrap, mean, paired_difference
from fiducial.core.records import Evidence, Group
from fiducial.data.split import place_of

Found = list[dict[str, float]]
"""Loss and metrics of each held-out group, as far as it has them."""
Together = dict[str, tuple[float, float, float]]
"""Figures of all held-out groups together, with the ends of their intervals."""
SHARES = ("accuracy", "displaced")
"""Metrics that are shares, of pairs or of groups."""
SALT = "held out of training"
DRAWS = 200
"""Of the bootstrap, at every look."""


def divided(groups: Sequence[Group], share: float) -> tuple[list[Group], list[Group]]:
    """Groups to train on, and groups held out: those of about `share` of the prompts, by hash, so that groups of one prompt stay together.
    Texts without a prompt go by themselves.

    Nothing is held out for a share of 0. Raises ConfigError when one of the two would be empty.
    """
    held = [bool(share) and place_of(_text(g), SALT) < share for g in groups]
    parts = ([g for g, out in zip(groups, held, strict=True) if not out], [g for g, out in zip(groups, held, strict=True) if out])
    if share and not all(parts):
        said = f"held_out={share:g} of {len(groups)} groups leaves {len(parts[0])} to train on and {len(parts[1])} to look at"
        raise ConfigError(said, hint="give another share, or more data")
    return parts


def _text(group: Group) -> str:
    return group.prompt.text or next((c.text for c in group.completions), "")


def together(metrics: Callable[[Sequence[int]], Mapping[str, float]], names: Sequence[str], groups: int) -> Together:
    """Those of some metrics that are of a whole set of groups, with intervals by drawing groups; `metrics` is given the indices of a draw."""
    said = {name: value for name, value in metrics(range(groups)).items() if name in names}
    spread = bootstrap(lambda rows: {name: value for name, value in metrics(rows).items() if name in said}, groups, draws=DRAWS) if said else {}
    # drawing groups twice makes bins less even, so that an interval of the calibration error may lie above it
    return {name: (said[name], min(low, said[name]), max(high, said[name])) for name, (low, high) in spread.items()}


def figures(found: Found) -> dict[str, float]:
    """Mean of each metric over the groups that have it, and their number."""
    names = dict.fromkeys(name for each in found for name in each)
    return {"groups": float(len(found))} | {name: fmean(each[name] for each in found if name in each) for name in names}


def intervals(found: Found) -> dict[str, Mean | Rate]:
    """The same with what an interval needs. A share of groups that are right or wrong is a rate."""
    known: dict[str, Mean | Rate] = {}
    for name in dict.fromkeys(name for each in found for name in each):
        values = [each[name] for each in found if isfinite(each.get(name, nan))]
        whole = name in SHARES and all(v in (0.0, 1.0) for v in values)
        known[f"held-out {name}"] = Rate(round(sum(values)), len(values)) if whole else mean(values)
    return known


def evidence(found: Together, groups: int) -> list[Evidence]:
    """The figures of all groups together, as evidence."""
    return [Evidence(name=f"held-out {name}", value=value, n=groups, low=low, high=high) for name, (value, low, high) in found.items()]


def rule(looks: Sequence[Mapping[str, float]], before: Found, after: Found) -> tuple[bool, str]:
    """Whether held-out groups got no worse, in a sentence; `before` and `after` are the first and the last look by group.

    They got worse when the interval of the paired differences lies wholly on that side, or when each of the last two looks was worse than the one before.
    """
    by = _judged(looks)
    sign = 1 if by == "accuracy" else -1
    pairs = [(now[by], then[by]) for now, then in zip(after, before, strict=True) if by in now and by in then]
    change = paired_difference([now for now, _ in pairs], [then for _, then in pairs])
    best = max(sign * bound for bound in change.interval())
    said = f"{by} on {len(pairs)} held-out groups is {looks[-1][by]:.3g}, and was {looks[0][by]:.3g} (change {change})"
    return (False, f"{said}; it got worse twice running") if falling(looks) else (not best < 0, said)


def falling(looks: Sequence[Mapping[str, float]]) -> bool:
    """Whether held-out groups got worse in each of the last two looks."""
    by = _judged(looks)
    last = [look[by] if by == "accuracy" else -look[by] for look in looks[-3:]]
    return len(last) == 3 and last[2] < last[1] < last[0]


def _judged(looks: Sequence[Mapping[str, float]]) -> str:
    """What looks are judged by: accuracy, higher = better, or the loss where nothing is compared."""
    return "accuracy" if all("accuracy" in look for look in looks) else "loss"
