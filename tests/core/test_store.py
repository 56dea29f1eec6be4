import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fiducial.core.errors import DataError, StorageError
from fiducial.core.records import Message, Verdict
from fiducial.core.store import Lines, Lock, copy_tree, disk_errors, hash_file, hash_tree, write_atomic


def said(*texts):
    return [Message(role="user", content=text) for text in texts]


def filled(path, *texts):
    with Lines(path, Message) as lines:
        for message in said(*texts):
            lines.append(message)
    return lines


def test_records_are_read_back_equal_and_in_order(tmp_path):
    lines = filled(tmp_path / "deep" / "er" / "messages.jsonl", "one", "二", "with\nbreak and \u2028 separator")
    assert lines.read() == said("one", "二", "with\nbreak and \u2028 separator")


def test_a_file_that_does_not_exist_holds_no_records(tmp_path):
    assert Lines(tmp_path / "none.jsonl", Message).read() == []
    assert not (tmp_path / "none.jsonl").exists()


def test_all_records_are_replaced_in_one_step_and_the_next_is_appended_to_them(tmp_path):
    lines = filled(tmp_path / "m.jsonl", "a", "b")
    lines.append(said("c")[0])
    lines.replace(said("b"))
    lines.append(said("d")[0])
    assert lines.read() == Lines(tmp_path / "m.jsonl", Message).read() == said("b", "d")


def test_each_line_begins_with_the_schema_version(tmp_path):
    filled(tmp_path / "m.jsonl", "hi")
    assert (tmp_path / "m.jsonl").read_text() == '{"v": 1, "role": "user", "content": "hi"}\n'


def test_what_was_appended_can_be_read_before_closing(tmp_path):
    lines = Lines(tmp_path / "m.jsonl", Message)
    lines.append(said("a")[0])
    lines.sync()
    assert Lines(tmp_path / "m.jsonl", Message).read() == said("a")
    lines.close()
    lines.close()
    lines.append(said("b")[0])
    assert lines.read() == said("a", "b")


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_passed_over_with_a_warning_and_cut_off_before_the_next_append(tmp_path, cut, caplog):
    path = tmp_path / "m.jsonl"
    filled(path, "one", "two 二")
    whole = path.read_bytes()
    path.write_bytes(whole[: -1 - cut])
    lines = Lines(path, Message)
    with caplog.at_level(logging.WARNING):
        assert lines.read() == said("one")
    assert "m.jsonl:2: the last line was not completed" in caplog.text
    assert path.read_bytes() == whole[: -1 - cut], "reading changes nothing"
    lines.append(said("three")[0])
    assert lines.read() == said("one", "three")


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    filled(path, "one", "two")
    path.write_bytes(path.read_bytes()[:-1])
    lines = Lines(path, Message)
    assert lines.read() == said("one", "two")
    lines.append(said("three")[0])
    assert lines.read() == said("one", "two", "three")


def test_a_file_of_nothing_but_a_torn_line_is_empty(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"v": 1, "ro')
    lines = Lines(tmp_path / "m.jsonl", Message)
    assert lines.read() == []
    lines.append(said("a")[0])
    assert lines.read() == said("a")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{broken}\n", "not a JSON object"),
        (b'{"v": 1, "role": "robot", "content": "x"}\n', "role: Input should be"),
        (b'{"v": 1, "role": "user", "content": "x", "colour": "red"}\n', "colour: Extra inputs"),
        (b'{"v": 2, "role": "user", "content": "x"}\n', "schema 2; this program reads schema 1"),
        (b"[1]\n", "not a JSON object"),
        (b"\xff\xfe\n", "not a JSON object"),
        (b"[" * 100_000 + b"\n", "not a JSON object"),
    ],
)
def test_any_other_bad_line_is_an_error_that_names_it(tmp_path, bad, reason):
    path = tmp_path / "m.jsonl"
    filled(path, "one")
    path.write_bytes(path.read_bytes() + bad + path.read_bytes())
    with pytest.raises(DataError, match=rf"m\.jsonl:2: not a valid Message: .*{reason}"):
        Lines(path, Message).read()


