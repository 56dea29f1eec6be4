import hashlib
import json
import os
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiducial.core.errors import LedgerError, StorageError
from fiducial.core.ledger import ZEROS, Ledger, merkle_root
from fiducial.core.store import Lock

KINDS = ["data", "train", "evaluate", "gate", "promote", "serve"]


def filled(folder, n=5):
    ledger = Ledger(folder / "ledger.jsonl")
    for i in range(n):
        ledger.append(KINDS[i % len(KINDS)], {"model": f"{i:064x}", "rate": i / 7, "n": 40, "note": f"第{i}轮"})
    return ledger


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """The bytes of a ledger of five events and of its head."""
    ledger = filled(tmp_path_factory.mktemp("five"))
    return ledger.path.read_bytes(), ledger.head_path.read_bytes()


def placed(folder, data, head):
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.path.write_bytes(data)
    ledger.head_path.write_bytes(head)
    return ledger


def test_an_empty_ledger_verifies(tmp_path):
    result = Ledger(tmp_path / "ledger.jsonl").verify()
    assert (result.ok, result.n, result.head) == (True, 0, ZEROS)


def test_events_are_numbered_from_one_and_hold_the_hash_of_the_one_before(tmp_path):
    ledger = filled(tmp_path, 3)
    one, two, three = ledger.events()
    assert [one.number, two.number, three.number] == [1, 2, 3]
    assert (one.previous, two.previous, three.previous) == (ZEROS, one.hash, two.hash)
    assert ledger.head.hash == three.hash
    assert str(ledger.verify()) == f"3 events verified, head {three.hash}"


def test_the_hash_can_be_computed_by_anyone_from_the_line(tmp_path):
    line = json.loads(filled(tmp_path, 1).path.read_text())
    stated = line.pop("hash")
    assert hashlib.sha256(b"\0" + json.dumps(line, sort_keys=True, separators=(",", ":")).encode()).hexdigest() == stated


def test_a_reopened_ledger_goes_on_where_it_was(tmp_path):
    filled(tmp_path, 2)
    assert Ledger(tmp_path / "ledger.jsonl").append("gate", {"outcome": "pass"}).number == 3
    assert Ledger(tmp_path / "ledger.jsonl").verify().ok


def test_an_event_that_is_to_be_entered_once_is_not_doubled_after_a_kill(tmp_path):
    ledger = filled(tmp_path)
    body = {"model": "a" * 64, "figures": {"rate": [0.1, (1, 2)]}, "run": "r1"}
    first = ledger.append("evaluate", body, once=True)
    again = Ledger(ledger.path).append("evaluate", body, once=True)
    assert (again.number, len(ledger.events())) == (first.number, 6)
    assert ledger.append("gate", body, once=True).number == 7
    assert ledger.append("evaluate", body).number == 8
    assert ledger.verify().ok


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_of_the_log_is_located(five, tmp_path_factory, data):
    log, head = five
    at = data.draw(st.integers(0, len(log) - 1))
    flipped = bytearray(log)
    flipped[at] ^= data.draw(st.integers(1, 255))
    result = placed(tmp_path_factory.mktemp("flip"), bytes(flipped), head).verify()
    assert not result.ok
    assert result.line == log[:at].count(b"\n") + 1, result


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_byte_left_out_or_put_in_is_located(five, tmp_path_factory, data):
    log, head = five
    at = data.draw(st.integers(0, len(log) - 1))
    put = data.draw(st.one_of(st.just(b""), st.binary(min_size=1, max_size=2)))
    changed = log[:at] + put + log[at + (not put) :]
    result = placed(tmp_path_factory.mktemp("byte"), changed, head).verify()
    assert not result.ok
    assert abs(result.line - (log[:at].count(b"\n") + 1)) <= 1, result


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_of_the_head_is_noticed(five, tmp_path_factory, data):
    log, head = five
    flipped = bytearray(head)
    flipped[data.draw(st.integers(0, len(head) - 1))] ^= data.draw(st.integers(1, 255))
    assert not placed(tmp_path_factory.mktemp("flip"), log, bytes(flipped)).verify().ok


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 4), second=st.integers(0, 4))
def test_two_lines_that_change_places_are_located(five, tmp_path_factory, first, second):
    log, head = five
    lines = log.splitlines(keepends=True)
    lines[first], lines[second] = lines[second], lines[first]
    result = placed(tmp_path_factory.mktemp("swap"), b"".join(lines), head).verify()
    assert result.ok == (first == second)
    assert result.line == (0 if first == second else min(first, second) + 1)


