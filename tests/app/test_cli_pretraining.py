"""`fiducial align` on documents in parts: scored ones, and ones that a reward scores first."""

import json
from pathlib import Path

import pytest

import fiducial
from fiducial.models.control import ALIGNED

FAST = ["--epochs", "2", "--batch", "2", "--learning-rate", "1e-3"]


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    rows = [{"texts": [f"{word} day. ", "Bad day. "], "scores": [0.0, 1.0]} for word in ("Fine", "Good", "Calm", "Warm")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("args", [["--lora-rank", "2"], ["--lora-rank", "0"], ["--lora-rank", "0", "--from-scratch", "--sizes", "{num_hidden_layers: 1}"]])
def test_the_model_of_a_run_is_conditional_however_it_was_trained(call, documents, args):
    body, code = call("align", "conditional_pretraining", "tiny", "--data", documents, *FAST, *args)
    assert code == 0
    model = fiducial.open(body["data"]["model"], dtype="float32")
    assert model.fingerprint == body["data"]["fingerprint"]
    assert model.chat.lead == ALIGNED
    card = (Path(body["data"]["folder"]) / "README.md").read_text()
    assert "puts the first after every prompt" in card
    assert ("resize_token_embeddings" in card) == (args == ["--lora-rank", "2"])
    report = json.loads(Path(body["data"]["card"]).read_text())
    assert report["rules"]["drift"]["outcome"] == "not measured"
    assert model.sample([()], max_tokens=2)[0][0].finish in ("stop", "length")


def test_a_reward_scores_the_parts_first(call, documents, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def kind(completions):\n    return [-1.0 if 'Bad' in text else 0.0 for text in completions]\n")
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"texts": json.loads(line)["texts"]}) + "\n" for line in documents.read_text().splitlines()))
    one, _ = call("align", "conditional_pretraining", "tiny", "--data", documents, *FAST)
    other, code = call("align", "conditional_pretraining", "tiny", "--data", bare, "--reward", f"{mine}:kind", *FAST)
    assert code == 0
    # what is dropped depends on the document, which now has the same values
    assert other["data"]["last"]["loss"] == one["data"]["last"]["loss"]


def test_a_filter_leaves_documents_out_and_says_how_many(call, documents):
    body, code = call("align", "filtered_pretraining", "tiny", "--data", documents, "--threshold", "-0.5", *FAST)
    assert (code, body["data"]["left_out"]) == (0, 0)
    body, code = call("align", "filtered_pretraining", "tiny", "--data", documents, *FAST)
    assert code == 2
    assert "none of 4 groups" in body["error"]["message"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "DATA", "--from-scratch"], "an adapter on random weights"),
        (["--data", "DATA", "--lora-rank", "0", "--from-scratch", "--sizes", "{hidden: 3}"], "no 'hidden' to change"),
        (["--data", "DATA", "--lora-rank", "0", "--sizes", "{num_hidden_layers: 1}"], "sizes are those of a model from scratch"),
        (["--prompts", "PROMPTS", "--reward", "rubric_reward"], "marks text that it is given"),
    ],
)
def test_what_does_not_fit_is_said(call, documents, tmp_path, args, message):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    places = {"DATA": str(documents), "PROMPTS": str(prompts)}
    body, code = call("align", "conditional_pretraining", "tiny", *[places.get(a, a) for a in args])
    assert code == 2
    assert message in body["error"]["message"]
