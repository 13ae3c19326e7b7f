"""Files without a schema: columns that begin late, and objects in which a key stands twice."""

import json

import pytest

from tests.data.tiny_tokenizers import make
from uft.data.mixture import load_feedback
from uft.data.readers import read_text
from uft.data.sources import DataError, Source, open_table

LATE = 150  # beyond the rows that are looked at first
PLAIN = [{"prompt": f"p{i}", "completion": f" c{i}"} for i in range(LATE)]
LABELLED = [row | {"label": True} for row in PLAIN[:10]]


def write(path, rows):
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path


def late_sources(folder, **options):
    rows = PLAIN + LABELLED
    files = [write(folder / f"rows.{suffix}", rows) for suffix in ("jsonl", "json")]
    return [*(Source("s", file, **options) for file in files), Source("s", data=rows, **options)]


# ---- columns that begin late ----


def test_a_label_that_begins_late_is_seen(tmp_path):
    for source in late_sources(tmp_path):
        assert open_table(source).columns == ("prompt", "completion", "label")
        reading = read_text(source)
        examples = list(reading.examples)
        assert (reading.kind, reading.total) == ("label", len(examples))
        assert {(bad.reason, bad.column) for bad in examples[:LATE]} == {("missing value", "label")}
        assert [example.targets for example in examples[LATE:]] == [(1.0,)] * 10
        data, report = load_feedback(source, make(), on_bad_row="drop")
        assert (len(data), report["s"].dropped) == (10, {"missing value": LATE})


def test_only_the_rows_that_are_used_have_a_say(tmp_path):
    for options in ({"limit": LATE}, {"fraction": LATE / (LATE + 10)}):
        for source in late_sources(tmp_path, **options):
            reading = read_text(source)
            assert (reading.kind, reading.total, len(list(reading.examples))) == ("demonstration", LATE, LATE)


def test_a_column_that_begins_late_can_be_renamed_and_scored(tmp_path):
    rows = PLAIN + [row | {"stars": 5} for row in PLAIN[:3]]
    path = write(tmp_path / "rows.jsonl", rows)
    for options in ({"columns": {"score": "stars"}}, {"score": {"stars": 1.0}}):
        examples = list(read_text(Source("s", path, score_range=(0, 5), **options)).examples)
        assert [example.targets for example in examples[LATE:]] == [(1.0,)] * 3


def test_rows_without_columns(tmp_path):
    (bad,) = read_text(Source("s", write(tmp_path / "a.jsonl", [{}]))).examples
    assert str(bad).endswith("row 0 (line 1): empty row: found no column; want a mapping from column to value")
    (bad,) = read_text(Source("s", data=[{3: "a"}])).examples
    assert str(bad) == "data set 's', row 0: wrong type: found column 3 (int); want names that are strings"


# ---- keys that stand twice ----

GOOD = '{"prompt": "p", "completion": "a"}'
TWICE = '{"prompt": "p", "completion": "a", "completion": "b"}'
INSIDE = '{"messages": [{"role": "user", "content": "x", "content": "y"}]}'


def texts(path, *objects):
    path.write_text("\n".join(objects) if path.suffix == ".jsonl" else f" [ {' , '.join(objects)} ]\n")
    return Source("s", path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_that_stands_twice_makes_a_bad_row(name, tmp_path):
    source = texts(tmp_path / name, GOOD, TWICE, GOOD, INSIDE)
    good, twice, _, inside = read_text(source).examples
    assert good.responses == ("a",)
    assert (twice.reason, twice.row) == (inside.reason, inside.row - 2) == ("duplicate key", 1)
    assert str(twice).endswith("duplicate key: found 'completion' twice in one object; want each key once")
    assert "'content' twice" in str(inside)
    data, report = load_feedback(source, make(), on_bad_row="drop")
    assert [example.row for example in data] == [0, 2]
    assert report["s"].dropped == {"duplicate key": 2}
    with pytest.raises(DataError, match=r"row 1.*: duplicate key"):
        load_feedback(source, make())


def test_a_list_that_is_broken_behind_a_key_that_stands_twice(tmp_path):
    with pytest.raises(DataError, match=r"rows.json: found broken JSON: .*; want a list of objects"):
        read_text(texts(tmp_path / "rows.json", TWICE, '{"a"'))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_object_over_several_lines_is_one_error_not_one_per_line(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_text('{\n  "prompt": "a",\n  "completion": "b"\n}\n')
    with pytest.raises(DataError, match="a JSON object over several lines; want one object per line"):
        read_text(Source("s", path))
