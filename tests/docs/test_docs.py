"""What the documents say, tried: commands, keys, links, names, examples, figures, and the two READMEs side by side."""

import ast
import importlib
import re
import shlex
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

import fiducial
from fiducial.app.cli.jobs import FLAGS, OptionsCommand, _split
from fiducial.app.cli.main import cli
from fiducial.app.cli.output import Output
from fiducial.core import registry
from fiducial.core.config import resolve

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
PAGES = [ROOT / name for name in (*READMES, "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
GENERATED = ROOT / "docs" / "reference" / "methods.md"
WRITE = ROOT / "docs" / "guides" / "write-a-method.md"
EXAMPLE = "attack/disemvowel"
"""The method that the guide has the reader write."""
GRAMMAR = {"fiducial AREA METHOD", "fiducial AREA METHOD [MODEL]", "fiducial AREA METHOD --help", "fiducial explain METHOD", "fiducial"}
"""Forms of a command, which are no commands."""
FORBIDDEN = re.compile(r"/work/|/home/|/Users/|/tmp/|\bshared/|TODO|FIXME|[Pp]laceholder|[Cc]oming soon|\bXXX\b")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language=None):
    """Bodies of fenced blocks; of those without a language when `language` is the empty string, of all when it is None."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)
    return [body for name, body in found if language in (None, name)]


def prose(page):
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)


def commands(page):
    """Every `fiducial ...` of a page: lines of blocks, and spans in the text."""
    lines = [line.strip().removeprefix("$ ") for block in blocks(page, "") for line in block.splitlines()]
    spans = re.findall(r"`(fiducial[^`\n]*)`", prose(page))
    found = [line for line in [*lines, *spans] if re.match(r"fiducial( |$)", line)]
    return [c for c in dict.fromkeys(found) if c not in GRAMMAR]


def parse(words, command=cli, parent=None):
    """Parses a command line as the program does, without running it. Raises what the program would report."""
    with command.make_context("fiducial", list(words), parent=parent, obj=Output(), resilient_parsing=False) as context:
        if isinstance(command, click.Group):
            _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            return parse(rest, inner, context)
        if isinstance(command, OptionsCommand):
            model = importlib.import_module(command._model_path.split(":")[0])
            uri, overrides = _split(context.params["words"])
            flags = {flag: context.params[flag] for flag in FLAGS if flag in context.params} | {"model": uri}
            resolve(getattr(model, command._model_path.split(":")[1]), None, overrides, flags)
        return context.command


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The method of the guide, installed as a package of a third party would be."""
    code, test = [b for b in blocks(WRITE, "python") if "Disemvowel" in b]
    file = tmp_path / "mymethods" / "attack" / "disemvowel.py"
    file.parent.mkdir(parents=True)
    file.write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(name="mymethods", value="mymethods")])
    yield test.replace("fiducial.attack.disemvowel", "mymethods.attack.disemvowel")
    for name in [n for n in sys.modules if n.startswith("mymethods")]:
        del sys.modules[name]


ALL = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{p.name}: {c}" for p, c in ALL])
def test_a_command_in_the_documents_is_understood(page, command, written):
    words = shlex.split(command, comments=True)[1:]
    if words == ["--version"]:
        assert CliRunner().invoke(cli, words).exit_code == 0
        return
    parse([word for word in words if word != "--help"])


def test_the_check_of_commands_notices_what_is_wrong(written):
    for wrong in ("loop smollm2 gate=1", "check limits=3", "attack personna", "attack persona --limits 3", "frobnicate", "loop train.epoch=3", "log shw"):
        with pytest.raises((click.UsageError, fiducial.FiducialError)):
            parse(shlex.split(wrong))


def test_every_command_and_every_area_is_shown_somewhere():
    shown = {shlex.split(c, comments=True)[1] for _, c in ALL}
    assert set(cli.known()) - shown == set()


@pages
def test_every_relative_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pages
def test_every_method_named_exists(page):
    known = set(registry.methods()) | ({EXAMPLE} if page == WRITE else set())
    areas = "|".join(registry.AREAS)
    # a name ends where a word ends; paths such as attack/base.py and stages are no methods
    for name in re.findall(rf"(?<![\w/.])((?:{areas})/[a-z0-9_]+)(?![\w./])", text(page).replace("\\_", "_")):
        assert name in known, name


@pages
def test_nothing_in_it_is_of_one_machine_or_unfinished(page):
    assert FORBIDDEN.findall(text(page)) == []


