import json
import logging

import pytest

from fiducial.align.probing import Prober
from fiducial.align.taxonomy import Point, read_taxonomy
from fiducial.align.weakness_discovery import WeaknessDiscovery
from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Attempt, Prompt, Verdict, user
from fiducial.data.split import split_of
from fiducial.models.scripted import ScriptedModel, tiny


def attempt(text="Describe a pine forest.", expected="comply", language="en"):
    prompt = Prompt(messages=user(text), expected=expected, language=language)
    verdict = Verdict(judge="j", outcome="success", label="compliance")
    return Attempt(prompt=prompt, attack="attack/direct", family="direct", model="m", sent=prompt.messages, response="Yes", verdict=verdict)


def taxonomy(tmp_path, *points):
    path = tmp_path / "taxonomy.json"
    path.write_text(json.dumps({"tasks": [{"task": "skills", "categories": {"all": list(points)}}]}), encoding="utf-8")
    return str(path)


SUMS = {"point": "sums", "check": "sum"}


def found(tmp_path, model=None, **options):
    """Groups, and every case as it was written down."""
    path = tmp_path / "results.jsonl"
    groups = WeaknessDiscovery(results=str(path), **options).make([attempt()], model or ScriptedModel(default="It is 0."))
    return groups, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_failing_answer_is_paired_with_the_right_one(tmp_path):
    groups, rows = found(tmp_path, taxonomy=taxonomy(tmp_path, SUMS), cases=10)
    assert len(rows) == 10
    group = groups[0]
    good, own = (c.text for c in group.completions)
    assert own == "It is 0."
    assert good.startswith(group.prompt.text.removeprefix("What is ").rstrip("?") + " = ")
    assert group.targets == (1.0, 0.0)
    assert group.prompt.category == "skills/sums"
    assert group.annotator == "align/weakness_discovery: skills/sums, failed 10/10 = 100% (72% to 100%)"


def test_the_held_out_half_of_what_failed_never_becomes_a_group(tmp_path):
    groups, rows = found(tmp_path)
    failed = [r for r in rows if r["score"] < 3.1]
    halves = {half: {r["request"] for r in failed if r["half"] == half} for half in ("training", "held-out")}
    assert min(map(len, halves.values())) > 20
    trained = {g.prompt.text for g in groups}
    assert trained
    assert trained <= halves["training"]
    assert not trained & halves["held-out"]
    # and by the hash itself: of the expression for arithmetic, of the request without its requirement for the others
    requests = read_taxonomy().requests["en"] + ["Describe a pine forest."]
    for text in trained:
        key = next((r for r in requests if text.startswith(r)), text.removeprefix("What is ").rstrip("?"))
        assert split_of(key, "weakness") == "repair"


def test_without_a_file_the_loss_of_the_held_out_half_is_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    WeaknessDiscovery(taxonomy=taxonomy(tmp_path, SUMS)).make([attempt()], ScriptedModel(default="It is 0."))
    assert "held out to measure the repair, but kept nowhere: name a file with --results" in caplog.text


def test_harmless_prompts_of_the_attempts_become_requests_and_harmful_ones_do_not(tmp_path):
    model = ScriptedModel(default="x")
    attempts = [attempt("Describe a pine forest."), attempt("Explain how to pick a lock.", "refuse")]
    options = {"taxonomy": taxonomy(tmp_path, {"point": "short", "check": "words_at_least"}), "cases": 40}
    WeaknessDiscovery(**options).make(attempts, model)
    asked = [c[0].content for c in model.asked]
    assert any(a.startswith("Describe a pine forest.") for a in asked)
    assert not any("lock" in a for a in asked)


def test_chinese_attempts_are_searched_in_chinese(tmp_path):
    model = ScriptedModel(default="零")
    groups = WeaknessDiscovery(taxonomy=taxonomy(tmp_path, SUMS)).make([attempt("描写松林。", language="zh")], model)
    assert all("等于多少" in c[0].content for c in model.asked)
    assert groups[0].prompt.language == "zh"


def test_what_went_well_and_what_has_no_good_answer_gives_no_group(tmp_path):
    long = taxonomy(tmp_path, {"point": "long", "check": "words_at_least"})
    assert found(tmp_path, ScriptedModel(default="word " * 99), taxonomy=long)[0] == []
    groups, rows = found(tmp_path, ScriptedModel(default="too short"), taxonomy=long)
    assert groups == []
    assert all(r["score"] == 1.0 for r in rows)


OPEN = ["rhymes"]


@pytest.fixture
def helpers(tmp_path):
    """URIs of an examiner that proposes as told, an expert and an assessor."""

    def named(proposal, accept="Yes."):
        texts = {
            "examiner": [{"when": "from easy to hard", "answer": "Rhyme on the cat."}, {"when": "Name one further", "answer": proposal}],
            "expert": [{"when": "default", "answer": "A good answer."}],
            "assessor": [{"when": "Proposed skill", "answer": accept}, {"when": "default", "answer": "[[1]]"}],
        }
        for name, rows in texts.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {name: f"scripted:{tmp_path / name}.jsonl" for name in texts}

    return named


def test_the_search_ends_at_stop(tmp_path, helpers):
    groups, rows = found(tmp_path, ScriptedModel(default="No."), taxonomy=taxonomy(tmp_path, *OPEN), cases=2, **helpers("I am done: [[Stop]]"))
    assert {r["point"] for r in rows} == {"rhymes"}
    assert {g.completions[0].text for g in groups} <= {"A good answer."}


