"""A run of TRL's trainers that is killed goes on, in another process, to the weights of a run that was not."""

import json
import signal
from itertools import cycle
from pathlib import Path

import pytest

from fiducial.core.run import Run

pytest.importorskip("trl")
pytest.importorskip("datasets")

SCRIPT = Path(__file__).with_name("trl_command.py")
COMMON = "max_steps: 5\nsave_steps: 2\nlearning_rate: 1e-3\ngradient_checkpointing: false\nper_device_train_batch_size: 2\n"
LORA = "use_peft: true\nlora_r: 2\nlora_dropout: 0.1\nlora_target_modules: all-linear\n"
SAMPLED = "num_generations: 2\nmax_completion_length: 4\nreward_funcs: [letters.letters]\n"
REWARD = "def letters(completions, **_):\n    return [float(sum(map(str.isalpha, c))) for c in completions]\n"
ANSWERS = [{"prompt": f"why {n}?", "completion": "because" + n * "!"} for n in range(7)]
PAIRS = [{"prompt": f"why {n}?", "chosen": "because" + n * "!", "rejected": "no no no"} for n in range(7)]
LABELS = [row | {"label": n % 2 == 0} for n, row in enumerate(ANSWERS)]
PROMPTS = [{"prompt": f"why {n}?"} for n in range(7)]
CASES = {
    "dpo": (LORA, PAIRS),
    "sft": ("", ANSWERS),
    "kto": (LORA, LABELS),
    "reward": ("", PAIRS),
    "grpo": (SAMPLED, PROMPTS),
    "rloo": (SAMPLED, PROMPTS),
}
"""Trainer -> what its configuration says besides, and its data: 7 rows in batches of 2, so that the fourth step is over a border of passes."""

STATE = "trainer_state.json"
EARLY = ["update", "update"]
"""Where a process dies, as nursery.py has it: in the second step, before anything was saved."""
WRITING = [
    ([f"open .*/checkpoint-2/{STATE}", "torn"], [f"open .*/checkpoint-2/{STATE}", "update"], [1, 1, 2, 1, 2, 3, 4, 5]),
    ([f"open .*/checkpoint-4/{STATE}", "torn"], ["update"], [1, 1, 2, 3, 4, 3, 4, 5]),
    (["rmtree .*/checkpoint-2"], ["update"], [1, 1, 2, 3, 4, 5]),
]
"""Where the next one dies: the last file of the first or the second checkpoint is empty, or the old one is still beside the new; and the third,
in the step after a checkpoint. Then the steps that all of them finish."""


@pytest.mark.parametrize(("trainer", "writing"), [pytest.param(*case, id=case[0]) for case in zip(CASES, cycle(WRITING), strict=False)])
def test_a_run_that_is_killed_in_three_places_ends_in_the_weights_of_one_that_was_not(nursery, tmp_path, trainer, writing):
    more, rows = CASES[trainer]
    (tmp_path / "config.yaml").write_text(COMMON + more, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "letters.py").write_text(REWARD, encoding="utf-8")
    words = begin = ["align", "trl", "tiny", "--config", "config.yaml", "--data", "rows.jsonl", "--trainer", trainer]
    children, call = nursery(SCRIPT), f"{SCRIPT}:said"

    def run(words, runs, die_at=()):
        return children.run(call, *words, folder=str(tmp_path), environment={"FIDUCIAL_RUNS": str(tmp_path / runs)}, die_at=die_at)

    for die_at in (EARLY, *writing[:2]):
        status, body = run(words, "killed", die_at)
        assert status == -signal.SIGKILL, body or children.log.read_text()[-5000:]
        words = ["align", "trl", "--resume", "last"]
    (whole, code), (resumed, again) = run(begin, "whole")[1], run(words, "killed")[1]
    assert (code, again) == (0, 0), (whole, resumed)
    assert resumed["data"]["fingerprint"] == whole["data"]["fingerprint"]
    made, once = (Run.open(tmp_path / place / body["run"]).read_metrics() for place, body in (("killed", resumed), ("whole", whole)))
    losses = {m.step: m.values["loss"] for m in once}
    assert list(losses) == [1, 2, 3, 4, 5]
    assert all(m.values["loss"] == losses[m.step] for m in made)  # also of the steps that were made twice
    assert [m.step for m in made] == writing[2]
