import json

import pytest

from fiducial.align import learned_reward
from fiducial.align.process_reward import ProcessReward
from fiducial.align.step_labels import StepLabels, convincing
from fiducial.core import registry
from fiducial.core.errors import ConfigError, ModelError
from fiducial.core.records import Attempt, Completion, Prompt, user
from fiducial.models.scorehead import ScoreHead
from fiducial.models.scripted import ScriptedModel, tiny


class Solver(ScriptedModel):
    """Solutions and continuations as listed; remembers what was asked."""

    def __init__(self, solutions, continued):
        super().__init__(default="")
        self.solutions, self.continued, self.begun = solutions, continued, []

    def sample(self, conversations, *, k=1, **_):
        rows = []
        for conversation in conversations:
            if conversation[-1].role == "assistant":
                self.begun.append(conversation[-1].content)
                rows.append(tuple(self.continued[conversation[-1].content][:k]))
            else:
                rows.append(tuple(self.solutions[:k]))
        return rows


def texts(*found, finish="stop"):
    return [Completion(text=t, finish=finish) for t in found]


def attempt(text="What is 2+3*4?"):
    prompt = Prompt(messages=user(text))
    return Attempt(prompt=prompt, attack="attack/direct", family="direct", model="m", sent=prompt.messages, response="?")


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"question": "What is 2+3*4?", "answer": 14}) + "\n", encoding="utf-8")
    return str(path)


RIGHT, WRONG = "3*4=12\n2+12=14\nanswer 14", "2+3=5\n5*4=20\nanswer 20"


def solver():
    return Solver(
        texts(RIGHT, WRONG, RIGHT) + texts("3*4=12\n2+", finish="length"),
        {
            "3*4=12\n": texts("2+12=14\nanswer 14", "2+12=15\nanswer 15", "2+12=14\nanswer 14") + texts("2+12=14", finish="length"),
            "3*4=12\n2+12=14\n": texts("answer 14", "answer 14", "answer 14", "answer 14"),
            "2+3=5\n": texts("5*4=20\nanswer 20", "no: answer 14", "answer 20", "answer 20"),
            "2+3=5\n5*4=20\n": texts("answer 20", "answer 20", "answer 20", "answer 20"),
        },
    )


def test_a_step_is_worth_the_share_of_continuations_that_reach_the_answer(answers):
    model, seen = solver(), []
    (group,) = StepLabels(answers=answers, continuations=4).make([attempt(), attempt()], model, sink=seen.append)
    right, wrong = group.completions  # equal ones once, and none that was cut off
    # two of four reach 14; one repeats a right sum and is cut off before it answers
    assert right.values == (0.5, 1.0, 1.0)
    assert wrong.values == (0.25, 0.0, 0.0)
    assert [right.text[a:b] for a, b in zip((0, *right.ends), right.ends, strict=False)] == ["3*4=12\n", "2+12=14\n", "answer 14"]
    assert (group.rewards, group.prompt.reference) == ((1.0, 0.0), "14")
    assert seen == [group]
    assert len(model.begun) == 4


def test_hard_labels_need_one_right_continuation(answers):
    (group,) = StepLabels(answers=answers, continuations=4, hard=True).make([attempt()], solver())
    assert [c.values for c in group.completions] == [(1.0, 1.0, 1.0), (1.0, 0.0, 0.0)]


def test_the_labels_are_what_a_process_reward_model_learns_from(answers):
    (group,) = StepLabels(answers=answers, continuations=4).make([attempt()], solver())
    learnt = ProcessReward().prepare(group)
    # after the first step from which nothing reached the answer nothing is supervised
    assert learnt.rewards == (0.5, 1.0, 1.0, 0.25, 0.0)
    assert ProcessReward(labels="outcome").prepare(group).rewards == (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)


def test_failed_continuations_are_no_label_and_problems_without_an_answer_are_counted(answers, caplog):
    model = solver()
    model.continued["3*4=12\n"] = texts("", "", "", "", finish="error")
    (group,) = StepLabels(answers=answers, continuations=4).make([attempt(), attempt("What is 1+1?")], model)
    assert group.completions[0].values == (None, 1.0, 1.0)
    assert "1 of 2 problems gave no group: 1 its answer is not known" in caplog.text
    assert "1 steps have no value, since all continuations from them failed" in caplog.text


def test_a_completer_that_cannot_go_on_from_a_begun_solution_is_an_error_and_gives_no_group(answers):
    model, seen = solver(), []
    model.continued = {text: texts("", "", "", "", finish="error") for text in model.continued}
    with pytest.raises(ModelError, match="continued none of 4 begun solutions") as error:
        StepLabels(answers=answers, continuations=4).make([attempt()], model, sink=seen.append)
    assert "openai+prefill:NAME" in error.value.hint
    assert seen == []