@pytest.mark.parametrize("gone", range(5))
def test_a_deleted_line_is_located(five, tmp_path, gone):
    lines = five[0].splitlines(keepends=True)
    result = placed(tmp_path, b"".join(lines[:gone] + lines[gone + 1 :]), five[1]).verify()
    assert not result.ok
    assert result.line == gone + 1


@pytest.mark.parametrize("twice", range(5))
def test_a_doubled_line_is_located(five, tmp_path, twice):
    lines = five[0].splitlines(keepends=True)
    result = placed(tmp_path, b"".join(lines[: twice + 1] + lines[twice:]), five[1]).verify()
    assert not result.ok
    assert result.line == twice + 2


@pytest.mark.parametrize("cut", [1, 2, 50, 10**6])
def test_bytes_cut_off_the_end_are_noticed_by_verify_and_by_the_next_append(five, tmp_path, cut):
    ledger = placed(tmp_path, five[0][:-cut] if cut < len(five[0]) else b"", five[1])
    result = ledger.verify()
    assert not result.ok
    assert result.line == (1 if cut == 10**6 else 5)
    with pytest.raises(LedgerError, match="shorter"):
        ledger.append("run", {})


@pytest.mark.parametrize("extra", [b"\n", b" ", b"{}\n", b'{"v":1', b'{"v":1,"number":7,"time":"'], ids=repr)
def test_bytes_added_at_the_end_are_noticed(five, tmp_path, extra):
    ledger = placed(tmp_path, five[0] + extra, five[1])
    if extra == b'{"v":1':  # which is how event 6 begins, so it may be a torn write
        assert ledger.verify().note.startswith("the last line was never completed: ")
    else:
        assert ledger.verify().line == 6
        with pytest.raises(LedgerError, match="bytes were added"):
            ledger.append("run", {})


