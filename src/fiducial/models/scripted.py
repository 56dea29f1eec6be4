"""Doubles: a model that answers from a script, and a tiny random one. No weights are needed, and runs repeat exactly.

A script file is YAML (a mapping of pattern to answer, or a list of entries) or JSON Lines (one entry a line). An entry:

    {"when": "weather", "answer": ["Sunny.", "Rain."], "finish": "stop"}

`when` is a text that the last user turn contains, or `re:` and a regular expression that matches in it, or `default`. Several
answers are given in turn to the k samples of one prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiducial.core.config import parse_yaml
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Completion, Conversation, digest
from fiducial.models.base import Arrived, Model

if TYPE_CHECKING:
    from fiducial.models.local import LocalModel

Answer = str | Completion | Sequence[str | Completion] | Callable[[Conversation], str | Completion]
"""One answer, several to be given in turn, or a function of the conversation."""

DEFAULT = "default"
KEYS = {"when", "answer", "finish", "error"}


class ScriptedModel(Model):
    """Answers by the first pattern that the last user turn contains.

    >>> from fiducial.core.records import user
    >>> ScriptedModel({"hello": "hi"}, default="?").sample([user("hello there"), user("bye")], k=1)[0][0].text
    'hi'
    """

    def __init__(self, script: Mapping[str, Answer] | Callable[[Conversation], str | Completion] | None = None, *, default: Answer = "") -> None:
        self.uri = "scripted"
        self._function = script if callable(script) else None
        self._script: dict[str, Answer] = {} if script is None or callable(script) else dict(script)
        self._default = default
        for pattern in self._script:
            _check(pattern)
        self.fingerprint = "scripted-" + digest([[k, _plain(v)] for k, v in (*self._script.items(), (DEFAULT, self._default))])
        self.asked: list[Conversation] = []
        """Every conversation put to it, in order."""
        self.samples = 0
        """How many completions it gave."""

    @classmethod
    def read(cls, path: Path) -> ScriptedModel:
        """The model in a script file. Raises DataError naming the line or entry that cannot be used."""
        script: dict[str, Answer] = {}
        default: Answer = ""
        for where, entry in _entries(path):
            when, answer = _entry(where, entry)
            if when == DEFAULT:
                default = answer
            else:
                script[when] = answer
        model = cls(script, default=default)
        model.uri = f"scripted:{path}"
        return model

    @property
    def calls(self) -> int:
        """How many conversations were put to it."""
        return len(self.asked)

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
    ) -> list[tuple[Completion, ...]]:
        """The script's answers; words count as tokens. Sampling settings change nothing but the length."""
        groups = []
        for index, conversation in enumerate(conversations):
            self.asked.append(conversation)
            groups.append(tuple(self._answer(conversation, i, max_tokens, stop) for i in range(k)))
            self.samples += k
            if arrived:
                arrived(index, groups[-1])
        return groups

    def _answer(self, conversation: Conversation, number: int, max_tokens: int, stop: Sequence[str]) -> Completion:
        answer: Answer = self._function if self._function else self._find(conversation)
        if callable(answer):
            answer = answer(conversation)
        if not isinstance(answer, str | Completion):
            answer = answer[number % len(answer)] if answer else ""
        if isinstance(answer, Completion):
            return answer
        for text in stop:
            answer = answer.partition(text)[0]
        words = re.findall(r"\s*\S+", answer)
        cut = len(words) > max_tokens
        return Completion(
            text="".join(words[:max_tokens]) if cut else answer,
            finish="length" if cut else "stop",
            prompt_tokens=sum(len(m.content.split()) for m in conversation),
            completion_tokens=min(len(words), max_tokens),
        )

    def _find(self, conversation: Conversation) -> Answer:
        asked = next((m.content for m in reversed(conversation) if m.role == "user"), "")
        for pattern, answer in self._script.items():
            if re.search(pattern[3:], asked) if pattern.startswith("re:") else pattern in asked:
                return answer
        return self._default


def tiny(*, seed: int = 0, template: bool = True) -> LocalModel:
    """A random llama of two layers with a byte tokenizer in ChatML, as `smollm2` is but a thousand times smaller.

    Without `template` it stands for a base model. The same seed gives the same weights. It reads 4096 bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fiducial.models.local import LocalModel
    from fiducial.models.tiny import tiny as random_model

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe"]
    # two merges are enough for tokens to depend on their neighbours
    merges = [("h", "e"), ("Ġ", "he")]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], bos_token=special[1], eos_token=special[2])
    if template:
        tokenizer.chat_template = CHATML
    return LocalModel(random_model("llama", seed=seed, vocab=len(pieces), max_position_embeddings=4096), tokenizer, uri="tiny")


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Chat template of the tiny model: no system turn unless one is given."""


def _check(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise DataError(f"'{pattern}' is no regular expression: {error}", hint="leave out re: to look for the plain text") from error


def _plain(answer: Answer) -> Any:
    if callable(answer):
        return getattr(answer, "__qualname__", type(answer).__name__)
    if isinstance(answer, str | Completion):
        return answer if isinstance(answer, str) else answer.id
    return [_plain(part) for part in answer]


def _entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, entry) for every entry of the file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = enumerate(text.splitlines(), start=1)
            return [(f"{path}:{number}", json.loads(line)) for number, line in lines if line.strip()]
        rows = parse_yaml(text, str(path))[0] or []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="give a YAML or JSON Lines file") from error
    except ConfigError as error:
        raise DataError(error.message, hint=error.hint) from error
    except ValueError as error:
        raise DataError(f"{path} is no script: {' '.join(str(error).split())}", hint="give a mapping of pattern to answer, or a list of entries") from error
    if isinstance(rows, dict):
        rows = [{"when": when, "answer": answer} for when, answer in rows.items()]
    if not isinstance(rows, list):
        raise DataError(f"{path} is no script", hint="give a mapping of pattern to answer, or a list of entries")
    return [(f"{path}: entry {number}", row) for number, row in enumerate(rows, start=1)]


def _entry(where: str, entry: Any) -> tuple[str, Answer]:
    if not isinstance(entry, dict) or not isinstance(entry.get("when"), str) or set(entry) - KEYS:
        raise DataError(f"{where}: an entry has the keys when, answer and optionally finish and error", hint='{"when": "hello", "answer": "hi"}')
    answers, finish, error = entry.get("answer", ""), entry.get("finish", "stop"), entry.get("error", "")
    texts = answers if isinstance(answers, list) else [answers]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: 'answer' is a text or a list of texts, got {answers!r}", hint="quote numbers and yes/no")
    if finish not in ("stop", "length", "filtered", "error"):
        raise DataError(f"{where}: unknown finish '{finish}'", hint="stop, length, filtered or error")
    if finish == "stop" and not error:
        return entry["when"], texts
    return entry["when"], [Completion(text=text, finish="error" if error else finish, error=error) for text in texts]
