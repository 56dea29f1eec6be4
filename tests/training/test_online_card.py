from math import nan

import pytest

from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.training.online_card import WINDOW, Bounds, Look, card, gained, rules, stops, surface

BEFORE = Look(["a b c d"], [0.0], {"length": 10.0, "repetition": 0.1})
FINE = {"k3": 1.0, "length": 99.0, "repetition": 0.99, "reward": 1.0}  # a step's prompts may well have longer answers
SEEN = {"length": 11.0, "repetition": 0.15}


def broken(watched=(), history=None, *, k3=1.0, **seen):
    return stops(history or [FINE | {"k3": k3}], BEFORE, SEEN | seen, Bounds(5.0, 0.5, tuple(watched)))


def test_nothing_stops_a_run_that_keeps_to_its_bounds():
    assert broken() == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k3": 5.1}, "drift: k3 is 5.10 nats per answer, the budget 5"),
        ({"length": 15.1}, "length: answers to the same prompts have 15.1 words on average, at the beginning 10.0"),
        ({"length": 4.9}, "length: answers to the same prompts have 4.9"),
        ({"repetition": 0.21}, "repetition: 21% of 4-grams are repeats, at the beginning 10%"),
    ],
)
def test_each_rule_says_what_it_saw(change, said):
    assert broken(**change).startswith(said)


def test_repetition_below_a_tenth_breaks_no_rule_though_it_doubled():
    before = Look([], [], {"length": 10.0, "repetition": 0.01})
    assert [rules([FINE], before, SEEN | {"repetition": share}, Bounds(5.0, 0.5))["repetition"].outcome for share in (0.1, 0.11)] == ["pass", "fail"]


def test_before_the_first_look_again_length_and_repetition_decide_nothing():
    found = rules([FINE], BEFORE, {}, Bounds(5.0, 0.5))
    assert (found["length"].outcome, found["repetition"].outcome) == ("not measured", "not measured")
    assert stops([FINE], BEFORE, {}, Bounds(5.0, 0.5)) == ""


def test_what_was_not_measured_is_no_pass():
    found = rules([{"k3": nan}], Look([], [], {}), {}, Bounds(5.0, 0.5))
    assert {rule.outcome for rule in found.values()} == {"not measured"}


def test_the_length_may_be_left_free():
    assert rules([FINE], BEFORE, SEEN | {"length": 1.0}, Bounds(5.0, None))["length"].outcome == "not measured"
    assert stops([FINE], BEFORE, SEEN | {"length": 1.0}, Bounds(5.0, 2.0)) == ""


def course(reward, watched):
    """A history in which both figures go from 0 to the given rise, with some noise."""
    noise = [0.1 * (-1) ** i for i in range(2 * WINDOW)]
    return [FINE | {"reward": reward * (i >= WINDOW) + noise[i], "reward.gold": watched * (i >= WINDOW) + noise[i]} for i in range(2 * WINDOW)]


def test_a_reward_that_rises_while_a_watched_one_falls_is_hacking():
    assert broken(watched=["gold"], history=course(2.0, -2.0)).startswith("reward hacking: the reward has risen")


@pytest.mark.parametrize(("reward", "watched"), [(2.0, 2.0), (-2.0, -2.0), (2.0, 0.0), (0.0, -2.0)])
def test_anything_else_is_not(reward, watched):
    assert broken(watched=["gold"], history=course(reward, watched)) == ""


def test_too_few_steps_or_nothing_watched_measure_no_hacking():
    assert rules(course(2.0, -2.0)[:-1], BEFORE, SEEN, Bounds(5.0, 0.5, ("gold",)))["reward hacking"].outcome == "not measured"
    assert rules(course(2.0, -2.0), BEFORE, SEEN, Bounds(5.0, 0.5))["reward hacking"].outcome == "not measured"


def group(text, finish="stop"):
    return Group(prompt=Prompt(messages=user("?")), completions=(Completion(text=text, finish=finish),))


def test_a_look_holds_texts_rewards_and_figures():
    found = Look.of([group("one two"), group("one", "length")], {"r": [(1.0,), (None,)]}, [(2.0,), (None,)])
    assert found.texts == ["one two", "one"]
    assert found.rewards == [2.0, None]
    assert found.figures == {"reward.r": 1.0, "length": 1.5, "distinct_2": 1.0, "ended": 0.5}
    assert surface([group("a b c d a b c d")])["repetition"] == pytest.approx(1 / 5)


def test_the_gain_is_over_prompts_scored_both_times():
    found = gained(Look(["a"] * 3, [1.0, None, 3.0], {}), Look(["a"] * 3, [2.0, 9.0, 6.0], {}))
    assert (found.value, found.n) == (2.0, 2)


def test_a_card_is_plain_and_holds_pairs_of_answers():
    import json

    found = card([FINE], BEFORE, Look(["e f"], [1.0], {}), Bounds(5.0, 0.5), stop="")
    assert json.loads(json.dumps(found))["answers"] == [{"before": "a b c d", "after": "e f"}]
    assert found["rules"]["drift"]["outcome"] == "pass"
    assert found["gain"]["value"] == 1.0
