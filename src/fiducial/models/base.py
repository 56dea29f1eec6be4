"""What every model can do, and what a model whose weights we hold can do besides. Importing this loads no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fiducial.core.records import Completion, Conversation

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fiducial.models.forest import Paths
    from fiducial.models.scorehead import ScoreHead
    from fiducial.models.scoring import Scores

Arrived = Callable[[int, tuple[Completion, ...]], None]
"""Called with (index of the conversation, its completions) as soon as they are there, in any order."""


class Model(ABC):
    """A black box: conversations in, completions out."""

    uri: str
    """How it was opened."""
    fingerprint: str
    """Identity of what answers: a hash of the weights, or the endpoint and its model name."""

    @abstractmethod
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
        """`k` completions per conversation, in order. Temperature 0 takes the likeliest token.

        A conversation whose last turn is the assistant's is continued from there. A completion that failed says so in `finish`
        and `error`; it is not an exception unless nothing can be had at all.
        """

    def unsendable(self, conversation: Conversation) -> str:
        """Why the model cannot be asked this at all, however often; empty where it can."""
        return ""

    def beside(self, uri: str) -> Model:
        """Another model, to be used together with this one and closed by whoever asked for it. Raises ModelError."""
        from fiducial.models import open as opening

        return opening.open(uri)

    def close(self) -> None:  # noqa: B027 most models hold nothing
        """Gives back what the model holds. Safe to call twice."""


class WhiteBox(Model):
    """A model whose weights are here: it can be scored, looked into and trained."""

    module: torch.nn.Module
    """The causal language model, in evaluation mode: no dropout, also while training."""
    tokenizer: Any
    """A Hugging Face tokenizer."""
    head: ScoreHead | None = None
    """Turns final states into scores, where the model was trained to give them."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Longest prompt and completion together, in tokens."""

    @abstractmethod
    def encode(self, conversation: Conversation, completion: str | None = None, *, end: bool = True) -> tuple[list[int], int]:
        """Token ids of the rendered conversation, and where the completion starts (their number when there is none).

        Prompt and completion are rendered and tokenised together; the start is the longest prefix that both share. The completion
        ends with the stop token, without the template's trailing newline; with `end=False` it stays open (a choice to be scored, a
        completion that was cut off).
        """

    @abstractmethod
    def score(self, paths: Paths, *, grad: bool = False, temperature: float = 1.0, hidden: Mapping[str, Any] | None = None) -> Scores:
        """Log-probabilities of the scored tokens of token sequences; see `fiducial.models.scoring`."""

    def rated(self, ids: list[list[int]]) -> torch.Tensor:
        """The score of each token sequence under the model's head; see `fiducial.models.scorehead.scores`."""
        from fiducial.models.scorehead import scores

        return scores(self, ids)
