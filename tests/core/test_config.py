from typing import Annotated, Literal

import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fiducial.core.config import given, load_recipe, override, parse_yaml, resolve, show
from fiducial.core.errors import ConfigError


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Train(Options):
    epochs: int = 1
    learning_rate: float = 1e-5
    mode: Literal["on", "off"] = "off"
    name: str = "yes"

    @field_validator("epochs")
    @classmethod
    def _positive(cls, value):
        if value < 1:
            raise ValueError("it must be at least 1")
        return value


class GCG(Options):
    kind: Literal["gcg"]
    steps: int = 250


class Persona(Options):
    kind: Literal["persona"]
    voice: str = "pirate"


class Recipe(Options):
    train: Train = Train()
    backup: Train | None = None
    attacks: tuple[str, ...] = ("persona",)
    steps: list[Train] = []
    search: Annotated[GCG | Persona, Field(discriminator="kind")] | None = None
    limit: float = float("inf")
    extra: dict[str, float] = {}
    n: int | None = None
    text: str = ""


def file(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path, text, overrides=(), flags=None):
    with pytest.raises(ConfigError) as caught:
        resolve(Recipe, load_recipe(file(tmp_path, text)), overrides, flags)
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("+1e3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("3", 3),
        ("-1_000", -1000),
        ("on", "on"),
        ("Off", "Off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("true", True),
        ("~", None),
        ("null", None),
        ("0777", "0777"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("[1e-4, no]", [1e-4, "no"]),
    ],
)
def test_plain_values_are_read_without_the_traps_of_yaml_1_1(text, value):
    data, _ = parse_yaml(f"a: {text}", "x")
    assert data == {"a": value}
    assert type(data["a"]) is type(value)


def test_a_recipe_comes_with_the_line_of_each_key(tmp_path):
    path = file(tmp_path, "# a comment\ntrain:\n  epochs: 3\n\nsteps:\n  - epochs: 1\n    name: a\n")
    data, marks = load_recipe(path)
    assert data == {"train": {"epochs": 3}, "steps": [{"epochs": 1, "name": "a"}]}
    assert marks["train",] == f"{path}:2"
    assert marks["train", "epochs"] == f"{path}:3"
    assert marks["steps", 0, "name"] == f"{path}:7"


@pytest.mark.parametrize("first", ["", "fiducial: 1\n"])
def test_a_recipe_is_of_version_1_whether_it_says_so_or_not_and_that_is_no_option(tmp_path, first):
    data, marks = load_recipe(file(tmp_path, f"{first}n: 3\n"))
    assert data == {"n": 3}
    assert resolve(Recipe, (data, marks))[0].n == 3


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2", "this recipe is of version 2, and versions up to 1 are read here"),
        ("0", "the version of a recipe is a whole number, this is 0"),
        ("true", "the version of a recipe is a whole number, this is True"),
        ("1.5", "the version of a recipe is a whole number, this is 1.5"),
        ("'1'", "the version of a recipe is a whole number, this is '1'"),
        ("", "the version of a recipe is a whole number, this is None"),
    ],
)
def test_a_recipe_of_a_later_version_is_refused_with_its_line_before_what_stands_in_it(tmp_path, version, message):
    path = file(tmp_path, f"# later\nunheard_of: 3\nfiducial: {version}\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert error.value.message == f"{path}:3: {message}"


def test_a_recipe_that_is_shown_says_its_version(tmp_path):
    path = file(tmp_path, shown := show(Recipe(n=3), {}, recipe=True))
    assert shown.startswith("fiducial: 1  # ")
    assert resolve(Recipe, load_recipe(path))[0] == Recipe(n=3)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_recipe_has_no_options(tmp_path, text):
    assert load_recipe(file(tmp_path, text))[0] == {}


def test_the_command_line_comes_before_the_recipe_and_the_recipe_before_the_default(tmp_path):
    path = file(tmp_path, "train:\n  epochs: 2\n  learning_rate: 1e-4\nn: 5\n")
    options, origins = resolve(Recipe, load_recipe(path), ["train.epochs=3"], {"n": 6, "text": None})
    assert (options.train.epochs, options.train.learning_rate, options.train.mode, options.n, options.text) == (3, 1e-4, "off", 6, "")
    assert origins["train", "epochs"] == origins["n",] == "command line"
    assert origins["train", "learning_rate"] == f"{path}:3"
    assert origins["train", "mode"] == origins["text",] == "default"
    assert given(options, origins) == {"train": {"epochs": 3, "learning_rate": 1e-4}, "n": 6}


def test_flags_may_be_nested_or_dotted():
    options, origins = resolve(Recipe, flags={"train.epochs": 4, "train": {"name": "x"}})
    assert (options.train.epochs, options.train.name) == (4, "x")
    assert origins["train", "name"] == "command line"


def test_an_override_makes_groups_reaches_into_lists_and_leaves_the_original():
    data = {"steps": [{"epochs": 1}]}
    result, keys = override(data, ["steps.0.epochs=2", "extra.kl=1e-2", "text=a=b", "attacks=[gcg, persona]"])
    assert result == {"steps": [{"epochs": 2}], "extra": {"kl": 0.01}, "text": "a=b", "attacks": ["gcg", "persona"]}
    assert keys == [("steps", 0, "epochs"), ("extra", "kl"), ("text",), ("attacks",)]
    assert data == {"steps": [{"epochs": 1}]}


@pytest.mark.parametrize("assignment", ["epochs", "=3", "train..epochs=3", ".=1"])
def test_an_override_needs_a_key_and_a_value(assignment):
    with pytest.raises(ConfigError, match="not of the form key=value"):
        override({}, [assignment])


@pytest.mark.parametrize("assignment", ["steps.1.epochs=2", "steps.x=2"])
def test_an_override_of_an_item_that_is_not_there_is_refused(assignment):
    with pytest.raises(ConfigError, match="there is no item"):
        override({"steps": [{}]}, [assignment])


def test_an_unknown_key_names_the_line_the_group_and_the_nearest_key(tmp_path):
    assert refused(tmp_path, "n: 1\ntrain:\n  epocs: 3\n") == "recipe.yaml:3: no option 'epocs' in train (did you mean 'epochs'?)"
    assert refused(tmp_path, "trian: {}\n") == "recipe.yaml:1: no option 'trian' (did you mean 'train'?)"
    assert refused(tmp_path, "steps:\n- epochs: 1\n- epocs: 2\n") == "recipe.yaml:3: no option 'epocs' in steps.1 (did you mean 'epochs'?)"
    assert refused(tmp_path, "backup:\n  epocs: 3\n").startswith("recipe.yaml:2: no option 'epocs' in backup")
    assert refused(tmp_path, "search:\n  kind: gcg\n  stepps: 3\n").startswith("recipe.yaml:3: no option 'stepps' in search")
    assert refused(tmp_path, "", ["train.epocs=3"]).startswith("command line: no option 'epocs' in train")
    assert refused(tmp_path, "1: x\n").startswith("recipe.yaml:1: no option '1'")


def test_a_value_of_the_wrong_type_names_the_line_and_what_is_expected(tmp_path):
    assert refused(tmp_path, "train:\n  epochs: many\n").startswith("recipe.yaml:2: train.epochs is 'many', but should be a valid integer")
    assert refused(tmp_path, "train:\n  mode: maybe\n").startswith("recipe.yaml:2: train.mode is 'maybe', but should be 'on' or 'off'")
    assert refused(tmp_path, "train: 5\n").startswith("recipe.yaml:1: train is 5, but should be a group of options")
    assert refused(tmp_path, "attacks: [gcg, 3]\n").startswith("recipe.yaml:1: attacks.1 is 3, but should be a valid string")
    assert refused(tmp_path, "n: 1\nextra:\n  kl: x\n").startswith("recipe.yaml:3: extra.kl is 'x', but should be a valid number")
    assert refused(tmp_path, "", ["train.epochs=many"]).startswith("command line: train.epochs is 'many'")
    assert refused(tmp_path, "train:\n  epochs: 0\n").startswith("recipe.yaml:2: train.epochs is 0, but it must be at least 1")
    assert refused(tmp_path, "search:\n  steps: 3\n").startswith("recipe.yaml:1: search")


def test_a_needed_option_that_is_missing_is_named():
    class Needs(Options):
        model: str

    with pytest.raises(ConfigError, match="options: the option 'model' is needed"):
        resolve(Needs)


def test_a_rule_over_several_options_is_explained(tmp_path):
    class Bounds(Options):
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def _ordered(self):
            if self.low > self.high:
                raise ValueError("low must not exceed high")
            return self

    with pytest.raises(ConfigError, match=r"recipe\.yaml:1: low must not exceed high"):
        resolve(Bounds, load_recipe(file(tmp_path, "low: 3\n")))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("train: [1, 2\nn: 3\n", "recipe.yaml:2:2: not valid YAML"),
        ("a: b: c\n", "recipe.yaml:1:5: not valid YAML"),
        ("train:\n\tepochs: 1\n", "recipe.yaml:2:1: not valid YAML"),
        ("n: 1\nn: 2\n", "recipe.yaml:2:1: not valid YAML: the key 'n' stands twice"),
        ("a: !!python/object/apply:os.system [x]\n", "recipe.yaml:1:4: not valid YAML"),
        ("n: 1\ntext: \x00\n", "recipe.yaml:2: not valid YAML: the character U+0000"),
        ("a: &a [*a]\n", "recipe.yaml: not valid YAML: nested"),
        ("- a\n", "recipe.yaml:1: a recipe is a list of"),
        ("just text", "recipe.yaml:1: a recipe is a list of"),
    ],
)
def test_broken_yaml_names_line_and_column(tmp_path, text, where):
    assert refused(tmp_path, text).startswith(where)


