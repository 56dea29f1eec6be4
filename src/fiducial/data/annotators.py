"""Several annotators of the same items: one soft label per item, how reliable each annotator is, how far they agree.

    {"item": "answer 17", "annotator": "Mara", "label": "harmful"}

Rows of preferences with a column `annotator` count too: there the item is the prompt with its two answers, the label the answer that was
preferred. Aggregation: Dawid and Skene 1979, by expectation maximisation. Agreement: Krippendorff's alpha (2011) with an interval from
resampled items.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Literal, NamedTuple

from fiducial.core.errors import DataError
from fiducial.core.records import Group, digest
from fiducial.data.formats import best
from fiducial.data.rows import Row

if TYPE_CHECKING:
    import numpy as np

Scale = Literal["nominal", "ordinal", "interval"]

SMOOTHING = 0.01
"""Added to every count of a confusion matrix, so that nothing that an annotator has not done yet is impossible."""
TOLERANCE = 1e-6
"""Change of a probability below which the labels have settled."""
MOST_ROUNDS = 500
MOST_DIGITS = 28
"""Of a label that is read as a number, which are the digits that arithmetic on decimals keeps."""
LEVEL = 0.95


class Vote(NamedTuple):
    """What one annotator said of one item."""

    item: str
    annotator: str
    label: str


@dataclass(frozen=True, slots=True)
class Consensus:
    """What the votes amount to."""

    labels: tuple[str, ...]
    """The classes, in the order of all tables."""
    items: dict[str, tuple[float, ...]]
    """Probability of each class, per item."""
    confusion: dict[str, tuple[tuple[float, ...], ...]]
    """Per annotator: probability of saying column when row is true."""
    prior: tuple[float, ...]
    """Share of each class."""
    rounds: int
    """Rounds of expectation maximisation."""

    def accuracy(self, annotator: str) -> float:
        """Estimated probability that the annotator says what is true, over the shares of the classes."""
        table = self.confusion[annotator]
        return sum(p * table[i][i] for i, p in enumerate(self.prior))


@dataclass(frozen=True, slots=True)
class Agreement:
    """Krippendorff's alpha: 1 = perfect agreement, 0 = what chance gives, below 0 = systematic disagreement."""

    alpha: float
    """NaN where it is not defined: no item with two labels, or all labels alike."""
    low: float
    high: float
    """Percentile interval at 95 % over resampled items."""
    items: int
    """Items with at least two labels; others tell nothing about agreement."""
    labels: int
    """Labels on those items."""

    def __str__(self) -> str:
        return f"{self.alpha:.3f} ({self.low:.3f} to {self.high:.3f}, {self.labels} labels on {self.items} items)"


def read_votes(rows: Sequence[Row]) -> list[Vote]:
    """Votes from rows with item, annotator and label; a label that is a number is one however it is written. Raises DataError with `file:line`."""
    votes = []
    for where, values in rows:
        lower = {str(k).strip().lower(): v for k, v in values.items()}
        missing = [name for name in ("item", "annotator", "label") if lower.get(name) is None or not str(lower[name]).strip()]
        if missing:
            raise DataError(f"{where}: no {' and no '.join(missing)} in this row", hint='write {"item": "...", "annotator": "...", "label": "..."}')
        item, annotator, label = (str(lower[name]).strip() for name in ("item", "annotator", "label"))
        votes.append(Vote(item, annotator, _written(label)))
    return votes


def _written(label: str) -> str:
    """One writing of each number, other labels as they are.

    >>> [_written(label) for label in ("1.0", "01", "-0", "2.50", "1e3", "nan", "1_0", "B")]
    ['1', '1', '0', '2.5', '1000', 'nan', '1_0', 'B']
    """
    if "_" in label:
        return label
    try:
        value = Decimal(label)
    except InvalidOperation:
        return label
    # a longer number would lose digits, and one with a large exponent be written in very many
    if not value.is_finite() or len(label) > MOST_DIGITS or abs(value.adjusted()) > MOST_DIGITS:
        return label
    return f"{value.normalize():f}" if value else "0"


def votes_of(groups: Sequence[Group]) -> tuple[list[Vote], dict[str, Group]]:
    """Votes from groups that say who preferred what, and one group per item with its answers in a fixed order, without a label.

    The label is the index of the preferred answer as text. Groups without an annotator or without a preferred answer give no vote.
    """
    votes: list[Vote] = []
    items: dict[str, Group] = {}
    for group in groups:
        order = sorted(range(len(group.completions)), key=lambda i: group.completions[i].text)
        top = best(group)
        if not group.annotator or top is None or len(order) < 2:
            continue
        texts = [group.completions[i].text for i in order]
        item = digest([[m.model_dump(mode="json") for m in group.prompt.messages], texts])
        kept = group.model_copy(update={"completions": tuple(group.completions[i] for i in order), "rewards": None, "targets": None, "annotator": ""})
        items.setdefault(item, kept)
        votes.append(Vote(item, group.annotator, str(order.index(top))))
    return votes, items


