import json

import pytest

import fiducial

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPWISE = {"prompt": "1+2*3?", "completions": ["2*3=6", "1+6=8"], "labels": [True, False]}
RATED = {
    "question": {"problem": "1+2*3?"},
    "label": {"steps": [{"completions": [{"text": "2*3=5", "rating": -1}], "chosen_completion": 0}], "finish_reason": "found_error"},
}


def test_a_process_reward_model_is_trained_on_files_of_labelled_steps(call, tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (STEPWISE, RATED)), encoding="utf-8")
    body, code = call("align", "process_reward", "tiny", "--data", path, "--epochs", "1", "--batch", "2", "--lora-rank", "2")
    assert (code, body["data"]["groups"], body["data"]["last"]["right_steps"]) == (0, 2, pytest.approx(1 / 3))
    assert fiducial.open(body["data"]["model"]).head.trained_by == "align/process_reward"


def test_a_label_that_is_none_is_an_error_with_file_and_line(call, tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (STEPWISE, STEPWISE | {"labels": [True, "?"]})), encoding="utf-8")
    body, code = call("align", "process_reward", "tiny", "--data", path)
    assert (body["error"]["kind"], code) == ("data", 2)
    assert body["error"]["message"] == f"{path}:2: the label of step 2 is '?'"
