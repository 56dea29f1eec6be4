import json
from pathlib import Path

import pytest

from fiducial.app.cli.annotations import _labelled
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.core.run import Run
from fiducial.data.annotators import dawid_skene, votes_of


@pytest.fixture
def file(tmp_path):
    def written(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return written


def vote(item, annotator, label):
    return {"item": item, "annotator": annotator, "label": label}


def prefers(annotator, good, bad, prompt="Q"):
    return {"prompt": prompt, "chosen": good, "rejected": bad, "annotator": annotator}


def test_labels_of_several_people_become_one_label_per_item(call, file):
    rows = [vote(i, who, "harmful" if i < 3 else "fine") for i in range(6) for who in "xyz"]
    body, code = call("annotations", file(*rows, vote(0, "w", "fine")))
    assert code == 0
    data = body["data"]
    assert (data["items"], data["votes"]) == (6, 19)
    assert {p["annotator"]: p["labels"] for p in data["annotators"]} == {"x": 6, "y": 6, "z": 6, "w": 1}
    lines = [json.loads(line) for line in Path(data["file"]).read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == ["harmful"] * 3 + ["fine"] * 3
    assert lines[0]["probability"]["harmful"] > 0.9


def test_preferences_of_several_people_become_groups_to_train_on(call, file):
    rows = [prefers(who, "kind", "rude", f"Q{i}") for i in range(4) for who in "xyz"] + [prefers("w", "rude", "kind", "Q0")]
    body, _ = call("annotations", file(*rows))
    groups = Run.open(body["run"]).lines("groups", Group).read()
    assert [g.prompt.text for g in groups] == ["Q0", "Q1", "Q2", "Q3"]
    first = groups[0]
    assert [c.text for c in first.completions] == ["kind", "rude"]
    assert first.targets[0] > 0.9
    assert first.annotator == "4 annotators (Dawid and Skene)"
    assert first.provenance == {"preferred": {"x": 0, "y": 0, "z": 0, "w": 1}}


def test_votes_are_read_once_however_many_items_they_are_on():
    class Once(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return super().__iter__()

    answers = (Completion(text="a"), Completion(text="b"))
    made = [Group(prompt=Prompt(messages=user(str(n))), completions=answers, rewards=(1.0, 0.0), annotator=who) for n in range(5) for who in "xyz"]
    votes, items = votes_of(made)
    counted = Once(votes)
    found = list(_labelled(items, dawid_skene(votes, ["0", "1"]), counted))
    assert [g.provenance["preferred"] for g in found] == [dict.fromkeys("xyz", 0)] * 5
    assert counted.reads == 1


def test_weak_agreement_is_said_and_names_are_shown_harmlessly(run, file):
    rows = [vote(i, who, label) for i in range(8) for who, label in zip(["x\x1b[31m", "y"], ["a", "ab"[i % 2]], strict=True)]
    result = run("annotations", file(*rows))
    assert result.exit_code == 0
    assert "Krippendorff's alpha" in result.stdout
    assert "agreement may be below 0.667" in result.stdout
    assert "\x1b" not in result.stdout


def test_agreement_that_cannot_be_measured_is_not_a_number(call, run, file):
    path = file(vote(1, "x", "a"), vote(2, "y", "b"))
    assert call("annotations", path)[0]["data"]["agreement"] is None
    assert "agreement: not measured" in run("annotations", path).stdout


def test_the_scale_is_chosen_and_needs_numbers(call, file):
    near = file(*[vote(i, who, v) for i in range(5) for who, v in (("x", i), ("y", i + (i == 2)))])
    nominal, interval = (call("annotations", near, "--scale", scale)[0]["data"]["agreement"]["alpha"] for scale in ("nominal", "interval"))
    assert interval > nominal
    body, code = call("annotations", file(vote(1, "x", "a"), vote(1, "y", "b")), "--scale", "ordinal")
    assert (code, body["error"]["kind"]) == (2, "data")


def test_preferences_without_an_annotator_are_refused(call, file):
    body, code = call("annotations", file({"prompt": "Q", "chosen": "a", "rejected": "b"}))
    assert code == 2
    assert "no row says who preferred what" in body["error"]["message"]


def test_the_accuracy_of_an_annotator_has_an_interval_that_few_labels_widen(call, file):
    rows = [vote(i, who, "harmful" if i < 10 else "fine") for i in range(20) for who in "xyz"]
    people = {p["annotator"]: p for p in call("annotations", file(*rows, vote(0, "w", "harmful")))[0]["data"]["annotators"]}
    # Wilson's interval of 20 of 20
    assert (people["x"]["low"], people["x"]["high"]) == pytest.approx((0.839, 1.0), abs=1e-3)
    assert people["w"]["high"] - people["w"]["low"] > 0.5
