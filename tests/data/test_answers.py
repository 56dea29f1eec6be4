import pytest

from fiducial.core.errors import ConfigError, DataError
from fiducial.data.answers import final, known_answers, reaches


def test_a_number_is_reached_by_its_value_and_nothing_else():
    assert reaches("it costs $1,200.00.", "1200")
    assert not reaches("12", "2")
    assert not reaches("no number", "0")
    assert not reaches("", "paris")


def test_solutions_agree_by_their_final_answer():
    assert final("5*4=20\nanswer 20", "14") == final("so it is 20.", "14")
    assert final("The Answer: Yes.", "no") == final("the answer: yes", "no")


def test_problems_and_answers_are_read_from_the_usual_columns(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text("problem,answer\n1+1,2\n2+2,4\n")
    assert known_answers(str(path)) == {"1+1": "2", "2+2": "4"}
    path.write_text("question,target\n1+1,2\n2+2,\n")
    with pytest.raises(DataError, match=r"answers\.csv:3"):
        known_answers(str(path))
    with pytest.raises(ConfigError, match="final answers"):
        known_answers("")
