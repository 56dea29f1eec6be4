"""What the blocks below an adapter make of the data is computed once, and nothing else changes by it."""

import logging

import pytest
import torch
from accelerate import Accelerator

from fiducial.align.dpo import DPO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.scripted import tiny
from fiducial.models.tiny import tiny as network
from fiducial.training import frozen, lora
from fiducial.training.data import Data
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions
from fiducial.training.updates import Updates

OPTIONS = TrainOptions(batch=4, epochs=3, learning_rate=1e-2, lora_rank=4, lora_depth=0.5)


def adapted(depth=0.5, **config):
    """A tiny model with an adapter on its upper blocks."""
    base = tiny()
    model = LocalModel(network("llama", **config) if config else base.module, base.tokenizer, uri="tiny")
    model.module = lora.attach(model.module, rank=4, depth=depth)
    lora.make_trainable(model.module)
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.module.parameters() if p.requires_grad])


@pytest.mark.parametrize(("depth", "blocks"), [(1.0, 0), (0.5, 2), (0.25, 3)])
def test_blocks_below_the_lowest_adapter_are_frozen(depth, blocks):
    assert frozen.frozen_blocks(adapted(depth, num_hidden_layers=4).module) == blocks


def test_a_weight_of_several_blocks_belongs_to_the_first():
    model = adapted(0.25, num_hidden_layers=4)
    blocks = model.module.base_model.model.model.layers
    blocks[1].mlp.down_proj = blocks[3].mlp.down_proj
    assert frozen.frozen_blocks(model.module) == 1


def test_no_block_is_frozen_where_something_before_it_learns():
    model = adapted(num_hidden_layers=4)
    model.module.get_input_embeddings().weight.requires_grad_()
    assert frozen.frozen_blocks(model.module) == 0
    whole = tiny()
    lora.make_trainable(whole.module)
    assert frozen.frozen_blocks(whole.module) == 0


@pytest.mark.parametrize("objective", [SFT(), DPO(beta=0.5), RewardModel()], ids=lambda o: o.name)
def test_training_ends_in_the_same_weights_with_and_without(made, tmp_path, monkeypatch, objective):
    found = []
    for most in (0, frozen.MOST):
        monkeypatch.setattr(frozen, "MOST", most)
        model = tiny()
        result = train(model, made.pairs(6), objective, OPTIONS, folder=tmp_path / str(most))
        found.append((weights(model), [h["loss"] for h in result.history], result.tokens))
        assert model.engine.lower is None
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-4)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    assert found[1][2] == found[0][2]


def test_frozen_blocks_are_run_as_often_for_ten_passes_as_for_two(made, tmp_path):
    runs = []
    for epochs in (2, 2, 10):  # the first measures the model besides
        model = tiny()
        runs.append(0)

        def run(*_):
            runs[-1] += 1

        model.module.model.layers[0].mlp.register_forward_hook(run)
        result = train(model, made.pairs(6), SFT(), OPTIONS.model_copy(update={"epochs": epochs}), folder=tmp_path / str(len(runs)))
        assert result.steps == 6 * epochs / 4
    assert runs[1] == runs[2]


@pytest.mark.parametrize(("passes", "most", "keeps"), [(3.0, 1 << 30, True), (1.0, 1 << 30, False), (3.0, 100, False)])
def test_states_are_kept_where_that_pays_and_they_have_room(made, monkeypatch, passes, most, keeps):
    monkeypatch.setattr(frozen, "MOST", most)
    model = adapted()
    data = Data.of(model, made.pairs(6), SFT(), OPTIONS)
    with frozen.kept([model.engine], data.paths, passes=passes, keep_last=False):
        assert (model.engine.lower is not None) == keeps
    assert model.engine.lower is None


@pytest.mark.parametrize("pairs", [2, 20], ids=["as many as are compared, or fewer", "more"])
def test_a_model_whose_upper_blocks_need_the_lower_ones_runs_them(made, caplog, pairs):
    model = adapted()
    first, second = model.module.base_model.model.model.layers
    said = [0.0]
    first.mlp.register_forward_hook(lambda _m, _a, out: said.append(float(out.sum())))
    second.mlp.register_forward_hook(lambda _m, _a, out: out + said[-1])
    model.engine.verdict  # noqa: B018  # measured with the two blocks together
    data = Data.of(model, [*made.pairs(pairs), made.group(90, "a")], SFT(), OPTIONS)
    with caplog.at_level(logging.WARNING), frozen.kept([model.engine], data.paths, passes=3.0, keep_last=False):
        assert model.engine.lower is None
    assert "LlamaForCausalLM runs its frozen blocks in every step, since it cannot begin above them: it gives other numbers then" in caplog.text


