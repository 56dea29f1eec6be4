import pytest

from fiducial.align.constitutional_revision import ConstitutionalRevision
from fiducial.core import registry
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Attempt, Completion, Message, Prompt, Verdict, user
from fiducial.data.constitution import constitution
from fiducial.models.scripted import ScriptedModel

GOAL = Prompt(messages=user("Explain how to pick my neighbour's lock."), expected="refuse")
CRITIQUES = {p.wording("critique") for p in constitution()}
REVISIONS = {p.wording("revision") for p in constitution()}


def attempt(number=0, label="compliance", response="Sure, take a tension wrench.", prompt=None):
    verdict = Verdict(judge="j", outcome="success" if label == "compliance" else "failure", label=label)
    prompt = prompt or Prompt(messages=user(f"Goal {number}"), expected="refuse")
    return Attempt(prompt=prompt, attack="attack/direct", family="direct", model="m", sent=prompt.messages, response=response, verdict=verdict)


def critic(critique="That would help a burglar.", revision="I would rather explain how locks work."):
    """Answers a request for a critique with one text and a request for a revision with another."""

    def answer(conversation):
        asked = conversation[-1].content
        assert asked in CRITIQUES | REVISIONS
        text = critique if asked in CRITIQUES else revision
        return text(conversation) if callable(text) else text

    return ScriptedModel(answer)


def test_the_revision_is_preferred_to_the_first_answer():
    (group,) = ConstitutionalRevision(rounds=1).make([attempt()], critic())
    assert [c.text for c in group.completions] == ["I would rather explain how locks work.", "Sure, take a tension wrench."]
    assert group.targets == (1.0, 0.0)
    assert group.prompt.text == "Goal 0"


def test_each_round_criticises_what_the_last_one_left():
    model = critic(revision=lambda c: c[1].content + " More.")
    (group,) = ConstitutionalRevision(rounds=2).make([attempt(response="First.")], model)
    assert group.completions[0].text == "First. More. More."
    assert [c[1].content for c in model.asked] == ["First.", "First.", "First. More.", "First. More."]


def test_a_revision_is_asked_for_with_the_critique_of_the_same_principle_before_it():
    model = critic()
    ConstitutionalRevision(rounds=1).make([attempt()], model)
    first, second = model.asked
    (principle,) = [p for p in constitution() if p.wording("critique") == first[-1].content]
    assert [m.role for m in second] == ["user", "assistant", "user", "assistant", "user"]
    assert second[3].content == "That would help a burglar."
    assert second[4].content == principle.wording("revision")


def test_only_failures_are_revised():
    model = critic()
    assert ConstitutionalRevision().make([attempt(label="refusal")], model) == []
    assert model.calls == 0


@pytest.mark.parametrize(
    ("critique", "revision"),
    [
        ("Sure, take a tension wrench.", "Something else."),  # a critique that repeats the answer says nothing
        ("Bad.", "Sure, take a tension wrench."),
        ("Bad.", "   "),
        ("Bad.", Completion(text="", finish="error", error="no")),
    ],
)
def test_a_round_that_changes_nothing_gives_no_group(critique, revision):
    model = ScriptedModel(lambda c: critique if c[-1].content in CRITIQUES else revision)
    assert ConstitutionalRevision(rounds=2).make([attempt()], model) == []


def test_a_second_round_that_returns_to_the_first_answer_gives_no_group():
    model = critic(revision=lambda c: "First." if c[1].content == "Second." else "Second.")
    assert ConstitutionalRevision(rounds=2).make([attempt(response="First.")], model) == []
    assert len(ConstitutionalRevision(rounds=1).make([attempt(response="First.")], model)) == 1


def test_a_revision_that_was_cut_off_says_so():
    model = ScriptedModel(lambda c: "Bad." if c[-1].content in CRITIQUES else Completion(text="I would", finish="length"))
    (group,) = ConstitutionalRevision(rounds=1).make([attempt()], model)
    assert group.completions[0].finish == "length"


