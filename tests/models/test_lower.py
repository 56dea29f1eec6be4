"""Outputs of the first blocks that were kept, against passes through the whole model."""

import pytest
import torch
from torch import nn

from fiducial.models.forest import Paths
from fiducial.models.lower import Lower, chains
from fiducial.models.scoring import Engine
from fiducial.models.tiny import SIZES, tiny

PATHS = Paths([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10, 11], [5, 6, 20, 21], [30, 31], [30, 31, 32]], [3, 3, 3, 1, 2], [0, 0, 0, 1, 1])


def kept(engine, paths=PATHS, blocks=1, keep_last=False):
    """What the first blocks make of some paths."""
    states, places, count = [], {}, 0
    for row in engine.plan(paths, grad=True, keep_last=keep_last):
        given = engine.begin(row, blocks)
        places |= {tokens: chain + count for tokens, chain in chains(row, paths).items()}
        states.append(given.states)
        count += len(row.ids)
    return Lower(blocks, torch.cat(states), places, given.bare)


def counted(engine):
    """How often parts of the first and of the second block are run, [first, second]."""
    runs = [0, 0]

    def count(number):
        def run(*_):
            runs[number] += 1

        return run

    for number, block in enumerate(list(engine._part.layers)[:2]):
        next(part for part in block.modules() if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D").register_forward_hook(count(number))
    return runs


@pytest.mark.parametrize("architecture", SIZES)
def test_the_other_blocks_give_the_same_scores_and_the_first_is_not_run(architecture):
    engine = Engine(tiny(architecture))
    whole = engine.score(PATHS, grad=True)
    engine.lower = kept(engine)
    runs = counted(engine)
    again = engine.score(PATHS, grad=True)
    assert runs[0] == 0 < runs[1]
    torch.testing.assert_close(again.edge_logp, whole.edge_logp, atol=1e-5, rtol=1e-5)


def test_rows_of_another_layout_find_their_states():
    engine = Engine(tiny("llama"))
    whole = engine.score(PATHS)
    engine.lower = kept(engine)
    runs = counted(engine)
    some = engine.score(PATHS.select([4, 1]))
    torch.testing.assert_close(some.path_logp, whole.path_logp[[4, 1]])
    padded = Engine(engine.module, backend="padded")
    padded.lower = engine.lower
    torch.testing.assert_close(padded.score(PATHS).path_logp, whole.path_logp)
    assert runs[0] == 0


def test_the_upper_gradient_is_that_of_the_whole_model():
    found = []
    for lower in (False, True):
        engine = Engine(tiny("llama"))
        engine.lower = kept(engine) if lower else None
        for p in engine._part.layers[0].parameters():
            p.requires_grad_(False)
        engine.score(PATHS, grad=True).path_logp.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in engine._part.layers[1].parameters()]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("other", [Paths([[5, 6, 7, 8, 9], [1, 2, 3]], [3, 1]), Paths([[5, 6, 7, 8]], [2])])
def test_a_row_with_a_path_that_is_not_known_runs_through_the_whole_model(other):
    engine = Engine(tiny("llama"))
    whole = engine.score(other)
    engine.lower = kept(engine)
    runs = counted(engine)
    assert torch.equal(engine.score(other).edge_logp, whole.edge_logp)
    assert runs[0] == 1


def test_the_last_token_is_known_where_it_was_fed():
    engine, leaf = Engine(tiny("llama")), {"layers": "last", "at": "leaf"}
    whole = engine.score(PATHS, hidden=leaf).hidden["last"]
    engine.lower = kept(engine)
    runs = counted(engine)
    assert torch.equal(engine.score(PATHS, hidden=leaf).hidden["last"], whole)
    assert runs[0] > 0  # states were kept without it
    engine.lower = kept(engine, keep_last=True)
    runs[0] = 0
    torch.testing.assert_close(engine.score(PATHS, hidden=leaf).hidden["last"], whole)
    assert runs[0] == 0


@pytest.mark.parametrize(("layer", "skipped"), [(0, False), (1, True), (2, True)])
def test_a_block_that_is_asked_for_is_run(layer, skipped):
    engine = Engine(tiny("llama", num_hidden_layers=3))
    asked = {"layers": [layer], "at": "scored"}
    whole = engine.score(PATHS, hidden=asked).hidden[layer]
    engine.lower = kept(engine, blocks=2, keep_last=True)
    runs = counted(engine)
    torch.testing.assert_close(engine.score(PATHS, hidden=asked).hidden[layer], whole)
    assert (runs[0] == 0) == skipped


def test_a_row_that_continues_a_cache_runs_through_the_whole_model():
    engine = Engine(tiny("llama"), backend="kv")
    whole = engine.score(PATHS)
    engine.lower = kept(Engine(engine.module))
    assert torch.equal(engine.score(PATHS).edge_logp, whole.edge_logp)


def test_blocks_are_as_they_were_after_an_error():
    engine = Engine(tiny("llama"))
    whole = engine.score(PATHS)
    lower = kept(engine)
    engine.lower = Lower(1, lower.states[:, :5], lower.places, lower.bare)
    with pytest.raises(RuntimeError):
        engine.score(PATHS)
    engine.lower = None
    assert torch.equal(engine.score(PATHS).edge_logp, whole.edge_logp)


def test_a_forward_that_was_put_on_a_block_stays():
    engine = Engine(tiny("llama"))
    block = engine._part.layers[0]
    own = type(block).forward.__get__(block)
    block.forward = own
    engine.lower = kept(engine)
    engine.score(PATHS)
    assert block.forward is own


def test_nodes_along_each_path():
    engine = Engine(tiny("llama"))
    for keep_last in (False, True):
        for row in engine.plan(PATHS, grad=True, keep_last=keep_last):
            for tokens, chain in chains(row, PATHS).items():
                fed = tokens[: len(tokens) if keep_last else max(len(tokens) - 1, PATHS.start[PATHS.ids.index(tokens)])]
                assert row.ids[chain].tolist() == list(fed)
                assert row.pos[chain].tolist() == list(range(len(fed)))
