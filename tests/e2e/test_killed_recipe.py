"""Iterated learning, two rounds of self-rewarding: killed in the middle of both kinds of step, it makes the same pairs and the same model."""

import json
import signal

import pytest
import yaml

from fiducial.core.store import hash_file

pytestmark = pytest.mark.slow

TRAINING = {"batch": 2, "epochs": 1, "learning_rate": 1e-2, "lora_rank": 4, "save_every": 1}


@pytest.fixture
def recipe(world, tmp_path):
    """What is typed after `fiducial` for two rounds; answers with a letter of the first half of the alphabet are graded higher."""
    judge, file = tmp_path / "judge.yaml", tmp_path / "recipe.yaml"
    judge.write_text(yaml.safe_dump([{"when": r"re:rated:\n.*[a-m]", "answer": "Score: 4"}, {"when": "default", "answer": "Score: 2"}]), encoding="utf-8")
    rewarding = {"judge": f"scripted:{judge}", "max_tokens": 6, "length_ratio": 100.0, "draws": 1, "temperature": 1.0}
    attack, trained = "step:attack/direct", "step:align/dpo"
    steps = [
        {"method": "attack/direct", "options": {"goals": str(world / "goals.jsonl"), "max_tokens": 6}},
        {"method": "align/self_rewarding", "options": {"attempts": attack} | rewarding},
        {"method": "align/dpo", "options": {"data": "step:align/self_rewarding"} | TRAINING},
        {"name": "again", "method": "align/self_rewarding", "model": trained, "options": {"attempts": attack} | rewarding},
        {"name": "second", "method": "align/dpo", "model": trained, "options": {"data": "step:again"} | TRAINING},
    ]
    file.write_text(yaml.safe_dump({"model": str(world / "model"), "steps": steps}), encoding="utf-8")
    return ["run", file, "--exit-zero", "--json"]


def outcome(done, runs):
    """Pairs and weights of both rounds."""
    assert done.returncode == 0, done.stderr
    one, first, two, second = [runs / step["run"] for step in json.loads(done.stdout.strip().splitlines()[-1])["data"]["steps"][1:]]
    pairs = [(run / "groups.jsonl").read_text() for run in (one, two)]
    assert min(len(text.splitlines()) for text in pairs) >= 4
    return pairs, [hash_file(run / "model" / "adapter_model.safetensors") for run in (first, second)]


def test_kill_minus_nine_in_both_rounds_ends_where_an_uninterrupted_run_does(spawn, recipe, tmp_path):
    whole = spawn(*recipe, cwd=tmp_path / "whole")
    args = recipe
    # in the middle of making pairs (while answers come, then while pairs are written), then of the first training, then of the second
    for point in ("lines:make/answers:1", "lines:self-rewarding:2", "checkpoint:2", "checkpoint:6"):
        killed = spawn(*args, kill=point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        args = [*recipe, "--resume", "last"]
    for method, number in (("self-rewarding", 2), ("dpo", 2)):
        assert len(list((tmp_path / "runs").glob(f"*-align-{method}-*"))) == number
    assert outcome(spawn(*args), tmp_path / "runs") == outcome(whole, tmp_path / "whole")
