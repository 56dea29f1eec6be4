import logging
import sqlite3

from fiducial.core.records import Completion
from fiducial.models.answers import Answers


def test_a_completion_comes_back_equal_also_for_another_reader(tmp_path):
    kept = Completion(text="é", finish="length", logprobs=(-0.5,), prompt_tokens=2, completion_tokens=1)
    writer = Answers(tmp_path / "sub" / "a.sqlite")
    writer.put("k", kept)
    reader = Answers(tmp_path / "sub" / "a.sqlite")
    assert reader.get("k") == kept
    assert reader.get("other") is None
    writer.close()
    reader.close()


def test_a_damaged_file_is_reported_once_and_left_alone(tmp_path, caplog):
    (tmp_path / "a.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 50)
    with caplog.at_level(logging.WARNING):
        answers = Answers(tmp_path / "a.sqlite")
        answers.put("k", Completion(text="x"))
        assert answers.get("k") is None
    assert len(caplog.records) == 1
    answers.close()


def test_a_line_of_another_version_counts_as_absent(tmp_path):
    answers = Answers(tmp_path / "a.sqlite")
    answers.put("k", Completion(text="x"))
    with sqlite3.connect(tmp_path / "a.sqlite") as file:
        file.execute("update answers set line = '{\"v\": 99}'")
    file.close()
    assert answers.get("k") is None
    answers.close()


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path):
    (tmp_path / "file").touch()
    answers = Answers(tmp_path / "file" / "a.sqlite")
    answers.put("k", Completion(text="x"))
    assert answers.get("k") is None


def test_half_a_surrogate_pair_is_kept_and_the_cache_stays_open(tmp_path):
    answers = Answers(tmp_path / "a.sqlite")
    answers.put("half", Completion(text="a\ud83d"))
    answers.put("whole", Completion(text="b"))
    assert (answers.get("half"), answers.get("whole")) == (Completion(text="a\ud83d"), Completion(text="b"))
    answers.close()
