"""`fiducial annotations FILE`: what several annotators said of the same items, as one label each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fiducial.app.cli.commands import Command, output_of, runs_option
from fiducial.app.cli.output import Table, one_line
from fiducial.core.errors import DataError
from fiducial.core.intervals import Rate
from fiducial.core.records import Group

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fiducial.data.annotators import Agreement, Consensus, Scale, Vote
    from fiducial.data.rows import Row

TENTATIVE = 0.667
"""Alpha below which Krippendorff advises against even tentative conclusions."""


@click.command("annotations", cls=Command, params=[runs_option()])
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--scale", type=click.Choice(["nominal", "ordinal", "interval"]), default="nominal", show_default=True, help="How far labels are apart.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the interval's resampling.")
@click.pass_context
def combine(context: click.Context, file: str, scale: str, seed: int) -> None:
    """Combine the labels of several annotators in FILE: rows with item, annotator and label, or preferences with a column annotator.

    Writes one row per item with the probability of each label (Dawid and Skene), for preferences as groups to train on; shows how
    reliable each annotator is, and how far they agree (Krippendorff's alpha).
    """
    from fiducial.core.run import Run
    from fiducial.core.store import write_atomic
    from fiducial.data.annotators import dawid_skene, krippendorff, read_votes, votes_of
    from fiducial.data.formats import read_groups
    from fiducial.data.rows import read_rows

    output = output_of(context)
    rows = read_rows(file)
    items: dict[str, Group] = {}
    if _are_votes(rows):
        votes = read_votes(rows)
    else:
        votes, items = votes_of(read_groups(file, unusable="skip"))
    if not votes:
        raise DataError(f"{file}: no row says who preferred what", hint="give a column 'annotator', or rows with item, annotator and label")
    agreement = krippendorff(votes, cast("Scale", scale), seed=seed)
    width = max((len(g.completions) for g in items.values()), default=0)
    consensus = dawid_skene(votes, [str(i) for i in range(width)])
    with Run.create("annotations", {"file": file, "scale": scale, "seed": seed}, {"file": file}, seed) as run:
        output.run = run.id
        if items:
            path = run.path / "groups.jsonl"
            lines = run.lines("groups", Group)
            for group in _labelled(items, consensus, votes):
                lines.append(group)
        else:
            path = run.path / "labels.jsonl"
            write_atomic(path, "".join(f"{line}\n" for line in _lines(consensus)))
    _show(output_of(context), votes, agreement, consensus, path)


def _are_votes(rows: Sequence[Row]) -> bool:
    names = {str(key).strip().lower() for row in rows for key in row.values}
    return {"item", "label"} <= names and "chosen" not in names


def _labelled(items: dict[str, Group], consensus: Consensus, votes: Sequence[Vote]) -> Iterator[Group]:
    """Each item with the probability that each answer is the best; of answers that nobody could prefer it is 0."""
    preferred: dict[str, dict[str, int]] = {item: {} for item in items}
    for vote in votes:
        preferred[vote.item][vote.annotator] = int(vote.label)
    for item, group in items.items():
        soft = consensus.items[item][: len(group.completions)]
        said = preferred[item]
        note = f"{len(said)} annotators (Dawid and Skene)"
        yield group.model_copy(update={"targets": tuple(p / sum(soft) for p in soft), "annotator": note, "provenance": {"preferred": said}})


def _lines(consensus: Consensus) -> Iterator[str]:
    import json

    for item, soft in consensus.items.items():
        best = max(range(len(soft)), key=lambda i: soft[i])
        shares = dict(zip(consensus.labels, soft, strict=True))
        yield json.dumps({"item": item, "label": consensus.labels[best], "probability": shares}, ensure_ascii=False)


def _show(output: Any, votes: Sequence[Vote], agreement: Agreement, consensus: Consensus, path: Path) -> None:
    given = Counter(v.annotator for v in votes)
    columns = ("annotator", "labels", "accuracy (estimated)", "95 % interval")
    table = Table(columns, right=frozenset(columns[1:]))
    people = []
    for name, n in given.most_common():
        accuracy = consensus.accuracy(name)
        # as if so many labels had been found right; that the truth is estimated too is not in it
        low, high = Rate(round(accuracy * n), n).interval()
        people.append({"annotator": name, "labels": n, "accuracy": accuracy, "low": low, "high": high})
        table.rows.append((one_line(name, 40), str(n), f"{accuracy:.0%}", f"{low:.0%} to {high:.0%}"))
    known = agreement.alpha == agreement.alpha
    lines = [f"Krippendorff's alpha {agreement}" if known else "agreement: not measured, no item has two labels that could differ"]
    if known and agreement.low < TENTATIVE:
        lines.append(f"agreement may be below {TENTATIVE}: too little to rely on these labels")
    data = {
        "agreement": {"alpha": agreement.alpha, "low": agreement.low, "high": agreement.high, "items": agreement.items, "labels": agreement.labels}
        if known
        else None,
        "annotators": people,
        "items": len(consensus.items),
        "votes": len(votes),
        "file": path,
    }
    output.result(data, *lines, table, f"{len(votes)} labels on {len(consensus.items)} items: {path}")
