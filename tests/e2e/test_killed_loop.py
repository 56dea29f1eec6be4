"""A loop that is killed and taken up again finds the same failures and trains the same weights."""

import json
import signal

import pytest

from fiducial.core.store import hash_file

pytestmark = pytest.mark.slow


def outcome(runs):
    """What must not depend on interruptions: groups, weights, losses, figures."""
    (run,) = [p.parent for p in runs.glob("*/run.json")]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "groups": (run / "stages" / "make-1" / "groups.jsonl").read_text(),
        "weights": hash_file(run / "models" / "round-1" / "adapter_model.safetensors"),
        "loss": summary["training"][0]["loss"],
        "steps": summary["training"][0]["steps"],
        "evidence": [{k: v for k, v in e.items() if k != "source"} for e in summary["evidence"]],
        "slices": summary["slices"],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {}


@pytest.fixture
def expected(whole, spawn, arguments, tmp_path_factory):
    if not whole:
        runs = tmp_path_factory.mktemp("whole")
        done = spawn(*arguments, cwd=runs)
        assert done.returncode == 1, done.stderr  # the gate cannot pass on eight goals
        whole.update(outcome(runs))
    return whole


@pytest.mark.parametrize("points", [["attempts:find-1:20", "checkpoint:2"], ["lines:make-1/groups:3", "lines:metrics:3", "attempts:validate-1:2"]])
def test_kill_minus_nine_and_resume_ends_where_an_uninterrupted_run_does(expected, spawn, arguments, tmp_path, points):
    args = arguments
    for point in points:
        killed = spawn(*args, kill=point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        args = ["loop", "--resume", "last"]
    done = spawn(*args)
    assert done.returncode == 1, done.stderr
    assert outcome(tmp_path / "runs") == expected
    assert len(expected["groups"].splitlines()) > 8
    assert expected["steps"] > 2
