import gzip
import json
import logging

import pytest

from fiducial.align.process_reward import ProcessReward
from fiducial.core.errors import DataError
from fiducial.core.records import user
from fiducial.data.formats import read_groups
from fiducial.data.steps import solution


def step(text, rating=1, **fields):
    return {"text": text, "rating": rating, "flagged": None, **fields}


def place(*steps, chosen=0, human=None):
    return {"completions": list(steps), "human_completion": human, "chosen_completion": chosen}


def rated(*places, finish="solution", **fields):
    """A row with the fields that PRM800K's README shows."""
    return {
        "labeler": "340d89bc",
        "timestamp": "2023-01-22T04:34:27.052924",
        "generation": 9,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {"problem": "What is 1+2*3?", "ground_truth_answer": "7", "pre_generated_steps": ["2*3=6", "1+6=7"], "pre_generated_verifier_score": 0.01},
        "label": {"steps": list(places), "total_time": 278270, "finish_reason": finish},
        **fields,
    }


GOOD = rated(place(step("2*3=6")), place(step("1+6=7")))


def file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path, row):
    (group,) = read_groups(file(tmp_path, row))
    return group


def solutions(group):
    return [(c.text, c.values) for c in group.completions]


def supervised(group):
    """What align/process_reward learns from the group: prefixes and their labels."""
    prepared = ProcessReward().prepare(group)
    return dict(zip((c.text for c in prepared.completions), prepared.rewards, strict=True))


def test_a_solution_of_trl_s_stepwise_columns_has_its_steps_and_labels(tmp_path):
    found = one(tmp_path, {"prompt": "What is 1+2*3?", "completions": ["2*3=6", "1+6=8"], "labels": [True, False]})
    assert (found.prompt.messages, found.prompt.source) == (user("What is 1+2*3?"), "rows.jsonl")
    assert solutions(found) == [("2*3=6\n1+6=8", (1.0, 0.0))]
    assert found.completions[0].ends == (6, 11)
    assert supervised(found) == {"2*3=6\n": 1.0, "2*3=6\n1+6=8": 0.0}


def test_labels_may_be_probabilities_or_unknown_and_the_prompt_may_be_messages(tmp_path):
    found = one(tmp_path, {"prompt": [{"role": "user", "content": "q"}], "completions": ["a", "b", "c"], "labels": [0.75, None, 1]})
    assert solutions(found) == [("a\nb\nc", (0.75, None, 1.0))]


def test_nothing_is_learnt_after_the_first_error(tmp_path):
    stepwise = one(tmp_path, {"prompt": "q", "completions": ["a", "b", "c"], "labels": [True, False, True]})
    assert supervised(stepwise) == {"a\n": 1.0, "a\nb\n": 0.0}
    prm = one(tmp_path, rated(place(step("a")), place(step("b", -1)), place(step("c"), step("d", -1))))
    assert solutions(prm) == [("a\nb", (1.0, 0.0))]


def test_ratings_become_values_and_a_neutral_step_is_right(tmp_path):
    found = one(tmp_path, rated(place(step("a", 1)), place(step("b", 0)), place(step("c", None)), place(step("d", -1)), finish="found_error"))
    assert solutions(found) == [("a\nb\nc\nd", (1.0, 1.0, None, 0.0))]
    assert found.prompt.text == "What is 1+2*3?"


def test_every_other_rated_step_is_a_completion_in_which_only_that_step_counts(tmp_path):
    row = rated(
        place(step("a"), step("a2", -1), step("a3", None)), place(step("b2", -1), step("b"), chosen=1), place(step("c", -1), step("c2", 0), chosen=None)
    )
    found = one(tmp_path, row)
    assert solutions(found) == [
        ("a\nb", (1.0, 1.0)),
        ("a2", (0.0,)),
        ("a\nb2", (None, 0.0)),
        ("a\nb\nc", (None, None, 0.0)),
        ("a\nb\nc2", (None, None, 1.0)),
    ]
    assert supervised(found) == {"a\n": 1.0, "a\nb": 1.0, "a2": 0.0, "a\nb2": 0.0, "a\nb\nc": 0.0, "a\nb\nc2": 1.0}


def test_what_a_labeller_wrote_is_right_and_the_solution_goes_on_from_it(tmp_path):
    for human in ("b", {"text": "b", "rating": None, "source": "human"}):
        found = one(tmp_path, rated(place(step("a")), place(step("x", -1), chosen=None, human=human), place(step("c"))))
        assert solutions(found) == [("a\nb\nc", (1.0, 1.0, 1.0)), ("a\nx", (None, 0.0))]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (rated(place(step("a")), finish="bad_problem"), "1 bad_problem"),
        (rated(place(step("a")), finish="give_up"), "1 give_up"),
        (rated(place(step("a")), is_initial_screening_question=True), "1 screening"),
        (rated(place(step("a")), is_quality_control_question=True), "1 quality control"),
        (rated(place(step("a")), place(step("b", None, flagged=True))), "1 flagged"),
        (rated(place(step("a", None))), "1 without a rated step"),
        (rated(), "1 without a rated step"),
    ],
)
def test_rows_that_are_not_meant_to_be_learnt_from_are_left_out_and_counted(tmp_path, caplog, row, reason):
    with caplog.at_level(logging.WARNING):
        assert len(read_groups(file(tmp_path, row, GOOD))) == 1
    assert "1 of 2 rows of" in caplog.text
    assert caplog.text.rstrip().endswith(f"are not meant to be learnt from: {reason}")
    with pytest.raises(DataError, match=f"none of 1 rows is meant to be learnt from: {reason}"):
        read_groups(file(tmp_path, row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True]}, "2 completions but 1 labels"),
        ({"prompt": "q", "completions": "a", "labels": [True]}, "'completions' must be a list of steps"),
        ({"prompt": "q", "completions": [], "labels": []}, "'completions' must be a list of steps"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, -1]}, "the label of step 2 is -1"),
        ({"prompt": "q", "completions": ["a"], "labels": ["yes"]}, "the label of step 1 is 'yes'"),
        ({"prompt": "q", "completions": ["a", " "], "labels": [True, True]}, "step 2 is empty"),
        ({"prompt": " ", "completions": ["a"], "labels": [True]}, "'prompt' is empty"),
        (rated(place(step("a", 2))), "label.steps.0.completions.0.rating: Input should be -1, 0 or 1"),
        (rated(place(step("a"), chosen=1)), "label.steps.0.chosen_completion is 1"),
        (rated(place(step("a"), chosen=-1)), "label.steps.0.chosen_completion is -1"),
        (rated(place({"rating": 1})), "label.steps.0.completions.0.text: Field required"),
        (rated(place(step("")), place(step("b"))), "step 1 is empty"),
        (GOOD | {"question": {}}, "question.problem: Field required"),
        (GOOD | {"label": {"finish_reason": "solution"}}, "label.steps: Field required"),
        (GOOD | {"question": {"problem": " "}}, "'prompt' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    path = file(tmp_path, GOOD, row)
    with pytest.raises(DataError) as caught:
        read_groups(path)
    assert caught.value.message.startswith(f"{path}:2: ")
    assert message in caught.value.message
    assert caught.value.hint


def test_files_may_be_packed_and_rows_of_both_kinds_may_be_mixed(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = [GOOD, {"prompt": "q", "completions": ["a"], "labels": [True]}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert [len(g.completions[0].ends) for g in read_groups(path)] == [2, 1]


def test_line_breaks_around_steps_are_not_doubled():
    found = solution(["a\n", "\nb\n"], [1.0, None])
    assert (found.text, found.ends, found.values) == ("a\nb", (2, 3), (1.0, None))
