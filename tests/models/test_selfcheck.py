"""The verdicts on architectures that take tree masks, take them in another form, or silently do not."""

import pytest
import torch

from fiducial.models import selfcheck
from fiducial.models.selfcheck import check
from fiducial.models.tiny import tiny
from fiducial.training import lora


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        ("llama", "additive"),
        ("qwen2", "additive"),
        ("qwen3", "additive"),
        ("gpt2", "additive"),
        ("gpt_neo", "additive"),
        ("gemma2", "dict"),
        ("gemma3_text", "dict"),
        ("mistral", "windowed"),
        ("qwen3_moe", "additive"),
        ("gemma4_text", "dict"),
        ("llama4_text", "dict"),
    ],
)
def test_attention_models_are_accepted_in_their_own_form(architecture, form, attention):
    verdict = check(tiny(architecture, attention=attention))
    assert (verdict.tree_mask, verdict.kv, verdict.head) == (form, True, "known")


@pytest.mark.parametrize("architecture", ["mpt", "mamba2", "jamba", "lfm2", "qwen3_next"])
def test_models_that_would_be_silently_wrong_are_refused(architecture):
    verdict = check(tiny(architecture))
    assert verdict.tree_mask is None
    assert "no tree mask gives the true numbers" in verdict.reason
    assert float(verdict.differences["additive"]) > 0.1


def test_a_short_window_does_not_pass_the_plain_mask():
    part = selfcheck.anatomy(tiny("mistral"))
    paths, checked = selfcheck._trial(part)
    assert checked
    assert min(map(len, paths.ids)) > part.window
    with torch.no_grad():
        truth = torch.cat([selfcheck._alone(part, tuple(ids))[start - 1 :] for ids, start in zip(paths.ids, paths.start, strict=True)])
        assert selfcheck._difference(part, paths, "tree", truth, mask="additive") > 0.05
        assert selfcheck._difference(part, paths, "tree", truth, mask="windowed") < 1e-5


def test_a_window_too_long_to_check_limits_packed_paths():
    verdict = check(tiny("mistral", sliding_window=4096))
    assert (verdict.tree_mask, verdict.longest) == ("windowed", 4096)


def test_bool_masks_are_wrong_under_eager_attention_and_not_chosen():
    part = selfcheck.anatomy(tiny("llama", attention="eager"))
    paths, _ = selfcheck._trial(part)
    with torch.no_grad():
        truth = torch.cat([selfcheck._alone(part, tuple(ids))[start - 1 :] for ids, start in zip(paths.ids, paths.start, strict=True)])
        assert selfcheck._difference(part, paths, "tree", truth, mask="bool") > 0.05


@pytest.mark.parametrize(("architecture", "form"), [("llama", "additive"), ("gemma2", "dict"), ("mistral", "windowed"), ("mpt", None), ("lfm2", None)])
def test_bfloat16_verdicts_equal_float32_ones(architecture, form):
    assert check(tiny(architecture, dtype=torch.bfloat16)).tree_mask == form


def test_a_verdict_is_measured_once(monkeypatch):
    first = check(tiny("llama", num_hidden_layers=1))
    monkeypatch.setattr(selfcheck, "_measure", lambda part: pytest.fail("measured twice"))
    assert check(tiny("llama", num_hidden_layers=1, seed=5)) is first


def test_weights_of_another_size_are_measured_anew():
    sizes = [check(tiny("llama", num_hidden_layers=1, vocab=68, initializer_range=std)) for std in (0.2, 0.02, 0.2)]
    assert sizes[0] is sizes[2]
    assert sizes[0] is not sizes[1]


@pytest.mark.parametrize("architecture", ["mpt", "qwen3_next"])
def test_16_bit_weights_of_a_random_start_are_held_to_a_share_of_what_a_token_says(architecture):
    assert check(tiny(architecture, dtype=torch.bfloat16, initializer_range=0.02, vocab=1000)).tree_mask is None


@pytest.mark.parametrize("vocab", [128, 1000, 49152, 151936])
def test_the_branch_that_the_isolation_test_changes_stands_first_in_the_row(vocab):
    paths, _ = selfcheck._trial(selfcheck.anatomy(tiny("llama", vocab=vocab, hidden_size=8)))
    assert sorted(paths.ids)[0] == paths.ids[-1]


def flat(mask):
    """A mask of two dimensions in place of one of four, with which strangers of one row see each other."""
    return torch.ones(mask.shape[0], mask.shape[-1], dtype=torch.long) if isinstance(mask, torch.Tensor) and mask.ndim == 4 else None


def wrapped(part):
    inner = part.forward
    part.forward = lambda *args, attention_mask=None, **more: inner(*args, attention_mask=flat(attention_mask), **more)


def hooked(part):
    part.register_forward_pre_hook(lambda _, args, more: (args, more | {"attention_mask": flat(more.get("attention_mask"))}), with_kwargs=True)


def another_class(part):
    class Flat(type(part)):
        def forward(self, *args, attention_mask=None, **more):
            return super().forward(*args, attention_mask=flat(attention_mask), **more)

    part.__class__ = Flat


@pytest.mark.parametrize(
    ("change", "part"),
    [(wrapped, "model"), (hooked, "model"), (another_class, "model"), (wrapped, "model.layers.1.self_attn"), (another_class, "model.layers.1.self_attn")],
)
def test_a_model_that_had_code_put_on_it_is_measured_itself(change, part):
    assert check(tiny("llama")).tree_mask == "additive"
    model = tiny("llama")
    change(model.get_submodule(part))
    assert check(model).tree_mask is None
    assert check(tiny("llama")).tree_mask == "additive"


def test_a_verdict_on_a_model_with_code_put_on_it_is_kept_until_that_is_other_code():
    model = tiny("llama")
    wrapped(model.model)
    first = check(model)
    assert check(model) is first
    del model.model.forward
    model.model.forward = model.model.forward  # the class's own
    second = check(model)
    assert (first.tree_mask, second.tree_mask) == (None, "additive")
    hooked(model.model)
    assert check(model).tree_mask is None


def test_an_adapter_and_what_makes_it_fast_need_no_new_verdict():
    model = tiny("llama")
    verdict = check(model)
    adapted = lora.attach(model, rank=2)
    assert any("forward" in module.__dict__ for module in adapted.modules())
    assert check(adapted) is verdict


def test_checking_leaves_mode_and_gradients_alone():
    model = tiny("llama", num_hidden_layers=1, vocab=65).train()
    check(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_memory_that_runs_out_is_no_verdict(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(selfcheck, "_difference", full)
    model = tiny("llama", num_hidden_layers=1, vocab=66)
    with pytest.raises(torch.OutOfMemoryError):
        check(model)
    monkeypatch.undo()
    assert check(model).tree_mask == "additive"


def test_a_refusal_is_logged_once(caplog):
    for _ in range(2):
        check(tiny("mpt", vocab=67))
    assert [record.getMessage()[:38] for record in caplog.records] == ["MptForCausalLM is scored without share"]


@pytest.mark.parametrize("architecture", ["gpt2", "mpt", "llama"])
def test_the_width_of_attention_is_found_whatever_its_name(architecture):
    part = selfcheck.anatomy(tiny(architecture))
    weights = sum(parameter.numel() for parameter in part.layers.parameters() if parameter.ndim > 1)
    assert part.crossover == 0.5 * weights / (2 * 2 * 32)  # two layers of width 32
