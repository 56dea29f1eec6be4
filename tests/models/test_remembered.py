import pytest
import torch

from fiducial.core.records import Completion, user
from fiducial.core.store import Lines
from fiducial.models.forest import Paths
from fiducial.models.remembered import Call, Memory
from fiducial.models.scorehead import ScoreHead
from fiducial.models.scripted import ScriptedModel, tiny

ASKED = [user("Hello"), user("Goodbye")]


@pytest.fixture
def memory(tmp_path):
    """Each call reads the same file anew, as another process would."""
    return lambda: Memory(Lines(tmp_path / "answers.jsonl", Call))


def counting():
    """A model that never says the same twice."""
    said = []
    return ScriptedModel(lambda _: said.append(None) or f"Answer {len(said)}.")


def texts(rows):
    return [[c.text for c in row] for row in rows]


def test_what_was_answered_before_is_answered_again_without_the_model(memory):
    model = counting()
    first = memory().of(model).sample(ASKED, k=2)
    assert texts(first) == [["Answer 1.", "Answer 2."], ["Answer 3.", "Answer 4."]]
    arrived = {}
    assert memory().of(model).sample(ASKED, k=2, arrived=lambda i, row: arrived.update({i: row})) == first
    assert arrived == dict(enumerate(first))
    assert model.samples == 4


@pytest.mark.parametrize("change", [{"k": 2}, {"seed": 1}, {"temperature": 0.5}, {"top_p": 0.9}, {"max_tokens": 1}, {"stop": ["x"]}])
def test_another_setting_is_another_call(memory, change):
    model = counting()
    memory().of(model).sample(ASKED)
    memory().of(model).sample(ASKED, **change)
    assert model.samples == 2 * (1 + change.get("k", 1))


def test_a_call_that_is_made_twice_has_two_answers(memory):
    model = counting()
    for _ in range(2):
        remembered = memory().of(model)
        assert [texts(remembered.sample(ASKED[:1])) for _ in range(2)] == [[["Answer 1."]], [["Answer 2."]]]
    assert model.samples == 2


def test_another_model_has_answers_of_its_own(memory):
    one, other = ScriptedModel(default="One."), ScriptedModel(default="Other.")
    assert texts(memory().of(one).sample(ASKED[:1]) + memory().of(other).sample(ASKED[:1])) == [["One."], ["Other."]]


def test_a_model_that_is_opened_beside_remembers_too(memory, tmp_path):
    (tmp_path / "judge.yaml").write_text("default: 'No.'", encoding="utf-8")
    for _ in range(2):
        judge = memory().of(counting()).beside(f"scripted:{tmp_path}/judge.yaml")
        assert texts(judge.sample(ASKED)) == [["No."], ["No."]]
        (tmp_path / "judge.yaml").write_text("default: 'No.'", encoding="utf-8")
    assert judge._model.samples == 0


def test_scores_come_back_to_the_bit_and_gradients_are_never_remembered(memory, monkeypatch):
    model = tiny()
    paths = Paths.of([model.encode(c, answer) for c in ASKED for answer in ("Yes", "No")], group=[0, 0, 1, 1])
    first, plain = memory().of(model).score(paths), model.score(paths)
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "score", None)
        again = memory().of(model).score(paths)
    for scores in (first, again):
        for name in ("edge_logp", "edge_path", "path_logp", "path_len", "is_greedy"):
            assert torch.equal(getattr(scores, name), getattr(plain, name))
            assert getattr(scores, name).dtype == getattr(plain, name).dtype
    assert memory().of(model).score(paths, grad=True).path_logp.requires_grad


def test_what_would_be_read_as_something_else_is_not_kept(memory):
    asked = []

    def answer(key):
        asked.append(key)
        return Call(key=key, scores={"path_logp": (float("-inf"),)})

    for _ in range(2):
        assert memory().call(["x"], answer).scores == {"path_logp": (float("-inf"),)}
    assert len(asked) == 2


def test_a_model_elsewhere_is_asked_only_the_conversations_without_an_answer(memory):
    model = counting()
    memory().of(model).sample(ASKED[:1])
    assert texts(memory().of(model).sample([ASKED[1], ASKED[0], ASKED[0]])) == [["Answer 2."], ["Answer 1."], ["Answer 3."]]


def test_answers_are_kept_as_they_come_and_failed_ones_are_asked_for_again(memory):
    said = iter(["One.", Completion(text="", finish="error", error="down"), "Two.", "Three."])
    model = ScriptedModel(lambda _: next(said))
    first = memory()
    assert texts(first.of(model).sample(ASKED)) == [["One."], [""]]
    assert first.unanswered == 1
    second = memory()
    assert texts(second.of(model).sample(ASKED)) == [["One."], ["Two."]]
    assert second.unanswered == 0
    broken = ScriptedModel(lambda c: "Late." if c == ASKED[0] else 1 / 0)
    broken.fingerprint = "broken"
    with pytest.raises(ZeroDivisionError):
        memory().of(broken).sample(ASKED)
    broken._function = lambda c: "Never." if c == ASKED[0] else "Now."
    assert texts(memory().of(broken).sample(ASKED)) == [["Late."], ["Now."]]


def test_what_cannot_be_sent_is_not_owed(memory, monkeypatch):
    model = ScriptedModel(lambda _: Completion(text="", finish="error", error="it ends with the assistant's turn"))
    monkeypatch.setattr(type(model), "unsendable", lambda _, conversation: "its last turn" if conversation == ASKED[0] else "")
    kept = memory()
    kept.of(model).sample(ASKED)
    assert kept.unanswered == 1


def test_scores_of_a_head_come_back_to_the_bit(memory, monkeypatch):
    model = tiny()
    model.head = ScoreHead.fresh(model.width, seed=0, higher_is="better", trained_by="align/reward_model")
    ids = [model.encode(c, "Yes")[0] for c in ASKED]
    plain = model.rated(ids)
    first = memory().of(model).rated(ids)
    monkeypatch.setattr(type(model), "rated", None)
    for scores in (first, memory().of(model).rated(ids)):
        assert torch.equal(scores, plain)
        assert scores.dtype == plain.dtype
