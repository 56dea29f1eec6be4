"""Set up before torch is imported: quiet threads, no network, a folder of its own for runs."""

import os
from pathlib import Path

# Several tests run at once, each on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The shared data that stands beside a checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("shared data is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _own_runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_RUNS", str(tmp_path_factory.mktemp("runs")))
