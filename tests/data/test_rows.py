import gzip

import pytest

from fiducial.core.errors import DataError
from fiducial.data.rows import read_rows


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path):
    return [row.values["prompt"] for row in read_rows(path)]


def refused(path):
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.hint
    return caught.value.message.replace(f"{path.parent}/", "")


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    assert texts(file(tmp_path, "a.csv", b"\xef\xbb\xbfprompt,x\r\nOne,1\r\nTwo,2\r\n")) == ["One", "Two"]
    assert texts(file(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"prompt": "One"}\r\n')) == ["One"]
    assert texts(file(tmp_path, "a.txt", b"\xef\xbb\xbfOne\r\n\r\nTwo\r\n")) == ["One", "Two"]


def test_text_keeps_unusual_line_separators_inside_a_prompt(tmp_path):
    assert texts(file(tmp_path, "a.jsonl", '{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n')) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    "content",
    ['[{"prompt": "a"}, {"prompt": "b"}]', '["a", "b"]', '{"data": [{"prompt": "a"}, {"prompt": "b"}]}', '{"prompt": "a"}\n{"prompt": "b"}\n'],
)
def test_json_may_be_a_list_a_list_under_a_name_or_lines(tmp_path, content):
    assert texts(file(tmp_path, "a.json", content)) == ["a", "b"]


def test_json_lists_below_names_take_the_names_as_category(tmp_path):
    found = read_rows(file(tmp_path, "a.json", '{"Crime": {"Theft": ["a"], "Fraud": ["b"]}}'))
    assert [row.values for row in found] == [{"category": "Crime/Theft", "prompt": "a"}, {"category": "Crime/Fraud", "prompt": "b"}]


def test_tab_separated_and_packed_files_are_read(tmp_path):
    assert texts(file(tmp_path, "a.tsv", "prompt\tx\nOne, two\t1\n")) == ["One, two"]
    assert texts(file(tmp_path, "a.jsonl.gz", gzip.compress(b'{"prompt": "One"}\n'))) == ["One"]
    assert refused(file(tmp_path, "b.jsonl.gz", b"not gzip")) == "b.jsonl.gz: not a complete gzip file"


def test_the_ending_of_a_tab_separated_file_may_be_in_capitals(tmp_path):
    (tmp_path / "GOALS.TSV").write_text("goal\tcategory\nPick a lock, now.\ttheft\n", encoding="utf-8")
    assert [row.values for row in read_rows(str(tmp_path / "GOALS.TSV"))] == [{"goal": "Pick a lock, now.", "category": "theft"}]


@pytest.mark.parametrize(("name", "row"), [("a.jsonl", '{"goal": "a", "n": %s}'), ("a.json", '[{"goal": "a", "n": %s}]')])
def test_a_number_too_long_to_be_read_is_named_with_its_place(tmp_path, name, row):
    (tmp_path / name).write_text(row % ("1" * 4301), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name))
    assert caught.value.message.startswith(f"{tmp_path / name}")
    assert "4300 digits" in caught.value.message


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert refused(tmp_path / "none.csv") == "none.csv: there is no such file"
    (tmp_path / "dir.csv").mkdir()
    assert refused(tmp_path / "dir.csv") == "dir.csv: this is a folder, a file is needed"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt\nOne, two\n", "a.csv:2: 2 cells, but the header has 1"),
        ("a.csv", 'prompt\n"One"x\n', "a.csv:2: not CSV"),
        ("a.csv", 'prompt\nOne\n"Two\n', "a.csv:3: not CSV"),
        ("a.csv", "prompt,x\n", "a.csv: there are no rows"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": }\n', "a.jsonl:2: not JSON: Expecting value at column 12"),
        ("a.jsonl", '{"prompt": "a"}\n7\n', "a.jsonl:2: a row must be an object with columns, this is 7"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "a.jsonl:1: \\ud800 is half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: nested too deeply"),
        ("a.json", '[{"prompt": "a"},\n {"prompt": }]', "a.json:2: not JSON: Expecting value at column 13"),
        ("a.json", "7", "a.json: a JSON file holds one list of rows, this is 7"),
        ("a.txt", b"One\ncaf\xe9\n", "a.txt:2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.txt", " \n\n", "a.txt: the file is empty"),
        ("a.parquet", "x", "a.parquet: cannot tell what kind of file '.parquet' is"),
        ("README", "x", "README: cannot tell what kind of file 'README' is"),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_line(tmp_path, name, content, message):
    assert refused(file(tmp_path, name, content)).startswith(message)
