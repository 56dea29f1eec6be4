"""Groups made ready for training: token ids, where scoring starts, and what does not depend on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import nan

import torch
from torch import Tensor

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Completion, Conversation, Group
from fiducial.core.roles import Objective
from fiducial.models.forest import Paths, common
from fiducial.models.local import UNLIMITED, LocalModel
from fiducial.training.objective import GroupLogProbs, layout, shares
from fiducial.training.options import TrainOptions
from fiducial.training.segments import worth

MERGED = 0.01
"""Share of the completions whose first token may reach into the prompt."""


@dataclass(frozen=True, slots=True)
class Data:
    """Tokenised groups: the paths of all completions, and where each group's paths are. May be built from tokens that were drawn."""

    groups: list[Group]
    names: list[str]
    """Id of each group as it was given, which may have held more completions."""
    paths: Paths
    """One per completion, in order."""
    first: list[int]
    """Index of each group's first path."""
    parts: GroupLogProbs
    """Laid out with their tokens if the objective reads them."""
    left_out: int = 0
    limit: int = UNLIMITED
    """Longest path, in tokens."""
    endless: int = 0
    """Completions that no end token closes, such as those that were cut: from them no stop is learnt."""

    @classmethod
    def of(cls, model: LocalModel, groups: Sequence[Group], objective: Objective, options: TrainOptions) -> Data:
        """The groups as the objective wants them; those that are too long or too small are left out and counted.

        Raises DataError when none is left, or where more than a hundredth of the completions has a token that begins in the prompt;
        ConfigError where more than completions is to be learnt from, or noise put on them, by an objective that does not imitate.
        """
        if options.learn != "completion" and not objective.per_token:
            raise ConfigError(f"{objective.name} compares completions, and learns nothing from what stands before them", hint="leave out --learn")
        if options.neftune and not objective.per_token:
            # other noise on each completion would be in every difference, and none of it in what the reference says
            raise ConfigError(f"neftune is noise on what is imitated, which {objective.name} does not do", hint="leave it out, or train with align/sft")
        limit = min(options.max_length, model.context)
        kept: list[Group] = []
        names: list[str] = []
        rows: list[tuple[list[int], int]] = []
        owner: list[int] = []
        lengths: list[list[int]] = []
        values: list[float] = []
        answers: list[float] = []
        endless, merged = 0, 0
        for given in groups:
            columns, group = _columns(objective.prepare(given), options.learn)
            own = _encoded(model, columns, options.learn)
            sizes = [len(ids) - start for ids, start in own]
            if len(own) < max(1, objective.least) or max(len(ids) for ids, _ in own) > limit or min(sizes) < 1:
                continue
            merged += _merged(model, columns, own) if options.learn != "all" else 0
            if "prompt" in objective.reads:
                answers += [float(place >= start) for ids, start in own for place in range(1, len(ids))]
                own = [(ids, 1) for ids, _ in own]
                sizes = [len(ids) - 1 for ids, _ in own]
            if "tokens" in objective.reads:
                values += [v for k, (asked, _) in enumerate(columns) for v in _values(model, group, k, asked, *own[k])]
            owner += [len(kept)] * len(own)
            rows += own
            endless += sum(ids[-1] not in model.chat.end_ids for ids, _ in own)
            lengths.append(sizes)
            kept.append(group)
            names.append(given.id)
        if not kept:
            hint = f"each needs {objective.least} completions or more and must fit into max_length; see the data"
            raise DataError(f"none of {len(groups)} groups can be trained on", hint=hint)
        if merged > MERGED * len(rows):
            said = f"in {merged} of {len(rows)} completions the first token begins in the prompt, so that it would be taught as no model is asked for it"
            raise DataError(said, hint="begin completions with a space or a new line, or give the model a chat template")
        first = [end - len(sizes) for sizes, end in zip(lengths, accumulate(map(len, lengths)), strict=True)]
        # a head reads the state at the end alone, and no log-probability is computed
        start = [len(ids) if "scores" in objective.reads else start for ids, start in rows]
        known = {"value": torch.tensor(values)} | ({"answer": torch.tensor(answers)} if "prompt" in objective.reads else {})
        parts = layout(kept, lengths, known if "tokens" in objective.reads else None)
        return cls(kept, names, Paths([ids for ids, _ in rows], start, owner), first, parts, len(groups) - len(kept), limit, endless)

    def paths_of(self, chosen: Sequence[int]) -> list[int]:
        """Indices of the paths of some groups."""
        return [self.first[g] + k for g in chosen for k in range(len(self.groups[g].completions))]

    def place(self, chosen: Sequence[int], per_path: Tensor) -> Tensor:
        """Numbers per path, in the order of `paths_of(chosen)`, as [G, K] with zeros where there is no completion."""
        mask = self.parts.mask[torch.as_tensor(list(chosen), dtype=torch.long)]
        where = mask.flatten().nonzero().squeeze(1)
        flat = torch.zeros(mask.numel(), dtype=per_path.dtype, device=per_path.device)
        return flat.index_put((where.to(per_path.device),), per_path).view(mask.shape)

    def mismatched(self, chosen: Sequence[int]) -> Paths:
        """Each completion of the group before under the prompt of each chosen group, the last one's under the first's.

        Where the group before is the same group (in a step over the border of two passes), it is the nearest other one before; where the
        step has no other, the one before it in the data. What is longer than `limit` is left out.
        """
        ids, start = [], []
        for i, g in enumerate(chosen):
            h = next((other for other in (chosen[i - back] for back in range(1, len(chosen))) if other != g), (g - 1) % len(self.groups))
            for k in range(len(self.groups[g].completions)):
                own, other = self.first[g] + k, self.first[h] + k % len(self.groups[h].completions)
                asked, answer = self.paths.ids[own][: self.paths.start[own]], self.paths.ids[other][self.paths.start[other] :]
                if len(asked) + len(answer) <= self.limit:
                    ids.append([*asked, *answer])
                    start.append(len(asked))
        return Paths(ids, start)


