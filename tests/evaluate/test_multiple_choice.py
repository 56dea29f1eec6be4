import pytest

from fiducial.core.errors import ConfigError, DataError, MethodError
from fiducial.core.records import Score
from fiducial.evaluate.multiple_choice import MultipleChoice, correct
from fiducial.models.scripted import ScriptedModel, tiny


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def data(rows):
    return rows(*({"question": f"{n} and one?", "choices": [str(n), str(n + 1), "many"], "gold": 1} for n in range(4)))


def test_acc_goes_by_the_sum_acc_norm_by_characters_and_acc_bytes_by_bytes():
    # per character -4/2 = -2, -6/4 = -1.5; per byte -4/6 = -0.67 (two Han characters are six bytes), -6/4 = -1.5
    assert correct([-4.0, -6.0], ["茶叶", "teas"], 0) == {"acc": True, "acc_norm": False, "acc_bytes": True}


def test_a_tie_goes_to_the_lowest_index():
    assert correct([-1.0, -1.0], ["a", "b"], 0)["acc"]
    assert not correct([-1.0, -1.0], ["a", "b"], 1)["acc"]


def test_every_metric_rests_on_every_item(model, data):
    seen = []
    result = MultipleChoice(data=data).run(model, sink=seen.append)
    assert [s.metric for s in result.scores] == ["acc", "acc_norm", "acc_bytes"]
    for score in result.scores:
        assert (score.n, len(score.items), score.interval, score.suite) == (4, 4, "wilson", "evaluate/multiple_choice")
        assert score.value == sum(score.items) / 4
        assert Score.parse(score.line()) == score
    assert seen == result.items


def test_the_first_items_are_taken_up_to_the_limit(model, data):
    suite = MultipleChoice(data=data)
    assert suite.run(model, limit=2).items == suite.run(model).items[:2]
    assert suite.run(model, limit=0).scores[0].n == 0


def test_the_questions_that_come_along_are_the_default(model):
    (item,) = MultipleChoice().run(model, limit=1).items
    assert item["gold"] < len(item["choices"])
    assert item["chance"] == 1 / len(item["choices"])


def test_the_fingerprint_changes_with_data_format_and_model(model, data):
    def mark(suite, model=model, limit=None):
        return suite.run(model, limit=limit).scores[0].fingerprint

    first = mark(MultipleChoice(data=data))
    assert first == mark(MultipleChoice(data=data))
    assert first["data"] != mark(MultipleChoice(data=data), limit=2)["data"]
    assert first["format"] != mark(MultipleChoice(data=data, format="{question}"))["format"]
    assert first["format"] != mark(MultipleChoice(data=data, chat=True))["format"]
    assert first["model"] != mark(MultipleChoice(data=data), model=tiny(seed=1))["model"]
    assert (first["dtype"], first["truncated"], first["scorer"]) == ("torch.float32", "0", "likelihood-1")


def test_chat_puts_the_question_into_the_template(model, data):
    context = MultipleChoice(chat=True).context(model, "Who?")
    assert context == "<|im_start|>user\nQuestion: Who?\nAnswer:<|im_end|>\n<|im_start|>assistant\n"


def test_chat_needs_a_template(data):
    with pytest.raises(MethodError, match="no chat template"):
        MultipleChoice(data=data, chat=True).run(tiny(template=False))


def test_a_black_box_cannot_be_scored(data):
    with pytest.raises(MethodError, match="evaluate/multiple_choice"):
        MultipleChoice(data=data).run(ScriptedModel())


def test_a_format_needs_a_place_for_the_question():
    with pytest.raises(ConfigError, match="no place"):
        MultipleChoice(format="Question:")


@pytest.mark.parametrize(
    "row", [{"question": "Who?"}, {"question": "Who?", "choices": ["a"], "gold": 0}, {"question": "Who?", "choices": ["a", "b"], "gold": 2}]
)
def test_a_row_that_is_no_question_is_named(model, rows, row):
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        MultipleChoice(data=rows(row)).run(model)
