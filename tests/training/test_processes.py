"""Training in processes of their own: killed and taken up again, and several at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("one_of_many.py")


def run(tmp_path, name, *args, launcher=(sys.executable,), folder=None):
    out = tmp_path / f"{name}.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(SCRIPT), str(out), str(tmp_path / (folder or name)), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    return done, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto", "reward_model"])
def test_a_killed_training_taken_up_again_ends_with_the_same_weights(tmp_path, objective):
    done, whole = run(tmp_path, "whole", objective, 4, 3)
    assert done.returncode == 0, done.stderr
    killed, nothing = run(tmp_path, "killed", objective, 4, 3, 5, folder="again")
    assert (killed.returncode, nothing) == (-signal.SIGKILL, None)
    done, again = run(tmp_path, "again", objective, 4, 3)
    assert done.returncode == 0, done.stderr
    assert again["fingerprint"] == whole["fingerprint"]
    assert again["losses"] == whole["losses"]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "rank"), [("dpo", 4), ("sft", 0), ("dft", 4), ("kto", 4), ("reward_model", 4)])
def test_two_processes_train_as_one_does(tmp_path, objective, rank):
    """7 groups in batches of 3: the last batch has one group, so one process has nothing to do in that step."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done, one = run(tmp_path, "one", objective, rank, 2)
    assert done.returncode == 0, done.stderr
    done, two = run(tmp_path, "two", objective, rank, 2, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["tokens"] == one["tokens"]
    for name, values in one["weights"].items():
        assert two["weights"][name] == pytest.approx(values, abs=2e-5), name
