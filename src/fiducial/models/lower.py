"""What a model's first blocks make of sequences that are run again and again, kept while nothing in those blocks changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fiducial.models.forest import Paths, Row, Tokens
from fiducial.models.passes import Given


@dataclass(frozen=True, slots=True, eq=False)
class Lower:
    """Outputs of the last of the first `blocks` blocks, for every token of some paths that the network sees; what paths share in a row once."""

    blocks: int
    """How many blocks, at least one."""
    states: Tensor
    """[T, D], on the CPU."""
    places: Mapping[Tokens, Tensor]
    """All tokens of a path -> where the states of those that are fed stand in `states`, [n]."""
    bare: bool
    """Whether the model's blocks hand over tensors, not tuples."""

    def of(self, row: Row, paths: Paths) -> Given | None:
        """The states of a row's nodes, whatever its layout; None where some of its paths are not known, or it is run in two calls."""
        places = [known for index in row.paths if (known := self.places.get(tuple(paths.ids[index]))) is not None]
        if row.form == "kv" or len(places) < len(row.paths):
            return None
        lengths = [len(each) for each in places]
        first, length = torch.tensor([0, *accumulate(lengths)]), torch.tensor(lengths)
        if bool((row.pos >= length[row.branch]).any()):  # the path was fed without its last token
            return None
        return Given(self.blocks, self.states[torch.cat(places)[first[row.branch] + row.pos]], self.bare)


def chains(row: Row, paths: Paths) -> dict[Tokens, Tensor]:
    """The nodes along each path of a row, from its first token to the last that is fed, [n] each; of equal paths the longest."""
    parent, last = row.parent.tolist(), row.prompt_end.tolist()
    for path, node in zip(row.edge_path.tolist(), row.edge_parent.tolist(), strict=True):
        last[path] = node  # edges are ordered by step
    last = [node if leaf < 0 else leaf for node, leaf in zip(last, row.leaves.tolist(), strict=True)]
    found: dict[Tokens, Tensor] = {}
    for index, node in zip(row.paths, last, strict=True):
        chain = []
        while node >= 0:
            chain.append(node)
            node = parent[node]
        tokens = tuple(paths.ids[index])
        if len(chain) > len(found.get(tokens, ())):
            found[tokens] = torch.tensor(chain[::-1], dtype=torch.int64)
    return found
