import pytest

from fiducial.align.filtered_pretraining import FilteredPretraining
from fiducial.core.errors import DataError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

approx = pytest.approx


def document(*values):
    return Group(prompt=Prompt(messages=()), completions=(Completion(text="a" * len(values), ends=tuple(range(1, len(values) + 1)), values=values),))


def stays(group, threshold=0.0):
    return bool(FilteredPretraining(threshold=threshold).prepare(group).completions)


def test_a_document_stays_if_the_mean_value_of_its_parts_reaches_the_threshold():
    assert stays(document(0.0, 0.0))
    assert not stays(document(0.0, -1e-6))
    assert stays(document(-1.0, 1.0))
    assert stays(document(-0.2, -0.4), threshold=-0.31)  # mean -0.3
    assert not stays(document(-0.2, -0.4), threshold=-0.29)


def test_parts_of_unknown_value_do_not_count_and_a_document_of_unknown_value_goes():
    assert stays(document(None, 0.5))
    assert not stays(document(None, None))


def test_of_several_completions_those_of_sufficient_reward_stay_as_equal_examples():
    given = Group(prompt=Prompt(messages=user("q")), completions=tuple(Completion(text=t) for t in "abc"), rewards=(1.0, -1.0, 0.0))
    kept = FilteredPretraining().prepare(given)
    assert [c.text for c in kept.completions] == ["a", "c"]
    assert kept.targets == (1.0, 1.0)


def test_the_loss_is_the_negative_log_likelihood(group):
    assert FilteredPretraining()(group((-6.0, -2.0), targets=[[1.0, 1.0]])).tolist() == approx([8.0])


def test_what_was_left_out_is_counted_and_nothing_left_is_an_error(tmp_path):
    options = TrainOptions(batch=2, lora_rank=2)
    result = train(tiny(), [document(1.0), document(-1.0), document(0.5)], FilteredPretraining(), options, folder=tmp_path / "a")
    assert (result.groups, result.left_out) == (2, 1)
    with pytest.raises(DataError, match="none of 1 groups can be trained on"):
        train(tiny(), [document(-1.0)], FilteredPretraining(), options, folder=tmp_path / "b")
