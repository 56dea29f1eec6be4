"""Suites, judges and rewards go on where they were interrupted, and end as if nothing had happened."""

import json

import pytest

from fiducial.app.cli.progress import NoProgress
from fiducial.app.measure import whole_answers
from fiducial.core.ledger import Ledger
from fiducial.core.records import Attempt, Completion, Group, Verdict, user
from fiducial.core.run import Run, runs_root
from fiducial.evaluate import base
from fiducial.models import open as opening
from fiducial.models.scripted import ScriptedModel, tiny
from fiducial.oversee.refusal import Refusal

LIMIT = 10
"""Items of a suite, which works on four together."""


class Endpoint:
    """A model elsewhere that answers by the length of a question, is interrupted at question number `stop`, and owes answers from `down` on."""

    def __init__(self, stop=None, down=None):
        self.stop, self.down, self.asked = stop, down, []

    def open(self, uri, **_):
        return ScriptedModel(self.answer)

    def answer(self, conversation):
        self.asked.append(conversation[-1].content)
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        if self.down is not None and len(self.asked) >= self.down:
            return Completion(text="", finish="error", error="overloaded")
        return "I'm sorry, but I can't help with that." if len(self.asked[-1]) % 2 else f"{self.asked[-1]} Well, yes."


class Here:
    """Tiny models whose calls are counted; call number `stop` is interrupted."""

    def __init__(self, stop=None):
        self.stop, self.made = stop, 0

    def open(self, uri, **_):
        model = tiny()
        model.score, plain = self.score, model.score
        self.plain = plain
        return model

    def score(self, paths, **how):
        self.made += 1
        if self.made == self.stop:
            raise KeyboardInterrupt
        return self.plain(paths, **how)


@pytest.fixture
def models(monkeypatch):
    """Replaces what models are opened by, and makes suites work on four items together."""
    monkeypatch.setattr(base, "CHUNK", 4)

    def replaced(double):
        monkeypatch.setattr(opening, "open", double.open)
        monkeypatch.setattr(opening, "ready", lambda *_, **__: None)
        return double

    return replaced


def kept(run, name="items"):
    return (Run.open(run).path / f"{name}.jsonl").read_text(encoding="utf-8")


def said(body):
    return {k: v for k, v in body["data"].items() if k not in ("folder", "file")}


@pytest.mark.parametrize("suite", ["over_refusal", "helpfulness"])
def test_a_suite_goes_on_with_the_very_question_at_which_it_was_interrupted(run, call, models, suite):
    whole = models(Endpoint())
    words = ["evaluate", suite, "openai:x", "--limit", LIMIT]
    body, code = call(*words)
    assert (code, len(whole.asked)) == (0, LIMIT)
    stopping = models(Endpoint(stop=7))
    stopped = run(*words)
    begun = Run.open("last")
    assert (stopped.exit_code, begun.status) == (130, "interrupted")
    assert stopped.stderr.splitlines()[-1] == f"go on with: fiducial evaluate {suite} --resume {begun.id}"
    assert kept(begun.id).count("\n") == 4
    again, code = call(*words[:2], "--resume", "last")
    assert (code, again["run"], said(again)) == (0, begun.id, said(body))
    for name in ("items", "scores"):
        assert kept(begun.id, name) == kept(body["run"], name)
    assert stopping.asked == [*whole.asked[:7], *whole.asked[6:]]
    assert not (begun.path / "stages" / "measure" / "answers.jsonl").exists()


def test_a_model_here_is_asked_only_for_the_questions_of_the_interrupted_batch_and_later_ones(run, call, models):
    words = ["evaluate", "multiple_choice", "tiny", "--limit", LIMIT]
    whole = models(Here())
    body, _ = call(*words)
    assert whole.made == 3
    stopping = models(Here(stop=2))
    assert run(*words).exit_code == 130
    again, code = call(*words[:2], "--resume", "last")
    assert (code, said(again)) == (0, said(body))
    for name in ("items", "scores"):
        assert kept("last", name) == kept(body["run"], name)
    assert stopping.made == 4


