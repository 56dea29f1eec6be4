from random import Random

import pytest

from fiducial.attack.style_injection import STYLES, StyleInjection
from fiducial.core.errors import ConfigError
from fiducial.core.records import Prompt, user


@pytest.mark.parametrize("style", STYLES)
def test_the_demand_follows_the_request(style):
    english, chinese = STYLES[style]
    assert StyleInjection(style=style).rewrite(Prompt(messages=user("Brew tea.")), Random(0))[-1].content == f"Brew tea.\n\n{english}"
    assert StyleInjection(style=style).rewrite(Prompt(messages=user("泡茶。"), language="zh"), Random(0))[-1].content == f"泡茶。\n\n{chinese}"


def test_a_json_list_is_read_as_lines():
    assert StyleInjection(style="json").decode('["Boil water.", "Say \\"now\\"."]') == 'Boil water.\nSay "now".'


def test_a_list_that_was_cut_off_gives_its_whole_strings():
    assert StyleInjection(style="json").decode('["Boil water.", "Add te') == "Boil water."


def test_an_answer_that_is_no_list_stays():
    assert StyleInjection(style="json").decode('Sorry, "no".') == 'Sorry, "no".'
    assert StyleInjection(style="short").decode('["a"]') == '["a"]'


def test_an_unknown_style_is_an_error():
    with pytest.raises(ConfigError, match="json"):
        StyleInjection(style="jsonl")
