"""Noise on embeddings: how much, of which path, and that the network gets it."""

from math import sqrt

import pytest
import torch

from fiducial.core.errors import ModelError
from fiducial.models.forest import Paths
from fiducial.models.noise import Noise
from fiducial.models.scoring import Engine
from fiducial.models.tiny import tiny
from fiducial.training import lora

PATHS = Paths([[5, 6, 7, 8], [5, 6, 7, 9, 10, 11, 12, 13, 14], [5, 6]], [2, 3, 1], [0, 0, 1])
NOISE = Noise(5.0, [11, 12, 13])
WIDTH = 32


def of_paths(rows, noise=NOISE):
    """What is added to each token of each path that is fed."""
    found = {}
    for row in rows:
        drawn = noise.of(row, PATHS, WIDTH)
        for local, path in enumerate(row.paths):
            found[path] = drawn[row.branch == local]
    return found


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny("llama"))


def test_noise_is_uniform_up_to_alpha_over_the_root_of_tokens_times_width():
    row, tokens = Engine(tiny("llama")).plan(paths := Paths([list(range(3, 103))], [1]), keep_last=True, shared=False)[0], 100
    drawn = Noise(5.0, [1]).of(row, paths, WIDTH) / (5.0 / sqrt(tokens * WIDTH))
    assert drawn.shape == (tokens, WIDTH)
    assert 0.99 < float(drawn.max()) <= 1.0
    assert -1.0 <= float(drawn.min()) < -0.99
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(drawn.square().mean()) == pytest.approx(1 / 3, abs=0.02)  # the variance of that distribution


def test_the_length_is_that_of_the_path_and_not_of_the_row_or_of_what_is_fed(engine):
    found = of_paths(engine.plan(PATHS, shared=False), Noise(1.0, [7, 7, 7]))
    assert [len(found[path]) for path in range(3)] == [3, 8, 1]  # no last token is fed
    unit = found[2][0] * sqrt(2 * WIDTH)
    torch.testing.assert_close(found[0][0] * sqrt(4 * WIDTH), unit)
    torch.testing.assert_close(found[1][0] * sqrt(9 * WIDTH), unit)


def test_a_path_has_the_same_noise_in_every_row_and_no_two_have_the_same():
    network = tiny("llama")
    plans = [Engine(network, budget=budget).plan(PATHS, shared=False) for budget in (2, 2000)]
    assert len(plans[0]) > len(plans[1])
    few, many = map(of_paths, plans)
    assert all(torch.equal(few[path], many[path]) for path in range(3))
    assert not torch.equal(many[0][0] * sqrt(4), many[1][0] * sqrt(9))  # of the token that both begin with


def test_noise_leaves_the_generator_of_torch_alone(engine):
    before = torch.random.get_rng_state()
    of_paths(engine.plan(PATHS, shared=False))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_row_whose_paths_share_nodes_takes_none(engine):
    with pytest.raises(ValueError, match="of several"):
        of_paths(engine.plan(PATHS))


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mamba2"])
def test_scores_under_noise_are_those_of_single_passes_with_it_on_the_embeddings(architecture, adapted):
    network = tiny(architecture)
    network = lora.attach(network, rank=2, tokens=[7]) if adapted else network
    engine, expected = Engine(network), []
    drawn = of_paths(engine.plan(PATHS, keep_last=True, shared=False))
    for path, (ids, start) in enumerate(zip(PATHS.ids, PATHS.start, strict=True)):
        with torch.no_grad():
            states = network.get_input_embeddings()(torch.tensor([ids])) + drawn[path]
            logp = network(inputs_embeds=states).logits[0].log_softmax(-1)
        expected += [logp[place - 1, ids[place]] for place in range(start, len(ids))]
    quiet = engine.score(PATHS).edge_logp
    rows = list(engine.stream(PATHS, noise=NOISE))
    by_path = {path: scores.edge_logp[scores.edge_path == local] for paths, scores in rows for local, path in enumerate(paths)}
    found = torch.cat([by_path[path] for path in range(3)])
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-4)
    assert float((found - quiet).abs().max()) > 1e-2
    assert torch.equal(engine.score(PATHS).edge_logp, quiet)


def test_a_network_that_does_not_call_its_embedding_is_refused(engine):
    network = tiny("llama")
    forward, weight = network.model.forward, network.model.embed_tokens.weight
    network.model.forward = lambda input_ids, **more: forward(**more | {"inputs_embeds": weight[input_ids]})
    with pytest.raises(ModelError, match="takes no noise on its embeddings"):
        list(Engine(network).stream(PATHS, noise=NOISE))
