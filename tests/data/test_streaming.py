"""Streams: rows that come one after the other, as many as are asked for, into a store."""

import itertools
import json
from types import SimpleNamespace

import datasets
import pytest

from tests.data.same import same
from tests.data.tiny_tokenizers import make
from uft.data import cache
from uft.data.mixture import load_feedback
from uft.data.rows import BadRow, DataError
from uft.data.sources import Source, open_table

ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(300)]


def stream(rows=ROWS, named=True):
    """As a hub data set is streamed: with the names of its columns, or without."""
    if named:
        return datasets.Dataset.from_list(list(rows)).to_iterable_dataset()
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def endless():
    for i in itertools.count():
        yield {"prompt": f"{i}", "completion": f" {i + 1}"}


@pytest.fixture
def hub(monkeypatch):
    """A hub on which every data set is ROWS; what is asked of it."""
    asked = []

    def load_dataset(path, subset, split, **options):
        asked.append((path, subset, split, options))
        if path == "org/gone":
            raise FileNotFoundError("404")
        return stream()

    def dataset_info(self, path, revision=None):
        if path == "org/gone":
            raise FileNotFoundError("404")
        return SimpleNamespace(sha=hub.commit)

    hub = SimpleNamespace(asked=asked, commit="c0ffee")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    return hub


@pytest.mark.parametrize("named", [True, False])
def test_a_stream_in_memory(named):
    data, report = load_feedback({"s": stream(named=named)}, make(), 64)
    assert same(data, load_feedback({"s": ROWS}, make(), 64)[0])
    assert (report["s"].rows, report["s"].kept, report["s"].kind) == (300, 300, "demonstration")


def test_limit_ends_an_endless_stream():
    data, report = load_feedback(Source("s", data=datasets.IterableDataset.from_generator(endless), limit=7), make())
    assert [example.row for example in data] == list(range(7)) and report["s"].rows == 7


def test_a_split_of_streams():
    both = datasets.IterableDatasetDict({"train": stream(), "test": stream(ROWS[:2])})
    assert len(load_feedback(Source("s", data=both, split="test"), make())[0]) == 2


def test_temporary_tokens_go_away(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for source in (Source("s", data=stream()), Source("s", data=ROWS, streaming=True)):
        data, _ = load_feedback(source, make())
        (folder,) = tmp_path.iterdir()
        assert (folder / "tokens" / "tokens.bin").stat().st_size == 4 * data.lengths.sum()
        kept = data.mapped(lambda examples: examples[:3])  # copies
        del data
        assert list(tmp_path.iterdir()) == [] and len(kept[0].prompt)


def test_a_column_that_begins_late():
    rows = ROWS + [row | {"label": True} for row in ROWS[:2]]
    with pytest.raises(BadRow, match=r"data set 's', row 0, column 'label': missing value: found nothing; want true"):
        load_feedback({"s": stream(rows, named=False)}, make())
    assert open_table(Source("s", data=stream(rows, named=False))).columns == ("prompt", "completion", "label")
    limited = Source("s", data=stream(rows, named=False), limit=300)
    assert open_table(limited).columns == ("prompt", "completion")


def test_columns_that_are_missing():
    for named in (True, False):
        with pytest.raises(DataError, match="data set 's': found columns question; want those of a kind"):
            load_feedback({"s": stream([{"question": "q"}], named)}, make())
        with pytest.raises(DataError, match="data set 's': found columns prompt, completion; want x, which `columns`"):
            load_feedback(Source("s", data=stream(named=named), columns={"prompt": "x"}), make())
    with pytest.raises(DataError, match="data set 's': found no rows"):
        load_feedback({"s": stream([], named=False)}, make())


def test_a_stream_that_breaks(tmp_path):
    def rows():
        yield from ROWS[:200]
        raise ConnectionError("reset by peer")

    source = Source("s", data=datasets.IterableDataset.from_generator(rows))
    with pytest.raises(DataError, match=r"data set 's': the stream broke at row 200: .*reset by peer"):
        load_feedback(source, make(), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the hub ----


def test_a_streamed_hub_data_set(hub):
    source = Source("s", "org/name", subset="en", split="test", streaming=True)
    assert same(load_feedback(source, make())[0], load_feedback({"s": ROWS}, make())[0])
    assert hub.asked == [("org/name", "en", "test", {"streaming": True})]
    with pytest.raises(DataError, match=r"org/gone: found no such file, and as a data set on the hub .*404"):
        load_feedback(Source("s", "org/gone", streaming=True), make())


def test_a_store_is_of_one_commit(hub, tmp_path):
    source = Source("s", "org/name", streaming=True)
    for _ in range(2):
        load_feedback(source, make(), cache=tmp_path)
    assert hub.asked == [("org/name", None, "train", {"streaming": True, "revision": "c0ffee"})]
    hub.commit = "decade"
    load_feedback(source, make(), cache=tmp_path)
    assert [options["revision"] for *_, options in hub.asked] == ["c0ffee", "decade"]
    load_feedback(Source("s", "org/name", streaming=True, subset="de"), make(), cache=tmp_path)
    assert len(hub.asked) == 3
    with pytest.raises(DataError, match="org/gone: found no such file, and its commit on the hub cannot be looked up"):
        load_feedback(Source("s", "org/gone", streaming=True), make(), cache=tmp_path)


def test_a_stream_in_memory_is_never_taken_for_another(tmp_path):
    for rows in (ROWS, ROWS[:5]):
        assert len(load_feedback({"s": stream(rows)}, make(), cache=tmp_path)[0]) == len(rows)
    assert list(tmp_path.iterdir()) == []


# ---- files ----


def test_files_are_streamed_unless_they_are_lists(tmp_path):
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    whole.write_text(json.dumps(ROWS))
    data, _ = load_feedback(Source("s", lines, streaming=True), make())
    assert same(data, load_feedback({"s": ROWS}, make())[0])
    with pytest.raises(DataError, match=r"a.json: found a JSON list, which is read whole; want one object per line"):
        load_feedback(Source("s", whole, streaming=True), make())


def test_options():
    for option, value in (("streaming", "yes"), ("revision", 5)):
        with pytest.raises(DataError, match=f"source 's': {option} is {value!r}"):
            Source("s", "a", **{option: value})
    assert cache.belongs_on_disk(Source("s", data=stream())) and not cache.belongs_on_disk(Source("s", data=ROWS))
