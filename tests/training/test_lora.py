"""Adapters: float32, on all linear layers, without effect at first, and computed as peft does."""

import pytest
import torch
from peft import IA3Config, LoraConfig

from fiducial.core.errors import ConfigError
from fiducial.models import adapters
from fiducial.models.forest import Paths
from fiducial.models.scoring import Engine
from fiducial.models.tiny import tiny
from fiducial.training import lora

IDS = torch.tensor([[5, 9, 33, 71, 8, 8, 14]])


def trained(module, rank=4):
    """An adapter whose second matrix is no longer zero."""
    adapted = lora.attach(module, rank=rank)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return adapted


@torch.no_grad()
def logits(module):
    return module(IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_and_is_float32(architecture, dtype):
    base = tiny(architecture, dtype=dtype)
    adapted = lora.attach(base, rank=4)
    assert torch.equal(logits(adapted), logits(base))
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" not in n} == {dtype}


def test_all_linear_layers_but_the_head_get_one():
    adapted = lora.attach(tiny("llama"), rank=2)
    layers = {n.split(".")[-4] for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba2", "jamba", "qwen3_moe"])
@pytest.mark.parametrize(("depth", "blocks"), [(0.5, {"1"}), (0.01, {"1"}), (1.0, {"0", "1"})])
def test_a_share_of_the_depth_adapts_the_top_blocks_alone(architecture, depth, blocks):
    base = tiny(architecture)
    adapted = lora.attach(base, rank=2, depth=depth)
    assert {n.split(".layers.")[-1].split(".h.")[-1].split(".")[0] for n, _ in adapted.named_parameters() if "lora_A" in n} == blocks
    assert torch.allclose(logits(adapted), logits(base), atol=1e-4)


@pytest.mark.parametrize(("depth", "blocks"), [(0.5, ["1"]), (1.0, ["0", "1"])])
def test_experts_get_an_adapter_in_the_same_blocks_and_routers_none(depth, blocks):
    adapted = lora.attach(tiny("qwen3_moe"), rank=2, depth=depth)
    places = [n.split("layers.")[1].replace("base_layer.", "").split(".lora_A")[0] for n, _ in adapted.named_parameters() if "lora_A" in n]
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.experts", "mlp.experts"]
    assert sorted(places) == sorted(f"{block}.{layer}" for block in blocks for layer in layers)


def test_the_forward_pass_equals_pefts_own():
    from peft.tuners.lora import Linear

    adapted = trained(tiny("llama"))
    quick = logits(adapted)
    for layer in adapted.modules():
        if isinstance(layer, Linear):
            del layer.forward  # what peft's class computes
    plain = logits(adapted)
    assert not torch.allclose(plain, logits(tiny("llama")), atol=0.1)
    assert float((quick - plain).abs().max()) < 1e-5


def test_gradients_equal_pefts_own():
    from peft.tuners.lora import Linear

    def gradients(own):
        adapted = trained(tiny("llama"))
        lora.make_trainable(adapted)
        for layer in adapted.modules():
            if isinstance(layer, Linear) and own:
                del layer.forward
        adapted(IDS).logits.log_softmax(-1)[..., 3].sum().backward()
        return torch.cat([p.grad.flatten() for n, p in sorted(adapted.named_parameters()) if "lora_" in n])

    quick, plain = gradients(False), gradients(True)
    assert float((quick - plain).norm() / plain.norm()) < 1e-5


def test_the_start_depends_on_the_seed_alone():
    def start(seed):
        torch.manual_seed(torch.randint(1000, ()).item())
        return next(p for n, p in lora.attach(tiny("llama"), rank=2, seed=seed).named_parameters() if "lora_A" in n)

    before = torch.get_rng_state()
    lora.attach(tiny("llama"), rank=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_alpha_is_twice_the_rank_unless_given():
    assert lora.attach(tiny("llama"), rank=4).peft_config["default"].lora_alpha == 8
    assert lora.attach(tiny("llama"), rank=4, alpha=3).peft_config["default"].lora_alpha == 3


def test_only_the_adapter_is_trainable_and_without_one_everything():
    adapted, plain = lora.attach(tiny("llama"), rank=2), tiny("llama")
    for module in (adapted, plain):
        lora.make_trainable(module)
    assert {("lora_" in n) for n, p in adapted.named_parameters() if p.requires_grad} == {True}
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]), "whole layers \\(lm_head\\)"),
        (LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], bias="all"), "whole layers \\(biases\\)"),
        (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), "weights of the kind IA3"),
    ],
)
def test_an_adapter_from_elsewhere_that_would_train_in_part_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        lora.make_trainable(adapters.add(tiny("llama"), config))


def test_an_adapter_on_the_embeddings_is_scored():
    module = adapters.add(tiny("llama"), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"]))
    for name, p in module.named_parameters():
        if "lora_embedding" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    by_hand = logits(module)[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None]).sum()
    assert Engine(module).score(Paths(IDS.tolist(), [1])).path_logp.item() == pytest.approx(by_hand.item(), abs=1e-4)


def test_off_is_the_base_model_and_then_it_is_on_again():
    base = tiny("llama")
    adapted = trained(tiny("llama"))
    on = logits(adapted)
    with lora.adapter_off(adapted):
        assert torch.equal(logits(adapted), logits(base))
    assert torch.equal(logits(adapted), on)
    with lora.adapter_off(base):
        assert logits(base).isfinite().all()


def test_merging_gives_a_plain_model_that_computes_the_same():
    adapted = trained(tiny("llama"))
    on = logits(adapted)
    merged = lora.merge(adapted)
    assert not adapters.is_adapted(merged)
    assert float((logits(merged) - on).abs().max()) < 1e-4
    assert lora.merge(merged) is merged


def test_a_second_adapter_and_a_rank_of_zero_are_refused():
    with pytest.raises(ConfigError, match="already carries"):
        lora.attach(lora.attach(tiny("llama"), rank=2), rank=2)
    with pytest.raises(ConfigError, match="lora_rank=0"):
        lora.attach(tiny("llama"), rank=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_the_fingerprint_below_an_adapter_is_that_of_the_base_model(architecture):
    base = tiny(architecture)
    known = lora.base_fingerprint(base)
    assert lora.base_fingerprint(trained(base)) == known
    assert lora.base_fingerprint(tiny(architecture, seed=1)) != known
    assert lora.base_fingerprint(tiny(architecture, seed=0)) == known
