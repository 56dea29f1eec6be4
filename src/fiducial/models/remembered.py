"""Models whose answers are kept in a file, so that work which asks them step by step can be done again from the beginning for nothing.

Whoever asks the same things in the same order is given the same answers, and so comes to where the work was interrupted, whatever it
decided on the way: nothing but the answers has to be kept. A call is kept when it is complete, and an interrupted one asked again as a
whole: what a local model answers can depend on what else is in the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from pydantic import Field

from fiducial.core.records import Completion, Conversation, Record, digest
from fiducial.core.store import Lines
from fiducial.models.base import Arrived, Model, WhiteBox

if TYPE_CHECKING:
    from fiducial.models.forest import Paths
    from fiducial.models.scoring import Scores

SCORES = ("edge_logp", "edge_path", "path_logp", "path_len", "is_greedy")
"""What is kept of scores; float32 is the same again when it was written as text."""


class Call(Record):
    """One call of a model and what came of it."""

    key: str
    """Hash of the model, of what was asked, and of how often it had been asked before."""
    completions: tuple[tuple[Completion, ...], ...] = ()
    """Of a call for answers."""
    scores: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Of a call for scores, by SCORES."""


class Memory:
    """The calls in a file, and those to come."""

    def __init__(self, lines: Lines[Call]) -> None:
        self._lines = lines
        self._known = {call.key: call for call in lines.read()}
        self._asked: Counter[str] = Counter()

    def of(self, model: Model) -> Model:
        """The model with this memory; it and every model that is opened beside it ask the file first."""
        return RememberedWhiteBox(model, self) if isinstance(model, WhiteBox) else RememberedModel(model, self)

    def call(self, asked: Sequence[Any], answer: Callable[[str], Call]) -> Call:
        """What is known about the call `asked` (plain JSON values), else what `answer` gives for its key, kept."""
        same = digest(asked)
        key = f"{same}-{self._asked[same]}"
        self._asked[same] += 1
        if key not in self._known:
            call = self._known[key] = answer(key)
            failed = any(c.finish == "error" for row in call.completions for c in row)
            if not failed and Call.parse(call.line()) == call:  # an infinite score would be read as none: it is asked for again, as what failed is
                self._lines.append(call)
        return self._known[key]


class _Remembered(Model):
    """What both kinds have in common."""

    def __init__(self, model: Model, memory: Memory) -> None:
        self._model, self._memory = model, memory
        self.uri, self.fingerprint = model.uri, model.fingerprint

    def sample(
        self,
        conversations: Sequence[Conversation],
        *,
        k: int = 1,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        arrived: Arrived | None = None,
    ) -> list[tuple[Completion, ...]]:
        """The completions that were kept for this call, else those of the model."""

        def answer(key: str) -> Call:
            found = self._model.sample(conversations, k=k, max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop=stop, seed=seed)
            return Call(key=key, completions=tuple(found))

        talks = [[[m.role, m.content] for m in c] for c in conversations]
        rows = list(self._memory.call([self.fingerprint, talks, k, max_tokens, temperature, top_p, list(stop), seed], answer).completions)
        for index, row in enumerate(rows if arrived else ()):
            arrived(index, row)  # type: ignore[misc]  # no rows where it is None
        return rows

    def beside(self, uri: str) -> Model:
        """Another model, with the same memory."""
        return self._memory.of(self._model.beside(uri))

    def close(self) -> None:
        """Closes the model."""
        self._model.close()


@final
class RememberedModel(_Remembered):
    """A black box with a memory."""


@final
class RememberedWhiteBox(_Remembered, WhiteBox):
    """A model whose weights are here, with a memory. Scores are kept where no gradients and no states are asked for."""

    def __init__(self, model: WhiteBox, memory: Memory) -> None:
        super().__init__(model, memory)
        self._box = model
        self.module, self.tokenizer = model.module, model.tokenizer

    @property
    def context(self) -> int:
        """As of the model."""
        return self._box.context

    def encode(self, conversation: Conversation, completion: str | None = None, *, end: bool = True) -> tuple[list[int], int]:
        """As the model does."""
        return self._box.encode(conversation, completion, end=end)

    def score(self, paths: Paths, *, grad: bool = False, temperature: float = 1.0, hidden: Mapping[str, Any] | None = None) -> Scores:
        """The scores that were kept for this call, else those of the model."""
        if grad or hidden is not None:
            return self._box.score(paths, grad=grad, temperature=temperature, hidden=hidden)
        import torch

        from fiducial.models.scoring import Scores

        def answer(key: str) -> Call:
            found = self._box.score(paths, temperature=temperature)
            return Call(key=key, scores={name: tuple(getattr(found, name).tolist()) for name in SCORES})

        kept = self._memory.call([self.fingerprint, paths.ids, paths.start, paths.group, temperature], answer).scores
        kinds = {"edge_path": torch.int64, "path_len": torch.int64, "is_greedy": torch.bool}
        tensors: dict[str, Any] = {name: torch.tensor(kept[name], dtype=kinds.get(name, torch.float32)) for name in SCORES}
        return Scores(**tensors)
