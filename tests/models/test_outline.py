import pytest
import torch

from fiducial.core.errors import ModelError
from fiducial.core.records import user
from fiducial.models import loading
from fiducial.models.outline import outline
from fiducial.models.scripted import tiny
from fiducial.training import lora


def shapes(module):
    return {name: (p.shape, p.dtype) for name, p in module.named_parameters()}


def test_a_folder_is_outlined_without_a_weight(tmp_path):
    model = tiny()
    model.save(tmp_path / "model")
    found, device = outline(str(tmp_path / "model"), dtype="float32", device="cpu")
    assert device == "cpu"
    assert all(p.is_meta for p in found.module.parameters())
    assert shapes(found.module) == shapes(model.module)
    assert found.encode(user("hi")) == model.encode(user("hi"))
    (tmp_path / "model" / "model.safetensors").unlink()
    narrow, _ = outline(str(tmp_path / "model"), dtype="bf16", device="cpu")
    assert shapes(narrow.module) == {name: (shape, torch.bfloat16) for name, (shape, _) in shapes(model.module).items()}


def test_an_adapter_is_outlined_on_its_base(tmp_path):
    model = tiny()
    model.save(tmp_path / "base")
    adapted = loading.load(tmp_path / "base", dtype="float32", device="cpu")
    adapted.module = lora.attach(adapted.module, rank=3)
    adapted.save(tmp_path / "adapter")
    found, _ = outline(str(tmp_path / "adapter"), dtype="float32", device="cpu")
    assert shapes(found.module) == shapes(adapted.module)
    assert all(p.is_meta for p in found.module.parameters())


def test_of_the_hub_no_weights_are_fetched(monkeypatch, tmp_path):
    asked = []
    tiny().save(tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **said: asked.append((name, said)) or str(tmp_path / "model"))
    outline("some/model", device="cpu")
    ((name, said),) = asked
    assert name == "some/model"
    assert "config.json" not in said["ignore_patterns"]
    assert not any("safetensors" in pattern for pattern in said["allow_patterns"])


@pytest.mark.parametrize("uri", ["openai:gpt", "scripted:file.yaml"])
def test_a_model_whose_weights_are_elsewhere_has_no_outline(uri):
    with pytest.raises(ModelError, match="has no weights here"):
        outline(uri)
