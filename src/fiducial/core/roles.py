"""The roles a method can have: what it takes and what it gives.

A method is a frozen dataclass whose fields are its options, in one file `<area>/<method>.py`. Its name is its path.
Roles are abstract; methods are final. To vary a method, wrap it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from fiducial.core.records import Attempt, Conversation, Decision, Evidence, Finding, Group, Prompt, Score, Verdict
    from fiducial.models.base import Model, WhiteBox
    from fiducial.models.local import LocalModel
    from fiducial.training.loop import Report, TrainResult
    from fiducial.training.objective import GroupLogProbs

Sink = Callable[[Any], None]
"""Called with each record as soon as it exists, so that an interrupted run keeps what was done."""


def ignore(_: Any) -> None:
    """A sink that keeps nothing."""


class Method(ABC):  # noqa: B024 its roles add the abstract methods
    """A technique from the literature. Options are dataclass fields, each with a docstring."""

    maturity: ClassVar[Literal["stable", "trial"]] = "stable"
    tags: ClassVar[tuple[str, ...]] = ()
    """Identifiers in public catalogues, for example OWASP LLM or MITRE ATLAS."""

    @property
    def name(self) -> str:
        """`<area>/<method>`, from the module's path."""
        parts = type(self).__module__.split(".")
        return "/".join(parts[-2:])

    def options(self) -> dict[str, Any]:
        """The options as plain values; roles given as options are named by their own name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: _plain(v) for k, v in values.items()}


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Method) else tuple(map(_plain, value)) if isinstance(value, tuple) else value


class Attack(Method):
    """Turns goals into attempts on a model. Success is judged by someone else."""

    family: ClassVar[str]
    """The technique. Families, not single attacks, are held out when a repair is proved."""

    @abstractmethod
    def run(self, model: Model, prompts: Sequence[Prompt], *, seed: int = 0, max_tokens: int = 64, sink: Sink = ignore) -> list[Attempt]:
        """One attempt per prompt, in order; each also goes to `sink` as it comes. Nothing in `prompts` changes."""


class Judge(Method):
    """Gives a verdict on attempts."""

    @abstractmethod
    def judge(self, attempts: Sequence[Attempt]) -> list[Verdict]:
        """One verdict per attempt, in order. What cannot be judged is `not_scored`, never safe."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """Figures of one suite on one model and the record of every item."""

    scores: list[Score]
    items: list[dict[str, Any]]
    """Per item: what was asked, what came, how it was scored."""


class Suite(Method):
    """A fixed set of items with a scorer."""

    @abstractmethod
    def run(self, model: Model, *, limit: int | None = None, seed: int = 0, sink: Sink = ignore) -> SuiteResult:
        """Runs the first `limit` items (all when None)."""


class Inspector(Method):
    """Looks into a model for what its outputs may not show."""

    @abstractmethod
    def inspect(self, model: WhiteBox, base: WhiteBox | None = None) -> list[Finding]:
        """Findings about `model`, compared with `base` where one is given."""


class Maker(Method):
    """Produces groups to train on."""

    @abstractmethod
    def make(self, attempts: Sequence[Attempt], model: Model, *, seed: int = 0, sink: Sink = ignore) -> list[Group]:
        """Groups for the judged `attempts`, in order; an attempt that yields none is left out."""


Reading = Literal["tokens", "prompt", "values", "scores", "mismatched"]
"""`tokens`: the log-probability of each scored token. `prompt`: besides, those of the prompt, told apart from the answer's by the token's `answer`
of 0 or 1. `values`: besides, a linear head on the state before each of them. `scores`: a linear head on the state at the end of each
completion, and no log-probabilities. `mismatched`: besides, the log-probabilities of completions under the prompt of the group before them
in the step."""


class Objective(Method):
    """A loss over groups: a pure function of log-probabilities, or of the scores of a head."""

    reads: ClassVar[tuple[Reading, ...]] = ()
    """What the loss is a function of, beyond the summed log-probability of each completion."""
    least: ClassVar[int] = 1
    """Completions that a group must have at least; training leaves smaller ones out and counts them."""
    most: ClassVar[int | None] = None
    """Completions that a group may have at most; None = any number."""
    needs_reference: ClassVar[bool] = False
    """Whether reference log-probabilities must be supplied."""
    learning_rate: ClassVar[float] = 1e-5
    """Default for full fine-tuning, from the paper; LoRA takes ten times this."""
    controlled: ClassVar[bool] = False
    """Whether prepared completions hold control tokens (`models/control.py`), which training then gives to the model."""
    per_token: ClassVar[bool] = False
    """Whether losses are sums over the tokens of preferred completions, to be divided by those of the whole step; else by its groups."""
    higher_is: ClassVar[Literal["better", "worse"]] = "better"
    """What a higher score means, for an objective that trains a head; stored with the head."""

    @property
    def learns_from(self) -> str:
        """Which of several kinds of label its head learns from; stored with the head, since it says how scores are read."""
        return ""

    @abstractmethod
    def __call__(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> torch.Tensor:
        """Loss per group, shape [G], float32, in nats. The loop sums them, weighted, and divides by the sum of `size`."""

    def size(self, groups: GroupLogProbs) -> torch.Tensor:
        """What each group counts in the number that the losses of a step are divided by, [G]; known before any model is run."""
        return (groups.targets * groups.length).sum(1) if self.per_token else groups.weight.new_ones(len(groups.weight))

    def prepare(self, group: Group) -> Group:
        """The group as the loss wants it, for example without completions that do not enter it; left out when too few remain."""
        return group

    def metrics(self, policy: GroupLogProbs, reference: GroupLogProbs | None = None) -> dict[str, float]:
        """Figures worth logging beside the loss, means over the groups."""
        return {}


class Trainer(Method):
    """Trains a model with a loop that is not ours; what belongs to ours is an `Objective`."""

    def usual(self) -> dict[str, str]:
        """What its own configuration names for a command that does not: `model`, `data`, `dtype`. Raises ConfigError for one that cannot be used."""
        return {}

    @abstractmethod
    def train(self, model: LocalModel, data: Path, *, folder: Path, report: Report) -> tuple[LocalModel, TrainResult, dict[str, Any]]:
        """The trained model, how it went, and the settings that held, as plain values.

        Checkpoints of the loop lie below `folder`, from which it goes on when called again. Closes `model`.
        """


class Reward(Method):
    """Scores completions."""

    @abstractmethod
    def score(self, groups: Sequence[Group]) -> list[tuple[float | None, ...]]:
        """One value per completion of each group, higher is better; None where it cannot be scored."""

    def doubts(self, groups: Sequence[Group]) -> list[tuple[bool | None, ...]]:
        """Whether some step of each completion looks wrong; None where steps are not looked at."""
        return [(None,) * len(group.completions) for group in groups]

    def audited(self, groups: Sequence[Group]) -> list[tuple[tuple[float | None, ...], dict[str, Any]]]:
        """What `score` gives for each group, and what else is to be kept of it for audit, as plain JSON values."""
        return [(tuple(values), {}) for values in self.score(groups)]

    def refuse_unproven(self) -> None:
        """Raises MethodError where nothing shows that its values mean what they should; asked once before anything is learnt from them."""


class Guard(Method):
    """Stands between a user and a model."""

    @abstractmethod
    def check(self, conversation: Conversation) -> tuple[Verdict, Conversation]:
        """The verdict, and the conversation to go on with (rewritten or unchanged)."""


class Gate(Method):
    """Decides from evidence whether a model may go on."""

    @abstractmethod
    def decide(self, evidence: Sequence[Evidence]) -> Decision:
        """Pass, fail or insufficient, with a reason per rule. Missing evidence never passes."""


ROLES: dict[str, type[Method]] = {r.__name__: r for r in (Attack, Judge, Suite, Inspector, Maker, Objective, Trainer, Reward, Guard, Gate)}
"""Roles by class name, as a method file writes them in its class statement."""
