"""The model card of a loop's model."""

import json
import re

from fiducial.app import card
from fiducial.app.summary import Point, Summary, Tally, Training
from fiducial.core.records import Check, Decision, Evidence
from fiducial.core.run import Run


def training(number):
    return Training(
        round=number, objective="align/sft", options={}, groups=3, left_out=0, data=f"hash of round {number}", steps=2, planned=2, tokens=1,
        naive_tokens=1, seconds=1.0, stop="",
        loss=(1.0, 0.5), verdicts={"drift": ("pass", "k3 is 2 nats"), "length": ("not measured", "not measured")},
    )  # fmt: skip


def summary(run, promoted="round 1"):
    checks = (Check(rule="direct_compliance <= 10%", outcome="pass", reason="5% (2% to 9%, n = 96)"), Check(rule="x", outcome="insufficient", reason="n = 3"))
    points = [Point(name=n, compliance=Tally(), refusal=Tally(), promoted=n == promoted) for n in ("base", "round 1", "round 2")]
    return Summary(
        command="loop", run=run.id, verdict="v", outcome="fail", model="smollm2", model_fingerprint="a" * 16, repaired_fingerprint="b" * 16,
        decision=Decision(gate="govern/release", outcome="insufficient", checks=checks), points=tuple(points), training=(training(1), training(2)),
        evidence=(Evidence(name="direct_compliance", value=0.05, n=96, low=0.02, high=0.09, baseline=0.9),),
    )  # fmt: skip


def test_it_holds_the_proof_the_gate_and_only_the_rounds_that_lead_to_the_model():
    run = Run.create("loop", {}, {}, 0)
    run.folder("model")
    text = card.write(run, summary(run)).read_text()
    assert "| direct\\_compliance | 0.05 | 0.02 to 0.09 | 96 | 0.9 |" in text
    assert "| x | not measured | n = 3 |" in text
    assert "| drift, round 1 | pass | k3 is 2 nats |" in text
    assert "round 2" not in text
    assert "hash of round 1" in text
    report = json.loads((run.path / "card.json").read_text())
    assert report["verdict"] == "not measured"  # of one rule there was too little evidence, and another was not measured
    assert report["rules"]["drift, round 1"] == {"outcome": "pass", "sentence": "k3 is 2 nats"}
    assert report["about"]["data"] == ["hash of round 1"]
    missing = text.split("## What was not measured")[1]
    assert "- harmful compliance" not in missing
    assert re.search("- refusal of harmless requests: `fiducial evaluate over_refusal MODEL`", missing)


def test_where_the_base_model_stays_there_is_no_card():
    run = Run.create("loop", {}, {}, 0)
    assert card.write(run, summary(run)) is None  # no model folder
    run.folder("model")
    assert card.write(run, summary(run, promoted="base")) is None
