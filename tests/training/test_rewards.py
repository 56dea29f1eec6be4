"""Functions as rewards, and several rewards as one."""

import math

import pytest

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.core.roles import Reward
from fiducial.training.rewards import FunctionReward, Mixture, Part, Scale, is_function, mean, scale, without_end


def group(*texts, asked="why?", **fields):
    return Group(prompt=Prompt(messages=user(asked), **fields), completions=tuple(Completion(text=t) for t in texts))


class Said(Reward):
    """Gives what it was told to, by text."""

    def __init__(self, label, values):
        self.label, self.values = label, values

    @property
    def name(self):
        return f"test/{self.label}"

    def score(self, groups):
        return [tuple(self.values.get(c.text) for c in g.completions) for g in groups]


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(source, name="mine.py"):
        (tmp_path / name).write_text(source)
        return f"{tmp_path / name}"

    return write


def test_a_function_is_given_what_it_names_and_scores_every_completion(written):
    each = "len(p) + 10 * len(c) + 100 * len(r.category) for p, c, r in zip(prompts, completions, rows)"
    path = written(f"def length(prompts, completions, rows):\n    return [{each}]\n")
    reward = FunctionReward(f"{path}:length")
    assert reward.score([group("a", "bb"), group("", asked="so", category="x")]) == [(14.0, 24.0), (102.0,)]
    assert reward.score([]) == []


def test_a_module_of_this_folder_needs_no_path(written):
    written("def one(completions):\n    return [1] * len(completions)\n", "module_of_this_folder.py")
    reward = FunctionReward("module_of_this_folder:one")
    assert reward.name == "module_of_this_folder:one"
    assert reward.score([group("a")]) == [(1.0,)]


def test_a_function_in_the_style_of_trl_serves_as_it_is(written):
    path = written(
        "def reward(completions, **kwargs):\n    assert len(kwargs['prompts']) == len(completions)\n    return [float(len(c)) for c in completions]\n"
    )
    assert FunctionReward(f"{path}:reward").score([group("abc")]) == [(3.0,)]


def test_none_and_nan_say_that_it_cannot_say_and_tensors_are_lists(written):
    path = written("import torch\ndef r(completions):\n    return [None, float('nan'), True]\ndef t(completions):\n    return torch.tensor([1.0, 2.0, 3.0])\n")
    three = [group("a", "b"), group("c")]
    assert FunctionReward(f"{path}:r").score(three) == [(None, None), (1.0,)]
    assert FunctionReward(f"{path}:t").score(three) == [(1.0, 2.0), (3.0,)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "1 values for 2 completions"),
        ("return 3", "int for 2 completions"),
        ("return 'ab'", "for 2 completions"),
        ("return ['a', 'b']", "gave 'a'"),
        ("return [float('inf'), 0]", "gave inf"),
        ("return 1 / 0", "failed: ZeroDivisionError"),
    ],
)
def test_what_is_no_list_of_numbers_is_a_data_error_that_names_the_reward(written, body, message):
    path = written(f"def bad(completions):\n    {body}\n")
    with pytest.raises(DataError, match=message):
        FunctionReward(f"{path}:bad").score([group("a", "b")])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere_at_all:f", "cannot be imported"),
        ("math:no_such", "no function 'no_such'"),
        ("math:pi", "no function 'pi'"),
        ("gone.py:f", "there is no file"),
        (":f", "names no function"),
    ],
)
def test_a_function_that_is_not_there_is_a_config_error(path, message):
    with pytest.raises(ConfigError, match=message):
        FunctionReward(path)


def test_a_function_that_wants_something_else_is_refused_at_once(written):
    path = written("def f(text):\n    return 1\n")
    with pytest.raises(ConfigError, match=r"takes \['text'\]"):
        FunctionReward(f"{path}:f")


def test_a_changed_source_is_another_reward(written):
    path = written("def f(completions):\n    return [0] * len(completions)\n")
    assert FunctionReward(f"{path}:f").options()["source"]
    assert is_function("a:b")
    assert not is_function("align/rubric_reward")


def test_one_reward_is_left_on_its_own_scale():
    mixture = Mixture.of([Part(Said("a", {"x": 3.0, "y": 1.0}), 2.0)])
    parts = mixture.components([group("x", "y")])
    assert mixture.fitted(parts).total(parts) == [(6.0, 2.0)]


def test_several_rewards_are_standardised_on_given_samples_before_they_are_weighed():
    # a: mean 2, deviation sqrt(2); b: mean 150, deviation 50 sqrt(2)
    mixture = Mixture.of([Part(Said("a", {"x": 3.0, "y": 1.0}), 1.0), Part(Said("b", {"x": 100.0, "y": 200.0}), 0.5)])
    parts = mixture.components([group("x", "y")])
    assert mixture.fitted(parts).total(parts) == [pytest.approx((1 / math.sqrt(2) - 0.5 / math.sqrt(2), -1 / math.sqrt(2) + 0.5 / math.sqrt(2)))]


def test_a_watched_reward_does_not_count():
    mixture = Mixture.of([Part(Said("a", {"x": 3.0}), 1.0), Part(Said("b", {"x": 100.0}), 0.0)])
    parts = mixture.components([group("x")])
    assert parts["b"] == [(100.0,)]
    assert mixture.total(parts) == [(3.0,)]


def test_a_reward_that_has_nothing_to_do_with_a_prompt_leaves_it_to_the_others():
    mixture = Mixture.of([Part(Said("a", {"x": 3.0, "y": 1.0})), Part(Said("b", {"y": 5.0}))])
    parts = mixture.components([group("x", "x"), group("x", "y"), group("z")])
    # the first group is none of b's business; in the second b could not say of x; of z nobody can
    assert mixture.total(parts) == [(3.0, 3.0), (None, 6.0), (None,)]


def test_rewards_need_distinct_names_and_one_that_counts():
    with pytest.raises(ConfigError, match="two rewards are called 'a'"):
        Mixture.of([Part(Said("a", {})), Part(Said("a", {}))])
    Mixture.of([Part(Said("a", {})), Part(Said("a", {}), 1.0, "again")])
    with pytest.raises(ConfigError, match="no reward counts"):
        Mixture.of([Part(Said("a", {}), 0.0)])


def test_a_reward_that_gives_too_few_values_is_named():
    class Short(Said):
        def score(self, groups):
            return [(1.0,) for _ in groups]

    with pytest.raises(DataError, match="test/a does not give one value per completion"):
        Mixture.of([Part(Short("a", {}))]).components([group("x", "y")])


def test_scale_and_mean_look_at_what_was_scored():
    assert scale([(1.0, None), (3.0,)]) == pytest.approx(Scale(2.0, math.sqrt(2)))
    assert scale([(1.0, 1.0)]) == Scale(1.0, 1.0)
    assert scale([(None,)]) == Scale(0.0, 1.0)
    assert mean([(1.0, None), (3.0,)]) == 2.0
    assert math.isnan(mean([(None,)]))


def test_an_answer_that_was_cut_before_its_end_gets_the_penalty_instead():
    cut = Group(
        prompt=Prompt(messages=user("?")), completions=(Completion(text="a"), Completion(text="b", finish="length"), Completion(text="c", finish="length"))
    )
    assert without_end([(3.0, 3.0, None)], [cut], -1.0) == [(3.0, -1.0, None)]
