import errno
import os

import pytest

from fiducial.core.errors import ModelError, StorageError
from fiducial.models import places
from fiducial.models.scripted import tiny


def test_a_hub_name_that_is_not_here_is_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not on this machine and the hub cannot be reached") as failure:
        places.fetch("nobody/no-such-model")
    assert "\n" not in str(failure.value)


def test_a_name_that_the_hub_would_not_allow_is_refused():
    with pytest.raises(ModelError, match="there is no model"):
        places.fetch("a--b/..c")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_a_download_is_named(monkeypatch, number):
    import huggingface_hub

    def refused(*_, **__):
        raise OSError(number, os.strerror(number), "/cache/models/blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(StorageError, match="/cache/models/blob") as caught:
        places.fetch("org/name")
    assert "HF_HOME" in caught.value.hint


def test_a_look_downloads_nothing_and_finds_what_is_here(monkeypatch, tmp_path):
    from huggingface_hub import constants

    repository = tmp_path / "models--me--mine"
    tiny().save(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    places.look("me/mine")
    for name in ("me/other", "a--b/..c"):
        with pytest.raises(ModelError, match=name):
            places.look(name)


def test_a_look_asks_the_hub_for_what_is_not_here(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants

    asked, real = [], huggingface_hub.snapshot_download

    def download(name, **how):
        if how.get("local_files_only"):
            return real(name, **how)
        return asked.append((name, how["revision"], how["dry_run"]))

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    places.look("me/mine", revision="v1")
    assert asked == [("me/mine", "v1", True)]


def test_a_hub_that_cannot_be_reached_is_one_line_for_a_look_too(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        places.look("me/mine")


def test_a_folder_is_checked_without_being_opened(tmp_path):
    assert places.checked(tiny().save(tmp_path / "whole")) == tmp_path / "whole"
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    for name, why in (("none", "does not exist"), (".", "config.json is missing"), ("half", "no safetensors weights")):
        with pytest.raises(ModelError, match=why):
            places.checked(tmp_path / name)
