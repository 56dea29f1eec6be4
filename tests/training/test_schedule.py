from math import cos, pi

import pytest

from fiducial.training.options import TrainOptions
from fiducial.training.schedule import exploded, rate


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    options = TrainOptions(warmup=0.2)
    assert [rate(step, 10, options, 1.0) for step in range(3)] == pytest.approx([0.5, 1.0, 1.0])
    assert rate(6, 10, options, 1.0) == pytest.approx(0.5 * (1 + cos(pi / 2)))
    assert rate(10, 10, options, 3.0) == pytest.approx(0.0)


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert rate(0, 10, TrainOptions(warmup=0.0), 2.0) == 2.0


def test_a_norm_a_hundred_times_the_median_of_ten_is_too_large():
    assert exploded(101.0, [1.0] * 10).startswith("the gradient's norm 101 is over 100 times its median 1")
    assert exploded(99.0, [1.0] * 10) == ""
    assert exploded(1e9, [1.0] * 9) == ""


def test_steps_without_a_gradient_say_nothing_of_what_is_usual():
    assert exploded(0.1, [0.0] * 30) == ""
    assert exploded(101.0, [0.0] * 30 + [1.0] * 9) == ""
    assert exploded(101.0, [0.0] * 30 + [1.0] * 10) != ""