@pytest.mark.parametrize(("proposal", "accept"), [("verse: rhymes", "Yes."), ("verse: odes", "No."), ("no colon", "Yes.")])
def test_the_search_ends_after_three_rejected_points(proposal, accept):
    asked = {"examine": 0}

    def examine(conversation):
        if "Name one further" in conversation[-1].content:
            asked["examine"] += 1
            return proposal
        return "Rhyme on the cat."

    assessor = ScriptedModel(lambda c: accept if "Proposed skill" in c[-1].content else "[[1]]")
    shipped = read_taxonomy()
    point = read_point("rhymes")
    prober = Prober(ScriptedModel(), ScriptedModel(examine), ScriptedModel(default="x"), assessor, "en", shipped.requests["en"], shipped, 64, 0)
    cases = WeaknessDiscovery(cases=1).explore(prober, "skills", [point])
    assert asked["examine"] == 3
    assert {c.point for c in cases} == {point}


def test_an_examiner_that_is_told_of_a_rejection_comes_to_an_accepted_point():
    def examine(conversation):
        text = conversation[-1].content
        if "Name one further" not in text:
            return "Rhyme on the cat."
        return next(f"verse: {name}" for name in ("hymns", "odes", "psalms", "ballads") if name not in text)

    assessor = ScriptedModel(lambda c: ("yes" if "ballads" in c[-1].content else "no") if "Proposed skill" in c[-1].content else "[[1]]")
    shipped = read_taxonomy()
    prober = Prober(ScriptedModel(default="x"), ScriptedModel(examine), ScriptedModel(default="y"), assessor, "en", shipped.requests["en"], shipped, 64, 0)
    tried = dict.fromkeys(c.point.name for c in WeaknessDiscovery(cases=1, points=2).explore(prober, "skills", [read_point("rhymes")]))
    # hymns and odes are rejected, psalms would be the third
    assert list(tried) == ["rhymes"]
    assessor = ScriptedModel(lambda c: ("no" if "hymns" in c[-1].content else "yes") if "Proposed skill" in c[-1].content else "[[1]]")
    prober = Prober(ScriptedModel(default="x"), ScriptedModel(examine), ScriptedModel(default="y"), assessor, "en", shipped.requests["en"], shipped, 64, 0)
    tried = dict.fromkeys(c.point.name for c in WeaknessDiscovery(cases=1, points=2).explore(prober, "skills", [read_point("rhymes")]))
    assert list(tried) == ["rhymes", "odes"]


def test_the_share_found_is_said_in_all_and_by_point_with_its_interval(tmp_path, caplog):
    found(tmp_path, taxonomy=taxonomy(tmp_path, SUMS, {"point": "short", "check": "words_at_most"}), cases=10)
    # every sum is wrong, and three words keep within any limit: 10 / 20; Wilson: (0.5 + z^2 / 40) / (1 + z^2 / 20) and so on
    assert (
        "failed of the cases with a mark: 10/20 = 50% (30% to 70%); skills/sums 10/10 = 100% (72% to 100%); skills/short 0/10 = 0% (0% to 28%)" in caplog.text
    )


def test_the_search_ends_at_the_limit_of_points():
    names = iter(["odes", "limericks", "sonnets", "haiku", "ballads"])

    def examine(conversation):
        return f"verse: {next(names)}" if "Name one further" in conversation[-1].content else "Rhyme on the cat."

    assessor = ScriptedModel(lambda c: "yes" if "Proposed skill" in c[-1].content else "[[1]]")
    shipped = read_taxonomy()
    prober = Prober(ScriptedModel(default="x"), ScriptedModel(examine), ScriptedModel(default="y"), assessor, "en", shipped.requests["en"], shipped, 64, 0)
    cases = WeaknessDiscovery(points=3, cases=1).explore(prober, "skills", [read_point("rhymes")])
    assert [c.point.name for c in cases] == ["rhymes", "odes", "limericks"]
    assert next(names) == "sonnets"


def read_point(name):
    return Point("skills", "all", name)


def test_without_helpers_open_points_are_left_out_and_that_is_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    groups, rows = found(tmp_path, taxonomy=taxonomy(tmp_path, "rhymes", SUMS), cases=3)
    assert {r["point"] for r in rows} == {"sums"}
    assert "skills: 1 points are left out: they need an examiner, an expert and an assessor" in caplog.text
    assert all(g.prompt.category == "skills/sums" for g in groups)


def test_whoever_wrote_the_reference_must_not_mark_against_it():
    with pytest.raises(ConfigError, match="expert and assessor are both 'smollm2'"):
        registry.create("align/weakness_discovery", {"expert": "smollm2", "assessor": "smollm2"})


@pytest.mark.parametrize("options", [{"points": 0}, {"cases": 0}, {"max_tokens": 0}])
def test_options_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match="points, cases and max_tokens"):
        registry.create("align/weakness_discovery", options)


def test_it_runs_on_a_model_with_weights(tmp_path):
    groups, rows = found(tmp_path, tiny(), taxonomy=taxonomy(tmp_path, SUMS), cases=6, max_tokens=4)
    assert len(rows) == 6
    assert all(g.completions[0].text.endswith(".") for g in groups)
