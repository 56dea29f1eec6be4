import pytest
import yaml

from fiducial.core.errors import ConfigError, DataError
from fiducial.data.exemplars import SHIPPED, read_texts
from fiducial.data.overlap import words

EN, ZH = read_texts("", "en"), read_texts("", "zh")
THOUGHT = "I am an AI assistant and answer by these principles. By principle 9 I say it."
LONG = "Bees carry pollen from flower to flower while they look for nectar. Orchards without hives set far less fruit, as growers find. "
LONG += "That is why beekeepers move their hives to almond farms when the trees are in bloom."


def test_the_shipped_texts_say_the_same_in_both_languages():
    assert (len(EN.principles), len(EN.exemplars), len(EN.kinds), len(EN.topics)) == (16, 5, 14, 18)
    assert [len(getattr(ZH, name)) for name in ("principles", "exemplars", "kinds", "topics", "identity_set")] == [16, 5, 14, 18, 3]
    for say in (EN, ZH):
        for e in say.exemplars:
            shown = f"{say.thoughts} {say.named(say.opening)} {e.thoughts}\n{say.answer} {e.answer}"
            assert say.read(shown)[2] == ""


def test_the_prompt_holds_rules_exemplars_and_request_and_may_begin_the_answer():
    turns = EN.principled("Why do bees matter?", EN.thoughts)
    assert [t.role for t in turns] == ["system", *["user", "assistant"] * 6]
    assert "16. Invention" in turns[0].content
    assert turns[0].content.startswith("You are an AI assistant. You answer by these principles:\n1. No harm")
    assert turns[2].content.startswith("(thoughts) I am an AI assistant and answer by these principles.")
    assert turns[-1].content == "(thoughts)"
    assert EN.principled("Q")[-1].content == "Q"


def test_a_name_takes_the_place_of_the_assistant():
    say = read_texts("", "en", "Ada")
    assert say.principled("Q")[2].content.startswith("(thoughts) I am Ada and answer")
    assert say.named(say.identity_set[0].answer).startswith("I am Ada.")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"(thoughts) {THOUGHT}\n(answer) Bees carry pollen.", ""),
        (f"{THOUGHT} (answer) Bees carry pollen.", ""),
        ("(thoughts) The question is harmless; principle 9.\n(answer) Bees.", "no identification"),
        ("(thoughts) I am an AI assistant and answer by these principles. Fine.\n(answer) Bees.", "no principle named"),
        ("(thoughts) I am an AI assistant and answer by these principles. Principle 17.\n(answer) Bees.", "no principle named"),
        (f"(thoughts) {THOUGHT}", "no answer after the thoughts"),
        (f"(thoughts) {THOUGHT}\n(answer) Bees.\nUser: And wasps?", "cut short at a further turn"),
        (f"(thoughts) {THOUGHT}\n(answer) {LONG}\nUser: And wasps?\n(thoughts) more", ""),
        (f"(thoughts) {THOUGHT}\n(answer) By principle 9: bees.", "speaks of the principles"),
    ],
)
def test_an_answer_is_read_only_in_the_form_that_was_asked_for(text, reason):
    thought, answer, found = EN.read(text)
    assert found == reason
    if not reason:
        assert thought == THOUGHT
        assert answer == LONG if "wasps" in text else answer == "Bees carry pollen."


def test_chinese_answers_are_read_with_brackets_of_either_width():
    text = "（思考）我是一个人工智能助手，按这些原则回答。按原则9回答。\n(回答) 蜜蜂传播花粉。"
    assert ZH.read(text) == ("我是一个人工智能助手，按这些原则回答。按原则9回答。", "蜜蜂传播花粉。", "")


