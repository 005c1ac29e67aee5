import gzip
import json

import pytest

from dspark.data.files.atomic import Journal
from dspark.data.files.json_lines import beside, read_json_lines, scan_json_lines, write_json_lines
from dspark.errors import DataError


def test_damaged_lines_are_told_from_good_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b"",
        b"[1]",
        b'{"a": "\xff"}',
        b"1" * 5000,
        b'{"a":' * 100_000,
        b'{"a": 2}',
        b'{"a": 3',
    ]
    path.write_bytes(b"\n".join(lines))
    found = list(scan_json_lines(path))
    assert [(line.number, line.record) for line in found if line.record] == [
        (1, {"a": 1}),
        (7, {"a": 2}),
    ]
    faults = {line.number: line.fault for line in found if line.fault}
    assert faults.keys() == {3, 4, 5, 6, 8}
    assert faults[3] == f"{path}, line 3 is not a JSON object."
    assert "is not UTF-8" in faults[4]
    assert "is not valid JSON" in faults[8]
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 is not a JSON object"):
        list(read_json_lines(path))


def test_a_gzip_file_with_a_damaged_middle_gives_what_comes_before(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = bytearray(gzip.compress(b'{"a": 1}\n', mtime=0) + gzip.compress(b'{"a": 2}\n' * 99))
    whole[-12] ^= 0xFF  # within the second part's data
    path.write_bytes(whole)
    found = list(scan_json_lines(path))
    assert found[0].record == {"a": 1}
    assert "cannot be read to its end" in found[-1].fault


def write_many(path):
    with write_json_lines(path) as write:
        for i in range(200_000):
            write({"new": i})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_full_disk_leaves_the_older_file(tmp_path, name, small_disk):
    path = tmp_path / name
    with write_json_lines(path) as write:
        write({"old": 1})
    refused = pytest.raises(DataError, match=rf"{name} cannot be written \(File too large\)")
    with refused, small_disk(4096):
        write_many(path)
    assert [record for _, record in read_json_lines(path)] == [{"old": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "a.jsonl.gz"
    with write_json_lines(path) as write:
        write({"text": "Grüße\n\ud800"})
    assert [record for _, record in read_json_lines(path)] == [{"text": "Grüße\n\ud800"}]
    assert beside(path, "failed").name == "a_failed.jsonl"


def entries(journal):
    return [entry for _, entry in journal.entries()]


def test_a_journal_goes_on_where_it_was(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, {"t": 1.0})
    assert not journal.resumed
    journal.append({"line": 1})
    journal.append({"line": 2})
    journal.close()
    journal = Journal(path, {"t": 1.0})
    assert journal.resumed
    assert entries(journal) == [{"line": 1}, {"line": 2}]
    places = [place for place, _ in journal.entries()]
    assert list(journal.read([places[1], places[0]])) == [{"line": 2}, {"line": 1}]
    journal.remove()
    assert not path.exists()


@pytest.mark.parametrize("tail", [b'{"line": 3', b'{"line": 3}', b"\0" * 40, b"\0" * 40 + b"\n"])
def test_a_torn_line_is_taken_off(tmp_path, tail):
    path = tmp_path / "j"
    journal = Journal(path, {})
    journal.append({"line": 1})
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    journal = Journal(path, {})
    assert entries(journal) == [{"line": 1}]
    assert path.read_bytes() == whole
    journal.append({"line": 2})
    assert entries(journal) == [{"line": 1}, {"line": 2}]
    journal.close()


def test_every_cut_of_a_journal_is_a_shorter_journal(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, {"a": "b"})
    for line in range(3):
        journal.append({"line": line})
    journal.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = Journal(path, {"a": "b"})
        kept = whole[:size].count(b"\n") - 1
        assert entries(journal) == [{"line": line} for line in range(kept)]
        journal.close()


def test_a_journal_of_another_run_is_refused(tmp_path):
    path = tmp_path / "j"
    Journal(path, {"temperature": 1.0, "seed": 0}).close()
    with pytest.raises(DataError, match=r"with temperature 1\.0, but this one has 0\.7"):
        Journal(path, {"temperature": 0.7, "seed": 0})
    path.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="is no journal of a run"):
        Journal(path, {})


def test_a_journal_on_a_full_disk_keeps_what_it_has(tmp_path, small_disk):
    path = tmp_path / "j"
    journal = Journal(path, {})
    journal.append({"line": 1})
    size = path.stat().st_size
    with pytest.raises(DataError, match="j cannot be written"), small_disk(size + 20):
        journal.append({"line": 2, "text": "x" * 100})
    assert path.stat().st_size == size
    journal.append({"line": 2})
    assert entries(journal) == [{"line": 1}, {"line": 2}]
    journal.close()
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == entries(journal)
