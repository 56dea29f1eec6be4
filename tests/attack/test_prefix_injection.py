from random import Random

from fiducial.attack.prefix_injection import PREFIX_EN, PREFIX_ZH, PrefixInjection
from fiducial.core.records import Message, Prompt, user

TEA = Prompt(messages=user("How do I brew tea?"))
ZH = Prompt(messages=user("怎么泡茶？"), language="zh")


def sent(attack, prompt=TEA):
    return attack.rewrite(prompt, Random(0))


def test_the_request_comes_first_and_the_sentence_to_begin_with_last():
    (turn,) = sent(PrefixInjection())
    assert turn.content.startswith("How do I brew tea?\n")
    assert turn.content.endswith(f'"{PREFIX_EN}"')


def test_chinese_prompts_get_a_chinese_sentence():
    (turn,) = sent(PrefixInjection(), ZH)
    assert PREFIX_ZH in turn.content
    assert turn.content.startswith("怎么泡茶？")


def test_prefill_begins_the_answer_instead_of_asking_for_it():
    assert sent(PrefixInjection(prefill=True)) == (*TEA.messages, Message(role="assistant", content=PREFIX_EN))


def test_the_harmless_control_uses_the_given_sentence():
    assert sent(PrefixInjection(prefix="Hello!"))[-1].content.endswith('"Hello!"')
    assert sent(PrefixInjection(prefix="Hello!", prefill=True))[-1].content == "Hello!"


def test_an_answer_that_has_begun_cannot_be_prefilled(rule):
    begun = Prompt(messages=(*user("Hi"), Message(role="assistant", content="Yes")))
    (attempt,) = PrefixInjection(prefill=True).run(rule(), [begun])
    assert attempt.finish == "error"