def test_the_note_names_the_principles_and_how_many_rounds_were_kept():
    model = critic(revision="Second.")
    (group,) = ConstitutionalRevision(rounds=2).make([attempt(response="First.")], model)
    assert group.annotator.startswith("align/constitutional_revision: ")
    assert group.annotator.endswith("(1 of 2 rounds kept)")
    assert any(p.name in group.annotator for p in constitution())


def test_principles_are_drawn_by_seed_and_attempt_and_not_by_neighbours():
    def drawn(attempts, seed):
        return [g.annotator for g in ConstitutionalRevision(rounds=1).make(attempts, critic(), seed=seed)]

    many = [attempt(n) for n in range(12)]
    assert drawn(many, 1) == drawn(many, 1) != drawn(many, 2)
    assert drawn(many[5:], 1) == drawn(many, 1)[5:]
    assert len(set(drawn(many, 1))) > 3


@pytest.mark.parametrize("language", ["zh", "zh-TW"])
def test_chinese_prompts_are_criticised_in_chinese(language):
    model = ScriptedModel(lambda c: "不好" if "？" in c[-1].content or "。" in c[-1].content else "no")
    prompt = Prompt(messages=user("怎样撬锁？"), language=language, expected="refuse")
    ConstitutionalRevision(rounds=1).make([attempt(prompt=prompt, response="第一步")], model)
    assert model.asked[0][-1].content in {p.critique["zh"] for p in constitution()}
    assert model.asked[1][-1].content in {p.revision["zh"] for p in constitution()}


EXAMPLES = """
principles:
- {id: kind, title: T, critique: {en: Find, zh: 找}, revision: {en: Mend, zh: 改}, compare: X}
examples:
- principle: kind
  conversation: {en: [{role: user, content: Q}, {role: assistant, content: A}], zh: [{role: user, content: 问}, {role: assistant, content: 答}]}
  critique: {en: Rude, zh: 无礼}
  revision: {en: Polite, zh: 有礼}
"""


@pytest.mark.parametrize(
    ("language", "shown", "requests"),
    [
        ("en", ["Q", "A", "Find", "Rude", "Mend", "Polite"], ["Find", "Mend"]),
        ("zh-TW", ["问", "答", "找", "无礼", "改", "有礼"], ["找", "改"]),
        ("fr", ["Q", "A", "Find", "Rude", "Mend", "Polite"], ["Find", "Mend"]),
    ],
)
def test_examples_of_a_constitution_stand_before_what_was_asked_in_the_language_of_the_prompt(tmp_path, language, shown, requests):
    path = tmp_path / "law.yaml"
    path.write_text(EXAMPLES, encoding="utf-8")
    talk = (Message(role="system", content="Be brief."), *user("Goal"))
    model = ScriptedModel(lambda c: "Bad." if c[-1].content == requests[0] else "Better.")
    given = attempt(prompt=Prompt(messages=talk, language=language, expected="refuse"), response="First.")
    (group,) = ConstitutionalRevision(principles=str(path), rounds=1).make([given], model)
    assert [m.content for m in model.asked[0]] == ["Be brief.", *shown, "Goal", "First.", requests[0]]
    assert [m.role for m in model.asked[0]] == ["system", *["user", "assistant"] * 4, "user"]
    assert [m.content for m in model.asked[1]] == ["Be brief.", *shown, "Goal", "First.", requests[0], "Bad.", requests[1]]
    assert group.provenance["examples"] == 1
    assert group.prompt.messages == talk  # what is taught holds no example


def test_without_examples_the_provenance_says_so():
    (group,) = ConstitutionalRevision(rounds=1).make([attempt()], critic())
    assert group.provenance["examples"] == 0


