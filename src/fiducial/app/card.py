"""Report card and model card of a model that the loop promoted: the same cards as after any training, with the proof on what it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fiducial.app.summary import Summary
from fiducial.core.run import Run
from fiducial.core.store import write_atomic

if TYPE_CHECKING:
    from fiducial.training.reportcard import Outcome

PROVED = {"harmful compliance": "direct_compliance", "refusal of harmless requests": "benign_refusal", "general capability": "capability"}
"""What of `modelcard.USUAL` the evidence of a loop measures."""
AS: dict[str, Outcome] = {"pass": "pass", "fail": "fail", "insufficient": "not measured"}
"""Outcomes of a gate as those of a report card."""


def write(run: Run, summary: Summary) -> Path | None:
    """Writes the report card into the run and the model card into its `model` folder; None when no round was promoted, and there is no model."""
    from fiducial.training import modelcard, reportcard

    promoted = next((point.name for point in summary.points if point.promoted and point.name.startswith("round ")), "")
    folder = run.path / "model"
    if not promoted or not folder.is_dir():
        return None
    rounds = [training for training in summary.training if training.round <= int(promoted.removeprefix("round "))]
    last = rounds[-1]
    data = [training.data for training in rounds]
    rules = {f"{name}, round {last.round}": verdict for name, verdict in last.verdicts.items()}
    rules |= {c.rule: (AS[c.outcome], c.reason) for c in summary.decision.checks} if summary.decision else {}
    about = {"run": run.id, "model": summary.repaired_fingerprint, "base": summary.model_fingerprint, "data": data, "rounds": [r.round for r in rounds]}
    report = reportcard.summed(rules, summary.evidence, stop=last.stop, about=about)
    write_atomic(run.path / "card.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    known = {e.name for e in summary.evidence if e.n}
    facts = modelcard.Facts(
        run=run.facts,
        method=last.objective,
        base=summary.model,
        base_fingerprint=summary.model_fingerprint,
        fingerprint=summary.repaired_fingerprint,
        data=data,
        steps=", then ".join(f"{r.steps} of {r.planned} steps on {r.groups} groups" for r in rounds),
        figures=summary.evidence,
        rules=rules,
        measured=frozenset(name for name, figure in PROVED.items() if figure in known),
    )
    return modelcard.write(folder, facts)
