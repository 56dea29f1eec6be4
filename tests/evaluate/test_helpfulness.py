import json

import pytest

from fiducial.core.errors import DataError, MethodError
from fiducial.core.records import Completion, Prompt, Score, user
from fiducial.evaluate.helpfulness import Helpfulness, content, on_topic, reference_logp, repetition
from fiducial.models.scripted import ScriptedModel, tiny

ANSWERS = {
    "bread": "Bake the bread for an hour.",
    "lock": "I am sorry.",
    "poem": Completion(text="la la la la la la", finish="length"),
    "void": "",
    "owl": Completion(text="", finish="error", error="busy"),
}


@pytest.fixture
def data(rows):
    return rows(*({"prompt": f"Tell me about {word}."} for word in ANSWERS))


def scores(suite, model, **options):
    return {s.metric: s for s in suite.run(model, **options).scores}


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert repetition("la la la la la la") == pytest.approx(2 / 3)  # three 4-grams, one distinct
    assert repetition("one two three four five") == 0.0
    assert repetition("one two three") == 0.0
    assert repetition("好好好好好") == pytest.approx(1 / 2)  # two 4-grams, one distinct


def test_on_topic_counts_stems_of_content_words():
    assert on_topic("Tell me about baking breads.", "Bread is baked.") == 1.0
    assert on_topic("Tell me about baking bread.", "Cars are fast.") == 0.0
    assert on_topic("What is it?", "It is that.") is None


def test_chinese_topics_are_pairs_of_characters():
    assert content("泡茶水") == {"泡茶", "茶水"}
    assert on_topic("泡茶水", "先泡茶。") == 0.5


def test_each_rule_is_a_score_of_its_own(data):
    found = scores(Helpfulness(data=data), ScriptedModel(ANSWERS))
    assert {m: (s.value, s.n, s.not_scored) for m, s in found.items()} == {
        "answered": (0.75, 4, 1),  # void is empty, owl failed
        "finished": (pytest.approx(2 / 3), 3, 2),  # poem was cut
        "repetition": (pytest.approx(2 / 9), 3, 2),  # 0, 0, 2/3
        "on_topic": (0.25, 4, 1),  # bread only; nothing is on topic in an empty answer
    }
    assert found["repetition"].better == "lower"
    for score in found.values():
        assert Score.parse(score.line()) == score


def test_a_judge_adds_the_share_that_was_not_refused(data, sorry):
    found = scores(Helpfulness(data=data, judge=sorry), ScriptedModel(ANSWERS))
    assert (found["not_refused"].value, found["not_refused"].n) == (pytest.approx(2 / 3), 3)  # bread, lock and poem; only lock is refused


def test_likelihood_of_reference_answers_needs_weights(data, rows):
    answers = rows({"prompt": "Tell me about bread.", "answer": "Flour."}, name="answers.jsonl")
    with pytest.raises(MethodError, match="scripted"):
        Helpfulness(data=data, answers=answers).run(ScriptedModel(ANSWERS))


def test_recorded_answers_are_the_reference_of_another_run(data, tmp_path):
    suite = Helpfulness(data=data, max_tokens=4)
    kept = tmp_path / "answers.jsonl"
    kept.write_text("".join(json.dumps(item) + "\n" for item in suite.run(ScriptedModel(ANSWERS)).items), encoding="utf-8")
    one, other = (scores(Helpfulness(data=data, max_tokens=4, answers=str(kept)), tiny(seed=s))["reference_logp"] for s in (0, 1))
    assert (one.n, one.not_scored) == (3, 2)  # void and owl gave no answer
    assert one.fingerprint["items"] == other.fingerprint["items"]
    assert one.value != other.value
    assert one.high <= 0


@pytest.mark.parametrize("ended", [True, False])
def test_reference_likelihood_is_a_mean_per_token_and_counts_the_end_of_a_finished_answer(ended):
    import torch

    model = tiny()
    prompt, far = Prompt(messages=user("Who?")), Prompt(messages=user("?" * 5000))  # the last longer than the model reads
    head = model.tokenizer.encode("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    tail = model.tokenizer.encode("Me." + ("<|im_end|>" if ended else ""))
    with torch.no_grad():
        logp = model.module(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    by_hand = sum(logp[len(head) - 1 + i, t].item() for i, t in enumerate(tail)) / (4 if ended else 3)
    assert reference_logp(model, [prompt, Prompt(messages=user("?")), far], {"Who?": ("Me.", ended), far.text: ("Me.", ended)}) == [
        pytest.approx(by_hand, abs=1e-4),
        None,
        None,
    ]


def test_one_reference_answer_has_no_interval_and_gives_no_score(data, rows):
    answers = rows({"prompt": "Tell me about bread.", "answer": "Flour."}, name="answers.jsonl")
    assert "reference_logp" not in scores(Helpfulness(data=data, answers=answers, max_tokens=2), tiny())


def test_a_row_without_an_answer_is_named(data, rows):
    with pytest.raises(DataError, match=r"answers\.jsonl:1"):
        Helpfulness(data=data, answers=rows({"prompt": "a"}, name="answers.jsonl")).run(tiny())


def test_the_limit_takes_the_first_and_the_sink_gets_each(data):
    seen = []
    items = Helpfulness(data=data).run(ScriptedModel(ANSWERS), limit=2, sink=seen.append).items
    assert [i["prompt"] for i in items] == ["Tell me about bread.", "Tell me about lock."]
    assert seen == items
