"""A model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted service.

Requests run side by side in one background thread; refusals by load (429, 5xx, timeouts) are tried again with growing pauses.
A request that fails for good becomes a completion that says so. An endpoint that cannot answer at all becomes an EndpointError;
what came before is kept on disk, so that the same call goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from fiducial.core.errors import ConfigError, EndpointError, MissingExtraError, ModelError
from fiducial.core.records import Completion, Conversation, digest
from fiducial.models.answers import Answers
from fiducial.models.background import Background
from fiducial.models.base import Arrived, Model
from fiducial.models.embedded import cache_root

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
FIRST = 5
"""When as many requests have failed and none has succeeded, the endpoint is at fault and not the requests."""
LAST = 20
"""So many failures in a row after earlier successes mean that the endpoint has gone; as many requests at fault before any, that all of them will be."""
CONNECT = 10.0
"""Seconds for a server to take a connection; less where the timeout is."""
FINISH: dict[str, Literal["stop", "length", "filtered"]] = {"length": "length", "content_filter": "filtered"}
"""The server's reasons to end; every other one is a stop."""
REQUEST_AT_FAULT = (400, 413, 422)
"""Statuses that blame one request, for example a prompt beyond the context, and say nothing about the endpoint."""


@dataclass(slots=True)
class Usage:
    """What a remote model has cost so far."""

    requests: int = 0
    """Answered requests; those tried again count once."""
    failed: int = 0
    cached: int = 0
    """Completions taken from disk."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """How one call samples."""

    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int


class RemoteModel(Model):
    """Samples through chat completions.

    `api_key` defaults to OPENAI_API_KEY. `timeout` is in seconds, per try; a warning says when nothing came. `prefill` says that the server continues a last
    assistant turn (`continue_final_message` of vLLM and SGLang); without it such conversations are answered by `error`.
    `logprobs` asks for log-probabilities. `cache` keeps answers on disk (True: in the cache folder; a path: there; False: not).
    `body` holds further fields of every request; None leaves a field out that would be sent. Raises MissingExtraError without the openai package.
    """

    def __init__(
        self,
        name: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        prefill: bool = False,
        logprobs: bool = False,
        cache: bool | Path = True,
        body: dict[str, Any] | None = None,
    ) -> None:
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        self.address = _address(self.base_url)
        """The base URL without name and password, for messages and fingerprints."""
        if urlsplit(self.base_url).scheme not in ("http", "https") or not urlsplit(self.base_url).hostname:
            raise ConfigError(f"'{self.address}' is no address of a server", hint="for example http://localhost:8000/v1")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ConfigError(f"concurrency {concurrency}, timeout {timeout}, retries {retries}", hint="at least 1, above 0, and at least 0")
        self.name = name
        self.uri = f"openai+prefill:{name}" if prefill else f"openai:{name}"
        self.fingerprint = f"{name}@{self.address}"
        self.prefill, self.logprobs, self.body = prefill, logprobs, dict(body or {})
        self.usage = Usage()
        self._timeout, self._retries = timeout, retries
        self._connect = partial(_client, self.base_url, api_key, timeout, retries, self._late)
        self._client = self._connect()
        self._heard = self._told = -math.inf
        """When the server last answered, and when it was last said that it does not: seconds of the monotonic clock."""
        self._cache = cache_root() / "answers.sqlite" if cache is True else cache or None
        self._concurrency = concurrency
        self._many = True
        """Whether the server gives several answers to one request, as far as is known."""
        self._in_row = 0
        self._thread: Background | None = None

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
        """`k` completions per conversation; at temperature 0 one request serves all k. Raises EndpointError."""
        if k < 1 or max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ConfigError(f"k {k}, max_tokens {max_tokens}, temperature {temperature}, top_p {top_p}", hint="at least 1, 1 and 0; top_p in (0, 1]")
        settings = Settings(max_tokens, temperature, top_p, tuple(stop), seed)
        if self._thread is None:
            self._thread = Background()
        done: dict[int, tuple[Completion, ...]] = {}
        # results come back through a queue so that `arrived` runs in the caller's thread
        with closing(self._thread.results(lambda out: self._all(conversations, k, settings, out))) as results:
            for index, completions in results:
                done[index] = completions
                if arrived:
                    arrived(index, completions)
        return [done[i] for i in range(len(conversations))]

    def close(self) -> None:
        """Closes connections and ends the background thread."""
        if self._thread is not None:
            self._thread.end(self._client.close())
            self._thread = None
            self._client = self._connect()

    async def _all(self, conversations: Sequence[Conversation], k: int, settings: Settings, out: queue.SimpleQueue[Any]) -> None:
        """Every conversation, `concurrency` requests at a time."""
        answers = Answers(self._cache) if self._cache else None
        slots = asyncio.Semaphore(self._concurrency)
        waiting = iter(enumerate(conversations))

        async def work() -> None:
            for index, conversation in waiting:
                out.put((index, await self._group(conversation, k, settings, answers, slots)))

        workers = [asyncio.create_task(work()) for _ in range(min(self._concurrency, len(conversations)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            if answers:
                answers.close()

    async def _group(self, conversation: Conversation, k: int, settings: Settings, answers: Answers | None, slots: asyncio.Semaphore) -> tuple[Completion, ...]:
        """The k completions of one conversation: from disk, then by as few requests as the server allows."""
        if reason := self.unsendable(conversation):
            return (Completion(text="", finish="error", error=reason),) * k
        wanted = 1 if settings.temperature == 0 else k
        keys = [self._key(conversation, settings, i) for i in range(wanted)]
        found = {i: kept for i, key in enumerate(keys) if answers and (kept := answers.get(key))}
        self.usage.cached += len(found)
        missing = [i for i in range(wanted) if i not in found]
        many = self._many
        while missing:
            size = len(missing) if many else 1
            parts = [missing[i : i + size] for i in range(0, len(missing), size)]
            for part, got in zip(parts, await asyncio.gather(*(self._ask(conversation, part, settings, slots) for part in parts)), strict=True):
                found |= dict(zip(part, got, strict=False))
                for i in part[: len(got)]:
                    if answers and found[i].finish != "error":
                        answers.put(keys[i], found[i])
            missing = [i for i in missing if i not in found]
            many = many and not missing
        self._many = self._many and (many or all(c.finish == "error" for c in found.values()))
        group = tuple(found[i] for i in range(wanted))
        return group if len(group) == k else group * k

    async def _ask(self, conversation: Conversation, indices: list[int], settings: Settings, slots: asyncio.Semaphore) -> list[Completion]:
        """One request for these samples; at least one completion, fewer than asked for where the server ignores `n`."""
        import openai

        try:
            async with slots:
                raw = await self._client.chat.completions.with_raw_response.create(**self._request(conversation, indices, settings))
            completions = self._read(raw.http_response.json(), len(indices), settings.stop)
        except openai.APIStatusError as error:
            if error.code == "content_filter":  # Azure refuses a prompt so
                self.usage.requests += 1
                self._in_row = 0
                return [Completion(text="", finish="filtered")] * len(indices)
            if error.status_code in REQUEST_AT_FAULT and len(indices) > 1:
                return []  # perhaps because of `n`: the caller asks for one at a time
            return self._failed(f"status {error.status_code}: {_short(error.message)}", len(indices), status=error.status_code, code=error.code)
        except openai.APITimeoutError as error:
            return self._failed(_waited(error.__cause__, self._timeout), len(indices), late=True)
        except openai.APIConnectionError as error:
            return self._failed(f"no connection: {_short(str(error.__cause__ or error))}", len(indices), refused=True)
        except openai.OpenAIError as error:
            return self._failed(_short(str(error)), len(indices))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            return self._failed(f"the answer is not a chat completion: {_short(str(error))}", len(indices))
        self._in_row = 0
        self._heard = time.monotonic()
        return completions

    def _late(self, tried: int, why: str) -> None:
        """Says that try number `tried`, from 0, ran out of time: once for all requests, and not while others are answered."""
        now = time.monotonic()
        if tried < self._retries and now - max(self._heard, self._told) >= self._timeout:
            self._told = now
            log.warning("%s: %s, trying again (%d of %d)", self.address, why, tried + 1, self._retries)

    def unsendable(self, conversation: Conversation) -> str:
        """For a last turn of the assistant, which not every server continues, and for text that is not Unicode."""
        if conversation and conversation[-1].role == "assistant" and not self.prefill:
            return "the conversation ends with the assistant's turn, and whether this server continues it is not known (if so, name it openai+prefill:NAME)"
        try:
            "".join(m.content for m in conversation).encode()
        except UnicodeEncodeError as error:
            return f"the text is not Unicode: {error.reason} at character {error.start} (replace lone surrogates)"
        return ""

    def _request(self, conversation: Conversation, indices: list[int], settings: Settings) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": m.role, "content": m.content} for m in conversation],
            # the only field on which OpenAI and the servers that follow it have parted
            ("max_completion_tokens" if self.base_url == OPENAI else "max_tokens"): settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            # spread out, so that sample 1 of seed 0 is not sample 0 of seed 1
            "seed": int(digest([settings.seed, indices[0]])[:7], 16),
        }
        if len(indices) > 1:
            fields["n"] = len(indices)
        if settings.stop:
            fields["stop"] = list(settings.stop)
        if self.logprobs:
            fields["logprobs"] = True
        fields = {name: value for name, value in fields.items() if self.body.get(name, "") is not None}
        extra = {name: value for name, value in self.body.items() if value is not None}
        if conversation and conversation[-1].role == "assistant":
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        return fields | ({"extra_body": extra} if extra else {})

    def _read(self, answer: dict[str, Any], asked: int, stop: tuple[str, ...]) -> list[Completion]:
        """Completions of one response. Raises KeyError and the like for anything that is not one."""
        choices = answer["choices"][:asked]
        usage = answer.get("usage") or {}
        prompt, total = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        if not choices:
            raise ValueError("no choices")
        completions = [_completion(c, stop, prompt, total // len(choices) + (i < total % len(choices))) for i, c in enumerate(choices)]
        self.usage.requests += 1
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += sum(c.completion_tokens for c in completions)
        return completions

    def _failed(self, why: str, n: int, *, status: int = 0, code: str | None = None, refused: bool = False, late: bool = False) -> list[Completion]:
        """A failure as completions; as EndpointError where it is not this request's."""
        self.usage.failed += 1
        why = why.replace(self.base_url, self.address)
        if status not in REQUEST_AT_FAULT:
            self._in_row += 1
        fresh = self.usage.requests == 0
        hint = ""
        if fresh and refused:
            hint = "start the server, or correct the base URL"
        elif fresh and status in (401, 403):
            hint = "set OPENAI_API_KEY to a key that may use this model"
        elif fresh and (status == 404 or code == "model_not_found"):
            hint = f"check the model name '{self.name}' against {self.address}/models; most base URLs end in /v1"
        elif self._in_row >= (FIRST if fresh else LAST):
            mend = "look at the server's log, or give it longer with timeout" if late else "look at the server's log"
            hint = f"{mend}; what was answered is kept, so repeating the command goes on from here"
            why = f"{self._in_row} requests in a row failed, the last with: {why}"
        elif fresh and not self.usage.cached and self.usage.failed >= LAST:
            hint = 'what does this endpoint refuse? body={"FIELD": None} leaves a field out, body={"FIELD": value} adds one'
            why = f"{self.usage.failed} requests failed and none succeeded, the last with: {why}"
        if hint:
            raise EndpointError(f"{self.address}: {why}", hint=hint)
        return [Completion(text="", finish="error", error=f"{self.address}: {why}")] * n

    def _key(self, conversation: Conversation, settings: Settings, index: int) -> str:
        """Everything the answer depends on, and the number of the sample."""
        messages = [[m.role, m.content] for m in conversation]
        how = [settings.max_tokens, settings.temperature, settings.top_p, list(settings.stop), settings.seed, self.logprobs, self.body]
        return digest([self.address, self.name, messages, how, index])


