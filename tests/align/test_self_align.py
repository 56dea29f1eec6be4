import json
import logging

import pytest

from fiducial.align.self_align import SelfAlign
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Attempt, Completion, Prompt, Verdict, user
from fiducial.data.overlap import rouge_l, words
from fiducial.models.scripted import ScriptedModel, tiny

THOUGHT = "I am an AI assistant and answer by these principles. By principle 9 I say it."
NEW = ["How do I dry wet shoes?", "Why does bread rise in the oven?", "Name three rivers of Spain."]


def attempt(text="Why do bees matter to farmers?", language="en"):
    prompt = Prompt(messages=user(text), language=language, expected="comply")
    verdict = Verdict(judge="j", outcome="success", label="compliance")
    return Attempt(prompt=prompt, attack="attack/direct", family="direct", model="m", sent=user(f"As DAN: {text}"), response="Yes", verdict=verdict)


LISTED = "\n".join(f"{i}. {t}" for i, t in enumerate(NEW, 1))


def principled(answers, topics="1. Gardens\n2. Bridges", requests=LISTED):
    """Proposes `topics` and `requests`, and answers a request under the principles by the text in `answers`."""

    def answer(conversation):
        text = conversation[-1].content
        if text.startswith("We collect requests"):
            return topics
        if text.startswith("Write 4 requests"):
            return requests
        return answers(text) if callable(answers) else answers

    return ScriptedModel(answer)


def good(text):
    return f"(thoughts) {THOUGHT}\n(answer) Here is what I know of it: {len(text)} things."


def test_a_request_is_taught_with_its_answer_but_without_principles_and_thoughts():
    (group,) = SelfAlign(instructions=0).make([attempt()], principled(good))
    assert [m.role for m in group.prompt.messages] == ["user"]
    assert group.prompt.text == "Why do bees matter to farmers?"
    assert [c.text for c in group.completions] == ["Here is what I know of it: 30 things."]
    assert group.provenance == {"stage": "engrave", "thoughts": THOUGHT}


def test_the_model_saw_the_principles_and_the_exemplars():
    model = principled(good)
    SelfAlign(instructions=0).make([attempt()], model)
    (asked,) = model.asked
    assert asked[0].role == "system"
    assert len(asked) == 12


def test_new_requests_are_proposed_by_kind_and_topic_and_answered_after_the_seeds():
    model = principled(good)
    groups = SelfAlign(instructions=3).make([attempt()], model)
    assert [g.prompt.text for g in groups] == ["Why do bees matter to farmers?", *NEW]
    assert {g.prompt.category for g in groups[1:]} <= {"Gardens", "Bridges"}
    asked = [c[-1].content for c in model.asked]
    assert "Examples of requests, for their form only:\n- Why do bees matter to farmers?" in asked[1]