def test_a_model_whose_blocks_hand_on_more_than_states_runs_them(made, caplog):
    model = adapted()
    first, second = model.module.base_model.model.model.layers
    first.mlp.register_forward_hook(lambda _m, _a, out: setattr(second, "shared", out))
    second.mlp.register_forward_pre_hook(lambda *_: delattr(second, "shared"))
    model.engine.budget = 60  # several rows
    data = Data.of(model, made.pairs(6), SFT(), OPTIONS)
    with caplog.at_level(logging.WARNING), frozen.kept([model.engine], data.paths, passes=3.0, keep_last=False):
        assert model.engine.lower is None
    assert "cannot begin above them: AttributeError" in caplog.text


def test_lack_of_memory_is_no_answer(made, monkeypatch):
    model = adapted()
    data = Data.of(model, made.pairs(6), SFT(), OPTIONS)

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(frozen, "_agrees", full)
    with pytest.raises(torch.OutOfMemoryError), frozen.kept([model.engine], data.paths, passes=3.0, keep_last=False):
        pass
    assert model.engine.lower is None


def test_what_the_adapter_has_learnt_decides_nothing(made, monkeypatch):
    """Else a run that goes on could decide otherwise than the one that was interrupted."""
    said = []
    for learnt in (0.0, 0.3):
        model = adapted()
        with torch.no_grad():
            for name, p in model.module.named_parameters():
                if "lora_B" in name:
                    p.fill_(learnt)
        data, scores = Data.of(model, made.pairs(6), SFT(), OPTIONS), []
        score = model.engine.score
        monkeypatch.setattr(model.engine, "score", lambda *a, score=score, scores=scores: scores.append(score(*a)) or scores[-1])
        with frozen.kept([model.engine], data.paths, passes=3.0, keep_last=False):
            said.append([s.edge_logp for s in scores])
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True))
    assert len(said[0]) == 3


def test_states_go_when_training_breaks_off(made):
    model = adapted()
    data = Data.of(model, made.pairs(6), SFT(), OPTIONS)
    updates = Updates(model, SFT(), OPTIONS, Accelerator(cpu=True))

    def interrupted():
        with updates.passes.keeping(data, passes=3.0):
            assert model.engine.lower is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.engine.lower is None


def test_of_a_path_in_two_rows_the_longer_chain_counts():
    model = adapted()
    model.engine.budget = 8
    tokens = tuple(range(10, 18))
    paths = Paths([tokens, tokens, tokens], [8, 3, 3])  # the first is fed as a whole, the others without their last token
    lower = frozen._computed([model.engine], paths, 1, keep_last=False)
    assert len(lower.places[tokens]) == 8


def test_two_threads_divide_the_rows_and_find_the_same_states_each_time(made, two_cores):
    found, data = [], None
    for _ in range(3):
        model = adapted()
        data = Data.of(model, made.pairs(40), SFT(), OPTIONS)
        updates = Updates(model, SFT(), OPTIONS, Accelerator(cpu=True))
        with updates.passes.keeping(data, passes=3.0):
            engines = updates.passes._engines
            assert len(engines) == 2
            assert engines[0].lower is engines[1].lower is not None
            found.append(engines[0].lower)
            figures = updates.step(data, list(range(8)), rate=1e-3)
        assert [e.lower for e in engines] == [None, None]
    assert torch.equal(found[0].states, found[1].states)
    assert torch.equal(found[0].states, found[2].states)
    assert all(torch.equal(found[0].places[tokens], found[1].places[tokens]) for tokens in found[0].places)
    one = adapted()
    torch.set_num_threads(1)
    whole = Updates(one, SFT(), OPTIONS, Accelerator(cpu=True)).step(data, list(range(8)), rate=1e-3)
    assert figures == pytest.approx(whole, rel=1e-4)