@pytest.mark.parametrize(
    ("request_", "answer", "reason"),
    [
        ("Why do bees matter?", "Bees carry pollen.", ""),
        ("Why do bees matter?", "...", "empty"),
        ("Why?", "Bees carry pollen between flowers. It rains. Bees carry pollen between flowers.", "repeats itself"),
        ("Why?", "They work, they work, they work.", ""),  # short clauses are style
        ("Why do bees matter to us?", "You ask: why do bees matter to us? They do.", "repeats the request"),
        ("Why?", "Why? Because they do.", ""),  # a short request may be said again
        ("Why do bees matter?", "An enzyme set free there turns nectar into honey.", "words of an exemplar: an enzyme set free there"),
        ("Why do bees matter?", "It was Lorenz who told me.", "words of an exemplar: lorenz"),
        ("Who was Konrad Lorenz?", "It was Lorenz who raised geese.", ""),  # what the request says itself is no leak
        ("Why do bees matter?", "Some 400 years ago hives were baskets.", ""),
        ("Which day comes before Saturday?", "That is Friday.", ""),  # a weekday and a country are nobody's
        ("Name a big country of Asia.", "India is one, and China another.", ""),
    ],
)
def test_every_filter_lets_the_good_through_and_names_what_is_wrong(request_, answer, reason):
    assert EN.fault(request_, answer) == reason


def test_the_blacklist_comes_from_the_exemplars_and_not_from_what_they_share():
    assert {("lorenz",), ("valparaíso",), ("great", "wall"), ("洛", "伦", "茨")} <= EN.blacklist | ZH.blacklist
    assert {("an", "enzyme", "set", "free", "there")} <= EN.blacklist
    assert ("what", "is") not in EN.blacklist
    assert ("the",) not in EN.blacklist
    assert {("friday",), ("china",), ("peru",)}.isdisjoint(EN.blacklist)
    run = tuple(words("细胞破裂，释放出的"))
    assert run in ZH.blacklist
    assert ZH.fault("蜂蜜怎么来的？", "细胞破裂，释放出的糖变成蜂蜜。").startswith("words of an exemplar")


@pytest.mark.parametrize(
    ("request_", "answer", "reason"),
    [
        ("给新同事写一句欢迎的话。", "欢迎你，洛伦茨，很高兴与你共事。", "words of an exemplar: 洛 伦 茨"),
        ("智利有哪些港口？", "瓦尔帕莱索是其中之一。", "words of an exemplar: 瓦 尔 帕 莱 索"),
        ("洛伦茨研究什么动物？", "洛伦茨研究灰雁。", ""),
        ("星期六的前一天是星期几？", "是星期五。", ""),
    ],
)
def test_a_short_name_of_a_chinese_exemplar_is_a_leak_unless_the_request_has_it(request_, answer, reason):
    assert ZH.fault(request_, answer) == reason


def test_names_of_ones_own_exemplars_count(tmp_path):
    data = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    data["en"]["exemplars"][0]["names"] = ["sulphur", "1968"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    mine = read_texts(str(path), "en")
    assert mine.fault("What is yellow?", "Sulphur is.") == "words of an exemplar: sulphur"
    assert mine.fault("When was that?", "In 1968.") == "words of an exemplar: 1968"
    assert EN.fault("What is yellow?", "Sulphur is.") == ""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("How do I dry wet shoes?", ""),
        ("Wet shoes?", "too short"),
        ("Why do bees matter so much?", "like another request"),  # LCS 5 of 6 and 5 words: 10 / 11
        ("怎样把湿鞋子弄干？", "other language"),
        ("word " * 81, "too long"),
    ],
)
def test_a_proposed_request_is_taken_or_named(line, reason):
    assert EN.unusable(line, [words("Why do bees matter?")]) == ("" if line.startswith("How") else reason)


def test_rouge_l_just_below_the_bound_is_another_request():
    # LCS 2 of 3 and 3 words: 2 * 2 / 6 = 0.67 < 0.7
    assert EN.unusable("name three rivers", [words("name three lakes")]) == ""


def test_a_file_of_ones_own_is_used_and_what_it_lacks_is_named(tmp_path):
    data = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"en": data["en"] | {"principles": ["Be kind."]}}, allow_unicode=True), encoding="utf-8")
    assert read_texts(str(path), "en").principles == ("Be kind.",)
    with pytest.raises(DataError, match="no texts for 'zh'"):
        read_texts(str(path), "zh")
    path.write_text(yaml.safe_dump({"en": {k: v for k, v in data["en"].items() if k != "verbose"}}), encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.yaml:1: verbose: Field required"):
        read_texts(str(path), "en")
    with pytest.raises(ConfigError):
        read_texts(str(tmp_path / "none.yaml"), "en")