@pages
def test_make_targets_named_exist(page):
    targets = set(re.findall(r"^([a-z]+):", text(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text(page), re.MULTILINE)) <= targets


@pages
def test_its_lines_keep_to_the_width(page):
    if page != GENERATED:
        long = [line for line in text(page).splitlines() if len(line) > 160 and "|" not in line and "](" not in line]
        assert long == []


def test_the_readme_has_fewer_than_600_words():
    assert len(text(ROOT / "README.md").split()) < 600


def test_both_readmes_show_the_same_commands_links_and_tree():
    english, chinese = (ROOT / name for name in READMES)
    assert commands(english) == commands(chinese)
    assert [line for b in blocks(english)[:2] for line in b.splitlines()] == [line for b in blocks(chinese)[:2] for line in b.splitlines()]
    folders = [re.findall(r"^ *(\S+/) ", blocks(page)[-1], re.MULTILINE) for page in (english, chinese)]
    assert folders[0] == folders[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", text(page))) for page in (english, chinese)]
    assert links[0] - {"README.zh-CN.md"} <= links[1]


def test_the_tree_in_the_readme_is_the_tree():
    shown = re.findall(r"^  (\w+)/ ", blocks(ROOT / "README.md")[-1], re.MULTILINE)
    real = {p.name for p in (ROOT / "src" / "fiducial").iterdir() if (p / "__init__.py").exists()}
    assert set(shown) == real


@pytest.mark.parametrize("name", READMES)
def test_measured_figures_in_a_readme_stand_in_the_results(name):
    results = " ".join(text(p) for p in (ROOT / "bench" / "results").rglob("*.md")).replace(" %", "%")
    for figure in re.findall(r"\d+(?:\.\d+)? ?%|\d+(?:\.\d+)? ?(?:×|times\b)", text(ROOT / name)):
        assert figure.replace(" %", "%") in results, figure


def test_the_reference_is_up_to_date():
    assert text(GENERATED) == _reference().page(), "run python scripts/reference.py"


def test_the_reference_names_every_option_of_every_method():
    page = text(GENERATED)
    for card in _reference().cards():
        part = page.split(f"### {card.name}\n")[1].split("\n### ")[0]
        assert all(f"`{option.flag}`" in part for option in card.options)
        assert card.title in part


def test_the_architecture_names_the_areas_and_roles_that_have_no_method():
    line = re.search(r"Areas without a method: (.*?)\. Roles without a method: (.*?)\.", text(ROOT / "docs" / "architecture.md"))
    cards = _reference().cards()
    assert set(line[1].split(", ")) == set(registry.AREAS) - {c.area for c in cards}
    assert set(line[2].split(", ")) == set(registry.ROLES) - {c.role for c in cards}


PYTHON = [(page, body) for page in PAGES for body in blocks(page, "python")]


@pytest.mark.parametrize(("page", "body"), PYTHON, ids=[p.name for p, _ in PYTHON])
def test_python_examples_compile_and_name_what_exists(page, body):
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fiducial.") and "disemvowel" not in node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fiducial":
            assert node.attr in fiducial.__all__


def test_the_example_of_the_check_guide_runs():
    (body,) = blocks(ROOT / "docs" / "guides" / "check-your-model.md", "python")
    exec(compile(body.replace('"smollm2"', '"tiny"'), "check-your-model.md", "exec"), {})


def test_the_method_of_the_guide_has_a_card_and_passes_its_own_tests(written, tmp_path):
    card = registry.card(EXAMPLE)
    assert card.role == "Attack"
    assert set(registry.HEADINGS) - set(card.headings) == {"Formula"}
    assert all(option.help for option in card.options)
    space = {}
    exec(compile(written, "write-a-method.md", "exec"), space)
    tests = [value for name, value in space.items() if name.startswith("test_")]
    assert len(tests) >= 4
    for test in tests:
        test()


def test_the_method_of_the_guide_attacks(written):
    from fiducial.data.load import prompts
    from fiducial.models.scripted import ScriptedModel

    attempts = registry.create(EXAMPLE).run(ScriptedModel(default="No."), prompts("shipped"))
    assert {a.attack for a in attempts} == {EXAMPLE}
    assert all(a.response == "No." for a in attempts if a.prompt.language == "en")
    assert all(a.finish == "error" for a in attempts if a.prompt.language == "zh")


YAML = [(page, body) for page in PAGES for body in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "body"), YAML, ids=[p.name for p, _ in YAML])
def test_yaml_examples_are_read(page, body, tmp_path):
    from fiducial.models.scripted import ScriptedModel

    file = tmp_path / "example.yaml"
    file.write_text(body, encoding="utf-8")
    if "when:" in body:
        assert ScriptedModel.read(file).uri == f"scripted:{file}"
        return
    command = ["run", file] if "steps:" in body else ["loop", "--recipe", file]
    result = CliRunner().invoke(cli, [*map(str, command), "--show-config"])
    assert result.exit_code == 0, result.stderr


ROWS = [(page, body) for page in PAGES for body in blocks(page, "jsonl")]


@pytest.mark.parametrize(("page", "body"), ROWS, ids=[p.name for p, _ in ROWS])
def test_example_rows_are_goals_with_twins(page, body, tmp_path):
    from fiducial.data.load import prompts

    file = tmp_path / "goals.jsonl"
    file.write_text(body, encoding="utf-8")
    assert all(p.twin and p.category for p in prompts(file))


def test_toml_examples_are_toml():
    for page in PAGES:
        for body in blocks(page, "toml"):
            assert tomllib.loads(body)["project"]["entry-points"][registry.ENTRY_POINTS]


def test_the_package_says_what_the_documents_say():
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    assert (ROOT / project["readme"]).is_file()
    assert project["license"] == "Apache-2.0"
    assert project["version"] == fiducial.__version__
    assert f"## {fiducial.__version__}" in text(ROOT / "CHANGELOG.md")
    assert all("Python 3.11" in text(ROOT / name) for name in READMES)
    assert project["requires-python"] == ">=3.11"


def test_the_package_of_the_embedded_model_is_named_the_same_everywhere():
    from fiducial.models.embedded import INSTALL

    assert INSTALL.split()[-1] in text(ROOT / "Makefile")
    assert all(INSTALL in text(ROOT / name) for name in (*READMES, "docs/zh/user-guide.md"))


def _reference():
    spec = spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
