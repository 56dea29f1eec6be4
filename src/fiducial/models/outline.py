"""A model in outline: its tokenizer, and its shape by its configuration, on torch's meta device, where weights take no memory."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from fiducial.core.errors import ConfigError, ModelError, nearest
from fiducial.core.run import Run
from fiducial.models import adapters, embedded, loading, places
from fiducial.models.embedded import quiet
from fiducial.models.local import LocalModel
from fiducial.models.open import SCHEMES


def outline(uri: str, *, dtype: str | None = None, device: str | None = None) -> tuple[LocalModel, str]:
    """The model of that name without its weights, and the device that it would be opened on; of the embedded model, the hub, a folder or a run.

    Its `module` can be run, and gives shapes alone. Raises ModelError for a model whose weights are elsewhere, or that is not on this machine or the hub.
    """
    device = device or loading.default_device()
    dtype = dtype or loading.fast_dtype(device)
    if dtype not in loading.DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}'", hint=nearest(dtype, loading.DTYPES))
    if uri == "tiny":
        from fiducial.models.scripted import tiny

        with closing(tiny()) as model:
            return LocalModel(model.module.to("meta"), model.tokenizer, uri=uri), device
    return _read(_folder(uri, loading.DTYPES[dtype]), dtype, uri), device


def _folder(uri: str, dtype: str) -> Path:
    """Where configuration and tokenizer are; of a model of the hub these alone are fetched."""
    scheme, colon, rest = uri.partition(":")
    if uri == "smollm2":
        return embedded.any_folder(dtype)
    if scheme == "run" and colon:
        return Run.open(rest, trained=True).path / "model"
    if Path(uri).expanduser().is_dir():
        return Path(uri).expanduser()
    if colon and scheme in SCHEMES and scheme != "hf":
        raise ModelError(f"'{uri}' has no weights here", hint="give a model that runs here")
    name, _, revision = (rest if scheme == "hf" and colon else uri).partition("@")
    return places.fetch(name, revision=revision or None, weights=False)


def _read(folder: Path, dtype: str, uri: str) -> LocalModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if (folder / adapters.CONFIG).is_file():
        below, _ = outline(adapters.base_of(folder), dtype=dtype, device="cpu")
        below.module = _adapted(below.module, folder)
        return LocalModel(below.module, below.tokenizer, uri=uri, base=below.uri)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
            config = AutoConfig.from_pretrained(folder, **options)
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, loading.DTYPES[dtype]))
    # a boundary to foreign files and foreign model code, as where weights are read
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"{uri} cannot be read: {adapters.first_line(error)}", hint="check that the folder is complete and the model causal") from error
    return LocalModel(module, tokenizer, uri=uri)


def _adapted(module: Any, folder: Path) -> Any:
    """With the adapter's matrices, in shape."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return adapters.add(module, config)
