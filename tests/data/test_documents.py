"""Documents in parts with scores."""

import json

import pytest

from fiducial.core.errors import DataError
from fiducial.data.documents import document
from fiducial.data.formats import read_groups, write_groups


def test_a_score_is_minus_a_value_and_zero_stays_zero():
    (completion,) = document({"texts": ["Good. ", "Bad."], "scores": [0, 0.9]}, "x").completions
    assert (completion.text, completion.ends, completion.values) == ("Good. Bad.", (6, 10), (0.0, -0.9))
    assert str(completion.values[0]) == "0.0"


def test_scores_that_are_not_known_are_none():
    assert document({"texts": ["a", "b"], "scores": [None, 1]}, "x").completions[0].values == (None, -1.0)
    assert document({"texts": ["a", "b"]}, "x").completions[0].values == (None, None)


def test_a_file_of_documents_is_read_as_groups_without_prompt_and_survives_the_disk(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps({"texts": ["One. ", "Two."], "scores": [0.0, 1.0], "avg_score": 0.5, "num_sents": 2}) + "\n")
    (group,) = read_groups(path)
    assert group.prompt.messages == ()
    assert group.completions[0].values == (0.0, -1.0)
    write_groups(tmp_path / "own.jsonl", [group], "own")
    assert read_groups(tmp_path / "own.jsonl") == [group]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"texts": []}, "'texts' must be a list of parts"),
        ({"texts": ["a", ""]}, "none of them empty"),
        ({"texts": "a"}, "'texts' must be a list of parts"),
        ({"texts": ["a"], "scores": [0, 1]}, "a score for each of 1 texts"),
        ({"texts": ["a", "b"], "scores": [0, "bad"]}, "the score of part 2 is 'bad'"),
        ({"texts": ["a"], "scores": [float("nan")]}, "the score of part 1 is nan"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row, message):
    with pytest.raises(DataError, match=f"here:1: .*{message}"):
        document(row, "here:1")
