"""Data sets: read by the real library from folders; the hub's answers are its own errors."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, errors

from dspark.data.conversations import RECORD_KEYS, read_record
from dspark.data.prompts.sources import DataSet, data_set_rows, read_rows
from dspark.errors import DataError

CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.parquet}, {split: test, path: main/test.parquet}]
- config_name: socratic
  data_files: [{split: train, path: socratic.parquet}]
---
"""


@pytest.fixture(autouse=True)
def why(monkeypatch):
    """Why the hub cannot be reached: by default it can."""
    monkeypatch.setattr("dspark.data.prompts.sources.why_unreachable", lambda: None)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


@pytest.fixture
def folder(datasets, tmp_path):
    """A data set of two configurations, with 3 and 2 rows, and 1."""
    folder = tmp_path / "blend"
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for path, texts in (("main/train", "abc"), ("main/test", "de"), ("socratic", "f")):
        datasets.Dataset.from_list([{"prompt": text, "n": 1} for text in texts]).to_parquet(
            folder / f"{path}.parquet"
        )
    return str(folder)


def prompts(data_set, *columns, **options):
    return "".join(row.whole()["prompt"] for row in read_rows(data_set, columns, **options))


@pytest.mark.parametrize("stream", [False, True])
def test_configuration_and_split_choose_the_rows(folder, stream):
    assert prompts(DataSet(folder, "main"), "prompt", stream=stream) == "abc"
    assert prompts(DataSet(folder, "main", "test"), stream=stream) == "de"
    assert prompts(DataSet(folder, "main", "train+test"), stream=stream) == "abcde"
    assert prompts(DataSet(folder, "socratic"), stream=stream) == "f"
    row = list(read_rows(DataSet(folder, "main"), stream=stream))[1]
    assert (row.where, row.number) == (f"{folder}, train, row 2", 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_split_may_be_a_part_of_one(folder, stream):
    assert prompts(DataSet(folder, "main", "train[:2]+test[1:]"), stream=stream) == "abe"
    with pytest.raises(DataError, match=r"has no split 'train\[:2'; it has train, test\.$"):
        prompts(DataSet(folder, "main", "train[:2"), stream=stream)


def test_a_stream_reads_no_further_than_it_is_asked(datasets, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "train-1.csv").write_text("prompt\na\nb\n")
    (folder / "train-2.csv").write_text('prompt\n"c\n')
    damaged = pytest.raises(DataError, match=r"'train', is damaged or no table \(Error tokenizing")
    rows = read_rows(DataSet(str(folder)), stream=True)
    assert [next(rows).record["prompt"], next(rows).record["prompt"]] == ["a", "b"]
    with damaged:
        next(rows)
    with damaged:
        next(read_rows(DataSet(str(folder))))


def test_lists_of_objects_come_back_as_such(datasets, tmp_path):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    turned = {"from": ["human", "gpt"], "value": ["q", "a"]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list([{"conversations": turned}]).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    (row,) = read_rows(DataSet(str(tmp_path / "set")), RECORD_KEYS)
    assert row.record == {"conversations": talk}
    assert read_record(row.record, row.where).user_turns == ["q"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({}, "has several configurations; name one of main, socratic"),
        ({"config": "mian"}, "has no configuration 'mian'; it has main, socratic"),
        ({"config": "main", "split": "dev"}, "has no split 'dev'; it has train, test"),
        ({"config": "main", "split": "test+dev"}, "has no split 'test.dev'; it has train, test"),
    ],
)
def test_what_a_data_set_lacks_is_named_with_what_it_has(folder, chosen, said, stream):
    with pytest.raises(DataError, match=f"^The data set {folder} {said}.$"):
        list(read_rows(DataSet(folder, **chosen), stream=stream))


def test_a_missing_column_is_named_at_the_first_row(folder):
    said = r"'train', has no column 'turns' or 'messages', but 'prompt', 'n'; name another"
    with pytest.raises(DataError, match=said):
        next(read_rows(DataSet(folder, "main"), ("turns", "messages")))


def test_what_the_library_cannot_read_is_named(datasets, tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    with pytest.raises(DataError, match="program holds no file that can be read as a table"):
        list(read_rows(DataSet(str(folder))))
    (folder / "train.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"'train', is damaged or no table \(Parquet magic bytes"):
        list(read_rows(DataSet(str(folder))))
    (folder / "train.parquet").unlink()
    (folder / "train.csv").write_text("prompt\na\n")
    (folder / "train2.csv").write_text("other,columns\nb,c\n")
    with pytest.raises(DataError, match="'train', is damaged or no table"):
        list(read_rows(DataSet(str(folder))))
    (folder / "program.py").write_text("")
    said = "scripts are no longer supported.*try its revision refs/convert/parquet"
    with pytest.raises(DataError, match=said):
        list(read_rows(DataSet(str(folder))))


def refused(kind, status):
    return kind(
        "said by the hub", response=SimpleNamespace(headers={}, request=None, status_code=status)
    )


REFUSALS = [
    (refused(errors.RepositoryNotFoundError, 401), "^There is no data set owner/blend on the hub"),
    (refused(errors.GatedRepoError, 401), "^The data set owner/blend is gated; ask for access at"),
    (refused(errors.GatedRepoError, 403), "datasets/owner/blend, then log in with `hf auth login`"),
    (refused(errors.RevisionNotFoundError, 404), "^The data set owner/blend has no revision 'v2'"),
    (refused(errors.HfHubHTTPError, 503), r"does not hand out .*/blend \(said by the hub\); try"),
    (refused(errors.BadRequestError, 400), r"does not hand out .*/blend \(said by the hub\); try"),
    (errors.OfflineModeIsEnabled("switched off"), r"^The hub cannot be reached .*owner/blend \("),
    (errors.HTTPError("cut off"), r"^The hub cannot be reached .*owner/blend \(cut off\); check"),
    (errors.HFValidationError("a space"), "^owner/blend is no name of a data set"),
]


@pytest.mark.parametrize(("error", "said"), REFUSALS)
@pytest.mark.parametrize("files", [None, "*.jsonl"])
def test_every_refusal_of_the_hub_is_a_sentence(datasets, monkeypatch, error, said, files):
    def refuse(*_args, **_options):
        raise error

    monkeypatch.setattr(HfApi, "hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(DataError, match=said) as caught:
        next(data_set_rows(DataSet("owner/blend", revision="v2", files=files)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", "HF_TOKEN."))


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_data(datasets, monkeypatch):
    def fail(*_args, **_options):
        raise KeyError("a mistake")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(KeyError):
        next(data_set_rows(DataSet("owner/blend")))


def test_offline_reads_what_was_read_before(datasets, folder, tmp_path, monkeypatch):
    def no_network(*_args, **_options):
        raise AssertionError("asks the hub")

    monkeypatch.setattr(HfApi, "hf_hub_download", no_network)
    assert prompts(DataSet(folder, "main")) == "abc"
    # As it lies in the cache when it comes from the hub.
    (fresh,) = (tmp_path / "cache" / "blend").glob("main*/*/*/dataset_info.json")
    kept = tmp_path / "cache" / "owner___blend" / "main" / "0.0.0" / "abc123"
    shutil.copytree(fresh.parent, kept)
    for stream in (False, True):
        assert prompts(DataSet("owner/blend", "main"), offline=True, stream=stream) == "abc"
    assert not datasets.config.HF_HUB_OFFLINE
    for data_set, said in (
        (DataSet("owner/other"), "^The data set owner/other is not on this machine; read it once"),
        (DataSet("owner/blend", "x"), "not on this machine with configuration 'x'; name another"),
        (DataSet("owner/blend", "main", "dev"), "has no split 'dev'; it has train, test"),
        (DataSet("owner/blend", "main", revision="v2"), "is of revision v2; read it"),
        (DataSet("owner/blend", files="*.jsonl"), "^The data set owner/blend is not on this mach"),
    ):
        with pytest.raises(DataError, match=said):
            list(data_set_rows(data_set, offline=True))


def test_files_of_the_hub_are_read_as_local_ones(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": 1}) + "\n\n{cut\n")
    (tmp_path / "test2.jsonl").write_text(json.dumps({"other": "columns"}) + "\n")
    (tmp_path / "train.jsonl").write_text("{}\n")
    data_set = DataSet("owner/blend", revision="v2", files="test*.jsonl")
    rows = list(read_rows(data_set, offline=True))
    assert [row.record for row in rows] == [{"q": 1}, None, {"other": "columns"}]
    assert rows[1].fault.startswith(f"{tmp_path / 'test.jsonl'}, line 3 is not valid JSON")
    ((name, options),) = asked
    assert (name, options["repo_type"], options["revision"]) == ("owner/blend", "dataset", "v2")
    assert (options["allow_patterns"], options["local_files_only"]) == ("test*.jsonl", True)
    with pytest.raises(DataError, match=r"owner/blend has no file \*\.csv; give JSON lines"):
        list(data_set_rows(DataSet("owner/blend", files="*.csv")))


def test_without_the_library_a_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", None)
    with pytest.raises(DataError, match=r"owner/blend needs .* pip install 'dspark\[data\]'"):
        list(read_rows(DataSet("owner/blend")))


@pytest.mark.parametrize("files", [None, "*.jsonl"])
def test_a_hub_that_is_away_is_tried_once(datasets, folder, monkeypatch, caplog, files):
    def no_network(*_args, **_options):
        raise AssertionError("asks the hub again")

    monkeypatch.setattr(HfApi, "hf_hub_download", no_network)
    monkeypatch.setattr("dspark.data.prompts.sources.why_unreachable", lambda: "no such name")
    caplog.set_level("INFO", "dspark.data.prompts.sources")
    with pytest.raises(
        DataError, match=r"owner/blend is not on this machine.* read it once online"
    ):
        list(data_set_rows(DataSet("owner/blend", files=files)))
    assert "The hub cannot be reached (no such name)" in caplog.text
    assert prompts(DataSet(folder, "main")) == "abc"  # a folder needs no hub
