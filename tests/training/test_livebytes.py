import torch

from fiducial.training.livebytes import LiveBytes


def test_it_counts_what_exists_at_once_and_neither_views_nor_what_was_there_before():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        a = before + 1
        b = a.view(10, 100)[2]
        before.add_(1)
        assert live.now == 4000
        del a, b
        c = torch.zeros(500)
    assert (live.peak, live.now) == (4000, 2000)
    del c
    assert live.now == 0


def test_what_is_saved_for_the_way_back_counts_until_it_was_gone():
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        loss = weight.exp().exp().sum()
        held = live.now
        loss.backward()
        del loss
    assert held == 2 * 400 + 4  # both results, which their derivatives are, and the sum
    assert live.now == weight.grad.nbytes


def test_shapes_alone_count_as_if_they_had_memory():
    with LiveBytes() as live:
        a = torch.empty(1 << 20, 1 << 10, device="meta") + 1
    assert live.peak == 2 * (1 << 32)
    del a