def test_aliases_that_stand_for_billions_of_values_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "more than 100000 keys" in refused(tmp_path, "\n".join(lines))


def test_a_missing_recipe_a_folder_and_a_foreign_encoding_are_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("text: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="byte 9 is not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_the_shown_configuration_names_the_origin_of_each_value(tmp_path):
    path = file(tmp_path, "train:\n  learning_rate: 1e-4\n")
    text = show(*resolve(Recipe, load_recipe(path), ["train.epochs=3"]))
    assert text.splitlines()[:4] == ["train:", "  epochs: 3  # command line", f"  learning_rate: 0.0001  # {path}:2", "  mode: 'off'  # default"]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["on", "1e-4", "0x1", "null", "~", "2024-01-01", "a # b", "- a", "a: b", "1:30"]
)


@settings(max_examples=80, deadline=None)
@examples(
    rate=st.floats(allow_nan=False),
    text=words,
    attacks=st.lists(words, max_size=3),
    extra=st.dictionaries(words, st.floats(allow_nan=False), max_size=3),
    n=st.none() | st.integers(),
)
def test_the_shown_configuration_resolves_to_the_same_options(tmp_path_factory, rate, text, attacks, extra, n):
    options = Recipe(train=Train(learning_rate=rate, name=text), attacks=tuple(attacks), extra=extra, n=n, text=text, steps=[Train(name=text)], backup=Train())
    path = tmp_path_factory.mktemp("shown") / "recipe.yaml"
    path.write_bytes(show(options, {}).encode())
    assert resolve(Recipe, load_recipe(path))[0] == options


def test_a_part_of_a_list_item_that_has_no_parts_is_an_error():
    with pytest.raises(ConfigError, match=r"a\.0 is 5, which has no parts"):
        override({"a": [5]}, ["a.0.b=3"])
    with pytest.raises(ConfigError, match=r"a\.0 is 5, which has no parts"):
        override({"a": [5]}, ["a.0.b.c=3"])
