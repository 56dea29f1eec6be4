"""Set up before torch is imported: quiet threads, no network, a folder of its own for runs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

# Several tests run at once, each on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

NURSERY = Path(__file__).with_name("nursery.py")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PEERS = ("trl", "datasets", "lm_eval", "lm_eval.models.huggingface")
"""What tests compare with where it is installed."""
REQUIRED = ("CI", "FIDUCIAL_REQUIRE_PEERS")
"""Variables of which one that is set makes a peer that cannot be imported an error."""


def pytest_sessionstart(session):
    """A peer that is broken or missing is no reason to skip where peers are required."""
    if any(map(os.environ.get, REQUIRED)):
        for name in PEERS:
            importlib.import_module(name)


@pytest.fixture
def two_cores():
    """What divides its work among threads does so, whatever the machine has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shared_data() -> Path:
    """The shared data that stands beside a checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("shared data is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _own_runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_RUNS", str(tmp_path_factory.mktemp("runs")))


class Nursery:
    """A process that has imported some modules and forks a child for each job; see nursery.py."""

    def __init__(self, log, names):
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w") as errors:
            command = [sys.executable, str(NURSERY), *map(str, names)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert self._answer() == "ready"

    def run(self, call, *args, **job):
        """How a child ended that called the function, a signal as its negative number; and what the function returned, None if it did not."""
        self.process.stdin.write(json.dumps({"call": str(call), "with": [str(a) for a in args]} | job) + "\n")
        self.process.stdin.flush()
        value = None
        while "status" not in (answer := self._answer()):
            value = answer["value"]
        return answer["status"], value

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-5000:]
        return json.loads(line)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Gives a nursery that has imported these files and modules; one for all tests that ask for the same."""
    begun = {}

    def made(*names):
        if names not in begun:
            begun[names] = Nursery(tmp_path_factory.mktemp("nursery") / "errors.txt", names)
        return begun[names]

    yield made
    for each in begun.values():
        each.close()
