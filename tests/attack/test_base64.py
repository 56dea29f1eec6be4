from random import Random

import pytest

from fiducial.attack.base64 import Base64
from fiducial.core.errors import ConfigError
from fiducial.core.records import Prompt, user

TEA = Prompt(messages=user("How do I brew tea?"))
CODE = "SG93IGRvIEkgYnJldyB0ZWE/"  # by hand: How|_do|_I_|bre|w_t|ea? in groups of three bytes
BOIL = "Qm9pbCB0aGUgd2F0ZXIgZmlyc3Qu"  # Boil the water first.


@pytest.mark.parametrize(("variant", "has_code", "has_text"), [("both", True, False), ("raw", True, False), ("input", True, False), ("output", False, True)])
def test_each_variant_encodes_its_side(variant, has_code, has_text):
    sent = Base64(variant=variant).rewrite(TEA, Random(0))[-1].content
    assert (CODE in sent, "brew tea" in sent) == (has_code, has_text)


def test_raw_is_the_code_and_nothing_else():
    assert Base64(variant="raw").rewrite(TEA, Random(0))[-1].content == CODE


def test_chinese_is_encoded_as_utf8():
    sent = Base64().rewrite(Prompt(messages=user("茶"), language="zh"), Random(0))[-1].content
    assert sent.endswith("\n6Iy2")  # U+8336 = e8 8c b6


def test_an_encoded_answer_is_decoded():
    assert Base64().decode(BOIL) == "Boil the water first."


def test_code_within_words_is_decoded_in_place():
    assert Base64().decode(f"Here is the answer: {BOIL} I hope this helps you.") == "Here is the answer: Boil the water first. I hope this helps you."


@pytest.mark.parametrize(("lost", "text"), [(1, "Boil the water first"), (2, "Boil the water firs"), (3, "Boil the water fir")])
def test_an_answer_cut_at_the_token_limit_loses_only_its_end(lost, text):
    # 21 bytes are 28 characters; of a last group with 3, 2 or 1 of its 4 characters 2, 1 or 0 bytes are whole
    assert Base64().decode(BOIL[:-lost]) == text


def test_a_plain_refusal_stays_what_it_is():
    assert Base64().decode("I'm sorry, but I can't help with that.") == "I'm sorry, but I can't help with that."


def test_noise_is_not_readable(rule):
    (attempt,) = Base64().run(rule(lambda c: "xK9+/aQ2vB7nM0pL zz9 q8w7"), [TEA])
    assert attempt.decoded is None
    assert attempt.parameters == {"variant": "both", "encoded": True}


def test_a_copy_of_the_request_is_no_answer(rule):
    copied, answered = Base64().run(rule(lambda c: CODE if "SG93" in c[-1].content else BOIL), [TEA, Prompt(messages=user("Boil?"))])
    assert (copied.response, copied.decoded) == (CODE, None)
    assert answered.decoded == "Boil the water first."


def test_an_unknown_variant_is_an_error():
    with pytest.raises(ConfigError, match="input"):
        Base64(variant="inputs")
