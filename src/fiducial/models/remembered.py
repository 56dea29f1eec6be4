"""Models whose answers are kept in a file, so that work which asks them step by step can be done again from the beginning for nothing.

Whoever asks the same things in the same order is given the same answers, and so comes to where the work was interrupted, whatever it
decided on the way: nothing but the answers has to be kept. A model elsewhere is asked each conversation by itself, so that each answer is
kept as it comes. A call of a model whose weights are here is kept when it is complete, and an interrupted one made again as a whole: what such
a model answers can depend on what else is in the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from pydantic import Field

from fiducial.core.records import Completion, Conversation, Record, digest
from fiducial.core.store import Lines
from fiducial.models.base import Arrived, Model, WhiteBox

if TYPE_CHECKING:
    import torch

    from fiducial.models.forest import Paths
    from fiducial.models.scoring import Scores

HEAD = "head"
"""What scores of a model's head are kept as."""
SCORES = ("edge_logp", "edge_path", "path_logp", "path_len", "is_greedy")
"""What is kept of scores; float32 is the same again when it was written as text."""


class Call(Record):
    """One call of a model and what came of it; of a model elsewhere, one conversation of a call."""

    key: str
    """Hash of the model, of what was asked, and of how often it had been asked before."""
    completions: tuple[tuple[Completion, ...], ...] = ()
    """Of a call for answers."""
    scores: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Of a call for scores, by SCORES or HEAD."""


class Memory:
    """The calls in a file, and those to come."""

    def __init__(self, lines: Lines[Call]) -> None:
        self._lines = lines
        self._known = {call.key: call for call in lines.read()}
        self._asked: Counter[str] = Counter()
        self.unanswered = 0
        """Answers that a model elsewhere owed so far; they are asked for again when the work is done again."""

    def of(self, model: Model) -> Model:
        """The model with this memory; it and every model that is opened beside it ask the file first."""
        return RememberedWhiteBox(model, self) if isinstance(model, WhiteBox) else RememberedModel(model, self)

    def key(self, asked: Sequence[Any]) -> str:
        """What stands for asking this (plain JSON values) once more."""
        same = digest(asked)
        key = f"{same}-{self._asked[same]}"
        self._asked[same] += 1
        return key

    def known(self, key: str) -> Call | None:
        """The call that was kept under this key."""
        return self._known.get(key)

    def keep(self, call: Call) -> None:
        """Appends a call to the file, unless it failed or would be read back as another, as infinite scores would: then it is made again."""
        failed = any(c.finish == "error" for row in call.completions for c in row)
        if not failed and Call.parse(call.line()) == call:
            self._lines.append(call)

    def call(self, asked: Sequence[Any], answer: Callable[[str], Call]) -> Call:
        """What is known about the call `asked` (plain JSON values), else what `answer` gives for its key, kept."""
        key = self.key(asked)
        call = self.known(key)
        if call is None:
            call = answer(key)
            self.keep(call)
        return call


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
        """The completions that were kept for these conversations, else those of the model."""
        how = {"k": k, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop": list(stop), "seed": seed}
        return self._sampled(conversations, how, arrived or _nobody)

    @abstractmethod
    def _sampled(self, conversations: Sequence[Conversation], how: dict[str, Any], arrived: Arrived) -> list[tuple[Completion, ...]]:
        """The same; `how` holds the other arguments of `sample`."""

    def _asked(self, conversations: Sequence[Conversation], how: dict[str, Any]) -> list[Any]:
        """What identifies a call."""
        return [self.fingerprint, [[[m.role, m.content] for m in c] for c in conversations], *how.values()]

    def beside(self, uri: str) -> Model:
        """Another model, with the same memory."""
        return self._memory.of(self._model.beside(uri))

    def close(self) -> None:
        """Closes the model."""
        self._model.close()


@final
class RememberedModel(_Remembered):
    """A black box with a memory: only the conversations that have no answer yet are put to it."""

    def _sampled(self, conversations: Sequence[Conversation], how: dict[str, Any], arrived: Arrived) -> list[tuple[Completion, ...]]:
        keys = [self._memory.key(self._asked([c], how)) for c in conversations]
        rows: dict[int, tuple[Completion, ...]] = {}
        for index, key in enumerate(keys):
            if (call := self._memory.known(key)) is not None:
                rows[index] = call.completions[0]
                arrived(index, rows[index])
        missing = [index for index in range(len(keys)) if index not in rows]

        def keep(position: int, row: tuple[Completion, ...]) -> None:
            index = missing[position]
            if index not in rows:
                rows[index] = row
                if not self._model.unsendable(conversations[index]):
                    self._memory.unanswered += sum(c.finish == "error" for c in row)
                self._memory.keep(Call(key=keys[index], completions=(row,)))
                arrived(index, row)

        if missing:
            for position, row in enumerate(self._model.sample([conversations[i] for i in missing], **how, arrived=keep)):
                keep(position, row)
        return [rows[index] for index in range(len(keys))]


@final
class RememberedWhiteBox(_Remembered, WhiteBox):
    """A model whose weights are here, with a memory. Scores are kept where no gradients and no states are asked for."""

    def __init__(self, model: WhiteBox, memory: Memory) -> None:
        super().__init__(model, memory)
        self._box = model
        self.module, self.tokenizer, self.head = model.module, model.tokenizer, model.head

    @property
    def context(self) -> int:
        """As of the model."""
        return self._box.context

    def encode(self, conversation: Conversation, completion: str | None = None, *, end: bool = True) -> tuple[list[int], int]:
        """As the model does."""
        return self._box.encode(conversation, completion, end=end)

    def _sampled(self, conversations: Sequence[Conversation], how: dict[str, Any], arrived: Arrived) -> list[tuple[Completion, ...]]:
        def answer(key: str) -> Call:
            return Call(key=key, completions=tuple(self._box.sample(conversations, **how)))

        rows = list(self._memory.call(self._asked(conversations, how), answer).completions)
        for index, row in enumerate(rows):
            arrived(index, row)
        return rows

    def rated(self, ids: list[list[int]]) -> torch.Tensor:
        """The scores of the head that were kept for this call, else those of the model."""
        import torch

        def answer(key: str) -> Call:
            return Call(key=key, scores={HEAD: tuple(self._box.rated(ids).tolist())})

        return torch.tensor(self._memory.call([self.fingerprint, HEAD, ids], answer).scores[HEAD])

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


def _nobody(_: int, __: tuple[Completion, ...]) -> None:
    """Is told of answers and does nothing."""
