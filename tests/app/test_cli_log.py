from fiducial.app.cli.log import ledger
from fiducial.core.run import Run


def filled():
    book = ledger()
    book.append("data", {"data": ["d" * 16], "run": "r0"})
    book.append("train", {"base": "b" * 16, "model": "m" * 16, "data": ["d" * 16], "run": "r1"})
    book.append("gate", {"model": "m" * 16, "outcome": "pass", "run": "r2"})
    book.append("train", {"base": "b" * 16, "model": "o" * 16, "run": "r3"})
    return book


def test_an_intact_ledger_verifies_and_prints_its_head(run, call):
    book = filled()
    assert run("log", "verify").stdout == f"verified: 4 events verified, head {book.head.hash}\n"
    assert call("log", "verify")[1] == 0


def test_where_there_is_no_ledger_nothing_is_verified(call, tmp_path):
    body, code = call("log", "verify", "--runs", tmp_path)
    assert (body["ok"], code) == (False, 2)
    assert body["error"]["message"] == f"there is no ledger in {tmp_path}"


def test_a_changed_event_is_found_and_exits_with_1(run, call):
    book = filled()
    text = book.path.read_text(encoding="utf-8")
    book.path.write_text(text.replace('"outcome":"pass"', '"outcome":"fail"'), encoding="utf-8")
    body, code = call("log", "verify")
    assert code == 1
    assert (body["ok"], body["data"]["verified"], body["data"]["line"]) == (True, False, 3)
    assert run("log", "show").exit_code == 2


def test_a_published_hash_is_held_against_the_ledger(call):
    book = filled()
    assert call("log", "verify", "--published", f"4:{book.head.hash}")[1] == 0
    assert call("log", "verify", "--published", "4:" + "0" * 64)[1] == 1
    assert call("log", "verify", "--published", "four")[0]["error"]["kind"] == "config"


def test_show_gives_the_last_events_of_a_kind(call):
    filled()
    body, _ = call("log", "show", "--kind", "train", "--limit", "1")
    assert [e["number"] for e in body["data"]["events"]] == [4]
    assert (body["data"]["total"], body["data"]["truncated"]) == (2, True)


def test_trace_follows_a_model_by_fingerprint_or_by_the_run_that_made_it(call):
    filled()
    for name in ("m" * 16, "m" * 8, "run:r1", "r1"):
        body, code = call("log", "trace", name)
        assert code == 0
        assert [e["number"] for e in body["data"]["events"]] == [1, 2, 3]


def test_trace_names_a_run_as_other_commands_do(call):
    made = Run.create("align/x", {}, {}, 0)
    ledger().append("train", {"base": "b" * 16, "model": "m" * 16, "run": made.id})
    for name in (f"run:{made.id}", f"run:{made.id[-4:]}", "run:last"):
        assert [e["number"] for e in call("log", "trace", name)[0]["data"]["events"]] == [1]
    assert call("log", "trace", "run:nowhere")[0]["error"]["kind"] == "config"


def test_an_unknown_model_is_an_error(call):
    filled()
    assert call("log", "trace", "nothing!")[0]["error"]["kind"] == "config"


def test_an_empty_ledger_is_said_to_be_empty(run):
    assert run("log", "show").stdout == "the ledger is empty\n"