def test_a_killed_writer_leaves_a_file_that_can_be_read_and_continued(tmp_path):
    path = tmp_path / "m.jsonl"
    code = f"""
from fiducial.core.records import Message
from fiducial.core.store import Lines
lines = Lines({str(path)!r}, Message)
while True:
    lines.append(Message(role="user", content="x" * 5000))
    print("wrote", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    for _ in range(50):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    lines = Lines(path, Message)
    before = len(lines.read())
    assert before >= 50
    lines.append(said("after")[0])
    assert len(lines.read()) == before + 1


def test_appending_from_several_threads_keeps_lines_whole(tmp_path):
    with Lines(tmp_path / "m.jsonl", Message) as lines, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: lines.append(Message(role="user", content=str(i) * 200)), range(200)))
    assert {m.content for m in lines.read()} == {str(i) * 200 for i in range(200)}


def test_text_that_is_not_valid_unicode_is_read_back_the_same(tmp_path):
    lines = filled(tmp_path / "m.jsonl", "a\ud800b", "\\ud800")
    assert lines.read() == said("a\ud800b", "\\ud800")
    assert len({m.id for m in lines.read()}) == 2


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    lines = filled(tmp_path / "m.jsonl", "one")
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    with pytest.raises(StorageError, match="no space left on the disk") as caught:
        lines.append(said("two")[0])
    assert caught.value.passing
    assert caught.value.hint.endswith("free some space")
    monkeypatch.undo()
    lines.append(said("three")[0])
    assert lines.read() == said("one", "three")


def test_dev_full_says_that_the_disk_is_full(tmp_path):
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="no space left"):
        Lines(tmp_path / "full.jsonl", Message).append(said("x")[0])


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*_args, **_kw):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=r"m\.jsonl cannot be written: Permission denied") as caught:
        Lines(tmp_path / "m.jsonl", Message).append(said("x")[0])
    assert "FIDUCIAL_RUNS" in caught.value.hint


def test_a_folder_in_place_of_the_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        Lines(tmp_path, Message).append(said("x")[0])
    with pytest.raises(StorageError, match="cannot be read"):
        Lines(tmp_path, Message).read()


def test_records_of_another_type_are_refused(tmp_path):
    filled(tmp_path / "m.jsonl", "one")
    with pytest.raises(DataError, match="not a valid Verdict"):
        Lines(tmp_path / "m.jsonl", Verdict).read()


def test_write_atomic_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_atomic(path, "old and longer")
    write_atomic(path, "新")
    assert path.read_text(encoding="utf-8") == "新"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_copied_folder_replaces_what_was_there(tmp_path):
    for name in ("a/x", "a/deep/y", "b/stale"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    copy_tree(tmp_path / "a", tmp_path / "b")
    assert hash_tree(tmp_path / "b") == hash_tree(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_copy_that_a_full_disk_stops_leaves_the_old_folder(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="no space left"):
        copy_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").read_text() == "b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_that_is_gone_replaces_nothing(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(StorageError, match="not there any more"):
        copy_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").is_dir()


def test_an_error_that_is_not_of_the_system_stays_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="os error of mine"), disk_errors(tmp_path):
        raise ValueError("os error of mine")


def test_the_hash_of_a_file_is_the_sha_256_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(StorageError, match="cannot be read"):
        hash_file(tmp_path / "none")


def test_the_hash_of_a_folder_depends_on_names_and_contents_alone(tmp_path):
    def tree(name, files):
        for relative, content in files.items():
            path = tmp_path / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return hash_tree(tmp_path / name)

    first = tree("a", {"x/1": "one", "2": "two"})
    assert tree("b", {"2": "two", "x/1": "one"}) == first
    os.utime(tmp_path / "a" / "2", (0, 0))
    (tmp_path / "a" / "empty").mkdir()
    assert hash_tree(tmp_path / "a") == first
    assert tree("c", {"x/1": "one", "2": "too"}) != first
    assert tree("d", {"x1": "one", "2": "two"}) != first
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "2").symlink_to(tmp_path / "a" / "2")
    (tmp_path / "e" / "x").mkdir()
    (tmp_path / "e" / "x" / "1").write_text("one")
    assert hash_tree(tmp_path / "e") == first, "a link to a file counts as the file"
    with pytest.raises(StorageError, match="not a folder"):
        hash_tree(tmp_path / "none")


def test_a_lock_is_held_by_one_and_given_back(tmp_path):
    one, two = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert one.take()
    one.sign()
    assert one.held
    assert not two.take(wait=0.05)
    assert two.owner() == str(os.getpid())
    one.release()
    one.release()
    assert two.take()
    two.release()


def test_half_a_surrogate_pair_in_a_text_is_written_as_its_escape(tmp_path):
    write_atomic(tmp_path / "f", "caf\udce9")
    assert (tmp_path / "f").read_text() == "caf\\udce9"


def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "file" / "f", "x")


def test_asking_whether_a_lock_is_free_needs_no_right_to_write(tmp_path, monkeypatch):
    lock, real = Lock(tmp_path / "lock"), os.open
    assert lock.take()

    def reading_only(path, flags, *more):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "no")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", reading_only)
    assert not Lock(tmp_path / "lock").free()
    lock.release()
    assert Lock(tmp_path / "lock").free()
    assert Lock(tmp_path / "none").free()
    assert not (tmp_path / "none").exists()
