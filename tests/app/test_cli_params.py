import click
import pytest

from fiducial.app.cli.params import Literals, MethodName, OrNone, Yaml, default, from_recipe, parameter, shape
from fiducial.core.errors import ConfigError, MethodError
from fiducial.core.registry import Option


def option(annotation, default=None, required=False, help_text="What it is."):
    return Option("some_field", annotation, default, required, help_text)


def parsed(annotation, *args, **kwargs):
    command = click.Command("x", params=[parameter(option(annotation, **kwargs))])
    return command.make_context("x", list(args)).params["some_field"]


@pytest.mark.parametrize(
    ("annotation", "args", "value"),
    [
        ("int", ["--some-field", "3"], 3),
        ("float", ["--some-field", "1e-4"], 1e-4),
        ("str", ["--some-field", "a b"], "a b"),
        ("bool", ["--some-field"], True),
        ("bool", ["--no-some-field"], False),
        ("bool", [], None),
        ("Literal['a', 'b']", ["--some-field", "b"], "b"),
        ("Literal[1, 2]", ["--some-field", "2"], 2),
        ("tuple[str, ...]", ["--some-field", "a", "--some-field", "b"], ("a", "b")),
        ("list[int]", ["--some-field", "1"], (1,)),
        ("tuple[float, float]", ["--some-field", "0.1", "0.9"], (0.1, 0.9)),
        ("int | None", ["--some-field", "none"], None),
        ("int | None", ["--some-field", "5"], 5),
        ("Optional[float]", ["--some-field", "0.5"], 0.5),
        ("Annotated[int, 'steps']", ["--some-field", "7"], 7),
        ("typing.Literal['x']", ["--some-field", "x"], "x"),
        ("dict[str, float]", ["--some-field", "{a: 1e-4}"], {"a": 1e-4}),
        ("int | str", ["--some-field", "4"], 4),
        ("'int'", ["--some-field", "4"], 4),
        ("Judge", ["--some-field", "oversee/refusal"], "oversee/refusal"),
        ("Judge | None", ["--some-field", "refusal"], "oversee/refusal"),
        ("tuple[Attack, ...]", ["--some-field", "direct", "--some-field", "persona"], ("attack/direct", "attack/persona")),
    ],
)
def test_an_annotation_as_written_decides_how_the_value_is_read(annotation, args, value):
    assert parsed(annotation, *args) == value


@pytest.mark.parametrize(("annotation", "value"), [("int", "x"), ("Literal['a']", "b"), ("tuple[int, ...]", "x"), ("dict[str, int]", "{a: ")])
def test_a_value_that_does_not_fit_is_refused(annotation, value):
    with pytest.raises((click.BadParameter, ConfigError)):
        parsed(annotation, "--some-field", value)


def test_a_method_of_another_role_is_refused():
    with pytest.raises(MethodError, match="is of the role judge, but a method of role attack is needed"):
        parsed("Attack", "--some-field", "oversee/refusal")


def test_what_is_not_given_is_left_to_the_method():
    assert parsed("int", default=3) is None
    assert parsed("tuple[str, ...]", default=("a",)) == ()


def test_help_shows_the_default_in_words():
    assert parameter(option("bool", default=True)).help == "What it is. [default: on]"
    assert parameter(option("float | None")).help == "What it is. [default: none]"
    assert parameter(option("int", required=True)).help == "What it is."


def test_a_judge_that_must_be_named_is_the_usual_one_unless_another_is():
    assert default(option("Judge", required=True)) == "oversee/compliance"
    assert not parameter(option("Judge", required=True)).required
    assert parameter(option("Attack", required=True)).required


def test_types_nobody_foresaw_are_given_as_yaml():
    assert isinstance(shape("Callable[[int], str]").type, Yaml)
    assert isinstance(shape("tuple[tuple[int, int], ...]").type, Yaml)
    assert isinstance(shape("Schedule").type, Yaml)


def test_shapes_know_flags_and_roles():
    assert shape("bool").is_flag
    assert not shape("bool | None").is_flag
    assert shape("Judge | None").role == "Judge"
    assert isinstance(shape("Literal['a', None]").type, Literals)
    assert shape("Literal['a', None]").optional


@pytest.mark.parametrize(
    ("annotation", "value", "read"),
    [("int", 3, 3), ("float", 1, 1.0), ("bool", True, True), ("tuple[int, ...]", [1, 2], (1, 2)), ("tuple[str, ...]", "a", ("a",)), ("int | None", None, None)],
)
def test_a_recipe_value_is_read_as_the_flag_is(annotation, value, read):
    assert from_recipe(parameter(option(annotation)), value, click.Context(click.Command("x"))) == read


@pytest.mark.parametrize(("annotation", "value"), [("int", 1.5), ("int", True), ("Literal['a']", 3)])
def test_a_recipe_value_is_never_bent_to_fit(annotation, value):
    with pytest.raises(click.BadParameter):
        from_recipe(parameter(option(annotation)), value, click.Context(click.Command("x")))


def test_method_names_complete_in_the_shell():
    found = MethodName("Attack").shell_complete(None, None, "attack/per")
    assert "attack/persona" in [item.value for item in found]
    assert OrNone(click.INT).convert("None", None, None) is None
