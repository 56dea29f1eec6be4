"""One string names a model, everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fiducial.core.errors import ConfigError, ModelError, nearest
from fiducial.models.base import Model

FORMS = {
    "smollm2": "the embedded SmolLM2-135M-Instruct",
    "FOLDER": "a folder with a model or a peft adapter",
    "ORG/NAME": "a model of the Hugging Face hub",
    "hf:NAME@REVISION": "the same at a branch, tag or commit",
    "run:ID": "the model that a run trained",
    "openai:NAME": "a model behind an OpenAI-compatible server, with its base URL",
    "openai+prefill:NAME": "the same, where the server goes on from an answer that was begun for it (vLLM and SGLang do)",
    "scripted:FILE": "answers from a YAML or JSON Lines file",
    "tiny": "a tiny random model, for trying things out",
}
"""Forms of a model name, and what each opens."""
SCHEMES = ("hf", "run", "openai", PREFILL := "openai+prefill", "scripted", "inspect")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def open(  # noqa: A001 it opens a model, and is called models.open
    uri: str = "smollm2", *, dtype: str | None = None, device: str | None = None, base_url: str | None = None, **options: Any
) -> Model:
    """The model of that name; see FORMS.

    `dtype` and `device` are for local models and default to what the machine is fast at, `base_url` and `options` for remote ones
    (see `RemoteModel`). Raises ModelError where there is no such model, ConfigError for an option that the model cannot take,
    MissingExtraError where a package is needed.
    """
    return _found(uri, dtype, device, base_url, options)()


def ready(uri: str, *, dtype: str | None = None, device: str | None = None, base_url: str | None = None, **options: Any) -> None:
    """Raises what `open` does for a name that leads to no model, and for an option it cannot take. Opens and downloads nothing, and loads no torch."""
    _found(uri, dtype, device, base_url, options)


def _found(uri: str, dtype: str | None, device: str | None, base_url: str | None, options: dict[str, Any]) -> Callable[[], Model]:
    """What opens the model of that name."""
    scheme, colon, rest = uri.partition(":")
    if not uri or (scheme in SCHEMES and colon and not rest):
        raise ModelError(f"'{uri}' names no model", hint=_forms())
    if colon and scheme in SCHEMES:
        if scheme in ("openai", PREFILL):
            _refuse(uri, dtype=dtype, device=device)
            remote = _remote(uri, rest, base_url, options | ({"prefill": True} if scheme == PREFILL else {}))
            return lambda: remote
        _refuse(uri, base_url=base_url, **options)
        if scheme == "scripted":
            _refuse(uri, dtype=dtype, device=device)
            scripted = _scripted(uri, rest)
            return lambda: scripted
        if scheme == "inspect":
            raise ModelError(f"'{uri}': providers of Inspect AI are not opened here", hint="most speak the OpenAI protocol: openai:NAME with a base URL")
        return _hub(uri, rest, dtype, device) if scheme == "hf" else _of_run(rest, dtype, device)
    _refuse(uri, base_url=base_url, **options)
    return _local(uri, dtype, device)


def _local(uri: str, dtype: str | None, device: str | None) -> Callable[[], Model]:
    from fiducial.models import embedded, places

    if uri == "smollm2":
        embedded.packed()
        return partial(_embedded, uri, dtype, device)
    if uri == "tiny":
        from fiducial.models.scripted import tiny

        return tiny
    if Path(uri).expanduser().is_dir():
        places.checked(uri)
        return partial(_loaded, uri, dtype, device)
    if uri.startswith(("/", ".", "~")) or uri.endswith("/"):
        raise ModelError(f"the folder {uri} does not exist", hint=_forms())
    return _hub(uri, uri, dtype, device)


def _embedded(uri: str, dtype: str | None, device: str | None) -> Model:
    from fiducial.models import embedded, loading

    device = device or loading.default_device()
    dtype = loading.DTYPES.get(dtype or loading.fast_dtype(device), dtype or "")
    return loading.load(embedded.folder(dtype), dtype=dtype, device=device, uri=uri)


def _loaded(folder: str | Path, dtype: str | None, device: str | None, uri: str = "") -> Model:
    from fiducial.models import loading

    return loading.load(folder, dtype=dtype, device=device, uri=uri)


def _hub(uri: str, name: str, dtype: str | None, device: str | None) -> Callable[[], Model]:
    from fiducial.models import places

    name, _, revision = name.partition("@")
    if not HUB_NAME.fullmatch(name):
        raise ModelError(f"'{uri}' does not name a model", hint=_forms())
    try:
        places.look(name, revision=revision or None)
    except ModelError as error:
        if "/" in name:
            raise
        known = nearest(name, [form for form in FORMS if form.islower() and ":" not in form])
        raise ModelError(error.message, hint=known if known.startswith("did") else _forms()) from error
    return lambda: _loaded(places.fetch(name, revision=revision or None), dtype, device, uri)


def _of_run(reference: str, dtype: str | None, device: str | None) -> Callable[[], Model]:
    from fiducial.core.run import Run
    from fiducial.models import places

    run = Run.open(reference, trained=True)
    folder = run.path / "model"
    if not folder.is_dir():
        raise ModelError(f"the run {run.id} trained no model", hint="name a run of training or of the loop")
    places.checked(folder)
    # by its id: `run:last` is another run as soon as there is one more
    return partial(_loaded, folder, dtype, device, f"run:{run.id}")


def _remote(uri: str, name: str, base_url: str | None, options: dict[str, Any]) -> Model:
    from fiducial.models.remote import RemoteModel

    try:
        return RemoteModel(name, base_url=base_url, **options)
    except TypeError as error:
        raise ConfigError(f"{uri}: {error}", hint="see RemoteModel for the options of a remote model") from error


def _scripted(uri: str, file: str) -> Model:
    from fiducial.models.scripted import ScriptedModel

    model = ScriptedModel.read(Path(file))
    model.uri = uri
    return model


def _refuse(uri: str, **given: Any) -> None:
    """An option that would be ignored is an error."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} has no meaning for the model '{uri}'", hint="leave it out")


def _forms() -> str:
    return "a model is " + ", ".join(FORMS)
