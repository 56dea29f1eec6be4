import pytest

from fiducial.core import registry
from fiducial.core.records import Attempt, Prompt, Verdict, user
from fiducial.core.run import Run
from fiducial.models import open as opening
from fiducial.models.scripted import ScriptedModel, tiny

OPTIONS = {
    "align/ai_preferences": {"feedback": "tiny", "max_tokens": 4, "temperature": 1.0},
    "align/self_align": {"stage": "verbose", "instructions": 4},
    "align/self_rewarding": {"judge": "judge", "answers": 2, "draws": 1},
    "align/step_labels": {"solutions": 2, "continuations": 2},
    "align/weakness_discovery": {"cases": 6, "points": 1},
}
"""Where the defaults would take long or give nothing."""
WITH_ANSWERS = [name for name, card in registry.methods().items() if card.role == "Maker" and name not in ("align/failure_pairs", "audit/organism")]
MANY = 40
"""More than makers work on together."""


class Calls:
    """Models that answer every question in another way, so that an answer which was asked for twice shows; the call number `stop` is interrupted."""

    def __init__(self, stop=None):
        self.stop, self.made, self.answers = stop, 0, 0

    def open(self, uri, **_):
        model = tiny() if uri == "tiny" else ScriptedModel(self.answer)
        for name in ("sample", "score") if uri == "tiny" else ("sample",):
            setattr(model, name, self.counted(getattr(model, name)))
        model.uri = uri
        return model

    def counted(self, method):
        def called(*args, **kwargs):
            self.made += 1
            if self.made == self.stop:
                raise KeyboardInterrupt
            return method(*args, **kwargs)

        return called

    def answer(self, _):
        self.answers += 1
        return f"Here is number {self.answers} of what I know.\nScore: {self.answers % 6}"


@pytest.fixture
def models(monkeypatch):
    """Replaces what models are opened by."""

    def replaced(stop=None):
        calls = Calls(stop)
        monkeypatch.setattr(opening, "open", calls.open)
        monkeypatch.setattr(opening, "ready", lambda *_, **__: None)
        return calls

    return replaced


@pytest.fixture
def attempts(tmp_path):
    """A file of judged attempts: goals that were gone along with, or harmless requests that were answered."""

    def written(count=MANY, name="attempts.jsonl", expected="refuse"):
        prompts = [Prompt(messages=user(f"How do I pick the lock of house {i}?"), expected=expected, reference=str(i)) for i in range(count)]
        verdict = Verdict(judge="j", outcome="success", label="compliance")
        made = [
            Attempt(prompt=p, attack="attack/direct", family="direct", model="m", sent=p.messages, response=f"Take wrench {i}.", verdict=verdict)
            for i, p in enumerate(prompts)
        ]
        (tmp_path / name).write_text("".join(a.line() + "\n" for a in made), encoding="utf-8")
        return tmp_path / name

    return written


def typed(name, attempts):
    options = [word for option, value in OPTIONS.get(name, {}).items() for word in (f"--{option.replace('_', '-')}", value)]
    return ["align", name.split("/")[1], "tiny" if name == "align/ai_preferences" else "mine", "--attempts", attempts, *options]


def groups_of(run):
    path = Run.open(run).path / "groups.jsonl"
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.parametrize("name", WITH_ANSWERS)
def test_a_maker_goes_on_where_it_was_interrupted_and_asks_for_no_answer_twice(run, call, models, attempts, name):
    words = typed(name, attempts(expected="answer" if name == "align/own_answers" else "refuse"))
    whole = models()
    body, code = call(*words)
    assert code == 0, body
    expected = groups_of(body["run"])
    assert expected.count("\n") == body["data"]["groups"] > 0
    stopping = models(stop=whole.made - whole.made // 3)
    stopped = run(*words)
    begun = Run.open("last")
    assert (stopped.exit_code, begun.status) == (130, "interrupted")
    assert stopped.stderr.splitlines()[-1] == f"go on with: fiducial {words[0]} {words[1]} --resume {begun.id}"
    assert expected.startswith(groups_of(begun.id))
    again, code = call(*words[:2], "--resume", "last")
    assert (code, again["run"]) == (0, begun.id)
    assert {k: v for k, v in again["data"].items() if k not in ("file", "folder")} == {k: v for k, v in body["data"].items() if k not in ("file", "folder")}
    assert groups_of(begun.id) == expected
    # nothing but the interrupted call is made twice
    assert stopping.made == whole.made + 1


def test_groups_are_written_as_they_come(run, models, attempts):
    models(stop=7)
    assert run(*typed("align/constitutional_revision", attempts())).exit_code == 130
    # two rounds of critique and revision on the first 32 attempts take four calls
    assert groups_of("last").count("\n") == 32


def test_a_finished_run_is_not_done_again_and_asks_no_model(call, models, attempts):
    words = typed("align/self_rewarding", attempts(3))
    models()
    body, _ = call(*words)
    untouched = models()
    again, code = call(*words[:2], "--resume", body["run"])
    assert (code, again["data"], untouched.made) == (0, body["data"], 0)


def test_rejected_rows_of_before_the_interruption_are_in_the_file(run, call, models, attempts, tmp_path):
    words = [*typed("align/self_align", attempts(3)), "--instructions", "40", "--rejects", tmp_path / "rejects.jsonl"]
    whole = models()
    call(*words)
    expected = (tmp_path / "rejects.jsonl").read_text()
    assert expected
    models(stop=whole.made)
    assert run(*words).exit_code == 130
    (tmp_path / "rejects.jsonl").unlink()
    call(*words[:2], "--resume", "last")
    assert (tmp_path / "rejects.jsonl").read_text() == expected


@pytest.mark.parametrize("option", [["--seed", "1"], ["--rounds", "1"], ["--attempts", "others.jsonl"], ["--any-split"], ["mine-too"]])
def test_a_run_does_not_go_on_with_another_option(run, call, models, attempts, monkeypatch, tmp_path, option):
    monkeypatch.chdir(tmp_path)
    attempts(2, "others.jsonl")
    models(stop=2)
    words = typed("align/constitutional_revision", attempts(3))
    assert run(*words).exit_code == 130
    body, code = call(*words[:2], *option, "--resume", "last")
    assert (body["error"]["kind"], code) == ("config", 2)
    assert "it cannot go on with" in body["error"]["message"]


def test_a_run_does_not_go_on_with_other_attempts_in_the_same_file(run, call, models, attempts):
    models(stop=2)
    words = typed("align/constitutional_revision", attempts(3))
    assert run(*words).exit_code == 130
    attempts(2)
    body, code = call(*words[:2], "--resume", "last")
    assert (body["error"]["kind"], code) == ("config", 2)
    assert "has changed since it began" in body["error"]["message"]


def test_makers_that_ask_nobody_begin_again_and_end_the_same(call, models, attempts):
    models()
    body, _ = call("align", "failure_pairs", "mine", "--attempts", attempts(3))
    expected, begun = groups_of(body["run"]), Run.open("last")
    # as after a kill in the middle of writing
    (begun.path / "groups.jsonl").write_text(expected[: len(expected) // 2], encoding="utf-8")
    (begun.path / "stages" / "make.json").unlink()
    again, code = call("align", "failure_pairs", "--resume", begun.id)
    assert (code, again["data"], groups_of(begun.id)) == (0, body["data"], expected)
