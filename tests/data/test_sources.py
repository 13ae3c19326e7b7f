"""Reading rows: formats, options, and that what cannot be read is named with file, row, column, found and wanted."""

import json
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uft.data.sources import BadRow, DataError, Source, as_sources, open_table, read_rows

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def values(source):
    return [row.values for row in read_rows(source)]


class Indexed:
    """The least that counts as data: a length and rows by number."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return ROWS[range(len(ROWS))[i]]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    source = Source("s", write(tmp_path / f"data.{suffix}", ROWS))
    assert values(source) == ROWS
    assert [row.number for row in read_rows(source)] == [0, 1, 2, 3, 4]
    assert open_table(source).columns == ("prompt", "completion")


@pytest.mark.parametrize("data", [ROWS, tuple(ROWS), Indexed(), datasets.Dataset.from_list(ROWS)], ids=type)
def test_data_in_memory(data):
    assert values(Source("s", data=data)) == ROWS


def test_split_of_a_dataset_dict():
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    assert values(Source("s", data=data, split="test")) == ROWS[:2]
    with pytest.raises(DataError, match="found splits train, test; want 'validation'"):
        values(Source("s", data=data, split="validation"))


def test_folder_of_save_to_disk(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert values(Source("s", tmp_path / "saved")) == ROWS
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="other: found a folder that cannot be loaded; want one written by"):
        values(Source("s", tmp_path / "other"))


def test_json_lines_in_a_json_file(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS).rename(tmp_path / "data.json")
    assert values(Source("s", path)) == ROWS


def test_hub(monkeypatch):
    asked = []

    def load_dataset(path, subset, split):
        asked.append((path, subset, split))
        if path == "org/gone":
            raise FileNotFoundError("404")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values(Source("s", "org/name", subset="en", split="test")) == ROWS
    assert asked == [("org/name", "en", "test")]
    with pytest.raises(DataError, match=r"org/gone: found no such file, and as a data set on the hub .*404"):
        values(Source("s", "org/gone"))


# ---- options ----


@pytest.mark.parametrize("options, rows", [({"limit": 2}, 2), ({"limit": 9}, 5), ({"fraction": 0.5}, 2), ({}, 5)])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_limit_and_fraction_take_the_first_rows(tmp_path, suffix, options, rows):
    source = Source("s", write(tmp_path / f"data.{suffix}", ROWS), **options)
    assert values(source) == ROWS[:rows]
    assert open_table(source).total in (rows, None)


def test_columns_get_our_names():
    data = [{"question": "q", "answer": "a", "prompt": "theirs", "extra": 1}]
    source = Source("s", data=data, columns={"prompt": "question", "completion": "answer"})
    assert values(source) == [{"prompt": "q", "completion": "a", "extra": 1}]
    assert set(open_table(source).columns) == {"prompt", "completion", "extra"}
    with pytest.raises(DataError, match=r"data set 's': found columns question, .*; want reply, which `columns` names"):
        values(Source("s", data=data, columns={"completion": "reply"}))


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "neither path nor data"),
        ({"path": "a", "data": []}, "both path and data"),
        ({"path": "a", "limit": "5"}, "limit is '5'; want a whole number"),
        ({"path": "a", "weight": "2"}, "weight is '2'; want a positive number"),
        ({"path": "a", "limit": 0}, "limit is 0 .*want a whole number"),
        ({"path": "a", "fraction": 1.5}, "fraction is 1.5"),
        ({"path": "a", "fraction": 0.5, "limit": 1}, "not both"),
        ({"path": "a", "weight": 0.0}, "weight is 0.0 .*positive"),
        ({"path": "a", "weight": float("nan")}, "weight is nan"),
        ({"path": "a", "on_bad_row": "ignore"}, "on_bad_row is 'ignore'; want error or drop"),
        ({"path": "a", "score_range": (1, 1)}, "score_range"),
        ({"path": "a", "columns": ["x"]}, "columns is .*want a mapping"),
        ({"path": "a", "columns": {"prompt": ["x"]}}, "columns is .*want a mapping"),
        ({"path": "a", "columns": {"prompt": 3}}, "columns is .*want a mapping"),
        ({"path": 5}, "path is 5 .*want a file"),
        ({"path": "a", "split": 5}, "split is 5"),
        ({"path": "a", "subset": 5}, "subset is 5"),
        ({"path": "a", "limit": True}, "limit is True"),
        ({"path": "a", "weight": True}, "weight is True"),
        ({"path": "a", "weight": 10**400}, "weight is 1000"),
        ({"path": "a", "score": {"x": "1"}}, "score is {'x': '1'} .*want a mapping from columns to positive weights"),
        ({"path": "a", "score": {3: 1.0}}, "score is {3: 1.0}"),
        ({"path": "a", "score_range": ("0", "1")}, "score_range is"),
        ({"path": "a", "special_tokens": "yes"}, "special_tokens is 'yes'; want true or false"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(DataError, match=f"source 's'.*{message}"):
        Source("s", **options)


def test_what_people_write_for_sources():
    assert as_sources("folder/pairs.jsonl") == [Source("pairs", "folder/pairs.jsonl")]
    assert as_sources("org/name") == [Source("name", "org/name")]
    assert as_sources(ROWS) == [Source("train", data=ROWS)]
    assert as_sources({"path": "a.csv", "limit": 2}) == [Source("a", "a.csv", limit=2)]
    mapping = {"a": "x.csv", "b": {"path": "y.csv", "weight": 2.0}, "c": ROWS, "d": Source("other", "z.csv")}
    assert as_sources(mapping) == [
        Source("a", "x.csv"),
        Source("b", "y.csv", weight=2.0),
        Source("c", data=ROWS),
        Source("d", "z.csv"),
    ]
    assert [s.name for s in as_sources(["x.csv", {"path": "y.csv"}, Source("z", "z.csv")])] == ["x", "y", "z"]
    with pytest.raises(DataError, match=r"'a.csv': option 'limt' is unknown; want name, path"):
        as_sources({"path": "a.csv", "limt": 2})
    with pytest.raises(DataError, match="two sources are named 'x'"):
        as_sources(["a/x.csv", "b/x.csv"])


# ---- what cannot be read ----


def test_bad_lines_are_bad_rows(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [b'\xef\xbb\xbf{"a": 1}', b"", b'{"a": 2', b'{"a": "\xff"}', b"[1, 2]", b'{"a": 3}']
    path.write_bytes(b"\n".join(lines))
    rows = list(read_rows(Source("s", path)))
    assert [row.number for row in rows] == [0, 1, 2, 3, 4]
    assert [row.line for row in rows] == [1, 3, 4, 5, 6]
    assert [row.problem and row.problem.reason for row in rows] == [
        None, "broken JSON", "invalid UTF-8", "not an object", None,
    ]  # fmt: skip
    assert str(rows[1].problem).startswith(f"{path}, row 1 (line 3): broken JSON: found '{{\"a\": 2' (")
    assert str(rows[1].problem).endswith("want one JSON object per line")
    assert str(rows[2].problem) == f"{path}, row 2 (line 4): invalid UTF-8: found byte 0xff at position 7; want UTF-8"
    assert "row 3 (line 5): not an object: found [1, 2] (list); want a mapping" in str(rows[3].problem)


def test_invalid_utf8_in_parquet_is_a_bad_row(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "data.parquet")
    rows = list(read_rows(Source("s", tmp_path / "data.parquet")))
    assert [row.problem and row.problem.reason for row in rows] == [None, "invalid UTF-8", None]
    assert [row.number for row in rows] == [0, 1, 2]


def test_csv_rows_of_the_wrong_length_and_lines(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n"two\nlines",x\n\nonly one\na,b,c\ny,z\n')
    rows = list(read_rows(Source("s", path)))
    assert [row.line for row in rows] == [2, 5, 6, 7]
    assert rows[0].values["prompt"] == "two\nlines"
    expected = f"{path}, row 1 (line 5): broken CSV: found 1 values; want 2, as in the header"
    assert str(rows[1].problem) == expected
    assert "found 3 values" in str(rows[2].problem)


def test_values_of_a_csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("completion,label,score\n1,True,0.25\ntrue,0,nan\nx,maybe,\n")
    assert values(Source("s", path)) == [
        {"completion": "1", "label": True, "score": 0.25},
        {"completion": "true", "label": 0.0, "score": "nan"},
        {"completion": "x", "label": "maybe", "score": ""},
    ]


def empty(path):
    path.write_bytes(b"")


def corrupt(path):
    path.write_bytes(b"PAR1 this is no parquet PAR1")


def truncated(path):
    write(path, [{"text": "x" * 50} for _ in range(500)])
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("gone.jsonl", None, "found no such file"),
        ("empty.jsonl", empty, "found an empty file; want rows"),
        ("empty.parquet", empty, "found an empty file; want rows"),
        ("blank.jsonl", lambda p: p.write_text("\n\n"), "found no rows; want at least one"),
        ("none.json", lambda p: p.write_text("[]"), "found no rows; want at least one"),
        ("header.csv", lambda p: p.write_text("prompt,completion\n"), "found no rows; want at least one"),
        ("rows.parquet", lambda p: pq.write_table(pa.table({"text": []}), p), "found no rows; want at least one"),
        ("corrupt.parquet", corrupt, "found a corrupt parquet file"),
        ("truncated.parquet", truncated, "found a corrupt parquet file"),
        ("broken.json", lambda p: p.write_text('[{"a": 1}, {"a"]'), "found broken JSON: .*char.*; want a list"),
        ("latin.json", lambda p: p.write_bytes(b'["\xe9"]'), "latin.json: invalid UTF-8: found byte 0xe9"),
        ("data.txt", lambda p: p.write_text("hello"), r"found a file ending in '.txt'; want .json, .jsonl"),
        ("twice.csv", lambda p: p.write_text("a,a\n1,2\n"), "found the header 'a, a'; want a different name"),
        ("quote.csv", lambda p: p.write_text('a,b\n1,"2\n'), "found broken CSV"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, make, message):
    path = tmp_path / name
    if make:
        make(path)
    with pytest.raises(DataError, match=message) as error:
        list(read_rows(Source("s", path)))
    assert str(error.value).startswith(str(path))
    assert not isinstance(error.value, BadRow)


def test_a_parquet_may_turn_out_corrupt_behind_its_first_rows(tmp_path, monkeypatch):
    def batches(self, batch_size):
        yield pa.RecordBatch.from_pylist([{"text": "a"}, {"text": "b"}])
        raise OSError("page header is broken")

    path = write(tmp_path / "data.parquet", ROWS)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", batches)
    with pytest.raises(DataError, match="corrupt parquet file behind row 2: page header"):
        list(read_rows(Source("s", path)))


@pytest.mark.parametrize("data", [7, "text", SimpleNamespace(), iter(ROWS)], ids=type)
def test_data_that_has_no_rows(data):
    with pytest.raises(DataError, match=r"data set 's': found .*; want rows that can be counted and indexed"):
        list(read_rows(Source("s", data=data)))
    assert [row.problem.reason for row in read_rows(Source("s", data=[7]))] == ["not an object"]


def test_the_columns_are_those_of_the_first_row_that_can_be_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("broken\n" * 150 + '{"text": "a"}\n' + "broken\n")
    table = open_table(Source("s", path))
    assert table.columns == ("text",)
    assert sum(row.problem is None for row in table.rows) == 1


def test_bad_rows_travel_between_processes():
    import pickle

    row = BadRow("too long", "9 tokens", "8", "chosen", "a.jsonl", 3, 4)
    assert str(pickle.loads(pickle.dumps(row))) == str(row)
    assert str(row) == "a.jsonl, row 3 (line 4), column 'chosen': too long: found 9 tokens; want 8"
