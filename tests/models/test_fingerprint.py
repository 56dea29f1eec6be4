import pytest
import torch

from fiducial.core.records import user
from fiducial.models import fingerprint
from fiducial.models.loading import load
from fiducial.models.scripted import tiny


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / "cache"))


def test_equal_models_have_equal_fingerprints_and_others_do_not():
    assert tiny().fingerprint == tiny().fingerprint
    assert tiny().fingerprint != tiny(seed=1).fingerprint
    assert len(tiny().fingerprint) == 16


def test_one_changed_weight_changes_it():
    model = tiny()
    before = model.fingerprint
    with torch.no_grad():
        next(model.module.parameters())[0, 0] += 1
    assert model.fingerprint != before


def test_a_step_of_an_optimiser_changes_it():
    model = tiny()
    before = model.fingerprint
    optimiser = torch.optim.AdamW(model.module.parameters(), fused=True)
    model.module(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimiser.step()
    assert model.fingerprint != before


def test_dtype_and_template_count():
    before = tiny().fingerprint
    other, half = tiny(), tiny()
    other.tokenizer.chat_template += " "
    half.module.to(torch.bfloat16)
    assert len({before, other.fingerprint, half.fingerprint}) == 3


def test_how_the_tokenizer_was_called_last_does_not_count():
    model, other = tiny(), tiny()
    other.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3)
    other.sample([user("hi")], max_tokens=2)
    assert model.fingerprint == other.fingerprint


def test_it_survives_saving_and_is_then_read_from_disk(tmp_path, monkeypatch):
    model = tiny()
    folder = model.save(tmp_path / "m")
    assert load(folder, dtype="float32").fingerprint == model.fingerprint
    monkeypatch.setattr(fingerprint, "fingerprint", lambda *_: pytest.fail("hashed again"))
    assert load(folder, dtype="float32").fingerprint == model.fingerprint


def test_a_changed_file_is_hashed_again(tmp_path):
    folder = tiny().save(tmp_path / "m")
    before = load(folder, dtype="float32").fingerprint
    tiny(seed=1).save(folder)
    assert load(folder, dtype="float32").fingerprint == tiny(seed=1).fingerprint != before


def test_a_model_trained_after_loading_is_not_taken_for_its_folder(tmp_path):
    model = load(tiny().save(tmp_path / "m"), dtype="float32")
    with torch.no_grad():
        next(model.module.parameters()).mul_(2)
    assert model.fingerprint != tiny().fingerprint
    assert load(tmp_path / "m", dtype="float32").fingerprint == tiny().fingerprint


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / "file"))
    assert load(tiny().save(tmp_path / "m"), dtype="float32").fingerprint == tiny().fingerprint


def test_a_template_changed_after_the_first_question_counts(tmp_path):
    model = load(tiny().save(tmp_path / "m"), dtype="float32")
    before = model.fingerprint
    model.tokenizer.chat_template += " "
    assert model.fingerprint != before
    assert load(tmp_path / "m", dtype="float32").fingerprint == before


@pytest.mark.parametrize("tell", [lambda model, folder: model.changed(), lambda model, folder: model.save(folder)])
def test_saving_or_saying_so_has_everything_hashed_anew(tmp_path, monkeypatch, tell):
    model = load(tiny().save(tmp_path / "m"), dtype="float32")
    before = model.fingerprint
    monkeypatch.setattr(fingerprint, "state", lambda *_: 0)  # as after a step that the samples do not show
    with torch.no_grad():
        next(model.module.parameters())[0, 0] += 1
    tell(model, tmp_path / "n")
    assert model.fingerprint != before
