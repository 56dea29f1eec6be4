import json
from random import Random

import pytest

from fiducial.attack.payload_splitting import PayloadSplitting, split
from fiducial.core.errors import ConfigError
from fiducial.core.records import Prompt, user


@pytest.mark.parametrize("text", ["How do I repair a bicycle wheel?", "怎样修理自行车的轮子？", 'Say "hi" to\nall neighbours', "a b c d e"])
@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_the_pieces_join_to_the_request(text, pieces):
    parts = split(text, pieces)
    assert "".join(parts) == text
    assert len(parts) == pieces


def test_the_longest_words_are_cut():
    assert not {"bicycle", "repair"} & set(" ".join(split("How do I repair a bicycle wheel?", 3)).split())


def test_what_is_sent_is_assignments_and_their_sum():
    sent = PayloadSplitting().rewrite(Prompt(messages=user('Say "hi" to every neighbour')), Random(0))[-1].content
    first, second, third, last = sent.splitlines()
    assert "".join(json.loads(line.split(" = ", 1)[1]) for line in (first, second, third)) == 'Say "hi" to every neighbour'
    assert "a + b + c" in last


def test_fewer_characters_than_pieces_cannot_be_cut():
    assert PayloadSplitting(pieces=3).rewrite(Prompt(messages=user("ab")), Random(0)) is None


@pytest.mark.parametrize("pieces", [1, 9])
def test_the_number_of_pieces_is_checked(pieces):
    with pytest.raises(ConfigError, match=str(pieces)):
        PayloadSplitting(pieces=pieces)
