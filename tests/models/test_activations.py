import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, OPTConfig, OPTForCausalLM

from fiducial.core.errors import ModelError
from fiducial.models.activations import capture, decoder_layers, patch

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)).eval()


def hooks(module):
    return sum(len(part._forward_hooks) for part in decoder_layers(module).modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_residual_stream_is_the_hidden_state_that_the_model_reports(name, request):
    module = request.getfixturevalue(name)
    with torch.no_grad(), capture(module) as store:
        states = module(input_ids=IDS, output_hidden_states=True).hidden_states
    assert list(store) == list(range(len(decoder_layers(module))))
    for layer in list(store)[:-1]:  # the last one that the model reports is taken after the final norm
        torch.testing.assert_close(store[layer], states[layer + 1])


def test_attention_and_mlp_are_what_a_layer_adds(llama):
    with torch.no_grad(), capture(llama, [0, 1]) as stream, capture(llama, [1], at="attention") as attention, capture(llama, [1], at="mlp") as mlp:
        llama(input_ids=IDS)
    torch.testing.assert_close(stream[0] + attention[1] + mlp[1], stream[1])


def test_positions_are_gathered_as_the_layer_runs(llama):
    with torch.no_grad(), capture(llama, [-1]) as full:
        llama(input_ids=IDS)
    for positions, expected in (
        (-1, full[-1][:, -1]),
        ([1, 3], torch.stack([full[-1][0, 1], full[-1][1, 3]])),
        (torch.tensor([[0, 2], [4, 1]]), torch.stack([full[-1][0, [0, 2]], full[-1][1, [4, 1]]])),
    ):
        with torch.no_grad(), capture(llama, [-1], positions=positions) as store:
            llama(input_ids=IDS)
        torch.testing.assert_close(store[-1], expected)
        assert store[-1].untyped_storage().nbytes() == store[-1].nbytes  # nothing else is kept alive


def test_gradients_flow_through_what_is_stored(llama):
    with capture(llama, [0], positions=-1) as store:
        llama(input_ids=IDS)
    (gradient,) = torch.autograd.grad(store[0].sum(), [llama.model.embed_tokens.weight])
    assert gradient.abs().sum() > 0


def test_a_patch_that_changes_nothing_changes_nothing(llama):
    with torch.no_grad():
        before = llama(input_ids=IDS).logits
        with patch(llama, 1, lambda hidden: hidden):
            assert torch.equal(llama(input_ids=IDS).logits, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_patch_replaces_the_stream_for_all_that_follows_and_ends_with_its_block(name, request):
    module = request.getfixturevalue(name)
    with torch.no_grad():
        before = module(input_ids=IDS).logits
        with capture(module, [0]) as source:
            module(input_ids=IDS.flip(0))
        with patch(module, 0, lambda hidden: source[0]):
            swapped = module(input_ids=IDS).logits
        torch.testing.assert_close(swapped, before.flip(0))
        assert torch.equal(module(input_ids=IDS).logits, before)


def test_a_patch_of_another_shape_is_an_error(llama):
    with patch(llama, 0, lambda hidden: hidden[:, :1]), pytest.raises(ModelError, match=r"\[2, 1, 16\] for \[2, 5, 16\]"):
        llama(input_ids=IDS)


def test_hooks_are_removed_when_the_block_fails(llama):
    before = hooks(llama)

    def fail():
        with capture(llama), patch(llama, 0, lambda hidden: hidden):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert hooks(llama) == before


def test_hooks_are_removed_when_a_later_layer_does_not_exist(llama):
    before = hooks(llama)
    with pytest.raises(ModelError, match="no layer 7"), capture(llama, [0, 7]):
        pass
    assert hooks(llama) == before


def test_positions_for_another_number_of_rows_are_an_error(llama):
    with capture(llama, [0], positions=[1, 2, 3]), pytest.raises(ModelError, match="3 rows, but the forward has 2"):
        llama(input_ids=IDS)


def test_a_part_that_a_layer_does_not_have_names_those_it_has():
    config = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16, word_embed_proj_dim=16
    )
    with pytest.raises(ModelError, match="fc1"), capture(OPTForCausalLM(config).eval(), [0], at="mlp"):
        pass


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it by its old name
def test_layers_are_found_in_a_state_space_model_and_under_peft(llama):
    from peft import LoraConfig, get_peft_model

    mamba = Mamba2ForCausalLM(
        Mamba2Config(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=2, head_dim=16, n_groups=1, chunk_size=4)
    )
    assert len(decoder_layers(mamba)) == 2
    wrapped = get_peft_model(copy.deepcopy(llama), LoraConfig(target_modules=["q_proj"], r=2))
    assert len(decoder_layers(wrapped)) == 3


def test_a_model_without_layers_says_where_it_looked():
    class Bare(torch.nn.Module):
        config = LlamaConfig(num_hidden_layers=2)

    with pytest.raises(ModelError, match=r"model\.layers"):
        decoder_layers(Bare())
