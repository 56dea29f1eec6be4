"""What is asked of a score head before anything is learnt from it."""

import json
import logging

import pytest

from fiducial.core.errors import MethodError
from fiducial.core.records import Score
from fiducial.core.run import Run
from fiducial.models.scripted import tiny
from fiducial.training.headproof import refuse_unproven

SURE, CHANCE = (0.9, 0.7, 0.97, 20), (0.6, 0.48, 0.71, 60)
"""Value, the ends of its interval, and the number of cases: 18 of 20, and 36 of 60, as Wilson's interval has them."""


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def trained(tmp_path):
    """A model's folder in a run whose report card has these held-out figures."""

    def with_card(**figures):
        folder = tmp_path / "run" / "model"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(("value", "low", "high", "n"), f, strict=True), name=f"held-out {name}") for name, f in figures.items()]
        (folder.parent / "card.json").write_text(json.dumps({"figures": [{"name": "loss", "value": 1.0}, *rows]}), encoding="utf-8")
        return str(folder)

    return with_card


@pytest.fixture
def measured(tmp_path, monkeypatch, model):
    """A run of evaluate/reward_card with this accuracy of the model, or of another."""
    monkeypatch.setenv("FIDUCIAL_RUNS", str(tmp_path / "runs"))

    def card(figure, of=model.fingerprint, suite="evaluate/reward_card"):
        run = Run.create(suite, {}, {}, 0)
        fields = dict(zip(("value", "low", "high", "n"), figure, strict=True))
        run.lines("scores", Score).append(Score(suite=suite, metric="accuracy", interval="wilson", model=of, fingerprint={}, **fields))
        return f"run:{run.id}"

    return card


def test_an_accuracy_whose_interval_lies_above_one_half_is_enough(trained, model, caplog):
    refuse_unproven(trained(accuracy=SURE), model, ())
    assert caplog.records == []


def test_one_whose_interval_holds_one_half_is_refused_with_its_figures(trained, model):
    with pytest.raises(MethodError, match=r"accuracy of .* is 0.60 \(0.48 to 0.71, n=60\), which does not lie above the 0.5 of chance") as error:
        refuse_unproven(trained(accuracy=CHANCE), model, ())
    assert "unproven" in error.value.hint


def test_a_model_without_a_card_or_whose_training_held_nothing_out_is_refused(trained, tmp_path, model):
    (tmp_path / "bare").mkdir()
    for name in (trained(), str(tmp_path / "bare"), "tiny"):
        with pytest.raises(MethodError, match="nothing shows that") as error:
            refuse_unproven(name, model, ())
        assert "--held-out" in error.value.hint


def test_chance_for_steps_is_what_calling_all_of_them_right_would_give(trained, model):
    with pytest.raises(MethodError, match=r"does not lie above the 0\.85 of chance"):
        refuse_unproven(trained(accuracy=SURE, right_steps=(0.85, 0.8, 0.9, 20)), model, ())
    with pytest.raises(MethodError, match=r"does not lie above the 0\.9 of chance"):
        refuse_unproven(trained(accuracy=SURE, right_steps=(0.1, 0.0, 0.2, 20)), model, ())
    refuse_unproven(trained(accuracy=SURE, right_steps=(0.5, 0.4, 0.6, 20)), model, ())


def test_a_later_measurement_of_this_very_model_counts_before_what_its_training_said(trained, measured, model):
    refuse_unproven(trained(), model, [measured(SURE)])
    with pytest.raises(MethodError, match=r"0\.60"):
        refuse_unproven(trained(accuracy=SURE), model, [measured(CHANCE)])
    for other in (measured(SURE, of="another"), measured(SURE, suite="evaluate/helpfulness")):
        with pytest.raises(MethodError, match=f"none of {other} measured this very model"):
            refuse_unproven(trained(), model, [other])


def test_scores_that_follow_length_are_warned_of(trained, model, caplog):
    with caplog.at_level(logging.WARNING):
        refuse_unproven(trained(accuracy=SURE, length_correlation=(0.6, 0.4, 0.8, 20)), model, ())
        assert not caplog.records
        refuse_unproven(trained(accuracy=SURE, length_correlation=(-0.7, -0.8, -0.55, 20)), model, ())
    assert "scores shorter answers higher" in caplog.text


def test_a_damaged_card_is_no_proof(trained, model):
    name = trained(accuracy=SURE)
    place = name.removesuffix("model") + "card.json"
    for text in ("{", '{"figures": [{"name": "held-out accuracy", "value": null, "low": 0, "high": 1, "n": 3}]}'):
        with open(place, "w", encoding="utf-8") as file:
            file.write(text)
        with pytest.raises(MethodError, match="cannot be read"):
            refuse_unproven(name, model, ())