def _client(base_url: str, api_key: str | None, timeout: float, retries: int, late: Callable[[int, str], None]) -> AsyncOpenAI:
    """What sends requests. `late` is told of every try that ran out of time: its number, from 0, and what was waited for."""
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError("openai", "remote") from error
    key = api_key or os.environ.get("OPENAI_API_KEY")
    if not key and base_url == OPENAI:
        raise ModelError("there is no key for the OpenAI service", hint="set OPENAI_API_KEY, or give the base URL of another server")

    class Telling(openai.DefaultAsyncHttpxClient):  # type: ignore[misc]
        async def send(self, request: Any, **how: Any) -> Any:
            try:
                return await super().send(request, **how)
            except Exception as error:  # told and passed on, whatever it is
                if why := _waited(error, timeout):
                    late(int(request.headers.get("x-stainless-retry-count", 0)), why)
                raise

    limit = openai.Timeout(timeout, connect=min(timeout, CONNECT))
    return openai.AsyncOpenAI(base_url=base_url, api_key=key or "none", timeout=limit, max_retries=retries, http_client=Telling(timeout=limit))


def _waited(error: BaseException | None, timeout: float) -> str:
    """What a try that ran out of time waited for; empty for any other error. By names, since openai is built on httpx or, newer, on httpx2."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if "ConnectTimeout" in names:
        return f"no connection within {min(timeout, CONNECT):g} seconds"
    return f"no answer within {timeout:g} seconds" if "TimeoutException" in names else ""


def _address(url: str) -> str:
    """The URL without name and password."""
    scheme, slashes, rest = url.partition("//") if "//" in url else ("", "", url)
    place, slash, path = rest.partition("/")
    return scheme + slashes + place.rpartition("@")[2] + slash + path


def _completion(choice: dict[str, Any], stop: tuple[str, ...], prompt: int, tokens: int) -> Completion:
    message = choice["message"]
    # OpenAI puts some refusals into a field of their own
    text = message.get("content") or message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError("the content is not a text")
    for mark in stop:
        text = text.partition(mark)[0]
    given = (choice.get("logprobs") or {}).get("content") or ()
    return Completion(
        text=text,
        finish=FINISH.get(choice.get("finish_reason") or "", "stop"),
        logprobs=tuple(float(token["logprob"]) for token in given),
        prompt_tokens=prompt,
        completion_tokens=len(given) or tokens,
    )


def _short(text: str) -> str:
    """One line of at most 200 characters: servers answer errors with whole pages."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
