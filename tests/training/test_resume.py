"""A training that is killed goes on as if nothing had happened, whatever is trained: the same weights, bit for bit, and the same figures."""

import signal
from itertools import cycle
from pathlib import Path

import pytest

from fiducial.core import registry
from fiducial.models.scorehead import ScoreHead

SCRIPT = Path(__file__).with_name("trainers.py")
OBJECTIVES = [card.name.partition("/")[2] for card in registry.methods().values() if card.role == "Objective"]
SPECIAL = [f"{name}@full" for name in ("sft", "dpo", "kto", "reward_model", "awr", "ppo")]
SPECIAL += ["sft@full@bfloat16", "sft@top", "dpo@top@bfloat16", "dpo@rows", "dpo@online", "rwr@online", "rloo@cost", "ppo@cost", "ppo@cost@full"]
SPECIAL += ["ppo@shown", "dpo@threads", "sft@full@threads"]

EARLY = (["update", "update"], [])
"""Where a process dies, as nursery.py has it, and the checkpoints that are left: in the second step, and nothing has been saved."""
WRITING = [
    (["tensors .*/[.]checkpoint-2/optimizer"], [".checkpoint-2"]),
    (["open .*/[.]checkpoint-4/state.json", "torn"], [".checkpoint-4", "checkpoint-2"]),
    (["rename .*/[.]checkpoint-4"], [".checkpoint-4", "checkpoint-2"]),
    (["rename .*/[.]checkpoint-4", "rmtree .*/checkpoint-2"], ["checkpoint-2", "checkpoint-4"]),
]
"""While a checkpoint is written: weights without moments; the last file is empty; all is there but its name; the one before is there too."""
BETWEEN = {
    ".checkpoint-2": (["rename .*/[.]checkpoint-2", "update"], ["checkpoint-2"]),
    "checkpoint-2": (["update"], [".checkpoint-4", "checkpoint-2"]),
    "checkpoint-4": (["update"], ["checkpoint-2", "checkpoint-4"]),
}
"""In the step after a checkpoint, by the newest that there was: from 2 on in the third step, from 4 on in the last."""


@pytest.mark.parametrize(("trainer", "writing"), [pytest.param(*case, id=case[0]) for case in zip([*OBJECTIVES, *SPECIAL], cycle(WRITING), strict=False)])
def test_kill_minus_nine_in_three_places_ends_in_the_weights_of_a_run_that_was_not_killed(nursery, tmp_path, trainer, writing):
    """Before the first checkpoint, while one is written, and between two; each process is another."""
    children, call = nursery(SCRIPT), f"{SCRIPT}:lived"
    for die_at, left in (EARLY, writing, BETWEEN[writing[1][-1]]):
        status, _ = children.run(call, trainer, tmp_path / "killed", die_at=die_at)
        assert status == -signal.SIGKILL, children.log.read_text()[-5000:]
        assert sorted(p.name for p in (tmp_path / "killed").glob("*checkpoint-*")) == left
    (resumed, made), (whole, all_steps) = (children.run(call, trainer, tmp_path / name)[1] for name in ("killed", "whole"))
    assert all_steps == [1, 2, 3, 4, 5]
    assert made == all_steps[int(left[-1][-1]) :]
    assert resumed == whole
    assert len(whole["history"]) == 5


def test_a_critic_of_the_cost_that_a_checkpoint_does_not_have_would_be_noticed(trainers, tmp_path):
    """What is compared above holds both critics, and both have moved."""
    found = trainers.found(*trainers.go("ppo@cost", tmp_path))["weights"]
    fresh = [ScoreHead.fresh(32, seed=seed, higher_is="better", trained_by="x").weight.tolist() for seed in (0, 1)]
    assert all(found[name] != first for name, first in zip(("head", "cost_head"), fresh, strict=True))
