"""What a training would take of memory, before any weight is loaded."""

import json

import pytest

from fiducial.core.run import Run
from fiducial.models import loading
from fiducial.models.scripted import tiny

ROWS = [{"prompt": f"why {n}? " + "so " * 40, "chosen": "because " * (n + 1), "rejected": "no"} for n in range(8)]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def folder(tmp_path):
    """A model of which only the outline is there."""
    tiny().save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    return tmp_path / "model"


def test_parts_and_ways_to_take_less_are_known_without_a_weight(call, data, folder):
    body, code = call("align", "dpo", folder, "--data", data, "--plan", "--dtype", "float32", "--device", "cpu", "--batch", "4")
    assert code == 0, body
    found = body["data"]
    sizes = {part["name"]: part["bytes"] for part in found["parts"]}
    assert {"weights", "adapter", "gradients", "optimizer", "activations", "logits"} <= set(sizes)
    assert found["bytes"] == sum(sizes.values())
    assert found["largest"] == max(sizes, key=sizes.__getitem__)
    assert (found["device"], found["dtype"], found["groups"]) == ("cpu", "float32", 8)
    ways = [way["option"] for way in found["ways"]]
    assert ways[0] == "--dtype bfloat16"
    assert 1 < len(ways) <= 3
    assert Run.all() == []


def test_a_way_to_take_less_takes_what_it_says(call, data, folder):
    line = ["align", "sft", folder, "--data", data, "--plan", "--dtype", "bfloat16", "--device", "cpu"]
    whole = call(*line)[0]["data"]
    said = {way["option"]: way["bytes"] for way in whole["ways"]}
    assert said["--lora-depth 0.5"] == call(*line, "--lora-depth", "0.5")[0]["data"]["bytes"] < whole["bytes"]


def test_weights_from_scratch_are_planned_in_their_own_sizes(call, data, folder):
    line = ["align", "sft", folder, "--data", data, "--plan", "--from-scratch", "--lora-rank", "0"]
    two, four = (call(*line, "--sizes", f"{{num_hidden_layers: {n}}}")[0]["data"]["bytes"] for n in (2, 4))
    assert four > 1.5 * two


def test_it_is_shown_as_a_table(run, data):
    shown = run("align", "dpo", "tiny", "--data", data, "--plan").output
    assert "activations" in shown
    assert "MiB on cpu" in shown
    assert "--preview measures" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["dpo", "tiny", "--plan"], "--plan is about data"),
        (["dpo", "tiny", "--data", "DATA", "--plan", "--preview"], "give one of them"),
        (["conditional_pretraining", "tiny", "--data", "DATA", "--plan"], "adds tokens"),
        (["dpo", "openai:gpt", "--data", "DATA", "--plan"], "has no weights here"),
    ],
)
def test_what_cannot_be_planned_is_said(call, data, monkeypatch, line, message):
    monkeypatch.setattr(loading, "_read", None)  # no weights are read
    body, code = call("align", *[data if word == "DATA" else word for word in line])
    assert code == 2
    assert message in json.dumps(body)
