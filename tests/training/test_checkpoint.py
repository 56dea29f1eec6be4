"""Checkpoints are whole or they are not there."""

import errno
import json

import pytest
import torch

from fiducial.core.errors import StorageError
from fiducial.training import checkpoint


def pieces(value=0.0):
    weights = {"a": torch.full((3, 2), value, requires_grad=True), "b": torch.full((2,), value, requires_grad=True)}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1)
    return weights, optimizer


def save(folder, step, value=0.0, **state):
    weights, optimizer = pieces(value)
    for w in weights.values():
        w.grad = torch.ones_like(w)
    optimizer.step()
    checkpoint.save(folder, step=step, weights=weights, optimizer=optimizer, state=state)
    return weights, optimizer


def load(folder, **named):
    weights, optimizer = pieces()
    return checkpoint.load(folder, weights=weights, optimizer=optimizer, **named), weights, optimizer


def test_weights_moments_state_and_random_state_come_back(tmp_path):
    torch.manual_seed(5)
    weights, optimizer = save(tmp_path, 3, 1.5, seconds=2.5, history=[{"loss": 0.1}])
    drawn = torch.rand(3)
    torch.manual_seed(9)
    state, again, other = load(tmp_path)
    assert state == {"step": 3, "seconds": 2.5, "history": [{"loss": 0.1}]}
    assert all(torch.equal(weights[n], again[n]) for n in weights)
    for key, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, other.state_dict()["state"][key][name]) for name, v in values.items())
    assert torch.equal(torch.rand(3), drawn)


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    assert load(tmp_path / "none")[0] is None


def test_only_the_newest_is_kept(tmp_path):
    for step in (9, 10):
        save(tmp_path, step)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]
    assert load(tmp_path)[0]["step"] == 10


def test_steps_are_compared_as_numbers(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "checkpoint-10").rename(tmp_path / "kept")
    save(tmp_path, 9)
    (tmp_path / "kept").rename(tmp_path / "checkpoint-10")
    assert load(tmp_path)[0]["step"] == 10


def test_a_folder_that_a_kill_left_half_written_is_passed_over_and_cleaned_up(tmp_path):
    save(tmp_path, 1)
    for name in (".checkpoint-2", "checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    assert load(tmp_path)[0]["step"] == 1
    save(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_left_out_with_a_warning_and_the_older_one_used(tmp_path, caplog, file):
    save(tmp_path, 1, 1.0)
    (tmp_path / "checkpoint-1").rename(tmp_path / "kept")
    save(tmp_path, 2, 2.0)
    (tmp_path / "kept").rename(tmp_path / "checkpoint-1")
    damaged = tmp_path / "checkpoint-2" / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    state, weights, _ = load(tmp_path)
    assert state["step"] == 1
    assert weights["b"].max() < 1.5
    assert "checkpoint-2 is damaged and left out" in caplog.text


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_changed(tmp_path):
    save(tmp_path, 1, 1.0)
    other = {"a": torch.zeros(3, 2, requires_grad=True), "b": torch.zeros(5, requires_grad=True)}
    with pytest.raises(StorageError, match="another model or adapter"):
        checkpoint.load(tmp_path, weights=other, optimizer=torch.optim.AdamW(other.values()))
    assert other["a"].abs().max() == 0


def test_what_is_not_admitted_changes_nothing(tmp_path):
    save(tmp_path, 1, 1.0)
    weights, optimizer = pieces()

    def refuse(state):
        raise StorageError("no")

    with pytest.raises(StorageError):
        checkpoint.load(tmp_path, weights=weights, optimizer=optimizer, admit=refuse)
    assert weights["a"].abs().max() == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_is_a_storage_error_and_the_last_checkpoint_stays(tmp_path, monkeypatch, code):
    save(tmp_path, 1)

    def refuse(*_, **__):
        raise OSError(code, "no")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(StorageError):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert load(tmp_path)[0]["step"] == 1


def test_a_disk_that_fills_up_below_safetensors_is_a_storage_error(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def refuse(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(StorageError, match="no space left"):
        save(tmp_path, 1)


def test_a_file_in_the_place_of_the_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        save(tmp_path / "file", 1)


def test_clear_leaves_other_files_alone(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".checkpoint-2").mkdir()
    (tmp_path / "reference-1.safetensors").write_bytes(b"")
    checkpoint.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["reference-1.safetensors"]


def test_the_state_is_plain_json(tmp_path):
    save(tmp_path, 1, norms=[1.0, float("inf")])
    assert json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())["norms"][0] == 1.0
