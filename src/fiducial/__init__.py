"""fiducial: find the weaknesses of a language model, repair them, prove the repair, gate, and report.

Importing this loads neither torch nor transformers; `open` does, when it is called.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# Set before torch is imported anywhere: how long an OpenMP thread looks for work before it sleeps. GNU's own 300,000 turns make two threads
# on two busy cores up to 30 times slower than one; with none at all, waking up takes longer than most operations between the products.
# Telemetry of libraries below us stays off in a safety workbench.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"

_EXPORTS = {
    "open": "fiducial.models.open",
    "Model": "fiducial.models.base",
    "WhiteBox": "fiducial.models.base",
    "Attempt": "fiducial.core.records",
    "Completion": "fiducial.core.records",
    "Group": "fiducial.core.records",
    "Message": "fiducial.core.records",
    "Prompt": "fiducial.core.records",
    "Verdict": "fiducial.core.records",
    "user": "fiducial.core.records",
    "Rate": "fiducial.core.intervals",
    "FiducialError": "fiducial.core.errors",
}
__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fiducial' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
