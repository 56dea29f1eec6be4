import asyncio
import time

import pytest

from fiducial.models.background import Background


@pytest.fixture
def thread():
    background = Background()
    yield background
    background.end(asyncio.sleep(0))


def test_results_come_as_they_are_made(thread):
    gaps = []

    async def job(out):
        for i in range(3):
            out.put(i)
            await asyncio.sleep(0.03)

    for value in thread.results(job):
        gaps.append((value, time.monotonic()))
    assert [value for value, _ in gaps] == [0, 1, 2]
    assert gaps[2][1] - gaps[0][1] > 0.04


def test_an_error_comes_after_the_results_before_it(thread):
    async def job(out):
        out.put(1)
        raise KeyError("late")

    results = thread.results(job)
    assert next(results) == 1
    with pytest.raises(KeyError, match="late"):
        next(results)


def test_leaving_early_cancels_the_work(thread):
    seen = []

    async def job(out):
        try:
            for i in range(1000):
                out.put(i)
                await asyncio.sleep(0.01)
        finally:
            seen.append("cancelled")

    results = thread.results(job)
    next(results)
    results.close()
    time.sleep(0.1)
    assert seen == ["cancelled"]
