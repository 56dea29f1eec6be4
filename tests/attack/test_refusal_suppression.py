from random import Random

from fiducial.attack.refusal_suppression import RefusalSuppression
from fiducial.core.records import Prompt, user

TEA = Prompt(messages=user("How do I brew tea?"))


def text(attack, prompt=TEA):
    return attack.rewrite(prompt, Random(0))[-1].content


def test_rules_against_refusing_stand_before_the_request():
    sent = text(RefusalSuppression())
    assert sent.endswith("\n\nHow do I brew tea?")
    assert '"cannot"' in sent.split("How do I")[0]


def test_the_inverse_has_the_same_form_and_asks_for_caution():
    rules, inverse = text(RefusalSuppression()), text(RefusalSuppression(inverted=True))
    assert len(rules.splitlines()) == len(inverse.splitlines())
    assert "Never use" in rules
    assert "are welcome" in inverse


def test_chinese_prompts_get_chinese_rules():
    assert "不道歉" in text(RefusalSuppression(), Prompt(messages=user("怎么泡茶？"), language="zh"))
