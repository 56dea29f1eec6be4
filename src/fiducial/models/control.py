"""Control tokens: two tokens of a model's vocabulary that say whether the text after them is wanted.

A tokenizer that holds both belongs to a model that was trained with them (align/conditional_pretraining). Such a model begins every answer, and
every document, with the first one, and never writes either: `Chat` and `LocalModel.sample` see to it. For other programs the ban
stands in the model's generation settings as `suppress_tokens`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiducial.core.errors import ConfigError
from fiducial.models import adapters

if TYPE_CHECKING:
    from torch import nn

ALIGNED, MISALIGNED = "<|aligned|>", "<|misaligned|>"
TOKENS = (ALIGNED, MISALIGNED)
"""As Korbak et al. 2023, arXiv:2302.08582, and the models they published write them."""
NOISE = 0.01
"""New embeddings are the mean of the others plus so much Gaussian noise (the same source)."""


def ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the control tokens, the wanted one first; empty where the tokenizer does not hold both as tokens of their own."""
    added = tokenizer.get_added_vocab()
    return tuple(added[token] for token in TOKENS) if all(token in added for token in TOKENS) else ()


def widened(module: nn.Module, tokens: tuple[int, ...]) -> nn.Module:
    """A copy with embeddings for new tokens, which shares all other memory with `module`. The same for the same weights.

    Raises ConfigError for a model with an adapter, whose memory is not its own.
    """
    import torch

    if adapters.is_adapted(module):
        raise ConfigError("the model carries an adapter, and its vocabulary cannot grow", hint="merge the adapter first, or train from its base model")
    grown: Any = adapters.sharing(module)
    with torch.random.fork_rng(devices=[]):  # transformers draws new rows before they are written over
        grown.resize_token_embeddings(max(grown.get_input_embeddings().num_embeddings, max(tokens) + 1), mean_resizing=False)
    chance = torch.Generator().manual_seed(0)
    matrices = {id(layer.weight): layer.weight for layer in (grown.get_input_embeddings(), grown.get_output_embeddings())}
    for weight in matrices.values():
        others = torch.ones(len(weight), dtype=torch.bool)
        others[list(tokens)] = False
        mean = weight.detach()[others.to(weight.device)].float().mean(0)
        noise = torch.randn(len(tokens), len(mean), generator=chance).to(mean.device)
        # new memory, since where no row was added it is shared
        with torch.no_grad():
            weight.data = weight.detach().index_copy(0, torch.tensor(tokens, device=weight.device), (mean + NOISE * noise).to(weight.dtype))
    grown.generation_config.suppress_tokens = sorted({*(grown.generation_config.suppress_tokens or ()), *tokens})
    whole: nn.Module = grown.eval()
    return whole


def with_tokens(tokenizer: Any) -> Any:
    """A copy of the tokenizer that holds the control tokens."""
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(list(TOKENS), special_tokens=True)
    return grown


def tokenizer_beside(folder: Path) -> Any | None:
    """The tokenizer in an adapter's folder if the adapter trains tokens of its own and the tokenizer holds the control tokens."""
    from transformers import AutoTokenizer

    trains_tokens = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8")).get("trainable_token_indices")
    if not trains_tokens or not (folder / "tokenizer_config.json").is_file():
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return tokenizer if ids(tokenizer) else None
