import pytest

from fiducial.app.cli.stopping import Stop, reason
from fiducial.core.errors import ConfigError
from fiducial.core.records import Score
from fiducial.core.run import Run

AGAINST = Stop(step="look", figure="acc", against="before")


def scored(values, *, better="higher", data="d"):
    """A run with one figure of 0 or 1 per item."""
    run = Run.create("evaluate/x", {}, {}, 0)
    share = sum(values) / len(values)
    fields = {"items": tuple(map(float, values)), "better": better, "fingerprint": {"data": data}}
    with run:
        run.lines("scores", Score).append(Score(suite="s", metric="acc", value=share, n=len(values), low=0, high=1, **fields))
    return {"run": run.id}


def test_a_rise_beyond_the_interval_goes_on_and_one_within_it_ends_the_block():
    made = {"before": scored([0] * 40), "b/1/look": scored([1] * 10 + [0] * 30), "b/2/look": scored([1] * 11 + [0] * 29)}
    # 10 of 40 from 0, and then one more
    assert reason(AGAINST, "b", 1, made) == ""
    assert reason(AGAINST, "b", 2, made).startswith("acc changed by +0.025 (-")
    assert reason(AGAINST, "b", 2, made).endswith("since b/1/look")


def test_where_less_is_better_a_fall_is_a_gain():
    made = {"before": scored([1] * 40, better="lower"), "b/1/look": scored([1] * 10 + [0] * 30, better="lower"), "b/2/look": scored([1] * 40, better="lower")}
    assert reason(AGAINST, "b", 1, made) == ""
    assert "acc changed by +0.75" in reason(AGAINST, "b", 2, made)


def test_a_bound_is_passed_or_not():
    made = {"b/1/look": scored([1, 0, 0, 0])}
    assert reason(Stop(step="look", figure="acc", above=0.2), "b", 1, made) == "acc is 0.25"
    assert reason(Stop(step="look", figure="acc", below=0.2), "b", 1, made) == ""


def test_figures_of_other_items_are_no_gain_and_no_loss_but_an_error():
    with pytest.raises(ConfigError, match="cannot be held against before: not comparable"):
        reason(AGAINST, "b", 1, {"before": scored([0, 0]), "b/1/look": scored([1, 1], data="other")})