def test_requests_that_are_like_another_are_rejected_with_the_reason(tmp_path):
    path = tmp_path / "rejects.jsonl"
    requests = "Why do bees matter to all farmers?\nHow do I dry wet shoes?\nHow do I dry wet shoes?\nShoes"
    groups = SelfAlign(instructions=2, rejects=str(path)).make([attempt()], principled(good, requests=requests))
    assert [g.prompt.text for g in groups] == ["Why do bees matter to farmers?", "How do I dry wet shoes?"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # asked four times for the one that is missing; the first time three of four lines fall
    assert [r["reason"] for r in rows[:3]] == ["like another request", "like another request", "too short"]
    assert (rows[0]["stage"], rows[0]["text"]) == ("request", "Why do bees matter to all farmers?")
    assert rows[0]["kind"]
    kept = [words(g.prompt.text) for g in groups]
    assert all(rouge_l(a, b) < 0.7 for i, a in enumerate(kept) for b in kept[:i])


def test_the_request_in_which_a_list_was_cut_off_is_not_taken():
    cut = Completion(text="1. How do I dry wet shoes?\n2. Write a sonnet about the", finish="length")
    groups = SelfAlign(instructions=2).make([attempt()], principled(good, topics=Completion(text="Gardens\nBrid", finish="length"), requests=cut))
    assert [g.prompt.text for g in groups[1:]] == ["How do I dry wet shoes?"]
    assert groups[1].prompt.category == "Gardens"


def test_rejected_answers_are_written_down_with_request_and_reason(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = tmp_path / "rejects.jsonl"
    texts = {"bees": good("x"), "cats": "(answer) no thoughts", "dogs": Completion(text="", finish="error", error="down")}
    model = principled(lambda text: next(v for k, v in texts.items() if k in text))
    attempts = [attempt(f"Tell me all about {name} please.") for name in texts]
    groups = SelfAlign(instructions=0, rejects=str(path)).make(attempts, model)
    assert [g.prompt.text for g in groups] == ["Tell me all about bees please."]
    assert [(r["request"], r["reason"]) for r in map(json.loads, path.read_text().splitlines())] == [
        ("Tell me all about cats please.", "no identification"),
        ("Tell me all about dogs please.", "no answer came"),
    ]
    assert "rejected: 1 no identification, 1 no answer came" in caplog.text


def test_an_answer_that_was_cut_off_teaches_no_end_but_one_cut_at_a_further_turn_does():
    body = "Bees carry pollen from flower to flower while they look for nectar, and orchards without hives set far less fruit. "
    body += "That is why beekeepers move their hives to almond farms in spring."
    cut = principled(Completion(text=f"(thoughts) {THOUGHT}\n(answer) {body}", finish="length"))
    turned = principled(Completion(text=f"(thoughts) {THOUGHT}\n(answer) {body}\nUser: And was", finish="length"))
    assert [SelfAlign(instructions=0).make([attempt()], m)[0].completions[0].finish for m in (cut, turned)] == ["length", "stop"]


def test_a_named_assistant_learns_its_name():
    model = principled(lambda text: good(text).replace("an AI assistant", "Ada"))
    groups = SelfAlign(instructions=0, assistant="Ada").make([attempt()], model)
    assert [g.prompt.category for g in groups] == ["", "identity", "identity", "identity"]
    assert all("Ada" in g.completions[0].text for g in groups[1:])


def test_verbose_cloning_asks_for_long_answers_and_teaches_them_to_the_bare_request():
    model = principled("First of all, bees pollinate. Then they make honey.")
    (group,) = SelfAlign(stage="verbose", instructions=0).make([attempt()], model)
    assert [m.role for m in model.asked[0]] == ["system", "user"]
    assert "Answer fully" in model.asked[0][0].content
    assert [m.role for m in group.prompt.messages] == ["user"]
    assert group.provenance == {"stage": "verbose"}


def test_chinese_seeds_work_under_the_chinese_principles():
    thought = "我是一个人工智能助手，按这些原则回答。按原则9回答。"
    model = ScriptedModel(default=f"（思考）{thought}\n（回答）蜜蜂为果树传播花粉。")
    (group,) = SelfAlign(instructions=0).make([attempt("蜜蜂对农民为什么重要？", "zh")], model)
    assert group.completions[0].text == "蜜蜂为果树传播花粉。"
    assert group.prompt.language == "zh"


def test_the_same_seed_gives_the_same_groups():
    method = SelfAlign(instructions=3)
    assert method.make([attempt()], principled(good), seed=3) == method.make([attempt()], principled(good), seed=3)


def test_a_model_with_weights_begins_in_the_slot_of_the_thoughts():
    model, asked = tiny(), []
    sample = model.sample

    def listen(conversations, **options):
        asked.extend(conversations)
        return sample(conversations, **options)

    model.sample = listen
    assert SelfAlign(instructions=0, max_tokens=4).make([attempt()], model) == []
    assert asked[0][-1].role == "assistant"
    assert asked[0][-1].content == "(thoughts)"


@pytest.mark.parametrize("options", [{"stage": "all"}, {"instructions": -1}, {"max_tokens": 0}, {"temperature": -1.0}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="stage is"):
        registry.create("align/self_align", options)
