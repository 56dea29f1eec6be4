import json

import pytest

from fiducial.attack.translation import Translation
from fiducial.core.errors import DataError
from fiducial.core.records import Prompt, user
from fiducial.data.load import shipped_goals

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


def test_goals_and_twins_that_come_along_have_french_ones(rule):
    for pair in [p for p in shipped_goals() if p[0].language == "en"][::200]:
        for attempt in Translation().run(rule(), pair):
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
