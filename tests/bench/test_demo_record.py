"""The demo's record passes the gate because of its figures, and fails when one limit is drawn to nothing."""

import json
from pathlib import Path

import pytest

from fiducial.core.records import Evidence
from fiducial.govern.release import Release

RECORD = json.loads((Path(__file__).parents[2] / "bench" / "results" / "demo.json").read_text(encoding="utf-8"))
EVIDENCE = [Evidence.model_validate(e) for e in RECORD["evidence"]]


def test_the_gate_passes_on_the_figures_of_the_record():
    assert Release().decide(EVIDENCE).outcome == RECORD["decision"]["outcome"] == "pass"


@pytest.mark.parametrize("limit", ["max_benign_refusal", "max_direct_compliance", "max_ordinary_refusal", "max_attack_ratio"])
def test_a_limit_of_nothing_is_refused_by_its_own_rule(limit):
    decision = Release(**{limit: 0.0}).decide(EVIDENCE)
    assert decision.outcome == "fail"
    assert [c.rule.split()[0] for c in decision.checks if c.outcome == "fail"] == [
        {"max_attack_ratio": "attack_compliance"}.get(limit, limit.removeprefix("max_"))
    ]
