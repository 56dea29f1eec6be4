"""Opening causal language models: from a folder, from the Hugging Face hub, with or without an adapter."""

from __future__ import annotations

import errno
import os
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiducial.core.errors import ConfigError, ModelError, StorageError, nearest
from fiducial.models import adapters
from fiducial.models.embedded import quiet
from fiducial.models.local import LocalModel

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "fp32": "float32", "float32": "float32"}
"""Spellings of a dtype."""
FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
"""What is fetched of a model: never pickles, which can run code."""
WEIGHTS = "*.safetensors"
"""Those of them that are large."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of the disk that a download is written to."""
_adapter: ContextVar[Path | None] = ContextVar("_adapter", default=None)
"""The adapter whose base model is being opened."""


def load(folder: str | Path, *, dtype: str | None = None, device: str | None = None, uri: str = "") -> LocalModel:
    """The model in a folder: safetensors weights, or a peft adapter whose base model is opened too.

    `dtype` defaults to what this machine is fast at (`fast_dtype`), `device` to CUDA where there is one; `auto` spreads over all devices.
    Raises ModelError for a folder that holds no complete model.
    """
    folder = Path(folder).expanduser()
    uri = uri or str(folder)
    if not folder.is_dir():
        raise ModelError(f"the folder {folder} does not exist", hint="give a folder with config.json and safetensors weights")
    if (folder / adapters.CONFIG).is_file():
        return _with_head(_load_adapter(folder, dtype=dtype, device=device, uri=uri), folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: config.json is missing", hint="give a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no safetensors weights", hint="convert them with save_pretrained; pickled weights can run code and are not read")
    device = _checked(device or default_device())
    tokenizer, module = _read(folder, dtype or fast_dtype(device), device, uri)
    return _with_head(LocalModel(module, tokenizer, uri=uri, folders=(folder,)), folder)


def _with_head(model: LocalModel, folder: Path) -> LocalModel:
    """The model with the heads that stand beside its weights."""
    from fiducial.models import scorehead

    if (folder / scorehead.FILE).is_file():
        model.head = scorehead.ScoreHead.read(folder, width=model.width, device=model.device)
    if (folder / scorehead.COST_FILE).is_file():
        model.cost_head = scorehead.ScoreHead.read(folder, scorehead.COST_FILE, width=model.width, device=model.device)
    return model


def fetch(name: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Folder of a model of the Hugging Face hub, downloaded unless it is there already; without `weights` all but these.

    Raises ModelError in one line, StorageError when the disk refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        with quiet():
            return Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=[f for f in FILES if weights or f != WEIGHTS], ignore_patterns=["original/*", "onnx/*"]
                )
            )
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


def fast_dtype(device: str) -> str:
    """bfloat16 on CUDA and on processors with instructions for it (twice as fast as float32 there), else float32."""
    if (default_device() if device == "auto" else device) != "cpu":
        return "bfloat16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def default_device() -> str:
    """`cuda` where there is one, else `cpu`; of several processes of one machine each has a device of its own."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def _checked(device: str) -> str:
    """The device, or ConfigError where this machine has none such."""
    import torch

    if device == "auto":
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch asserts that it was built for the device
        raise ConfigError(f"the device '{device}' cannot be used: {adapters.first_line(error)}", hint="cpu, cuda, cuda:1, auto") from error
    return device


def _read(folder: Path, dtype: str, device: str, uri: str) -> tuple[Any, torch.nn.Module]:
    """Tokenizer and model. Foreign files can fail in many ways; here every one becomes a ModelError that names the model."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}'", hint=nearest(dtype, DTYPES))
    where: dict[str, Any] = {} if device == "cpu" else {"device_map": device if device == "auto" else {"": device}}
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
            module, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, DTYPES[dtype]), use_safetensors=True, output_loading_info=True, **where, **options
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{uri} cannot be opened: {adapters.first_line(error)}", hint="check that the folder is complete and the model causal") from error
    if any(p.device.type == "meta" for p in module.parameters()):
        raise ModelError(f"{uri} does not fit into the memory of all devices, so that weights would stay on the disk", hint="free memory, or add devices")
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{uri} lacks {len(missing)} weights, such as {missing[0]}, which would be random", hint="give a complete causal language model")
    return tokenizer, module


def _load_adapter(folder: Path, *, dtype: str | None, device: str | None, uri: str) -> LocalModel:
    from fiducial.models.open import open as open_model

    if above := _adapter.get():
        which = "itself" if above.resolve() == folder.resolve() else f"{folder}, which is an adapter too"
        raise ModelError(f"the adapter {above} names as its base model {which}", hint=f"name a whole model in its {adapters.BASE}")
    base_uri = adapters.base_of(folder)
    token = _adapter.set(folder)
    try:
        base = open_model(base_uri, dtype=dtype, device=device)
    finally:
        _adapter.reset(token)
    if not isinstance(base, LocalModel):
        raise ModelError(f"{folder} is an adapter of {base_uri}, whose weights are not here", hint="an adapter needs a local base model")
    model = base.with_adapter(folder)
    model.uri = uri
    return model
