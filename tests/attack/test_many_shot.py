from random import Random

import pytest

from fiducial.attack.many_shot import MOST, ManyShot
from fiducial.core.errors import ConfigError
from fiducial.core.records import Prompt, user

TEA = Prompt(messages=user("How do I brew tea?"))
ZH = Prompt(messages=user("怎么泡茶？"), language="zh")


def text(shots, prompt=TEA, seed=0):
    return ManyShot(shots=shots).rewrite(prompt, Random(seed))[-1].content


@pytest.mark.parametrize("shots", [1, 4, MOST])
def test_there_are_as_many_finished_exchanges_as_shots_and_each_is_another(shots):
    lines = text(shots).splitlines()
    assert len([line for line in lines if line.startswith("User: ")]) == shots + 1
    assert len([line for line in lines if line.startswith("Assistant: ")]) == shots
    assert len(set(lines)) == len(lines)


def test_the_request_is_the_last_line_and_the_assistant_is_next():
    assert text(4).endswith("\nUser: How do I brew tea?\nAssistant:")


def test_chinese_prompts_stand_in_a_chinese_dialogue():
    assert text(MOST, ZH).endswith("\n用户：怎么泡茶？\n助手：")
    assert "User" not in text(MOST, ZH)


def test_the_seed_chooses_the_exchanges():
    assert text(2, seed=1) == text(2, seed=1)
    assert text(2, seed=1) != text(2, seed=2)


@pytest.mark.parametrize("shots", [0, MOST + 1])
def test_the_number_of_shots_is_checked(shots):
    with pytest.raises(ConfigError, match=str(shots)):
        ManyShot(shots=shots)
