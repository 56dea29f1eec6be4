import pytest

from fiducial.core.errors import ConfigError, DataError
from fiducial.data.constitution import constitution, examples
from fiducial.data.languages import language_of


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_the_constitution_speaks_english_and_chinese():
    principles = constitution()
    assert len(principles) >= 10
    assert len({p.name for p in principles}) == len(principles)
    for principle in principles:
        for part in ("title", "critique", "revision", "compare"):
            assert language_of(principle.wording(part, "zh")) == "zh"
            assert language_of(principle.wording(part)) == "en"
            assert principle.wording(part, "fr") == principle.wording(part, "en")


def test_a_constitution_of_one_s_own_may_have_one_language(tmp_path):
    path = file(tmp_path, "c.yaml", "principles:\n- {id: kind, title: Be kind, critique: Find, revision: Mend, compare: Which}\n")
    (principle,) = constitution(path)
    assert principle.name == "kind"
    assert principle.wording("critique", "zh") == "Find"


def test_a_kind_of_a_language_is_worded_as_itself_else_as_the_language_else_in_english(tmp_path):
    text = "principles:\n- {id: kind, title: T, critique: {en: Find, zh: 指出, zh-TW: 指出來, fr: Trouve}, revision: R, compare: X}\n"
    (principle,) = constitution(file(tmp_path, "c.yaml", text))
    cases = {"zh": "指出", "zh-hk": "指出", "zh-tw": "指出來", "zh_TW": "指出來", "fr-CA": "Trouve", "de": "Find", "en-GB": "Find"}
    assert {language: principle.wording("critique", language) for language in cases} == cases


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rules: []\n", "c.yaml: there is no list 'principles'"),
        ("principles: []\n", "c.yaml: there is no list 'principles'"),
        ("- a\n", "c.yaml: there is no list 'principles'"),
        ("principles:\n- just text\n", "c.yaml:2: a principle is a mapping"),
        ("principles:\n- {id: a, title: T, critique: C, revision: R}\n", "c.yaml:2: compare: Field required"),
        ("principles:\n- {title: T, critique: C, revision: R, compare: X}\n", "c.yaml:2: id: Field required"),
        ("principles:\n- {id: a, title: T, critique: ' ', revision: R, compare: X}\n", "c.yaml:2: critique: Value error, a text is empty"),
    ],
)
def test_a_constitution_that_lacks_something_names_the_line(tmp_path, content, message):
    with pytest.raises(DataError) as caught:
        constitution(file(tmp_path, "c.yaml", content))
    assert caught.value.message.replace(f"{tmp_path}/", "").startswith(message)


LAW = "principles:\n- {id: kind, title: T, critique: Find, revision: Mend, compare: X}\n"
TALK = "conversation: [{role: user, content: Q}, {role: assistant, content: A}]"


def test_a_constitution_may_show_critiques_and_the_shipped_one_does_not(tmp_path):
    assert examples() == []
    assert examples(file(tmp_path, "none.yaml", LAW)) == []
    path = file(tmp_path, "c.yaml", LAW + f"examples:\n- {{principle: kind, {TALK}, critique: Bad, revision: Good}}\n")
    (example,) = examples(path)
    assert (example.principle, example.critique, example.revision) == ("kind", {"en": "Bad"}, {"en": "Good"})
    assert [(t.role, t.content) for t in example.conversation["en"]] == [("user", "Q"), ("assistant", "A")]
    assert [p.name for p in constitution(path)] == ["kind"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("examples: all\n", "c.yaml: examples must be a list, this is 'all'"),
        ("examples:\n- text\n", "c.yaml:4: an example is a mapping"),
        (f"examples:\n- {{principle: kind, {TALK}, critique: Bad}}\n", "c.yaml:4: revision: Field required"),
        (f"examples:\n- {{principle: other, {TALK}, critique: Bad, revision: Good}}\n", "c.yaml:4: there is no principle 'other'"),
        (f"examples:\n- {{principle: kind, {TALK}, critique: {{zh: 坏}}, revision: Good}}\n", "c.yaml:4: Value error, conversation, critique and revision"),
        (f"examples:\n- {{principle: kind, {TALK}, critique: ' ', revision: Good}}\n", "c.yaml:4: Value error, a text is empty"),
        (
            "examples:\n- {principle: kind, conversation: [{role: user, content: Q}], critique: Bad, revision: Good}\n",
            "c.yaml:4: Value error, the turns of a conversation",
        ),
    ],
)
def test_an_example_that_lacks_something_names_the_line(tmp_path, content, message):
    with pytest.raises(DataError) as caught:
        examples(file(tmp_path, "c.yaml", LAW + content))
    assert caught.value.message.replace(f"{tmp_path}/", "").startswith(message)


def test_a_constitution_that_is_not_yaml_names_line_and_column(tmp_path):
    with pytest.raises(ConfigError, match=r"c\.yaml:1:5: not valid YAML"):
        constitution(file(tmp_path, "c.yaml", "a: b: c\n"))
