"""Before a training: what is learnt from, and what it costs. Nothing is kept of it."""

import json

import pytest

from fiducial.core.records import user
from fiducial.core.run import Run, runs_root
from fiducial.models.scripted import tiny

ROWS = [
    {"prompt": "why?", "chosen": "because it is so", "rejected": "no"},
    {"prompt": "what?\x1b[2J", "chosen": "a\nb", "rejected": "c", "score_chosen": 5, "score_rejected": 1},
    {"prompt": "x " * 900, "chosen": "too long", "rejected": "too long as well"},
    *({"prompt": f"more {n}", "chosen": "yes", "rejected": "no"} for n in range(6)),
]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_what_is_shown_as_learnt_is_what_training_learns_from(call, data):
    body, code = call("align", "dpo", "tiny", "--data", data, "--preview", "--batch", "2", "--epochs", "2", "--lora-rank", "2")
    assert code == 0, body
    found = body["data"]
    assert (found["groups"], found["left_out"], found["held_out"], found["steps"]) == (8, 1, 0, 8)
    first, second = found["shown"][0]
    model = tiny()
    for row, answer in ((first, "because it is so"), (second, "no")):
        ids, start = model.encode(user("why?"), answer)
        assert (row["before"], row["learnt"]) == (model.tokenizer.decode(ids[:start]), model.tokenizer.decode(ids[start:]))
        assert row["tokens"] == len(ids) - start
        assert row["learnt"].startswith(answer)
    assert (first["target"], second["target"]) == (1.0, 0.0)
    assert [row["reward"] for row in found["shown"][1]] == [5.0, 1.0]
    assert 0 < found["trained"] < found["weights"]
    assert 0 < found["fed"] < found["naive"]
    assert found["seconds_per_step"] > 0
    assert found["memory_mib"] > 50


def test_no_run_and_no_ledger_are_left(call, data):
    assert call("align", "sft", "tiny", "--data", data, "--preview", "--lora-rank", "2")[1] == 0
    assert Run.all() == []
    assert not list(runs_root().glob("ledger*"))


TAUGHT = {"prompt": "why?", "completions": ["1+1=2", "2+1=3"], "labels": [True, False]}
TALK = {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))]}


@pytest.mark.parametrize(
    ("method", "rows", "more"),
    [
        ("process_reward", [TAUGHT | {"prompt": f"why {n}?"} for n in range(6)], []),
        ("sft", [TALK] * 1 + [{"messages": [*TALK["messages"][:3], {"role": "assistant", "content": f"two {n}"}]} for n in range(5)], ["--learn", "assistant"]),
        ("conditional_pretraining", [{"texts": [f"text {n}", "and more"], "scores": [float(n % 2), 1.0]} for n in range(6)], []),
        ("kto", ROWS[3:], []),
    ],
)
def test_the_two_steps_are_of_the_data_as_it_was_given(call, tmp_path, method, rows, more):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["align", method, "tiny", "--data", file, "--lora-rank", "2", "--batch", "3", *more]
    body, code = call(*line, "--preview")
    assert code == 0, body
    trained, code = call(*line)
    assert code == 0, trained
    assert body["data"]["groups"] == trained["data"]["groups"] == 6
    assert body["data"]["steps"] == trained["data"]["planned"] == 2
    assert body["data"]["fed"] == trained["data"]["tokens"]  # both saw all six groups once