def test_an_event_that_was_changed_and_hashed_anew_breaks_the_chain_at_the_next_line(five, tmp_path):
    lines = five[0].decode().splitlines()
    row = json.loads(lines[1])
    row["body"]["n"] = 41
    del row["hash"]
    row["hash"] = hashlib.sha256(b"\0" + json.dumps(row, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    lines[1] = json.dumps(row, separators=(",", ":"))
    result = placed(tmp_path, ("\n".join(lines) + "\n").encode(), five[1]).verify()
    assert (result.ok, result.line, result.problem) == (False, 3, "event 3 does not follow the event before it")


def test_a_chain_rebuilt_with_its_head_verifies_alone_but_not_against_a_published_head(tmp_path):
    for name in ("true", "false"):
        (tmp_path / name).mkdir()
    published = filled(tmp_path / "true", 3).head
    forged = filled(tmp_path / "false", 4)
    assert forged.verify().ok
    assert "not the one that was published" in str(forged.verify({published.n: published.hash}))
    short = filled(tmp_path, 2)
    assert "was published, but the log ends before it" in str(short.verify({published.n: published.hash}))


def test_a_missing_head_file_is_a_problem_and_stops_appending(tmp_path):
    ledger = filled(tmp_path, 1)
    ledger.head_path.unlink()
    assert "is missing" in ledger.verify().problem
    with pytest.raises(LedgerError, match="is missing"):
        ledger.append("run", {})


def test_a_kill_between_the_line_and_the_head_is_put_right_by_the_next_append(tmp_path):
    ledger = filled(tmp_path, 3)
    older = ledger.head_path.read_bytes()
    ledger.append("gate", {"outcome": "pass"})
    ledger.head_path.write_bytes(older)
    assert ledger.verify().ok
    assert "before the head file was replaced" in str(ledger.verify())
    assert ledger.append("run", {}).number == 5
    assert str(ledger.verify()).startswith("5 events verified")


def test_two_events_beyond_the_head_are_not_an_interruption(tmp_path):
    ledger = filled(tmp_path, 3)
    older = ledger.head_path.read_bytes()
    ledger.append("run", {})
    ledger.append("run", {})
    ledger.head_path.write_bytes(older)
    assert ledger.verify().line == 5
    with pytest.raises(LedgerError, match="added after event 3"):
        ledger.append("run", {})


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("kept", [1, 10, 80, -1])
def test_a_line_torn_by_a_kill_is_dropped_by_the_next_append(tmp_path, n, kept):
    (tmp_path / "longer").mkdir()
    last = filled(tmp_path / "longer", n + 1).path.read_bytes().splitlines()[-1]
    ledger = filled(tmp_path, n)
    if n == 0:  # the head of nothing is written before the first event
        ledger.head_path.write_text(json.dumps({"v": 1, "n": 0, "hash": ZEROS, "size": 0}) + "\n")
    before = ledger.path.read_bytes() if n else b""
    ledger.path.write_bytes(before + last[:kept])
    assert ledger.verify().ok
    assert ledger.verify().note.startswith("the last line was never completed: ")
    assert ledger.append("run", {}).number == n + 1
    assert str(ledger.verify()).startswith(f"{n + 1} events verified")


def test_a_process_killed_at_any_moment_leaves_a_ledger_that_verifies(tmp_path):
    code = f"""
from fiducial.core.ledger import Ledger
ledger = Ledger({str(tmp_path / "ledger.jsonl")!r})
print("ready", flush=True)
while True:
    ledger.append("run", {{"figure": 1.5}})
"""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.kill()
        process.wait()
        process.stdout.close()
        assert Ledger(tmp_path / "ledger.jsonl").verify().ok
        Ledger(tmp_path / "ledger.jsonl").append("run", {})


def test_several_processes_may_append(tmp_path):
    code = f"""
from fiducial.core.ledger import Ledger
for i in range(8):
    Ledger({str(tmp_path / "ledger.jsonl")!r}).append("evaluate", {{"i": i}})
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert Ledger(tmp_path / "ledger.jsonl").verify().n == 24


def test_a_ledger_in_use_names_the_process(tmp_path, monkeypatch):
    ledger = filled(tmp_path, 1)
    other = Lock(ledger.path.with_suffix(".lock"))
    assert other.take()
    other.sign()
    monkeypatch.setattr(Lock, "take", lambda self, wait=0.0: False)
    with pytest.raises(StorageError, match=f"in use by process {os.getpid()}"):
        ledger.append("run", {})
    other.release()


@pytest.mark.parametrize("body", [{"prompt": "How do I pick a lock?"}, {"figures": [{"response": "Sure, here is"}]}, {"reason": "x" * 501}])
def test_the_text_of_prompts_and_answers_is_refused(tmp_path, body):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(LedgerError, match="give its hash here"):
        ledger.append("evaluate", body)
    assert not ledger.path.exists()


def test_the_hash_of_a_prompt_is_welcome(tmp_path):
    assert Ledger(tmp_path / "ledger.jsonl").append("evaluate", {"prompt": "0123456789abcdef", "reason": "2 of 40 refused"}).number == 1


def test_what_is_no_number_is_stored_as_null_and_verifies(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("evaluate", {"rate": float("nan"), "tiny": 1e-300, "b": 2, "a": 1})
    assert ledger.events()[0].body == {"a": 1, "b": 2, "rate": None, "tiny": 1e-300}


def test_what_cannot_be_written_as_json_is_refused(tmp_path):
    with pytest.raises(LedgerError, match="cannot hold"):
        Ledger(tmp_path / "ledger.jsonl").append("run", {"thing": object()})


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    ledger = filled(tmp_path, 2)
    before = ledger.path.read_bytes()
    real = os.write

    def half(descriptor, data):
        return real(descriptor, data[: len(data) // 2]) if data.startswith(b'{"v":1,"number"') else real(descriptor, data)

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StorageError, match="no space left"):
        ledger.append("run", {})
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before
    assert ledger.append("run", {}).number == 3


def test_the_merkle_root_is_that_of_rfc_6962():
    # leaves d0..d6 of section 2.1.3 pair up as ((d0 d1)(d2 d3)) ((d4 d5) d6)
    leaves = [hashlib.sha256(b"\0" + bytes([i])).hexdigest() for i in range(7)]

    def node(left, right):
        return hashlib.sha256(b"\1" + bytes.fromhex(left) + bytes.fromhex(right)).hexdigest()

    left = node(node(leaves[0], leaves[1]), node(leaves[2], leaves[3]))
    assert merkle_root(leaves) == node(left, node(node(leaves[4], leaves[5]), leaves[6]))
    assert merkle_root(leaves[:1]) == leaves[0]
    assert merkle_root([]) == hashlib.sha256(b"").hexdigest()


def test_the_root_changes_with_every_event(tmp_path):
    ledger = filled(tmp_path, 2)
    before = ledger.root()
    ledger.append("run", {})
    assert ledger.root() != before


def test_a_trace_holds_the_model_its_base_and_the_data_they_saw(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    data, other, base, model, third = ("d" * 64, "e" * 64, "b" * 64, "a" * 64, "c" * 64)
    ledger.append("data", {"data": data, "rows": 300})
    ledger.append("data", {"data": other, "rows": 10})
    ledger.append("train", {"base": base, "model": model, "data": [data], "run": "r1"})
    ledger.append("train", {"base": base, "model": third, "data": [other]})
    ledger.append("evaluate", {"model": base, "rate": 0.4})
    ledger.append("gate", {"model": model, "outcome": "pass"})
    assert [event.number for event in ledger.trace(model)] == [1, 3, 5, 6]
    assert ledger.trace(model[:8]) == ledger.trace(model)
    assert ledger.trace(model[:4]) == []


def test_an_alias_means_what_was_last_promoted_or_rolled_back_to(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.alias_at("production") is None
    ledger.append("promote", {"alias": "production", "model": "a" * 64})
    second = ledger.append("promote", {"alias": "production", "model": "b" * 64})
    ledger.append("promote", {"alias": "staging", "model": "c" * 64})
    ledger.append("rollback", {"alias": "production", "model": "a" * 64})
    assert ledger.alias_at("production").number == 4
    assert ledger.alias_at("production", datetime.fromisoformat(second.time) - timedelta(days=1)) is None


def test_events_of_a_changed_ledger_are_not_read(five, tmp_path):
    ledger = placed(tmp_path, five[0].replace(b'"n":40', b'"n":39', 1), five[1])
    with pytest.raises(LedgerError, match="line 1: event 1 was changed: its hash does not fit its content"):
        ledger.events()


@pytest.mark.parametrize("reads", [1, 2])
def test_an_event_that_another_process_adds_between_two_reads_is_no_alarm(tmp_path, monkeypatch, reads):
    ledger, other = filled(tmp_path, 2), Ledger(tmp_path / "ledger.jsonl")
    real, seen = Ledger._bytes, []

    def interrupted(self):
        data = real(self)
        if self is ledger and not seen:
            seen.append(data)
            for _ in range(reads):
                other.append("run", {})
        return data

    monkeypatch.setattr(Ledger, "_bytes", interrupted)
    assert str(ledger.verify()).startswith("2 events verified")
    seen.clear()
    assert len(ledger.events()) == 2 + reads


def test_the_first_event_of_another_process_between_two_reads_is_no_alarm(tmp_path, monkeypatch):
    ledger, other = Ledger(tmp_path / "ledger.jsonl"), Ledger(tmp_path / "ledger.jsonl")
    real, seen = Ledger._bytes, []

    def interrupted(self):
        if self is ledger and not seen:
            seen.append(other.append("run", {}))
        return real(self)

    monkeypatch.setattr(Ledger, "_bytes", interrupted)
    assert ledger.verify().ok
    assert len(ledger.events()) == 1


def test_a_change_is_found_also_while_another_process_appends(tmp_path, monkeypatch):
    ledger, other = filled(tmp_path, 2), Ledger(tmp_path / "ledger.jsonl")
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"n":40', b'"n":41', 1))
    real = Ledger._bytes

    def interrupted(self):
        data = real(self)
        other.append("run", {})
        return data

    monkeypatch.setattr(Ledger, "_bytes", interrupted)
    assert ledger.verify().line == 1


@pytest.mark.parametrize(
    ("rest", "passed"),
    [
        ("", True),
        ("2026-11-21T20", True),
        ('2026-11-21T20:15:00.000+00:00","kind":"train","body":{"ba', True),
        ("a letter to my aunt", False),
        ('2026-11-21","kind":"\u00e9', False),
        ('2026","kind":"' + "x" * 70_000, False),
    ],
)
def test_a_torn_line_is_told_with_its_length_and_is_the_beginning_of_an_event(tmp_path, rest, passed):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("train", {"model": "m" * 16})
    torn = ('{"v":1,"number":2,"time":"' + rest).encode()
    with open(ledger.path, "ab") as file:
        file.write(torn)
    result = ledger.verify()
    assert result.ok is passed
    if passed:
        assert result.note == f"the last line was never completed: {len(torn)} bytes, which the next append removes"
        assert ledger.append("train", {"model": "n" * 16}).number == 2
    else:
        assert result.problem == "bytes were added after the last event"
        with pytest.raises(LedgerError, match="bytes were added"):
            ledger.append("train", {"model": "n" * 16})


def test_an_event_longer_than_can_be_told_from_a_torn_one_is_not_written(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(LedgerError, match="more than 65536"):
        ledger.append("train", {"data": ["d" * 64] * 1000})
    assert ledger.events() == []
