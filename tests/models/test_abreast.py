"""Work of one model in several threads."""

import random
import threading

import pytest
import torch

from fiducial.models import sampling
from fiducial.models.abreast import MOST, abreast, divided, threads, together, twins
from fiducial.models.scripted import tiny


def test_there_are_no_more_threads_than_cores_parts_or_the_most(two_cores):
    cpu = torch.device("cpu")
    assert [threads(cpu, parts) for parts in (0, 1, 2, 50)] == [1, 1, 2, 2]
    torch.set_num_threads(MOST + 3)
    assert threads(cpu, 50) == MOST
    assert threads(torch.device("meta"), 50) == 1


def test_what_the_functions_give_comes_in_their_order_and_each_has_its_share_of_the_cores(two_cores):
    ran_in = []

    def job(number):
        ran_in.append(threading.current_thread())
        return number, torch.get_num_threads()

    assert together([lambda: job(0), lambda: job(1)]) == [(0, 1), (1, 1)]
    assert torch.get_num_threads() == 2
    assert len(set(ran_in)) == 2
    assert threading.current_thread() not in ran_in


def test_parts_have_about_the_same_sum_and_hold_everything_once():
    # the largest first, each to the emptiest: 5 | 4, then 3 to the second (7), 3 to the first (8), 3 to the second (10)
    assert divided([3, 5, 3, 4, 3], 2) == [[1, 2], [0, 3, 4]]
    draw = random.Random(0)
    for count in range(1, MOST + 1):
        sizes = [draw.randrange(1, 90) for _ in range(23)]
        parts = divided(sizes, count)
        assert len(parts) == count
        assert sorted(i for part in parts for i in part) == list(range(23))
        assert all(part == sorted(part) for part in parts)
        sums = [sum(sizes[i] for i in part) for part in parts]
        assert max(sums) - min(sums) <= max(sizes)
    assert divided([7], 2) == [[0], []]
    assert divided([], 2) == [[], []]


def test_an_error_in_a_thread_is_raised_where_its_work_is_awaited(two_cores):
    def wrong():
        raise ValueError("from within")

    with pytest.raises(ValueError, match="from within"):
        together([lambda: 1, wrong])
    assert torch.get_num_threads() == 2


def test_leaving_early_ends_the_threads_at_their_next_item(two_cores):
    given = []

    def endless():
        number = 0
        while True:
            given.append(number)
            yield number
            number += 1

    some = abreast([endless, endless])
    next(some)
    some.close()
    count = len(given)
    assert not [t for t in threading.enumerate() if t.name == "fiducial-abreast"]
    assert len(given) == count


def test_twins_hold_the_same_parameters_and_hooks_of_their_own():
    module = tiny().module
    one, two = twins(module, 2)
    assert one is module
    assert two is not module
    assert all(a is b for a, b in zip(one.parameters(), two.parameters(), strict=True))
    before = len(two.lm_head._forward_pre_hooks)
    one.lm_head.register_forward_pre_hook(lambda *_: None)
    assert len(two.lm_head._forward_pre_hooks) == before
    two.config.use_cache = not one.config.use_cache
    assert two.config.use_cache != one.config.use_cache


def test_a_model_that_cannot_be_copied_stays_alone():
    module = tiny().module
    module.held = threading.Lock()
    assert twins(module, 3) == [module]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_are_the_same_in_one_thread_and_in_two(two_cores, monkeypatch, temperature):
    """float32, so that what else is in the batch makes no difference."""
    monkeypatch.setattr(sampling, "ROWS_EACH", 2)
    module = tiny().module
    prompts = [[5 + i, 7, 11 + (i % 3), *range(20, 20 + i)] for i in range(9)] + [[5, 7, 11]]
    asked = {"k": 2, "max_tokens": 6, "temperature": temperature, "eos": {2}, "seed": 3}
    both = sampling.generate(module, prompts, **asked)
    torch.set_num_threads(1)
    one = sampling.generate(module, prompts, **asked)
    assert [[s.tokens for s in each] for each in both] == [[s.tokens for s in each] for each in one]
    assert [s.logprobs for each in both for s in each] == [pytest.approx(s.logprobs, abs=1e-5) for each in one for s in each]


def test_each_completion_arrives_once_and_in_the_thread_that_asked(two_cores, monkeypatch):
    monkeypatch.setattr(sampling, "ROWS_EACH", 1)
    came = []
    prompts = [[3 + i, 9] for i in range(6)]
    sampling.generate(tiny().module, prompts, max_tokens=3, eos={2}, arrived=lambda index, _: came.append((index, threading.current_thread())))
    assert sorted(index for index, _ in came) == list(range(6))
    assert {thread for _, thread in came} == {threading.current_thread()}
