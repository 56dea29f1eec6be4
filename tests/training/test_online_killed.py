"""Runs in processes of their own: one that is killed with no time for a word goes on to the same weights, and two at once are one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("killed_online.py")


@pytest.fixture
def go():
    spec = importlib.util.spec_from_file_location("killed_online", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.go


def test_kill_minus_nine_and_resume_end_where_an_uninterrupted_run_does(go, tmp_path):
    killed = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "killed")], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    resumed, one = go(tmp_path / "killed")
    whole, other = go(tmp_path / "whole")
    mine, theirs = (dict(m.module.named_parameters()) for m in (one, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert resumed.history[-1] == whole.history[-1]
    assert (resumed.steps, resumed.answers, resumed.stop) == (whole.steps, whole.answers, whole.stop)


@pytest.mark.slow
def test_two_processes_draw_for_each_other_and_end_alike(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPT),
        str(tmp_path / "run"),
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert one == other
    assert one["answers"] == 8 * 2 * 3
    assert abs(one["k3"][0]) < 1e-6 < one["k3"][-1]