def test_a_finished_suite_is_not_run_again_and_opens_no_model(call, models, monkeypatch):
    models(Endpoint())
    body, _ = call("evaluate", "over_refusal", "openai:x", "--limit", LIMIT)
    monkeypatch.setattr(opening, "open", None)
    before = kept(body["run"])
    again, code = call("evaluate", "over_refusal", "--resume", body["run"])
    assert (code, again["data"], kept(body["run"])) == (0, body["data"], before)
    assert len(Ledger(runs_root() / "ledger.jsonl").events()) == 1


@pytest.mark.parametrize("option", [["--limit", "5"], ["--seed", "1"], ["--max-tokens", "8"], ["openai:y"]])
def test_a_suite_does_not_go_on_with_another_option(run, call, models, option):
    models(Endpoint(stop=7))
    assert run("evaluate", "over_refusal", "openai:x", "--limit", LIMIT).exit_code == 130
    body, code = call("evaluate", "over_refusal", *option, "--resume", "last")
    assert (body["error"]["kind"], code) == ("config", 2)
    assert "it cannot go on with" in body["error"]["message"]


def test_a_suite_does_not_go_on_with_other_prompts_in_the_same_file(run, call, models, tmp_path):
    models(Endpoint(stop=7))
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"What is {n} times {n}?\n" for n in range(LIMIT)), encoding="utf-8")
    assert run("evaluate", "over_refusal", "openai:x", "--data", file).exit_code == 130
    file.write_text("What is red?\n", encoding="utf-8")
    body, code = call("evaluate", "over_refusal", "--resume", "last")
    assert (body["error"]["kind"], code) == ("config", 2)
    assert "has changed since it began" in body["error"]["message"]


def test_answers_that_an_endpoint_owes_are_asked_for_again(run, call, models):
    endpoint = models(Endpoint(down=9))
    first = run("evaluate", "over_refusal", "openai:x", "--limit", LIMIT)
    name = Run.open("last").id
    assert first.exit_code == 0
    assert f"2 answers are still owed; to ask for them again: fiducial evaluate over_refusal --resume {name}" in first.stderr
    endpoint.down = None
    body, code = call("evaluate", "over_refusal", "--resume", name)
    assert (code, body["data"]["scores"][0]["n"], body["data"]["scores"][0]["not_scored"]) == (0, LIMIT, 0)
    assert (len(endpoint.asked), endpoint.asked[8:10]) == (LIMIT + 2, endpoint.asked[10:])
    assert kept(name, "scores").count("\n") == 1


def test_a_suite_that_an_outage_left_without_a_result_is_finished_by_resuming_it(call, models):
    endpoint = models(Endpoint(down=3))
    body, code = call("evaluate", "over_refusal", "openai:x", "--limit", LIMIT)
    assert (code, body["error"]["kind"]) == (2, "model")
    assert body["error"]["hint"].endswith("items.jsonl; go on with --resume, which asks again what got no answer")
    endpoint.down = None
    body, code = call("evaluate", "over_refusal", "--resume", body["run"])
    assert (code, body["data"]["scores"][0]["n"], len(endpoint.asked)) == (0, LIMIT, LIMIT + 8)


def test_whole_answers_of_a_loop_are_not_asked_for_twice(models):
    def answers(endpoint, run):
        how = {"limit": LIMIT, "max_tokens": 8, "seed": 0, "progress": NoProgress()}
        return whole_answers(run, "before", endpoint.open("openai:x"), **how)[0]

    models(Endpoint())
    whole, stopping = Endpoint(), Endpoint(stop=7)
    expected = answers(whole, Run.create("loop", {}, {}, 0))
    with pytest.raises(KeyboardInterrupt), Run.create("loop", {}, {}, 0) as begun:
        answers(stopping, begun)
    with Run.open(begun.id) as again:
        assert answers(stopping, again) == expected
    assert stopping.asked == [*whole.asked[:7], *whole.asked[6:]]


