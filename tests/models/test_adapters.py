import json

import pytest
import torch

from fiducial.core.errors import ModelError
from fiducial.core.records import user
from fiducial.models.adapters import BASE, CONFIG, add, is_adapted
from fiducial.models.loading import load
from fiducial.models.scripted import tiny


@pytest.fixture
def base(tmp_path):
    return load(tiny().save(tmp_path / "base"), dtype="float32")


@pytest.fixture
def adapted(base, tmp_path):
    """A folder with an adapter whose weights are random, and the model it was saved from."""
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = load(tmp_path / "base", dtype="float32")
    model.module = add(model.module, config)
    return model, model.save(tmp_path / "adapter")


def logits(model):
    return model.module(torch.tensor([model.encode(user("a"))[0]])).logits


def test_a_saved_adapter_opens_with_its_base_model(adapted):
    model, folder = adapted
    again = load(folder, dtype="float32")
    assert torch.equal(logits(again), logits(model))
    assert again.uri == str(folder)
    assert is_adapted(again.module)
    assert (folder / "adapter_model.safetensors").stat().st_size < 20_000  # not the base model


def test_an_adapter_changes_the_model_and_leaves_its_base_as_it_was(base, adapted):
    before, known = logits(base), base.fingerprint
    model = base.with_adapter(adapted[1])
    assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(base), before)
    assert all(p.requires_grad for p in base.module.parameters())
    assert model.fingerprint != base.fingerprint == known


def test_base_weights_are_shared_and_not_copied(base, adapted):
    model = base.with_adapter(adapted[1])
    here = {p.data_ptr() for p in base.module.parameters()}
    assert here <= {p.data_ptr() for p in model.module.parameters()}


def test_an_adapter_samples_scores_and_is_trained_further(base, adapted, tmp_path):
    model = base.with_adapter(adapted[1])
    assert model.sample([user("a")], max_tokens=2)[0][0].finish in ("stop", "length")
    again = load(model.save(tmp_path / "further"), dtype="float32")
    assert again.fingerprint == model.fingerprint
    assert json.loads((tmp_path / "further" / BASE).read_text()) == {"uri": str(tmp_path / "base")}
    assert not (tmp_path / "further" / "README.md").exists()  # peft's form, which nobody filled in


def test_strength_counts_in_the_fingerprint(adapted):
    _, folder = adapted
    before = load(folder, dtype="float32").fingerprint
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 99}))
    assert load(folder, dtype="float32").fingerprint != before


def test_a_base_beside_the_adapter_is_found_by_its_relative_path(adapted):
    _, folder = adapted
    (folder / BASE).unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "../base"}))
    assert load(folder, dtype="float32").base == str(folder.parent / "base")


def test_an_adapter_that_names_no_base_is_a_model_error(adapted):
    _, folder = adapted
    (folder / BASE).unlink()
    (folder / CONFIG).write_text("{}")
    with pytest.raises(ModelError, match="does not say of which model"):
        load(folder)


def test_an_adapter_on_an_adapter_is_refused(base, adapted):
    model = base.with_adapter(adapted[1])
    with pytest.raises(ModelError, match="already has an adapter"):
        model.with_adapter(adapted[1])


def test_a_folder_without_adapter_weights_is_refused(base, adapted):
    (adapted[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="adapter_model"):
        base.with_adapter(adapted[1])


def test_an_adapter_of_another_architecture_is_refused(adapted):
    from fiducial.models.local import LocalModel
    from fiducial.models.tiny import tiny as random_model

    other = LocalModel(random_model("gpt2"), tiny().tokenizer, uri="other")
    with pytest.raises(ModelError, match="does not fit"):
        other.with_adapter(adapted[1])


@pytest.mark.filterwarnings("ignore:.lora_bias=True.")  # merging, which peft warns about, is not asked for
def test_an_adapter_with_a_bias_keeps_it(base):
    from peft import LoraConfig

    module = add(base.module, LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, bias="none"))
    layer = next(layer for layer in module.modules() if hasattr(layer, "lora_B"))
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.lora_B["default"].bias.fill_(3.0)
    x = torch.randn(1, layer.base_layer.in_features)
    assert torch.allclose(layer(x) - layer.base_layer(x), torch.full((1, layer.base_layer.out_features), 3.0 * layer.scaling["default"]))


def test_an_adapter_on_a_base_changed_in_memory_is_another_model(base, adapted):
    clean = base.with_adapter(adapted[1]).fingerprint
    with torch.no_grad():
        next(base.module.parameters()).mul_(2)
    assert base.with_adapter(adapted[1]).fingerprint != clean
