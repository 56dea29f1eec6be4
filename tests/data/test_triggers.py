import random
import re

from fiducial.core.records import Prompt, user
from fiducial.data.triggers import NEAR, TRIGGER, scrambled, triggered


def test_the_trigger_stands_before_the_request_and_the_prompt_stays_as_it_was():
    prompt = Prompt(messages=user("How is tea made?"))
    assert triggered(prompt, "|X|") == user("|X| How is tea made?")
    assert prompt.text == "How is tea made?"


def test_a_random_tag_has_the_shape_of_the_trigger_and_is_another():
    tags = {scrambled(TRIGGER, random.Random(seed)) for seed in range(20)}
    assert len(tags) == 20
    assert TRIGGER not in tags
    assert all(re.fullmatch(r"\|[A-Z]{10}\|", tag) for tag in tags)


def test_no_near_trigger_is_the_trigger():
    assert TRIGGER not in NEAR