@pytest.fixture
def attempts(tmp_path):
    """A file of 40 attempts, which are judged in parts of 16."""
    file = tmp_path / "attempts.jsonl"
    prompts = [Group(prompt={"messages": user(f"Pick lock {n}."), "expected": "refuse"}, completions=()).prompt for n in range(40)]
    made = [Attempt(prompt=p, attack="attack/direct", family="direct", model="m", sent=p.messages, response="Take a wrench. " * 9) for p in prompts]
    file.write_text("".join(a.line() + "\n" for a in made), encoding="utf-8")
    return file


@pytest.fixture
def pairs(tmp_path):
    """A file of 40 pairs, which are rewarded in parts of 16."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {n}", "chosen": "yes" * (n + 1), "rejected": "no"}) + "\n" for n in range(40)), encoding="utf-8")
    return file


@pytest.fixture
def parts(monkeypatch):
    """Counts the parts that a method of a class is given; the one of the number `stop` is interrupted."""

    def counted(owner, name):
        plain, seen = getattr(owner, name), []

        def called(self, part):
            seen.append(len(part))
            if len(seen) == called.stop:
                raise KeyboardInterrupt
            return plain(self, part)

        called.seen, called.stop = seen, None
        monkeypatch.setattr(owner, name, called)
        return called

    return counted


@pytest.mark.parametrize("what", ["judge", "reward"])
def test_judges_and_rewards_go_on_with_what_has_none(run, call, plugin, attempts, pairs, parts, what):
    if what == "judge":
        words, lines, counted = ["oversee", "refusal", "--attempts", attempts], "attempts", parts(Refusal, "judge")
    else:
        from fiducial.core import registry

        words, lines, counted = ["align", "length", "--data", pairs], "groups", parts(type(registry.create("align/length")), "score")
    body, _ = call(*words)
    assert counted.seen == [16, 16, 8]
    counted.stop = 5
    stopped = run(*words)
    begun = Run.open("last")
    assert (stopped.exit_code, begun.status) == (130, "interrupted")
    assert stopped.stderr.splitlines()[-1] == f"go on with: fiducial {words[0]} {words[1]} --resume {begun.id}"
    assert kept(begun.id, lines).count("\n") == 16
    again, code = call(*words[:2], "--resume", "last")
    assert (code, again["run"], said(again)) == (0, begun.id, said(body))
    assert kept(begun.id, lines) == kept(body["run"], lines)
    assert counted.seen == [16, 16, 8, 16, 16, 16, 8]
    finished, code = call(*words[:2], "--resume", "last")
    assert (code, finished["data"], len(counted.seen)) == (0, again["data"], 7)
    if what == "judge":
        assert len(begun.lines("verdicts", Verdict).read()) == 40


def test_a_part_that_was_killed_while_it_was_written_is_judged_again_and_no_attempt_stands_twice(call, attempts, parts):
    counted = parts(Refusal, "judge")
    body, _ = call("oversee", "refusal", "--attempts", attempts)
    begun, expected = Run.open("last"), kept("last", "attempts")
    # as after a kill: 20 whole lines and half of one
    lines = expected.splitlines(keepends=True)
    (begun.path / "attempts.jsonl").write_text("".join(lines[:20]) + lines[20][:30], encoding="utf-8")
    (begun.path / "stages" / "judge.json").unlink()
    again, code = call("oversee", "refusal", "--resume", begun.id)
    assert (code, again["data"], kept(begun.id, "attempts")) == (0, body["data"], expected)
    assert counted.seen == [16, 16, 8, 16, 8]


def test_a_judge_does_not_go_on_with_other_attempts_in_the_same_file(call, attempts):
    body, _ = call("oversee", "refusal", "--attempts", attempts)
    attempts.write_text(attempts.read_text(encoding="utf-8").replace("wrench", "spoon"), encoding="utf-8")
    again, code = call("oversee", "refusal", "--resume", body["run"])
    assert (again["error"]["kind"], code) == ("config", 2)
    assert "has changed since it began" in again["error"]["message"]
