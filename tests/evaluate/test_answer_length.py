from math import sqrt

import pytest
import yaml

from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Score
from fiducial.evaluate.answer_length import AnswerLength
from fiducial.models.scripted import ScriptedModel, tiny

WORDS = "one two three four five six seven eight nine ten eleven twelve"


def said(number):
    return " ".join(WORDS.split()[:number])


@pytest.fixture
def data(rows):
    return rows({"prompt": "Tell me about tea."}, {"prompt": "Tell me about owls."})


@pytest.fixture
def base(tmp_path):
    """A model that says four words about tea and six about anything else."""
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump({"tea": said(4), "default": said(6)}), encoding="utf-8")
    return f"scripted:{path}"


def scores(model, data, base, **options):
    return {s.metric: s for s in AnswerLength(base=base, data=data, split="", **options).run(model).scores}


def test_growth_is_the_ratio_of_mean_lengths_less_one(data, base):
    growth = scores(ScriptedModel({"tea": said(6), "owls": said(9)}), data, base)["growth"]
    # 15 words against 10; every answer is longer by the same share, so there is no spread
    assert (growth.value, growth.low, growth.high, growth.n) == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5), 2)


def test_its_interval_is_that_of_a_ratio_of_paired_means(data, base):
    growth = scores(ScriptedModel({"tea": said(6), "owls": said(6)}), data, base)["growth"]
    # ratio 12 / 10; residuals 6 - 1.2 * 4 = 1.2 and 6 - 1.2 * 6 = -1.2, by the mean of 5: 0.24 and -0.24; se = 0.24 * sqrt(2) / sqrt(2)
    half = 1.96 * sqrt(2 * 0.24**2 / 1 / 2)
    assert (growth.value, growth.low, growth.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-3)


def test_longer_counts_answers_beyond_the_margin(data, base):
    found = scores(ScriptedModel({"tea": said(5), "owls": said(7)}), data, base)["longer"]
    assert (found.value, found.n, found.better) == (0.5, 2, "lower")  # 5 of 4 is 25 % more, 7 of 6 is 17 %
    assert scores(ScriptedModel({"tea": said(5), "owls": said(7)}), data, base, margin=0.3)["longer"].value == 0.0


def test_the_same_model_has_not_grown(data):
    found = scores(tiny(), data, "tiny", max_tokens=6)
    assert found["growth"].value == 0.0
    assert found["longer"].value == 0.0


def test_what_was_cut_is_not_finished_and_what_failed_is_not_counted(rows, base):
    data = rows(*({"prompt": f"Tell me about {word}."} for word in ("tea", "owls", "void")))
    cut, failed = Completion(text=said(6), finish="length"), Completion(text="", finish="error", error="busy")
    found = scores(ScriptedModel({"tea": cut, "owls": said(6), "void": failed}), data, base)
    assert (found["finished"].value, found["finished"].n) == (0.5, 2)
    assert found["growth"].not_scored == found["longer"].not_scored == 1


def test_one_prompt_has_no_interval_and_an_empty_base_nothing_to_grow_from(rows, base, tmp_path):
    one = rows({"prompt": "Tell me about tea."})
    assert "growth" not in scores(ScriptedModel(default=said(6)), one, base)
    (tmp_path / "silent.yaml").write_text("default: ''", encoding="utf-8")
    both = rows({"prompt": "Tell me about tea."}, {"prompt": "Tell me about owls."})
    assert "growth" not in scores(ScriptedModel(default=said(6)), both, f"scripted:{tmp_path}/silent.yaml")


def test_figures_round_trip_and_name_the_base_they_were_measured_against(data, base, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("default: hm", encoding="utf-8")
    model = ScriptedModel(default=said(6))
    found, against = scores(model, data, base), scores(model, data, f"scripted:{other}")
    assert all(Score.parse(s.line()) == s for s in found.values())
    assert found["longer"].fingerprint["format"] != against["longer"].fingerprint["format"]


@pytest.mark.parametrize("options", [{"split": "train"}, {"margin": -0.1}])
def test_an_unknown_split_or_a_negative_margin_is_an_error(options):
    with pytest.raises(ConfigError):
        AnswerLength(**options)
