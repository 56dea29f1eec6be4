import json

import pytest
import torch

from fiducial.core.errors import ConfigError, ModelError
from fiducial.models import loading
from fiducial.models.scripted import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny().save(tmp_path / "m")


def test_the_dtype_is_the_one_asked_for(folder):
    assert next(loading.load(folder, dtype="bf16").module.parameters()).dtype == torch.bfloat16
    assert next(loading.load(folder, dtype="float32").module.parameters()).dtype == torch.float32


def test_a_model_of_which_weights_would_stay_on_the_disk_is_refused(folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained

    def spread(*args, device_map=None, **options):
        module, report = read(*args, **options)
        return module.to("meta"), report  # as accelerate leaves what it puts on the disk

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spread)
    with pytest.raises(ModelError, match="does not fit into the memory"):
        loading.load(folder, device="auto", dtype="float32")


def test_an_unknown_dtype_or_device_is_a_config_error(folder):
    with pytest.raises(ConfigError, match="bfloat15"):
        loading.load(folder, dtype="bfloat15")
    with pytest.raises(ConfigError, match="toaster"):
        loading.load(folder, device="toaster")


@pytest.mark.parametrize(("name", "complaint"), [("config.json", "config.json is missing"), ("model.safetensors", "no safetensors")])
def test_a_missing_file_is_named(folder, name, complaint):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=complaint):
        loading.load(folder)


def test_cut_off_weights_are_a_model_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be opened"):
        loading.load(folder)


def test_an_unreadable_configuration_is_a_model_error(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be opened"):
        loading.load(folder)


def test_missing_weights_are_an_error_and_not_random(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        loading.load(folder)


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "novel", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot be opened"):
        loading.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_does_not_exist_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        loading.load(tmp_path / "none")


def test_bfloat16_is_chosen_where_the_processor_has_instructions_for_it(monkeypatch):
    class Info:
        def __init__(self, flags):
            self.flags = flags

        def read_text(self, **_):
            return f"flags : fpu {self.flags} sse"

    for flags, expected in (("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")):
        monkeypatch.setattr(loading, "Path", lambda _, flags=flags: Info(flags))
        assert loading.fast_dtype("cpu") == expected
    assert loading.fast_dtype("cuda") == "bfloat16"
    monkeypatch.setattr(loading, "default_device", lambda: "cpu")
    assert loading.fast_dtype("auto") == "float32"


def test_an_adapter_of_itself_or_of_another_adapter_is_a_model_error(tmp_path):
    for name, base in (("own", "."), ("upper", "../own")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "base.json").write_text(json.dumps({"uri": base}))
    with pytest.raises(ModelError, match="names as its base model itself"):
        loading.load(tmp_path / "own")
    with pytest.raises(ModelError, match="own, which is an adapter too"):
        loading.load(tmp_path / "upper")
