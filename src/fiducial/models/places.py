"""Where the weights of a model lie: in a folder, or on the Hugging Face hub. Importing this loads no torch."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fiducial.core.errors import ModelError, StorageError
from fiducial.models import adapters
from fiducial.models.embedded import quiet

FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
"""What is fetched of a model: never pickles, which can run code."""
WEIGHTS = "*.safetensors"
"""Those of them that are large."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of the disk that a download is written to."""
PATIENCE = 10.0
"""Seconds for the hub to say whether it has a model."""


def checked(folder: str | Path) -> Path:
    """The folder. Raises ModelError where it holds neither a model that can be read nor an adapter."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ModelError(f"the folder {folder} does not exist", hint="give a folder with config.json and safetensors weights")
    if (folder / adapters.CONFIG).is_file():
        return folder
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: config.json is missing", hint="give a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no safetensors weights", hint="convert them with save_pretrained; pickled weights can run code and are not read")
    return folder


def look(name: str, *, revision: str | None = None) -> None:
    """Raises ModelError where a model is neither on this machine nor on the hub. Downloads nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _explained(name, revision), quiet():
        try:
            snapshot_download(name, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            # a rehearsal, not a question to the hub's interface: it tells a hub that cannot be reached from a model that is not there
            snapshot_download(name, revision=revision, allow_patterns=["config.json"], etag_timeout=PATIENCE, dry_run=True)


def fetch(name: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Folder of a model of the Hugging Face hub, downloaded unless it is there already; without `weights` all but these.

    Raises ModelError in one line, StorageError when the disk refuses.
    """
    from huggingface_hub import snapshot_download

    with _explained(name, revision), quiet():
        files = [f for f in FILES if weights or f != WEIGHTS]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["original/*", "onnx/*"]))


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub's library inside are told in one line."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(f"the model '{name}' asks for consent first", hint=f"give it on https://huggingface.co/{name}, then: hf auth login") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"the model '{name}' has no revision '{revision}'", hint="give a branch, a tag or a commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"there is no model '{name}', neither as a folder nor on the hub", hint="check the spelling; private models need: hf auth login"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # no connection, offline mode, nothing cached: httpx and hub errors all derive from these
        if isinstance(error, OSError) and error.errno in DISK:
            refused = StorageError.from_os(error, error.filename or HF_HUB_CACHE)
            raise StorageError(refused.message, hint="free some space there, or set HF_HOME to a folder that can be written") from error
        raise ModelError(f"the model '{name}' is not on this machine and the hub cannot be reached", hint="download it once, or give a folder") from error