def _columns(group: Group, learn: str) -> tuple[list[tuple[Conversation, Completion]], Group]:
    """What is asked and answered in each path. Earlier answers of the assistant are paths of their own, each with the prompt that it answered.

    So every turn is taught as it would be asked for, whatever the template does to history, and shared beginnings cost nothing.
    """
    asked = group.prompt.messages
    own = [(asked, c) for c in group.completions]
    turns = [(asked[:i], Completion(text=m.content)) for i, m in enumerate(asked[:-1]) if m.role == "assistant" and i] if learn == "assistant" else []
    if not turns or not own:
        return own, group
    update = {
        "completions": (*(c for _, c in turns), *group.completions),
        "targets": (*(1.0 for _ in turns), *shares(group)),
        "rewards": (*(None for _ in turns), *group.rewards) if group.rewards is not None else None,
    }
    return [*turns, *own], group.model_copy(update=update)


def _encoded(model: LocalModel, columns: Sequence[tuple[Conversation, Completion]], learn: str) -> list[tuple[list[int], int]]:
    """Token ids and the first scored one. An answer that was cut off has no end: teaching one would teach to stop in mid-sentence."""
    rows = [model.encode(asked, c.text, end=c.finish != "length") for asked, c in columns]
    return [(ids, 1) for ids, _ in rows] if learn == "all" else rows


def _merged(model: LocalModel, columns: Sequence[tuple[Conversation, Completion]], rows: Sequence[tuple[list[int], int]]) -> int:
    """How many completions begin before the end of their prompt: a token was made of the end of one and the beginning of the other."""
    alone = {asked: model.encode(asked)[1] for asked, _ in columns}
    return sum(start < alone[asked] for (asked, _), (_, start) in zip(columns, rows, strict=True))


def _values(model: LocalModel, group: Group, k: int, asked: Conversation, ids: Sequence[int], start: int) -> list[float]:
    """The number that is known of each scored token. A token belongs to the part in which it ends; what follows the last part, to that."""
    completion = group.completions[k]
    if not completion.ends:
        reward = worth(group, k)
        return [nan if reward is None else reward] * (len(ids) - start)
    ends = [common(model.encode(asked, completion.text[:end], end=False)[0], ids) for end in completion.ends]
    found: list[float] = []
    for end, value in zip([*ends[:-1], len(ids)], completion.values, strict=True):
        found += [nan if value is None else value] * (end - start - len(found))
    return found
