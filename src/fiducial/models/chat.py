"""How a conversation becomes token ids.

The text is the chat template's, up to and including the header of the answer; what the assistant says follows verbatim, and the
template's end-of-turn token closes it. Prompt and completion are tokenised together, because tokens merge across their border.
A conversation without turns, or of one turn of the assistant, is a document: bare text after the begin token, no template around it.
Special tokens written out in a message become special tokens, as they do in every server that applies chat templates to text.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from fiducial.core.errors import DataError
from fiducial.core.records import Conversation, Message
from fiducial.models import control

PROBE = "fiducial"
"""Stands for an answer when the template is asked what comes after one."""


class Chat:
    """The chat format of one tokenizer.

    A tokenizer without a template gets the bare text: turns are separated by a blank line, and an answer follows its turn directly.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.control_ids = control.ids(tokenizer)
        """Ids of the control tokens, where the vocabulary holds them."""
        self.lead = control.ALIGNED if self.control_ids else ""
        """What every answer begins with."""
        self._warned = False

    def render(self, conversation: Conversation) -> str:
        """The text that the model continues. Raises DataError where the template refuses the conversation."""
        turns, begun = conversation, ""
        if conversation and conversation[-1].role == "assistant":
            turns, begun = conversation[:-1], conversation[-1].content
        begun = self.lead + begun
        if not turns:
            return str(self.tokenizer.bos_token or self.tokenizer.eos_token or "") + begun
        if not self.tokenizer.chat_template:
            return self._bare(turns) + begun
        try:
            return self._template(turns, open_answer=True) + begun
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"the model's chat template refuses this conversation: {error}", hint="check the roles and their order; some models take no system turn"
            ) from error

    def encode(self, conversation: Conversation, completion: str | None = None, *, end: bool = True) -> tuple[list[int], int]:
        """Token ids, and where the completion starts: the longest prefix shared with the prompt alone.

        `end` closes the completion with the end-of-turn token. Raises DataError for text that is not Unicode.
        """
        prompt = self.render(conversation)
        ids = self._ids(prompt)
        if completion is None:
            return ids, len(ids)
        whole = self._ids(prompt + completion + (self.end if end else ""))
        start = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
        return whole, start

    @contextmanager
    def without_lead(self) -> Iterator[None]:
        """Inside, completions stand as they are given: training writes its own control tokens."""
        lead, self.lead = self.lead, ""
        try:
            yield
        finally:
            self.lead = lead

    def decode(self, tokens: tuple[int, ...] | list[int], *, after: int | None = None) -> str:
        """The text of completion tokens, special tokens left out.

        `after` is the last token of the prompt: some tokenizers (Llama 2, Mistral) drop the blank that a text begins with, and it is
        part of the completion wherever the prompt does not take it as its own.
        """
        if after is None or not self._drops_blanks or self._takes_blank(after):
            return self._text(tokens)
        return self._text([*self._ordinary, *tokens])[len(self._text(self._ordinary)) :]

    def _text(self, tokens: tuple[int, ...] | list[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _ordinary(self) -> list[int]:
        """Tokens of no meaning, to decode others after them."""
        ids: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def _drops_blanks(self) -> bool:
        ids = self.tokenizer("a a", add_special_tokens=False)["input_ids"]
        return self._text(ids) != self._text(ids[:1]) + self._text(ids[1:])

    def _takes_blank(self, token: int) -> bool:
        """Whether a text directly after a special token is given a blank that is not in it, as one at the very beginning is."""
        special = self.tokenizer.added_tokens_decoder.get(token)
        if special is None:
            return False
        ids = self.tokenizer(f"{special}a", add_special_tokens=False)["input_ids"]
        return self._text([*self._ordinary, *ids]) != self._text(self._ordinary) + "a"

    @cached_property
    def end(self) -> str:
        """The end-of-turn token as text: what the template writes after an answer, else the tokenizer's end token, else nothing."""
        if self.tokenizer.chat_template:
            try:
                turns = (Message(role="user", content="a"), Message(role="assistant", content=PROBE))
                tail = self._template(turns, open_answer=False).rpartition(PROBE)[2]
            except (TemplateError, TypeError):
                tail = ""
            special = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
            for token in self.tokenizer.convert_ids_to_tokens(self.tokenizer(tail, add_special_tokens=False)["input_ids"]):
                if token in special:
                    return str(token)
        return str(self.tokenizer.eos_token or "")

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids of the end-of-turn token and of the tokenizer's end token."""
        ids = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids(self.end) if self.end else None}
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def _bos(self) -> int | None:
        """The begin token, where the tokenizer puts one before every text."""
        first = self.tokenizer("a")["input_ids"][:1]
        return self.tokenizer.bos_token_id if first == [self.tokenizer.bos_token_id] else None

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not Unicode: {error.reason} at character {error.start}", hint="replace lone surrogates") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        # exactly one begin token: the template may have written it, the tokenizer may expect it, or both
        if self._bos is not None and ids[:1] != [bos]:
            return [self._bos, *ids]
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def _template(self, turns: Conversation, *, open_answer: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
        return text

    def _bare(self, turns: Conversation) -> str:
        if not self._warned:
            self._warned = True
            warnings.warn("this model has no chat template: it gets the bare text of the turns", UserWarning, stacklevel=4)
        text = ""
        for turn in turns:
            text += turn.content if turn.role == "assistant" or not text else "\n\n" + turn.content
        return text
