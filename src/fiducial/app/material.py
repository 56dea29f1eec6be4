"""What the loop asks: harmful goals with their twins and ordinary prompts, divided into splits before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fiducial.core.errors import ConfigError
from fiducial.core.records import Prompt, digest
from fiducial.data.split import place_of


@dataclass(frozen=True, slots=True)
class Material:
    """Prompts of one split."""

    goals: list[Prompt]
    twins: list[Prompt]
    ordinary: list[Prompt]
    near: list[Prompt] = field(default_factory=list)

    @property
    def direct(self) -> list[Prompt]:
        """Everything that is asked without an attack."""
        return [*self.goals, *self.twins, *self.near, *self.ordinary]

    def first(self, count: int, *, near: float = 0.2) -> Material:
        """`count` goals with their twins, `near` times as many near twins, and two thirds as many ordinary prompts, at least 50, in the languages of the
        goals and in their shares, as far as there are such. Chosen by hash, whatever the order in the file; near twins of other goals fill up."""
        ranks = {p.text: i for i, p in enumerate(sorted(self.goals, key=lambda p: digest(p.text)))}
        goals, twins = ([p for p in some if ranks[of(p)] < count] for some, of in ((self.goals, lambda p: p.text), (self.twins, lambda p: p.twin)))
        close = sorted(self.near, key=lambda p: ranks.get(p.twin, len(ranks)))[: round(near * count)]
        return Material(goals, twins, self._alike(goals, max(50, 2 * count // 3)), close)

    def learnt(self, near: float = 0.0) -> list[Prompt]:
        """What is asked to be learnt from: all goals, and what is harmless beside them. The larger the share of the near twins, the smaller that of the
        looser twins and of the ordinary prompts, of which a twelfth is left when all near twins are in: the harmless stay about as many."""
        rest = 1 - 11 / 12 * near if self.near else 1.0
        return [*self.goals, *_share(self.twins, rest), *_share(self.near, near), *_share(self.ordinary, rest)]

    def _alike(self, goals: Sequence[Prompt], count: int) -> list[Prompt]:
        """`count` ordinary prompts in the languages of the goals, filled up with others."""
        spoken = Counter(p.language for p in goals)
        places: Counter[str] = Counter()
        fitting, others = [], []
        for prompt in sorted(self.ordinary, key=lambda p: digest(p.text)):
            room = places[prompt.language] < round(count * spoken[prompt.language] / max(1, len(goals)))
            places[prompt.language] += room
            (fitting if room else others).append(prompt)
        return [*fitting, *others][:count]

    def attacked(self, count: int, twins: int) -> list[Prompt]:
        """`count` goals, and the twins of the first `twins` of them, the same ones for every attack."""
        return [*self.first(count).goals, *self.first(twins).twins]


def _share(prompts: Sequence[Prompt], share: float) -> list[Prompt]:
    """About this share of the prompts, chosen by hash."""
    return [p for p in prompts if place_of(p.text, "learnt") < share]


def material(goals: str) -> dict[str, Material]:
    """Prompts by split. Ordinary prompts and near twins are the shipped ones."""
    from fiducial.data.load import near_twins, ordinary, prompts, twin_of
    from fiducial.data.split import SPLITS, normalised, split

    chosen = list({normalised(p.text): p for p in reversed(prompts(goals))}.values())[::-1]  # a goal that stands twice is one trial
    near = {p.twin: p for p in near_twins()} if goals == "shipped" else {}
    parts, plain = split(chosen), split(ordinary())
    found: dict[str, Material] = {}
    places: dict[str, str] = {}
    for name in SPLITS:
        own = [p for p in parts.get(name, []) if p.expected == "refuse"]
        twins = [t for t in map(twin_of, own) if t is not None]
        for twin in twins:
            if places.setdefault(normalised(twin.text), name) != name:
                raise ConfigError(
                    f"the twin '{twin.text}' belongs to goals of two splits, so it would be trained on and held out", hint="give each goal a twin of its own"
                )
        found[name] = Material(own, twins, plain.get(name, []), [near[p.text] for p in own if p.text in near])
    if not any(m.twins for m in found.values()):
        raise ConfigError(
            f"{goals} has no benign twins, so refusing everything would look like a repair", hint="add a column `twin` with a harmless counterpart of each goal"
        )
    return found
