"""Which model a command looks at, and how it is reached: one definition for flags, keys and recipes. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

REMOTE = ("base_url", "timeout", "retries", "concurrency")
"""Options that only a model behind a server has."""
OPENING = ("dtype", "device", *REMOTE)
"""Options that say how a model is opened, whichever it is."""


class ModelOptions(BaseModel):
    """A model that may be behind a server."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = "smollm2"
    """The model to look at."""
    base_url: str | None = None
    """Address of an OpenAI-compatible server, for models named `openai:NAME`."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds that the server has for one answer, per try; 60 where nothing is said."""
    retries: int | None = Field(default=None, ge=0)
    """How often a request without an answer is tried again; 3 where nothing is said."""
    concurrency: int | None = Field(default=None, ge=1)
    """Requests side by side; 8 where nothing is said."""


def opening(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was said of how the model is opened, as `models.open` takes it."""
    return {name: values[name] for name in OPENING if values.get(name) is not None}
