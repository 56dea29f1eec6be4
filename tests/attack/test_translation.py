import json

import pytest

from fiducial.attack.translation import Translation
from fiducial.core.errors import DataError
from fiducial.core.records import Prompt, user
from fiducial.data.load import SHIPPED, shipped_goals
from fiducial.data.rows import read_rows

TEA = Prompt(messages=user("How do I brew tea?"))


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"text": "How do I brew tea?", "language": "zu", "translation": "Ngilenza kanjani itiye?"}) + "\n", encoding="utf-8")
    return path


def test_the_stored_translation_is_sent(rule, own):
    (attempt,) = Translation(language="zu", translations=str(own)).run(rule(), [TEA])
    assert attempt.sent == user("Ngilenza kanjani itiye?")


def test_a_prompt_without_one_is_an_error_and_not_sent(rule, own):
    (attempt,) = Translation(language="fr", translations=str(own)).run(rule(), [TEA])
    assert (attempt.finish, attempt.error) == ("error", "no translation of this prompt into 'fr' is stored")


def test_each_english_goal_and_twin_that_comes_along_has_a_french_one_and_nothing_else_has(rule):
    english = [prompt for pair in shipped_goals() if pair[0].language == "en" for prompt in pair]
    stored = [str(row.values["text"]) for row in read_rows(SHIPPED / "translations.jsonl")]
    assert sorted(stored) == sorted(prompt.text for prompt in english)
    for attempt in Translation().run(rule(), english[::200]):
        assert attempt.finish == "stop"
        assert attempt.sent != attempt.prompt.messages


def test_a_changed_file_is_read_again(rule, own):
    attack = Translation(language="zu", translations=str(own))
    attack.run(rule(), [TEA])
    own.write_text(json.dumps({"text": "How do I brew tea?", "language": "zu", "translation": "Itiye?"}), encoding="utf-8")
    import os

    os.utime(own, ns=(1, 1))
    assert attack.run(rule(), [TEA])[0].sent == user("Itiye?")


def test_a_missing_file_and_a_wrong_row_are_data_errors(rule, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        Translation(translations=str(tmp_path / "none.jsonl")).run(rule(), [TEA])
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"wrong\.jsonl:1"):
        Translation(translations=str(wrong)).run(rule(), [TEA])
