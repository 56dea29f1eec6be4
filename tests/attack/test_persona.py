from random import Random

import pytest

from fiducial.attack.persona import CHARACTERS, Persona
from fiducial.core.errors import ConfigError
from fiducial.core.records import Message, Prompt, user

TURNS = (Message(role="system", content="Be kind."), *user("How do I brew tea?"))
TEA = Prompt(messages=TURNS)


@pytest.mark.parametrize("character", CHARACTERS)
def test_every_character_speaks_the_prompts_language(character):
    english, chinese = CHARACTERS[character]
    assert Persona(character=character).rewrite(TEA, Random(0))[-1].content == f"{english}\n\nHow do I brew tea?"
    assert Persona(character=character).rewrite(Prompt(messages=user("怎么泡茶？"), language="zh"), Random(0))[-1].content == f"{chinese}\n\n怎么泡茶？"


def test_as_a_system_prompt_it_replaces_the_one_there():
    sent = Persona(system=True).rewrite(TEA, Random(0))
    assert [(m.role, m.content) for m in sent] == [("system", CHARACTERS["unbound"][0]), ("user", "How do I brew tea?")]


def test_an_unknown_character_is_an_error_that_offers_the_nearest():
    with pytest.raises(ConfigError, match="adviser"):
        Persona(character="advisor")