def test_blank_lines_are_no_steps(answers):
    spaced = Solver(texts(RIGHT.replace("\n", "\n \n")), solver().continued)
    (group,) = StepLabels(answers=answers, continuations=4).make([attempt()], spaced)
    assert (group.completions[0].text, len(group.completions[0].ends)) == (RIGHT, 3)


def test_without_a_file_the_reference_of_the_prompt_is_the_answer():
    asked = attempt()
    asked = asked.model_copy(update={"prompt": asked.prompt.model_copy(update={"reference": "14"})})
    (group,) = StepLabels(continuations=4).make([asked], solver())
    assert group.rewards == (1.0, 0.0)


def test_a_temperature_of_zero_samples_nothing():
    with pytest.raises(ConfigError, match="temperature"):
        registry.create("align/step_labels", {"temperature": 0})


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        # by score: 0 right, 2 wrong, 3 right, 4 wrong, 6 wrong, 1 wrong, 5 wrong
        (1, [2]),  # 0.8 is one wrong solution
        (3, [2, 4, 0]),  # 2.4 are two, and the best of the rest is right
        (5, [2, 4, 6, 1, 0]),
        (6, [2, 4, 6, 1, 5, 0]),
        (7, [2, 4, 6, 1, 5, 0, 3]),  # of 5.6 wrong ones there are five
        (10, [2, 4, 6, 1, 5, 0, 3]),
    ],
)
def test_four_fifths_of_what_is_labelled_are_the_most_convincing_wrong_solutions(count, chosen):
    scores, right = [0.9, 0.2, 0.8, 0.7, 0.6, 0.1, 0.5], [True, False, False, True, False, False, False]
    assert convincing(scores, right, count) == chosen


def test_the_rest_may_be_wrong_too_and_what_has_no_score_is_not_chosen():
    assert convincing([0.9, 0.8, 0.7, None, 0.1], [False] * 5, 3) == [0, 1, 2]
    assert convincing([None, 0.5, 0.5, 0.4], [False, True, True, True], 2) == [1, 2]
    assert convincing([], [], 2) == []


LONG = "3*4=12\nanswer 12"


@pytest.fixture
def selector(monkeypatch):
    """The name of a process model that nobody trained."""
    model = tiny()
    model.head = ScoreHead.fresh(model.width, seed=3, higher_is="better", trained_by="align/process_reward", learns_from="process")
    monkeypatch.setattr(learned_reward, "opened", {"run:prm": model}.__getitem__)
    return "run:prm"


def test_a_selector_chooses_by_its_score_and_only_those_are_continued(answers, selector):
    model = solver()
    model.solutions = texts(RIGHT, WRONG, LONG)
    model.continued |= {"3*4=12\n": texts("answer 14", "answer 12", "answer 12", "answer 12")}
    everything = StepLabels(answers=answers, continuations=4).make([attempt()], model)
    (scores,) = learned_reward.LearnedReward(models=(selector,)).score(everything)
    better = max((1, 2), key=lambda k: scores[k])
    model.begun.clear()
    (group,) = StepLabels(answers=answers, solutions=3, continuations=4, selector=selector, labelled=1).make([attempt()], model)
    assert group.completions == (everything[0].completions[better],)
    assert group.rewards == (0.0,)
    assert group.provenance == {"selector": selector, "chosen_of": 3}
    assert len(model.begun) == len(group.completions[0].ends) - 1
    (two,) = StepLabels(answers=answers, solutions=4, continuations=4, selector=selector, labelled=2).make([attempt()], model)
    assert two.completions == tuple(everything[0].completions[k] for k in sorted((1, 2), key=lambda k: -scores[k]))


def test_a_selector_that_scores_whole_answers_is_refused_before_anything_is_asked(answers, selector):
    model = solver()
    learned_reward.opened(selector).head = None
    with pytest.raises(ModelError, match="run:prm does not score steps"):
        StepLabels(answers=answers, selector=selector, labelled=1).make([attempt()], model)
    assert not model.begun


@pytest.mark.parametrize("options", [{"selector": "run:prm"}, {"labelled": 2}, {"selector": "run:prm", "labelled": 4}, {"selector": "run:prm", "labelled": -1}])
def test_a_selector_and_how_many_it_chooses_go_together(options):
    with pytest.raises(ConfigError, match="a selector chooses some of the solutions"):
        registry.create("align/step_labels", options)
