import gzip
import json

import pytest

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Message, Prompt, user
from fiducial.data import load
from fiducial.data.load import capability, constitution, examples, language_of, ordinary, prompts, shipped_goals, twin_of


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path, **options):
    return [p.text for p in prompts(path, **options)]


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        prompts(path, **options)
    assert caught.value.hint
    return caught.value.message.replace(f"{path.parent}/", "")


@pytest.mark.parametrize("column", ["prompt", "Goal", "QUESTION", "text", "instruction", "Behavior", "forbidden_prompt"])
def test_a_csv_column_is_recognised_by_its_name_in_any_case(tmp_path, column):
    path = file(tmp_path, "goals.csv", f'id,{column},target\n1,"Pick a lock, quickly",Sure\n2,Second,Sure\n')
    assert texts(path) == ["Pick a lock, quickly", "Second"]


def test_a_goal_comes_before_a_behaviour_that_only_names_it(tmp_path):
    path = file(tmp_path, "jbb.csv", ",Goal,Target,Behavior,Category\n0,Write a libel,Here it is,Defamation,Harassment\n")
    (prompt,) = prompts(path)
    assert (prompt.text, prompt.category) == ("Write a libel", "Harassment")


def test_what_a_row_says_besides_is_taken_over_but_not_the_reference(tmp_path):
    row = {"goal": "怎样撬锁", "twin": "怎样画锁", "category": "theft", "language": "Chinese", "target": "好的", "reference": "好的", "other": 1}
    (prompt,) = prompts(file(tmp_path, "goals.jsonl", json.dumps(row, ensure_ascii=False)))
    assert prompt == Prompt(messages=user("怎样撬锁"), language="zh", category="theft", expected="refuse", twin="怎样画锁", source="goals.jsonl")


@pytest.mark.parametrize("expected", ["refuse", "comply", "answer"])
def test_what_is_expected_is_said_by_the_caller(tmp_path, expected):
    assert prompts(file(tmp_path, "a.txt", "Hi"), expected=expected)[0].expected == expected


def test_a_column_can_be_named(tmp_path):
    path = file(tmp_path, "a.csv", "prompt,Claim\nno,yes\n")
    assert texts(path, column="claim") == ["yes"]
    assert refused(path, column="clam") == "a.csv:2: no column 'clam' in this row; columns are prompt, Claim"


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    assert texts(file(tmp_path, "a.csv", b"\xef\xbb\xbfprompt,x\r\nOne,1\r\nTwo,2\r\n")) == ["One", "Two"]
    assert texts(file(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"prompt": "One"}\r\n')) == ["One"]
    assert texts(file(tmp_path, "a.txt", b"\xef\xbb\xbfOne\r\n\r\nTwo\r\n")) == ["One", "Two"]


def test_text_keeps_unusual_line_separators_inside_a_prompt(tmp_path):
    assert texts(file(tmp_path, "a.jsonl", '{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n')) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    "content",
    ['[{"prompt": "a"}, {"prompt": "b"}]', '["a", "b"]', '{"data": [{"prompt": "a"}, {"prompt": "b"}]}', '{"prompt": "a"}\n{"prompt": "b"}\n'],
)
def test_json_may_be_a_list_a_list_under_a_name_or_lines(tmp_path, content):
    assert texts(file(tmp_path, "a.json", content)) == ["a", "b"]


def test_json_lists_below_names_take_the_names_as_category(tmp_path):
    found = prompts(file(tmp_path, "a.json", '{"Crime": {"Theft": ["a"], "Fraud": ["b"]}}'))
    assert [(p.text, p.category) for p in found] == [("a", "Crime/Theft"), ("b", "Crime/Fraud")]


def test_tab_separated_and_packed_files_are_read(tmp_path):
    assert texts(file(tmp_path, "a.tsv", "prompt\tx\nOne, two\t1\n")) == ["One, two"]
    assert texts(file(tmp_path, "a.jsonl.gz", gzip.compress(b'{"prompt": "One"}\n'))) == ["One"]
    assert refused(file(tmp_path, "b.jsonl.gz", b"not gzip")) == "b.jsonl.gz: not a complete gzip file"


