"""Which part may import which: areas stand alone, what they share lies below them, and nothing heavy is loaded to list or to read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fiducial
from fiducial.core.registry import AREAS

ROOT = Path(fiducial.__file__).parent
BELOW = {
    "core": {"core"},
    "models": {"core", "models", "data"},
    "data": {"core", "models", "data"},
    "training": {"core", "models", "data", "training"},
} | {area: {"core", "models", "data", "training", area} for area in AREAS}
"""For each part, the parts that it may import."""
HEAVY = ("torch", "transformers", "numpy", "scipy", "sklearn", "peft", "accelerate", "datasets", "trl", "openai")
TYPING_ONLY = {("core", "models"), ("core", "training")}
"""Allowed below `if TYPE_CHECKING:` alone: the roles name the types of what they take."""


def imported(path):
    """(part of fiducial, line, only for type checking) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {id(n) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test) for n in ast.walk(block)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ("fiducial", *path.relative_to(ROOT).parts[:-1])
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fiducial" else [module]
        for name in names:
            if name.startswith("fiducial."):
                yield name.split(".")[1], node.lineno, id(node) in typing


def faults(path, part):
    for target, line, typing in imported(path):
        if (ROOT / target).is_dir() and target not in BELOW[part] and not (typing and (part, target) in TYPING_ONLY):
            yield f"{path.relative_to(ROOT.parent)}:{line} imports fiducial.{target}"


@pytest.mark.parametrize("part", BELOW)
def test_a_part_imports_only_what_lies_below_it(part):
    found = [fault for path in sorted((ROOT / part).rglob("*.py")) for fault in faults(path, part)]
    assert not found, "\n".join(found)


def test_the_rule_would_notice_an_import_between_areas(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for part in ("attack", "guard", "app", "core"):
        (tmp_path / part).mkdir()
    path = tmp_path / "attack" / "x.py"
    path.write_text(
        "import fiducial.app.cli\nfrom fiducial.guard.y import Z\nfrom ..guard import y\nfrom fiducial import guard, app\nfrom fiducial.core import run\n"
    )
    assert [fault.split(" ")[-1].removeprefix("fiducial.") for fault in faults(path, "attack")] == ["app", "guard", "guard", "guard", "app"]


def modules(part):
    return [f"fiducial.{part}.{p.stem}" for p in sorted((ROOT / part).glob("*.py")) if p.stem != "__init__"]


@pytest.mark.parametrize(
    "statement",
    [
        "import fiducial; dir(fiducial)",
        "import " + ", ".join(modules("core")),
        "import " + ", ".join(modules("data")),
        "import fiducial.models.base",
        "from fiducial.core.registry import methods; methods()",
    ],
    ids=["fiducial", "core", "data", "models.base", "listing methods"],
)
def test_nothing_heavy_is_imported(statement):
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_every_exported_name_can_be_imported():
    for name in fiducial.__all__:
        if name == "open":  # loads the machinery of models
            continue
        assert getattr(fiducial, name) is not None