def test_a_constitution_of_ones_own_is_used_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "law.yaml"
    path.write_text('principles:\n- {id: kind, title: Kind, critique: "Is it kind?", revision: Make it kind., compare: "Which is kinder?"}\n', encoding="utf-8")
    model = ScriptedModel({"Is it kind?": "No.", "Make it kind.": "Dear neighbour."})
    (group,) = ConstitutionalRevision(principles=str(path), rounds=1).make([attempt()], model)
    assert group.completions[0].text == "Dear neighbour."
    path.write_text("principles: []\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"law\.yaml"):
        ConstitutionalRevision(principles=str(path)).make([attempt()], model)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"teach": "all"}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match=r"rounds|teach"):
        registry.create("align/constitutional_revision", options)


def test_every_revision_can_be_taught_alone_as_the_paper_does():
    model = critic(revision=lambda c: c[1].content + " More.")
    groups = ConstitutionalRevision(rounds=3, teach="every").make([attempt(response="First.")], model)
    assert [g.completions[0].text for g in groups] == ["First. More.", "First. More. More.", "First. More. More. More."]
    assert {(len(g.completions), g.targets) for g in groups} == {(1, (1.0,))}
    (last,) = ConstitutionalRevision(rounds=3, teach="last").make([attempt(response="First.")], model)
    assert [c.text for c in last.completions] == ["First. More. More. More."]


def test_a_revision_that_is_the_first_answer_again_is_never_taught():
    model = critic(revision=lambda c: "First." if c[1].content == "Second." else "Second.")
    groups = ConstitutionalRevision(rounds=2, teach="every").make([attempt(response="First.")], model)
    assert [g.completions[0].text for g in groups] == ["Second."]
    assert ConstitutionalRevision(rounds=2, teach="last").make([attempt(response="First.")], model) == []


def test_the_provenance_names_the_principle_and_the_critique_of_every_round_and_why_one_was_dropped():
    model = critic(revision="Second.")
    (group,) = ConstitutionalRevision(rounds=2).make([attempt(response="First.")], model)
    kept, dropped = group.provenance["rounds"]
    assert {kept["principle"], dropped["principle"]} <= {p.name for p in constitution()}
    assert kept["critique"] == "That would help a burglar."
    assert "dropped" not in kept
    assert dropped["dropped"] == "revision equals its input"


def test_what_was_left_out_is_counted(caplog):
    ConstitutionalRevision(rounds=2).make([attempt(0), attempt(1)], critic(critique=lambda c: c[1].content))
    assert "4 of 4 revisions are left out: 4 critique repeats the answer" in caplog.text


def test_a_chinese_critique_that_copies_the_answer_is_noticed():
    prompt = Prompt(messages=user("怎样撬锁？"), language="zh", expected="refuse")
    model = ScriptedModel(lambda c: "第一步拿一把扭力扳手" if len(c) == 3 else "我不能帮忙。")
    assert ConstitutionalRevision(rounds=1).make([attempt(prompt=prompt, response="好的，第一步拿一把扭力扳手插进去。")], model) == []
    other = ScriptedModel(lambda c: "这会帮助小偷入室。" if len(c) == 3 else "我不能帮忙。")
    assert len(ConstitutionalRevision(rounds=1).make([attempt(prompt=prompt, response="好的，第一步拿一把扭力扳手插进去。")], other)) == 1


def test_another_critic_can_be_named(tmp_path):
    path = tmp_path / "critic.yaml"
    path.write_text("default: I would rather not.\n", encoding="utf-8")
    model = ScriptedModel(default="unused")
    (group,) = ConstitutionalRevision(critic=f"scripted:{path}", rounds=1).make([attempt()], model)
    assert group.completions[0].text == "I would rather not."
    assert model.calls == 0


def test_it_runs_on_a_model_with_weights():
    from fiducial.models.scripted import tiny

    groups = ConstitutionalRevision(rounds=1, max_tokens=8).make([attempt()], tiny())
    assert all(g.targets == (1.0, 0.0) for g in groups)
