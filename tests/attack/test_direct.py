from random import Random

from fiducial.attack.direct import Direct
from fiducial.core.records import Message, Prompt, user


def test_the_conversation_is_sent_unchanged():
    turns = (Message(role="system", content="Be brief."), *user("How do I brew tea?"))
    assert Direct().rewrite(Prompt(messages=turns), Random(0)) == turns