def dawid_skene(votes: Sequence[Vote], labels: Sequence[str] = ()) -> Consensus:
    """Soft labels and annotators' confusions that fit the votes best, starting from the shares of votes.

    `labels` are the classes, by default those that occur, sorted. At least three annotators must know better than chance: of two who differ
    nothing tells which is right. Where most are wrong the classes come out exchanged, since the start is the majority.
    Source: Dawid and Skene 1979, Applied Statistics 28 (1).
    """
    import numpy as np

    classes = tuple(labels) or tuple(sorted({v.label for v in votes}))
    if not votes:
        return Consensus(classes, {}, {}, (), 0)
    items, annotators = list(dict.fromkeys(v.item for v in votes)), list(dict.fromkeys(v.annotator for v in votes))
    at = [{name: i for i, name in enumerate(names)} for names in (items, annotators, classes)]
    counts = np.zeros((len(items), len(annotators), len(classes)))
    for vote in votes:
        if vote.label not in at[2]:
            raise DataError(f"the label '{vote.label}' of item '{vote.item}' is none of {', '.join(classes)}", hint="name all labels, or repair the row")
        counts[at[0][vote.item], at[1][vote.annotator], at[2][vote.label]] += 1
    truth = counts.sum(1) / counts.sum((1, 2))[:, None]
    rounds = 0
    while rounds < MOST_ROUNDS:
        rounds += 1
        prior, confusion = _maximise(counts, truth)
        logp = np.log(np.maximum(prior, 1e-300)) + np.einsum("iac,atc->it", counts, np.log(confusion))
        new = np.exp(logp - logp.max(1, keepdims=True))
        new /= new.sum(1, keepdims=True)
        moved, truth = float(np.abs(new - truth).max()), new
        if moved < TOLERANCE:
            break
    prior, confusion = _maximise(counts, truth)
    tables = {name: tuple(tuple(float(p) for p in row) for row in confusion[i]) for i, name in enumerate(annotators)}
    soft = {name: tuple(float(p) for p in truth[i]) for i, name in enumerate(items)}
    return Consensus(classes, soft, tables, tuple(float(p) for p in prior), rounds)


def _maximise(counts: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of classes [C] and confusions [A, true C, said C] given the probabilities of the classes [I, C]."""
    import numpy as np

    said = np.einsum("iac,it->atc", counts, truth) + SMOOTHING
    return truth.mean(0), said / said.sum(2, keepdims=True)


def krippendorff(votes: Sequence[Vote], scale: Scale = "nominal", *, resamples: int = 1000, seed: int = 0) -> Agreement:
    """Alpha of the votes with a bootstrap interval. Labels must be numbers for the scales `ordinal` and `interval`; else DataError.

    Items with one label count for nothing. Several labels of one annotator on one item count as if several people had given them.
    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    import numpy as np

    units: dict[str, list[str]] = defaultdict(list)
    for vote in votes:
        units[vote.item].append(vote.label)
    pairable = [labels for labels in units.values() if len(labels) > 1]
    values = sorted(sorted({label for labels in pairable for label in labels}), key=lambda label: (_number(label, scale), label))
    total = sum(map(len, pairable))
    if len(values) < 2:
        return Agreement(float("nan"), float("nan"), float("nan"), len(pairable), total)
    place = {value: i for i, value in enumerate(values)}
    numbers = np.array([_number(v, scale) for v in values])
    tables = np.zeros((len(pairable), len(values), len(values)))
    for table, labels in zip(tables, pairable, strict=True):
        counts = np.bincount([place[label] for label in labels], minlength=len(values)).astype(float)
        table += (np.outer(counts, counts) - np.diag(counts)) / (len(labels) - 1)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(pairable), [1 / len(pairable)] * len(pairable), size=resamples)
    alphas = [_alpha(np.tensordot(weights, tables, 1), numbers, scale) for weights in drawn]
    known = [a for a in alphas if not np.isnan(a)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if known else (float("nan"), float("nan"))
    return Agreement(_alpha(tables.sum(0), numbers, scale), float(low), float(high), len(pairable), total)


def _alpha(coincidences: np.ndarray, numbers: np.ndarray, scale: Scale) -> float:
    """Alpha of a table of coincidences [V, V]; NaN when all labels are alike."""
    import numpy as np

    margin = coincidences.sum(0)
    n = margin.sum()
    distance = _distance(margin, numbers, scale)
    expected = float((np.outer(margin, margin) * distance).sum()) / (n - 1)
    return 1 - float((coincidences * distance).sum()) / expected if expected > 0 else float("nan")


def _distance(margin: np.ndarray, numbers: np.ndarray, scale: Scale) -> np.ndarray:
    """Squared differences between values [V, V]; the ordinal one counts how many labels lie between."""
    import numpy as np

    if scale == "nominal":
        return 1.0 - np.eye(len(margin))
    # the labels up to and including a value, less half of its own: differences of these are sums over what lies between
    ranks = np.cumsum(margin) - margin / 2 if scale == "ordinal" else numbers
    return (ranks[:, None] - ranks[None, :]) ** 2


def _number(label: str, scale: Scale) -> float:
    if scale == "nominal":
        return 0.0
    try:
        return float(label)
    except ValueError:
        raise DataError(f"the label '{label}' is no number, which the scale '{scale}' needs", hint="use the scale nominal, or numbers") from None
