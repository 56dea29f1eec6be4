"""What tests compare with is there where it has to be, and a broken one is never a reason to skip."""

import ast
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SPEC = spec_from_file_location("peers_of_tests", TESTS / "conftest.py")
CONFTEST = module_from_spec(SPEC)
SPEC.loader.exec_module(CONFTEST)


def skipped_without():
    """Names of modules that some test is skipped without."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                yield ast.literal_eval(node.args[0])


def test_every_module_that_a_test_is_skipped_without_is_a_peer():
    assert set(skipped_without()) == set(CONFTEST.PEERS)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The only peer, which needs something that is not there; and nothing is required."""
    (tmp_path / "broken_peer.py").write_text("import a_dependency_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(CONFTEST, "PEERS", ("broken_peer",))
    for name in CONFTEST.REQUIRED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", CONFTEST.REQUIRED)
def test_a_broken_peer_ends_the_session_before_it_begins_where_peers_are_required(broken, monkeypatch, name):
    CONFTEST.pytest_sessionstart(None)
    monkeypatch.setenv(name, "1")
    with pytest.raises(ImportError, match="a_dependency_that_is_missing"):
        CONFTEST.pytest_sessionstart(None)


def test_continuous_integration_requires_them():
    assert "export FIDUCIAL_REQUIRE_PEERS=1" in (TESTS.parent / ".ci" / "run").read_text(encoding="utf-8")
