"""An interrupted training goes on as if nothing had happened, whatever is trained: the same weights, bit for bit, and the same figures."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fiducial.core import registry
from fiducial.models.scorehead import ScoreHead

SCRIPT = Path(__file__).with_name("trainers.py")
OBJECTIVES = [card.name.partition("/")[2] for card in registry.methods().values() if card.role == "Objective"]
FULL = [f"{name}@full" for name in ("sft", "dpo", "kto", "reward_model", "awr", "ppo")]


class KilledError(Exception):
    """Ends a training where a machine would go off: after some steps, before the next checkpoint."""


def interrupt(step, *_):
    if step == 3:
        raise KilledError


@pytest.mark.parametrize("trainer", [*OBJECTIVES, *FULL, "dpo@rows", "dpo@online", "rloo@cost", "ppo@cost", "ppo@cost@full"])
def test_every_objective_goes_on_from_its_checkpoint_to_the_same_weights(trainers, tmp_path, trainer):
    whole = trainers.found(*trainers.go(trainer, tmp_path / "whole"))
    with pytest.raises(KilledError):
        trainers.go(trainer, tmp_path / "again", report=interrupt)
    seen = []
    resumed = trainers.found(*trainers.go(trainer, tmp_path / "again", report=lambda step, *_: seen.append(step)))
    assert seen == [3, 4, 5]
    assert resumed == whole
    assert len(whole["history"]) == 5


def test_a_critic_of_the_cost_that_a_checkpoint_does_not_have_would_be_noticed(trainers, tmp_path):
    """What is compared above holds both critics, and both have moved."""
    found = trainers.found(*trainers.go("ppo@cost", tmp_path))["weights"]
    fresh = [ScoreHead.fresh(32, seed=seed, higher_is="better", trained_by="x").weight.tolist() for seed in (0, 1)]
    assert all(found[name] != first for name, first in zip(("head", "cost_head"), fresh, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["dpo", "reward_model", "rloo", "ppo@cost"])
def test_kill_minus_nine_while_a_checkpoint_is_written_loses_nothing_but_time(trainers, tmp_path, trainer):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out.json"), str(tmp_path), "2", trainer]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in sorted((tmp_path / trainer).glob("*checkpoint-*"))] == [".checkpoint-4", "checkpoint-2"]
    resumed = trainers.found(*trainers.go(trainer, tmp_path / trainer))
    assert resumed == trainers.found(*trainers.go(trainer, tmp_path / "whole"))
