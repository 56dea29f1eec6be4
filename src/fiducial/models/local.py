"""A causal language model whose weights are in memory: sampled, scored, looked into, trained and saved."""

from __future__ import annotations

import gc
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiducial.core.errors import ConfigError, DataError, ModelError, StorageError
from fiducial.core.records import Completion, Conversation, digest
from fiducial.core.store import disk_errors, put_tree, sync_tree
from fiducial.models import adapters, control
from fiducial.models import fingerprint as identity
from fiducial.models.base import Arrived, WhiteBox
from fiducial.models.chat import Chat
from fiducial.models.embedded import quiet

if TYPE_CHECKING:
    import torch

    from fiducial.models.forest import Paths
    from fiducial.models.sampling import Sampled
    from fiducial.models.scorehead import ScoreHead
    from fiducial.models.scoring import Engine, Scores

UNLIMITED = 1_000_000_000
"""Context in tokens of an architecture without a longest sequence."""


class LocalModel(WhiteBox):
    """Samples, scores, gives hidden states and gradients. `module` may be replaced or trained in place; `fingerprint` follows."""

    def __init__(self, module: torch.nn.Module, tokenizer: Any, *, uri: str, folders: tuple[Path, ...] = (), base: str = "") -> None:
        self.module = module.eval()
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.uri = uri
        self.base = base or uri
        """How the model without its adapter is opened; the uri where there is none."""
        self.chat = Chat(tokenizer)
        self._engine: Engine | None = None
        self._folders = folders
        self._known: dict[int, str] = {}
        self._loaded: int | None = identity.state(module, tokenizer)
        self.head: ScoreHead | None = None
        """Turns final states into scores, where the model was trained to give them."""
        self.cost_head: ScoreHead | None = None
        """The same for what answers cost, where the model has learnt from rewards under a limit on it."""

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""
        return next(self.module.parameters()).device

    @property
    def fingerprint(self) -> str:  # type: ignore[override]  # computed when asked for: hashing takes about a second per GB
        """16 hexadecimal digits over weights, adapter, heads, tokenizer and chat template; kept per folder until a file changes.

        After training call `changed`, or `save`: a step of a fused optimiser can go unnoticed (see `fingerprint.state`).
        """
        now = identity.state(self.module, self.tokenizer)
        if now not in self._known:
            place = identity.remembered(self._folders, str(next(self.module.parameters()).dtype)) if self._folders and now == self._loaded else None
            value = (identity.recall(place) if place else "") or identity.fingerprint(self.module, self.tokenizer)
            if place:
                identity.remember(place, value)
            self._known = {now: value}
        heads = [head.digest for head in self._heads.values()]
        return digest([self._known[now], *heads]) if heads else self._known[now]

    @property
    def _heads(self) -> dict[str, ScoreHead]:
        """The heads that there are, by the names of their files."""
        from fiducial.models.scorehead import COST_FILE, FILE

        return {file: head for file, head in ((FILE, self.head), (COST_FILE, self.cost_head)) if head is not None}

    def changed(self) -> None:
        """Says that weights, tokenizer or template are no longer those of the folder: the next `fingerprint` hashes everything anew."""
        self._known = {}
        self._loaded = None

    @property
    def folder(self) -> Path | None:
        """The folder that holds this very model; None where it was changed, has an adapter, or never was in one."""
        clean = len(self._folders) == 1 and identity.state(self.module, self.tokenizer) == self._loaded and not adapters.is_adapted(self.module)
        return self._folders[0] if clean else None

    @property
    def engine(self) -> Engine:
        """Scores token sequences, each shared token once. A new one when `module` was replaced; may be set to one with another back end."""
        if self._engine is None or self._engine.module is not self.module:
            from fiducial.models.scoring import Engine

            self._engine = Engine(self.module)
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: of the generation settings, the configuration, the tokenizer and the chat template."""
        module: Any = self.module
        found: set[int] = set(self.chat.end_ids)
        for config in (module.generation_config, module.config):
            ids = getattr(config, "eos_token_id", None)
            found |= set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {ids}
        return frozenset(found)

    @property
    def banned_ids(self) -> frozenset[int]:
        """Tokens that are never sampled: those that the generation settings suppress, and control tokens."""
        module: Any = self.module
        return frozenset(getattr(module.generation_config, "suppress_tokens", None) or ()) | frozenset(self.chat.control_ids)

    @property
    def context(self) -> int:
        """Longest prompt and completion together, in tokens."""
        module: Any = self.module
        # state-space architectures have no limit and no such field
        return int(getattr(module.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)

    @property
    def width(self) -> int:
        """Features of a final hidden state, as the head reads it."""
        module: Any = self.module
        return int(module.get_output_embeddings().in_features)

    def encode(self, conversation: Conversation, completion: str | None = None, *, end: bool = True) -> tuple[list[int], int]:
        """See `Chat.encode`."""
        return self.chat.encode(conversation, completion, end=end)

    def score(self, paths: Paths, *, grad: bool = False, temperature: float = 1.0, hidden: Mapping[str, Any] | None = None) -> Scores:
        """Log-probabilities of the scored tokens; see `fiducial.models.scoring`."""
        return self.engine.score(paths, grad=grad, temperature=temperature, hidden=hidden)

    def sample(
        self,
        conversations: Sequence[Conversation],
        *,
        k: int = 1,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        arrived: Arrived | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """`k` completions per conversation. A prompt that does not fit into the context is answered by `error`, never cut.

        A draw depends on the seed and the number of the conversation: `numbers`, where these are part of a larger list, else 0, 1, ...
        """
        from fiducial.models.sampling import generate

        if not all(stop):
            raise ConfigError("a stop text is empty, so every answer would be", hint="leave it out")
        done: dict[int, tuple[Completion, ...]] = {}
        prompts: dict[int, list[int]] = {}

        def finish(index: int, completions: tuple[Completion, ...]) -> None:
            if index not in done:
                done[index] = completions
                if arrived:
                    arrived(index, completions)

        for index, conversation in enumerate(conversations):
            try:
                prompts[index] = self._prompt(conversation)
            except DataError as error:
                finish(index, (Completion(text="", finish="error", error=str(error)),) * k)
        for room, indices in self._by_room(prompts, max_tokens).items():
            # default arguments: the loop variables move on, the callback must not
            def came(local: int, samples: list[Sampled], indices: list[int] = indices) -> None:
                finish(indices[local], tuple(self._completion(s, prompts[indices[local]], stop) for s in samples))

            generate(
                self.module,
                [prompts[i] for i in indices],
                numbers=indices if numbers is None else [numbers[i] for i in indices],
                k=k,
                max_tokens=room,
                temperature=temperature,
                top_p=top_p,
                eos=self.eos_ids,
                banned=self.banned_ids,
                seed=seed,
                arrived=came,
                stop_check=self._stop_check(stop) if stop else None,
            )
        return [done[i] for i in range(len(conversations))]

    def save(self, folder: str | Path) -> Path:
        """Writes model (or adapter), heads, tokenizer and template as a whole, on the disk before it gets its name. Raises StorageError.

        A crash leaves the old folder or the new; between the two renames of a replacement the old one is called `.<name>-<digits>.old`
        and has to be renamed by hand. The next `fingerprint` is hashed anew.
        """
        target = Path(folder)
        beside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
        from safetensors import SafetensorError

        module: Any = self.module
        try:
            with disk_errors(target):
                beside.mkdir(parents=True)
                with quiet():
                    if adapters.is_adapted(module):
                        adapters.save(module, beside, base=_absolute(self.base))
                    else:
                        module.save_pretrained(beside)
                    self.tokenizer.save_pretrained(beside)
                for file, head in self._heads.items():
                    head.save(beside, file)
                sync_tree(beside)
                put_tree(beside, target)
        except SafetensorError as error:
            raise StorageError.passed(f"{target} cannot be written: {error}", hint="check the disk") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self.changed()
        return target

    def with_adapter(self, folder: str | Path) -> LocalModel:
        """This model with a peft adapter on it; both share the base weights, and this one stays as it is. Raises ModelError."""
        if adapters.is_adapted(self.module):
            raise ModelError(f"{self.uri} already has an adapter", hint="put the other one on its base model")
        folder = Path(folder)
        with quiet():
            tokenizer = control.tokenizer_beside(folder)
            base = self.module if tokenizer is None else control.widened(self.module, control.ids(tokenizer))
            module = adapters.put_on(base, folder)
        clean = bool(self._folders) and identity.state(self.module, self.tokenizer) == self._loaded
        folders = (*self._folders, folder) if clean else ()
        return LocalModel(module, tokenizer or self.tokenizer, uri=str(folder), folders=folders, base=self.uri)

    def take_control_tokens(self) -> None:
        """Gives the vocabulary the control tokens, with fresh embeddings, unless it has them. Raises ConfigError for a model with an adapter."""
        if self.chat.control_ids:
            return
        tokenizer = control.with_tokens(self.tokenizer)
        asked = self.engine.asked
        self.module = control.widened(self.module, control.ids(tokenizer))
        self.tokenizer, self.chat = tokenizer, Chat(tokenizer)
        if asked != "auto":
            self.engine = type(self.engine)(self.module, backend=asked)

    def close(self) -> None:
        """Lets go of the model and gives its memory back."""
        self._engine = None
        if "module" in self.__dict__:
            cuda = self.device.type == "cuda"
            del self.module
            gc.collect()  # modules of transformers and peft hold each other in cycles
            if cuda:
                import torch

                torch.cuda.empty_cache()

    def _prompt(self, conversation: Conversation) -> list[int]:
        ids, _ = self.encode(conversation)
        if not ids:
            raise DataError("the prompt is empty", hint="ask something")
        if len(ids) >= self.context:
            raise DataError(f"the prompt has {len(ids)} tokens, the model's context holds {self.context}", hint="shorten it; nothing was cut")
        return ids

    def _by_room(self, prompts: Mapping[int, list[int]], max_tokens: int) -> dict[int, list[int]]:
        """Prompts by how many tokens their answers may have; fewer than asked near the end of the context."""
        groups: dict[int, list[int]] = {}
        for index, ids in prompts.items():
            groups.setdefault(min(max_tokens, self.context - len(ids)), []).append(index)
        return groups

    def _completion(self, sample: Sampled, prompt: list[int], stop: Sequence[str]) -> Completion:
        if sample.finish == "error":
            return Completion(text="", finish="error", error="the model's logits are no numbers (NaN)", prompt_tokens=len(prompt))
        text = self.chat.decode(sample.tokens, after=prompt[-1])
        if sample.finish == "length" and text.endswith("\ufffd"):
            text = self._whole(sample.tokens, prompt[-1])
        cut = min((at for at in (text.find(s) for s in stop) if at >= 0), default=-1)
        return Completion(
            text=text if cut < 0 else text[:cut],
            finish=sample.finish if cut < 0 else "stop",
            tokens=sample.tokens,
            logprobs=sample.logprobs,
            prompt_tokens=len(prompt),
            completion_tokens=len(sample.tokens),
        )

    def _whole(self, tokens: tuple[int, ...], after: int) -> str:
        """The text without the part of a character that it ends with, such as two of the three bytes of a Chinese one."""
        texts = [self.chat.decode(tokens[: len(tokens) - missing], after=after) for missing in range(4)]  # of four bytes three can be there, a token each
        return next((text for text in texts if not text.endswith("\ufffd")), texts[0])

    def _stop_check(self, stop: Sequence[str]) -> Any:
        """Whether the newest tokens contain a stop text. A character has at most four tokens, so the tail is enough."""
        tail = 4 * max(map(len, stop)) + 4

        def check(tokens: Sequence[int]) -> bool:
            text = self.chat.decode(list(tokens[-tail:]))
            return any(s in text for s in stop)

        return check


def _absolute(uri: str) -> str:
    """A folder as an absolute path, so that the adapter finds it from anywhere; other names as they are."""
    return str(Path(uri).expanduser().resolve()) if Path(uri).expanduser().is_dir() else uri
