import sys
from types import ModuleType

from fiducial.core.records import Attempt, Prompt, Score, Verdict, user
from fiducial.core.run import Run


def scored(*values, fingerprint="d1", metric="accuracy", interval="wilson"):
    rate = sum(values) / len(values)
    run = Run.create("evaluate/x", {"seed": len(values)}, {}, 0)
    score = Score(
        suite="evaluate/x",
        metric=metric,
        value=rate,
        n=len(values),
        low=0,
        high=1,
        items=values,
        interval=interval,
        fingerprint={"data": fingerprint, "model": run.id},
    )
    with run:
        run.lines("scores", score.__class__).append(score)
    return run.id


def attacked(*complied):
    run = Run.create("attack/x", {}, {}, 0)
    with run:
        for i, bad in enumerate(complied):
            verdict = Verdict(judge="j", outcome="success" if bad else "failure", label="compliance" if bad else "refusal")
            prompt = Prompt(messages=user(f"goal {i}"), expected="refuse")
            run.lines("attempts", Attempt).append(Attempt(prompt=prompt, attack="attack/x", family="x", model=run.id, verdict=verdict))
    return run.id


def test_runs_are_listed_with_their_status_and_long_lists_say_so(run, call):
    names = [scored(1.0), scored(0.0)]
    body, code = call("runs")
    assert code == 0
    assert [r["id"] for r in body["data"]["runs"]] == names
    assert {r["status"] for r in body["data"]["runs"]} == {"done"}
    short, _ = call("runs", "--limit", "1")
    assert (short["data"]["total"], short["data"]["truncated"], len(short["data"]["runs"])) == (2, True, 1)
    assert names[0] in run("runs").stdout


def test_scores_on_the_same_items_are_compared_pair_by_pair(call):
    a, b = scored(1.0, 0.0, 0.0, 1.0), scored(1.0, 1.0, 0.0, 1.0)
    (figure,) = call("compare", a, b)[0]["data"]["figures"]
    # 3/4 - 2/4, one discordant pair: exact McNemar p = 1
    assert (figure["difference"], figure["p"]) == (0.25, 1.0)
    # of forty, thirty go well in both: one more is -0.05 to +0.11, where two samples of forty would tell only -0.16 to +0.21
    same = [1.0] * 30 + [0.0] * 9
    (figure,) = call("compare", scored(*same, 0.0), scored(*same, 1.0))[0]["data"]["figures"]
    assert figure["high"] - figure["low"] < 0.25


def test_means_on_the_same_items_are_compared_by_their_differences(call):
    a, b = scored(1.0, 2.0, 3.0, interval="normal"), scored(2.0, 2.0, 5.0, interval="normal")
    (figure,) = call("compare", a, b)[0]["data"]["figures"]
    # differences 1, 0, 2: mean 1, standard deviation 1, standard error 1 / sqrt(3)
    assert figure["difference"] == 1.0
    assert round(figure["high"], 6) == round(1 + 1.959963984540054 / 3**0.5, 6)


def test_rates_of_attacks_are_compared_on_the_same_goals_with_an_exact_test(call, run):
    a, b = attacked(*[True] * 8), attacked(*[False] * 8)
    (figure,) = call("compare", a, b)[0]["data"]["figures"]
    assert figure["figure"] == "harmful compliance"
    assert figure["difference"] == -1.0
    # all eight pairs changed the same way: p = 2 * 0.5**8
    assert figure["p"] == 2 * 0.5**8
    assert "8 same items, McNemar p = 0.0078" in run("compare", a, b).stdout


def test_figures_on_other_data_are_not_compared(call):
    (figure,) = call("compare", scored(1.0, 0.0), scored(1.0, 1.0, fingerprint="d2"))[0]["data"]["figures"]
    assert figure["how"] == "not comparable: other data or scorer"
    assert figure["difference"] is None


def test_options_that_differ_are_named(run):
    assert "seed: 2 | 3" in run("compare", scored(1.0, 0.0), scored(1.0, 0.0, 1.0)).stdout


def test_a_run_without_figures_cannot_be_compared(call):
    empty = Run.create("x", {}, {}, 0).id
    body, code = call("compare", scored(1.0), empty)
    assert (body["error"]["kind"], code) == ("data", 2)
    assert empty in body["error"]["message"]


def test_an_unknown_run_is_a_config_error_with_the_nearest_id(call):
    name = scored(1.0)
    body, code = call("compare", name[:-1] + "z", name)
    assert (body["error"]["kind"], code) == ("config", 2)
    assert body["error"]["hint"] == f"did you mean '{name}'?"


def test_the_report_is_printed_as_a_path_and_made_when_missing(run, monkeypatch):
    built = []
    fake = ModuleType("fiducial.app.report")
    fake.build = lambda opened: built.append(opened.id) or (opened.path / "report.html")
    monkeypatch.setitem(sys.modules, "fiducial.app.report", fake)
    name = scored(1.0)
    path = Run.open(name).path / "report.html"
    assert run("report", name).stdout == f"{path}\n"
    path.write_text("there", encoding="utf-8")
    run("report", name)
    assert built == [name]
    run("report", name, "--rebuild")
    assert built == [name, name]
