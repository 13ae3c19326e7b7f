"""Stores are used again where they hold what would be made, and nowhere else."""

import json
import os
from dataclasses import asdict

import datasets
import pytest

from tests.data.same import same
from tests.data.tiny_tokenizers import UNMARKED, make
from uft.data import cache, check
from uft.data.mixture import load_feedback
from uft.data.rows import BadRow, DataError
from uft.data.sources import Source
from uft.data.template import PLAIN_TEMPLATE, Template

ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "score": 0.25, "other": " x"} for i in range(6)]
BAD = {"prompt": "a", "completion": "", "score": 0.5, "other": " y"}


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def readings(monkeypatch):
    """Names of the sources that were tokenised."""
    names = []

    def counted(source, *rest):
        names.append(source.name)
        return check.read_examples(source, *rest)

    monkeypatch.setattr(cache, "read_examples", counted)
    return names


def stores(folder):
    return sorted(path.name for path in folder.iterdir())


def test_tokenised_once(tmp_path, readings):
    path, kept = write(tmp_path / "a.jsonl"), tmp_path / "kept"
    memory, report = load_feedback(path, make(), 64)
    first, first_report = load_feedback(path, make(), 64, cache=kept)
    again, again_report = load_feedback(path, make(), 64, cache=kept)
    assert readings == ["a"]
    assert same(first, memory) and same(again, memory)
    assert first.fingerprint == again.fingerprint == memory.fingerprint
    assert asdict(first_report["a"]) == asdict(again_report["a"]) == asdict(report["a"])
    # under another name, weight and path it is the same data
    copy = write(tmp_path / "b.jsonl")
    other, other_report = load_feedback({"c": Source("x", copy, weight=2.0)}, make(), 64, cache=kept)
    assert readings == ["a"] and {example.source for example in other} == {"c"}
    assert (other_report["c"].name, other_report["c"].where) == ("c", str(copy))
    assert len(stores(kept)) == 1


def changed_in_place(path):
    """Same size, same times."""
    times = os.stat(path)
    write(path, [*ROWS[:3], ROWS[3] | {"completion": " 5"}, *ROWS[4:]])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(path).st_size == times.st_size


def test_a_file_that_changes(tmp_path, readings):
    path = write(tmp_path / "a.jsonl")
    before, _ = load_feedback(path, make(), cache=tmp_path / "kept")
    changed_in_place(path)
    after, _ = load_feedback(path, make(), cache=tmp_path / "kept")
    assert readings == ["a", "a"] and before.fingerprint != after.fingerprint
    assert after.fingerprint == load_feedback(path, make())[0].fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "demonstration"},
        {"columns": {"completion": "other"}},
        {"limit": 4},
        {"fraction": 0.5},
        {"score": {"score": 1.0}, "score_range": (0, 2)},
        {"score_range": (0, 2)},
        {"chat": True},
        {"special_tokens": True},
        {"tokenizer": make(eos="<eos>")},
        {"tokenizer": make(adds_bos=True)},
        {"max_length": 20},
        {"template": PLAIN_TEMPLATE},
        {"template": UNMARKED},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_store_depends_on(tmp_path, readings, options):
    path, options = write(tmp_path / "a.jsonl"), dict(options)
    load_feedback(path, make(), 64, cache=tmp_path / "kept")
    tokenizer, max_length = options.pop("tokenizer", make()), options.pop("max_length", 64)
    template = Template(tokenizer, max_length, options.pop("template", None))
    source = Source("a", path, **options)
    found, _ = load_feedback(source, template, cache=tmp_path / "kept")
    assert readings == ["a", "a"]
    assert same(found, load_feedback(source, template)[0])


def test_it_depends_on_code_and_libraries(tmp_path, readings, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    load_feedback(path, make(), cache=tmp_path / "kept")
    monkeypatch.setattr(cache, "_code", lambda: "other")
    load_feedback(path, make(), cache=tmp_path / "kept")
    monkeypatch.setattr(cache, "_version", lambda package: "0")
    load_feedback(path, make(), cache=tmp_path / "kept")
    assert readings == ["a"] * 3


def test_every_option_of_a_source_is_thought_of():
    """A new one makes another store, unless it is named here."""
    assert set(cache.WITHOUT) == {"name", "path", "data", "weight", "on_bad_row", "streaming", "revision"}


def test_special_tokens_of_a_template(tmp_path):
    """A template may write any of them, and texts may hold none."""
    tokenizer, plain = make(), Template(make()).fingerprint()
    tokenizer.pad_token = "<unk>"
    assert Template(tokenizer).fingerprint() != plain
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": ["hello"]})
    assert Template(tokenizer).fingerprint() != plain


def in_memory_sources(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return [Source("s", data=ROWS), Source("s", data=datasets.Dataset.from_list(ROWS)), Source("s", folder / "saved")]


def test_data_in_memory_and_folders(tmp_path, readings):
    for source in in_memory_sources(tmp_path):
        before = len(readings)
        for _ in range(2):
            data, _ = load_feedback(source, make(), cache=tmp_path / "kept")
        assert len(readings) == before + 1
        assert same(data, load_feedback(Source("s", data=ROWS), make())[0])
    before = len(readings)
    load_feedback(Source("s", data=[*ROWS[:-1], ROWS[0]]), make(), cache=tmp_path / "kept")
    load_feedback(Source("s", data=ROWS, limit=3), make(), cache=tmp_path / "kept")
    load_feedback(Source("s", data=[*ROWS[:3], BAD], limit=3), make(), cache=tmp_path / "kept")  # the same three
    assert len(readings) == before + 2


# ---- bad rows ----


def test_bad_rows_are_told_again(tmp_path, readings):
    path, kept = write(tmp_path / "a.jsonl", [*ROWS, BAD]), tmp_path / "kept"
    with pytest.raises(BadRow):
        load_feedback(path, make(), cache=kept)
    assert stores(kept) == []
    _, report = load_feedback(path, make(), cache=kept, on_bad_row="drop")
    moved = path.rename(tmp_path / "b.jsonl")
    _, again = load_feedback(moved, make(), cache=kept, on_bad_row="drop")
    assert readings == ["a", "a"]
    (row,) = again.bad_rows
    assert str(row) == str(report.bad_rows[0]).replace("a.jsonl", "b.jsonl")
    assert "b.jsonl, row 6 (line 7), column 'completion': empty response" in str(row)
    assert again["b"].dropped == {"empty response": 1} and not again.ok
    with pytest.raises(BadRow, match=r"row 6 .line 7., column 'completion': empty response"):
        load_feedback(moved, make(), cache=kept)
    assert readings == ["a", "a"]


def test_nothing_that_can_be_used(tmp_path):
    path = write(tmp_path / "a.jsonl", [BAD])
    with pytest.raises(DataError, match=r"found no row that can be used among 1 \(1 empty response\)"):
        load_feedback(path, make(), cache=tmp_path / "kept", on_bad_row="drop")
    assert stores(tmp_path / "kept") == []


def test_a_damaged_store_is_not_used(tmp_path):
    path = write(tmp_path / "a.jsonl")
    load_feedback(path, make(), cache=tmp_path / "kept")
    (folder,) = (tmp_path / "kept").iterdir()
    os.truncate(folder / "tokens.bin", 8)
    with pytest.raises(DataError, match=r"tokens.bin: a damaged store .*found 8 bytes; want .*Delete the folder"):
        load_feedback(path, make(), cache=tmp_path / "kept")
