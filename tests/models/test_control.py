"""Control tokens: what a vocabulary gains by them, and what it does not lose."""

import pytest
import torch

from fiducial.core.errors import ConfigError
from fiducial.models import control
from fiducial.models.scripted import tiny as tiny_model
from fiducial.models.tiny import tiny
from fiducial.training import lora

IDS = torch.tensor([[5, 9, 33, 71, 8, 8, 14]])


@pytest.mark.parametrize("tied", [False, True])
def test_new_embeddings_are_the_mean_of_the_others_and_a_little_noise(tied):
    base = tiny("llama", tie_word_embeddings=tied)
    grown = control.widened(base, (128, 129))
    for layer in (grown.get_input_embeddings(), grown.get_output_embeddings()):
        noise = (layer.weight[128:] - layer.weight[:128].mean(0)).flatten() / control.NOISE
        assert noise.mean().item() == pytest.approx(0, abs=4 / 8)  # 64 draws
        assert 0.7 < noise.std().item() < 1.3
    assert (grown.get_input_embeddings().weight is grown.get_output_embeddings().weight) == tied


@torch.no_grad()
def test_old_tokens_are_as_they_were_and_their_memory_is_shared_but_for_the_embeddings():
    base = tiny("llama")
    before = base(IDS).logits.clone()
    grown = control.widened(base, (128, 129))
    assert torch.allclose(grown(IDS).logits[..., :128], before, atol=1e-6)
    assert base.get_input_embeddings().weight.shape[0] == 128
    assert base.config.vocab_size == 128
    assert grown.config.vocab_size == 130
    assert {p.data_ptr() for p in base.model.layers.parameters()} == {p.data_ptr() for p in grown.model.layers.parameters()}
    assert base.generation_config.suppress_tokens is None
    assert grown.generation_config.suppress_tokens == [128, 129]


def test_spare_rows_of_a_padded_embedding_are_used_and_the_base_model_keeps_its_own():
    base = tiny("llama", vocab=160)
    before = base.get_input_embeddings().weight.detach().clone()
    grown = control.widened(base, (140, 141))
    assert grown.get_input_embeddings().weight.shape[0] == 160
    assert torch.equal(base.get_input_embeddings().weight, before)
    assert not torch.equal(grown.get_input_embeddings().weight[140:142], before[140:142])


def test_the_same_model_grows_in_the_same_way_and_the_generator_of_torch_is_left_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = (control.widened(tiny("llama"), (128, 129)).get_input_embeddings().weight for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_vocabulary_of_an_adapted_model_cannot_grow():
    with pytest.raises(ConfigError, match="carries an adapter"):
        control.widened(lora.attach(tiny("llama"), rank=2), (128, 129))


def test_a_vocabulary_with_both_tokens_makes_a_conditional_model_and_one_of_them_does_not():
    model = tiny_model()
    assert control.ids(model.tokenizer) == ()
    assert model.chat.lead == ""
    model.tokenizer.add_tokens([control.ALIGNED], special_tokens=True)
    assert control.ids(model.tokenizer) == ()
    both = control.with_tokens(model.tokenizer)
    assert control.ids(both) == tuple(both.convert_tokens_to_ids(list(control.TOKENS)))
    assert control.ids(model.tokenizer) == ()  # a copy grew


def test_the_tokens_never_show_in_text():
    model = tiny_model()
    model.take_control_tokens()
    assert model.chat.decode([*model.tokenizer("a")["input_ids"], *model.chat.control_ids]) == "a"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_quick_forward_of_trained_tokens_equals_pefts_own(tied, dtype):
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    adapted = lora.attach(control.widened(tiny("llama", tie_word_embeddings=tied, dtype=dtype), (128, 129)), rank=2, tokens=(128, 129))
    lora.make_trainable(adapted)
    trained = [p for n, p in adapted.named_parameters() if "trainable_tokens" in n]
    ids = torch.tensor([[128, 5, 9, 129, 33, 128]])

    def seen():
        loss = adapted(ids, labels=ids).loss
        return [loss, *torch.autograd.grad(loss, trained)]

    with torch.no_grad():
        for p in trained:
            p += 0.5
    quick, layers = seen(), [layer for layer in adapted.modules() if isinstance(layer, TrainableTokensLayer)]
    assert len(layers) == 2
    for layer in layers:
        del layer.forward
    for a, b in zip(quick, seen(), strict=True):
        assert torch.allclose(a, b, atol=1e-6 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_trains_new_embeddings_at_both_ends(architecture, tied):
    base = control.widened(tiny(architecture, tie_word_embeddings=tied), (128, 129))
    adapted = lora.attach(base, rank=2, tokens=(128, 129))
    lora.make_trainable(adapted)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n}
    assert len(trained) == (1 if tied else 2)
    assert {tuple(p.shape) for p in trained.values()} == {(2, 32)}
    assert lora.base_fingerprint(adapted) == lora.base_fingerprint(base)
    with torch.no_grad():
        assert torch.allclose(adapted(IDS).logits, base(IDS).logits, atol=1e-6)
        for p in trained.values():
            p += 1.0
        merged = lora.merge(adapted)
        assert torch.allclose(merged.get_input_embeddings().weight[128:], base.get_input_embeddings().weight[128:] + 1)
        assert torch.allclose(merged.get_output_embeddings().weight[128:], base.get_output_embeddings().weight[128:] + 1)