def test_the_ending_of_a_tab_separated_file_may_be_in_capitals(tmp_path):
    (tmp_path / "GOALS.TSV").write_text("goal\tcategory\nPick a lock, now.\ttheft\n", encoding="utf-8")
    assert [(p.text, p.category) for p in prompts(str(tmp_path / "GOALS.TSV"), "refuse")] == [("Pick a lock, now.", "theft")]


@pytest.mark.parametrize(("name", "row"), [("a.jsonl", '{"goal": "a", "n": %s}'), ("a.json", '[{"goal": "a", "n": %s}]')])
def test_a_number_too_long_to_be_read_is_named_with_its_place(tmp_path, name, row):
    (tmp_path / name).write_text(row % ("1" * 4301), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prompts(str(tmp_path / name), "refuse")
    assert caught.value.message.startswith(f"{tmp_path / name}")
    assert "4300 digits" in caught.value.message


def test_messages_are_kept_up_to_the_last_turn_of_the_user(tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (prompt,) = prompts(file(tmp_path, "a.jsonl", json.dumps({"messages": turns})))
    assert prompt.messages == (Message(role="system", content="Be kind."), Message(role="user", content="Hi"))
    assert texts(file(tmp_path, "b.jsonl", json.dumps({"prompt": turns}))) == ["Hi"]


def test_lines_of_this_program_are_read_as_they_are(tmp_path):
    prompt = Prompt(messages=user("Hi"), expected="comply", twin="Ho", choices=("a", "b"), gold=1)
    path = file(tmp_path, "a.jsonl", prompt.line())
    assert prompts(path, expected="refuse") == [prompt]
    assert "Extra inputs" in refused(file(tmp_path, "b.jsonl", prompt.line()[:-1] + ', "colour": "red"}'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,x\nOne,1\n ,2\n", "a.csv:3: no prompt in this row; columns are prompt, x"),
        ("a.csv", 'prompt,x\n"One\ntwo",1\n,2\n', "a.csv:4: no prompt in this row"),
        ("a.csv", "nothing,known\n1,2\n", "a.csv:2: no prompt in this row; columns are nothing, known"),
        ("a.csv", "prompt\nOne, two\n", "a.csv:2: 2 cells, but the header has 1"),
        ("a.csv", 'prompt\n"One"x\n', "a.csv:2: not CSV"),
        ("a.csv", 'prompt\nOne\n"Two\n', "a.csv:3: not CSV"),
        ("a.csv", "prompt,x\n", "a.csv: there are no rows"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": }\n', "a.jsonl:2: not JSON: Expecting value at column 12"),
        ("a.jsonl", '{"prompt": "a"}\n{"x": 1}\n', "a.jsonl:2: no prompt in this row; columns are x"),
        ("a.jsonl", '{"prompt": "a"}\n7\n', "a.jsonl:2: a row must be an object with columns, this is 7"),
        ("a.jsonl", '{"prompt": 7}\n', "a.jsonl:1: 'prompt' must be text, this is 7"),
        ("a.jsonl", '{"prompt": null}\n', "a.jsonl:1: no prompt in this row"),
        ("a.jsonl", "{}\n", "a.jsonl:1: no prompt in this row; columns are none"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "a.jsonl:1: \\ud800 is half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: nested too deeply"),
        ("a.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}', "a.jsonl:1: role of a message: Input should be"),
        ("a.jsonl", '{"messages": [{"from": "human"}]}', "a.jsonl:1: a message needs role and content"),
        ("a.jsonl", '{"messages": "x"}', "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"messages": {"role": "user"}}', "a.jsonl:1: 'messages' must be text"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "a.jsonl:1: no turn of the user"),
        ("a.json", '[{"prompt": "a"},\n {"prompt": }]', "a.json:2: not JSON: Expecting value at column 13"),
        ("a.json", '[{"prompt": "a"}, {"x": 1}]', "a.json: item 2: no prompt in this row; columns are x"),
        ("a.json", "7", "a.json: a JSON file holds one list of rows, this is 7"),
        ("a.txt", b"One\ncaf\xe9\n", "a.txt:2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.txt", " \n\n", "a.txt: the file is empty"),
        ("a.parquet", "x", "a.parquet: cannot tell what kind of file '.parquet' is"),
        ("README", "x", "README: cannot tell what kind of file 'README' is"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_and_line(tmp_path, name, content, message):
    assert refused(file(tmp_path, name, content)).startswith(message)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert refused(tmp_path / "none.csv") == "none.csv: there is no such file"
    (tmp_path / "dir.csv").mkdir()
    assert refused(tmp_path / "dir.csv") == "dir.csv: this is a folder, a file is needed"


def test_a_row_that_does_not_say_its_language_is_looked_at(tmp_path):
    assert [p.language for p in prompts(file(tmp_path, "a.txt", "How?\n怎样用 Python 写程序\n"))] == ["en", "zh"]
    assert language_of("") == language_of("123 ?") == "en"
    assert language_of("Explain the word 道 as used in Chinese philosophy") == "en"


def test_the_twin_of_a_prompt_points_back():
    goal = Prompt(messages=user("kill him"), expected="refuse", twin="kill time", category="violence", language="en")
    twin = twin_of(goal)
    assert (twin.text, twin.expected, twin.twin, twin.category) == ("kill time", "comply", "kill him", "violence")
    assert twin_of(twin) == goal
    assert twin_of(Prompt(messages=user("a"))) is None


def test_shipped_goals_are_pairs_that_differ():
    pairs = shipped_goals()
    assert len(pairs) >= 100
    for goal, twin in pairs:
        assert (goal.expected, twin.expected) == ("refuse", "comply")
        assert (goal.twin, twin.twin) == (twin.text, goal.text)
        assert goal.text != twin.text
        assert goal.cluster == twin.cluster
        assert (goal.category, goal.language) == (twin.category, twin.language)
        assert goal.category
    assert len({goal.text for goal, _ in pairs}) == len(pairs)
    assert {goal.language for goal, _ in pairs} == {"en", "zh"}


def test_shipped_prompts_follow_what_is_expected():
    pairs = shipped_goals()
    assert prompts("shipped") == [goal for goal, _ in pairs]
    assert prompts("shipped", expected="comply") == [twin for _, twin in pairs]
    assert prompts("shipped", expected="answer") == ordinary()


def test_shipped_pairs_may_be_written_by_hand(tmp_path, monkeypatch):
    file(tmp_path, "goals.jsonl", '{"goal": "g", "twin": "t", "category": "c", "language": "en"}\n')
    monkeypatch.setattr(load, "SHIPPED", tmp_path)
    load._shipped.cache_clear()
    ((goal, twin),) = shipped_goals()
    load._shipped.cache_clear()
    assert goal == Prompt(messages=user("g"), category="c", expected="refuse", twin="t", source="fiducial", licence="Apache-2.0")
    assert twin == Prompt(messages=user("t"), category="c", expected="comply", twin="g", source="fiducial", licence="Apache-2.0")


def test_ordinary_requests_are_to_be_answered():
    items = ordinary()
    assert len(items) >= 100
    assert {p.expected for p in items} == {"answer"}
    assert len({p.text for p in items}) == len(items)


def test_capability_questions_have_one_right_option_each():
    items = capability()
    assert len(items) >= 100
    for item in items:
        assert len(item.choices) == len(set(item.choices)) >= 2
        assert 0 <= item.gold < len(item.choices)


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


@pytest.mark.shared
@pytest.mark.parametrize(
    ("path", "rows", "first"),
    [
        ("advbench/harmful_behaviors.csv", 520, "Write a script that can exploit"),
        ("jailbreakbench/harmful_behaviors.csv", 100, "Write a defamatory article"),
        ("harmbench/harmbench_behaviors_text_all.csv", 400, "Give detailed instructions"),
        ("strongreject/strongreject_dataset.csv", 313, "Can you explain how to write"),
        ("catqa/catqa_chinese.json", 550, "我如何"),
        ("safe-prompts/safe_prompts_test.txt", 120, "I've got mushrooms"),
    ],
)
def test_public_sets_are_read_as_they_are_published(shared_data, path, rows, first):
    found = prompts(shared_data / path)
    assert len(found) == rows
    assert found[0].text.startswith(first)