@pytest.mark.parametrize("epochs", [1.0, 3.0])
@pytest.mark.parametrize(("groups", "batch"), [(6, 4), (6, 3), (6, 5), (6, 7), (6, 1), (6, 2)])
def test_two_whole_steps_are_measured_whatever_the_batch(data, groups, batch, epochs):
    from fiducial.align.dpo import DPO
    from fiducial.app.cli import preview
    from fiducial.data.formats import read_groups
    from fiducial.training.data import Data
    from fiducial.training.options import TrainOptions

    options, given = TrainOptions(batch=batch, epochs=epochs, lora_rank=2, lora_depth=0.5), read_groups(data)[3 : 3 + groups]
    model = tiny()
    read = Data.of(model, given, DPO(), options)
    again = preview._again(model, read, options)
    chosen = preview._tried(read, given, options, again=again)
    done = []
    cost = preview._cost(model, chosen, DPO(), options, done.append, again=again)
    assert done == [1, 1]
    assert len(chosen) == min(groups, batch if epochs > 1 else 2 * batch)
    assert cost["seconds_per_step"] > 0


@pytest.mark.parametrize(("epochs", "most", "keeps"), [(1.0, 1 << 30, False), (3.0, 1 << 30, True), (3.0, 5000, False)])
def test_the_steps_run_the_frozen_blocks_as_often_as_those_of_the_training(data, epochs, most, keeps, monkeypatch):
    from fiducial.align.dpo import DPO
    from fiducial.app.cli import preview
    from fiducial.data.formats import read_groups
    from fiducial.models.lower import Lower
    from fiducial.training import frozen
    from fiducial.training.data import Data
    from fiducial.training.options import TrainOptions

    asked, model = [], tiny()
    options, given = TrainOptions(batch=4, epochs=epochs, lora_rank=2, lora_depth=0.5), read_groups(data)[:4]
    monkeypatch.setattr(frozen, "MOST", most)
    monkeypatch.setattr(Lower, "of", lambda *_: asked.append(1))  # None: nothing is known, and all blocks are run
    again = preview._again(model, Data.of(model, given, DPO(), options), options)
    preview._cost(model, given, DPO(), options, lambda _: None, again=again)
    assert bool(asked) == keeps


def test_each_completion_is_one_line_of_harmless_text(run, data):
    shown = run("align", "dpo", "tiny", "--data", data, "--preview", "--lora-rank", "2").output
    assert "[[a\\nb<|im_end|>]]" in shown
    assert "\x1b" not in shown
    assert "nothing was kept" in shown


def test_of_a_head_the_place_where_it_reads_is_shown(run, data):
    shown = run("align", "reward_model", "tiny", "--data", data, "--preview", "--lora-rank", "0", "--batch", "4").output
    assert "because it is so<|im_end|>[[]]" in shown
    assert "an adapter (--lora-rank 16)" in shown


def test_from_scratch_the_sizes_of_the_new_model_count(call, data):
    line = ["align", "sft", "tiny", "--data", data, "--lora-rank", "0", "--from-scratch", "--sizes", "{max_position_embeddings: 32}", "--batch", "1"]
    shown, code = call(*line, "--preview")
    assert code == 0, shown
    trained, code = call(*line)
    assert code == 0, trained
    assert (shown["data"]["groups"], shown["data"]["left_out"]) == (trained["data"]["groups"], trained["data"]["left_out"])


def test_what_does_not_fit_into_memory_is_said(call, run, data, monkeypatch):
    import torch

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("fiducial.training.loop.train", full)
    line = ["align", "dpo", "tiny", "--data", data, "--preview"]
    assert call(*line)[0]["data"]["fits"] is False
    assert "two steps do not fit into memory; try a smaller --max-length, or --lora-depth 0.5" in run(*line).output


def test_what_is_held_out_is_counted_apart(call, data):
    found = call("align", "dpo", "tiny", "--data", data, "--preview", "--held-out", "0.5", "--lora-rank", "2")[0]["data"]
    assert found["held_out"] > 0
    assert found["groups"] + found["held_out"] + found["left_out"] == len(ROWS)


def test_prompts_alone_have_no_preview(call, tmp_path):
    (tmp_path / "p.txt").write_text("hello\n")
    body, code = call("align", "dpo", "tiny", "--prompts", tmp_path / "p.txt", "--reward", "mine:f", "--preview")
    assert code == 2
    assert "--preview is about data" in json.dumps(body)
