"""Stores give back what was put in, bit by bit; whole or absent; damaged ones are named."""

import json
import os
import pickle
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.same import examples, facts, same
from tests.mixed import dataset
from tests.mixed import examples as some
from uft.data import store
from uft.data.columns import in_memory
from uft.data.mixture import FeedbackDataset
from uft.data.rows import DataError
from uft.data.store import load, write

ROOT = Path(__file__).resolve().parents[2]


def written(folder, rows, key="k", **more):
    write(folder, key, iter(rows), lambda: more)
    return load(folder, key)[0]


# ---- what comes back ----


@settings(max_examples=60, deadline=None)
@given(st.lists(examples(), max_size=6), st.integers(1, 40))
def test_a_round_trip(tmp_path_factory, rows, block):
    memory = in_memory(rows)
    folder = tmp_path_factory.mktemp("store") / "s"
    kept, store.BLOCK = store.BLOCK, block  # handed on after few tokens, so that columns are written in pieces
    try:
        disk = written(folder, rows)
    finally:
        store.BLOCK = kept
    for columns in (memory, disk, pickle.loads(pickle.dumps(disk)), pickle.loads(pickle.dumps(memory))):
        assert same(columns, rows) and len(columns) == len(rows)
        assert columns.kinds == {row.kind for row in rows}
        first, length = columns.sequences
        assert [length[a:b].sum() for a, b in pairwise(first)] == [row.tokens for row in rows]
        assert columns.prompt_lengths.tolist() == [len(row.prompt) for row in rows]
        assert columns.fingerprint == memory.fingerprint
    assert [columns[i].index for i in range(len(rows))] == list(range(len(rows)))
    assert same(disk[1:], rows[1:]) and (not rows or facts(disk[-1]) == facts(rows[-1]))
    with pytest.raises(IndexError):
        disk[len(rows)]


def test_a_data_set_on_disk_is_the_one_in_memory(tmp_path):
    data = dataset()
    disk = FeedbackDataset({name: written(tmp_path / name, each) for name, each in data.examples.items()})
    assert same(disk, data) and disk.fingerprint == data.fingerprint and disk.kinds() == data.kinds()
    assert disk.lengths.tolist() == data.lengths.tolist() == [example.tokens for example in data]
    assert disk.prompt_lengths.tolist() == [len(example.prompt) for example in data]
    with pytest.raises(ValueError, match="read-only"):
        data[0].prompt[0] = 1  # a view of what all later readers get


def test_a_mask_of_another_length_is_refused():
    row = some("demonstrations", 1)[0]
    broken = type(row)("label", row.prompt, (type(row.responses[0])(row.prompt, np.ones(9, dtype=bool)),), row=4)
    with pytest.raises(ValueError, match="row 4: found a mask of 9 for 3 tokens"):
        in_memory([broken])


# ---- whole or absent ----


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def rows():
        yield from some("pairs")
        raise DataError("the stream broke")

    with pytest.raises(DataError, match="the stream broke"):
        write(tmp_path / "s", "k", rows(), dict)
    assert list(tmp_path.iterdir()) == []


def test_another_process_was_faster(tmp_path):
    def rows():
        yield from some("pairs")
        written(tmp_path / "other", some("labels"))
        os.rename(tmp_path / "other", tmp_path / "s")

    write(tmp_path / "s", "k", rows(), dict)
    assert same(load(tmp_path / "s", "k")[0].named("labels"), some("labels"))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_killed_while_writing(tmp_path):
    """No store is left, and what was begun goes away when it is begun again."""
    code = (
        "import sys, time; from pathlib import Path; import numpy as np\n"
        "from uft.data import store; from uft.feedback import Example, Response\n"
        "row = Example('label', np.arange(9), (Response(np.arange(5)),))\n"
        "store.BLOCK = 1\n"
        "def rows():\n"
        "    yield from [row] * 2000\n"
        "    print('half', flush=True); time.sleep(60)\n"
        "store.write(Path(sys.argv[1]), 'k', rows(), dict)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s")], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (begun,) = tmp_path.iterdir()
    assert begun.name.startswith(".s.") and (begun / "tokens.bin").stat().st_size > 0
    with pytest.raises(DataError, match="a damaged store"):
        load(tmp_path / "s", "k")
    assert same(written(tmp_path / "s", some("pairs")).named("pairs"), some("pairs"))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


# ---- damage ----


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_format(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("tokens.bin", cut, r"found \d+ bytes; want \d+"),
        ("first_token.bin", cut, r"found \d+ bytes; want \d+"),
        ("tokens.bin", flip, r"found content with sha256 .*; want .*, as it was written"),
        ("target.bin", flip, r"found content with sha256"),
        ("kind.bin", Path.unlink, "found .*No such file.*; want a readable file"),
        ("store.json", Path.unlink, "want a description of the store's columns"),
        ("store.json", cut, "found JSONDecodeError.*; want a description"),
        ("store.json", lambda path: path.write_text("[]"), "found TypeError"),
        ("store.json", of_another_format, "found format 0, key 'k'; want format 1, key 'k'"),
    ],
)
def test_damage_is_named(tmp_path, name, damage, message):
    written(tmp_path / "s", some("pairs"))
    damage(tmp_path / "s" / name)
    with pytest.raises(
        DataError, match=f"{tmp_path}/s/{name}: a damaged store .*{message}.* Delete the folder"
    ) as error:
        load(tmp_path / "s", "k")
    assert str(error.value).endswith(f"Delete the folder {tmp_path}/s, and the data will be tokenised again")


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    columns = written(tmp_path / "s", some("pairs"))
    assert len(columns[0].prompt) == 3
    os.truncate(tmp_path / "s" / "tokens.bin", 8)
    with pytest.raises(DataError, match=r"tokens.bin: a damaged store .*found 8 bytes at 0; want \d+"):
        columns[0]


def test_a_store_under_another_key(tmp_path):
    written(tmp_path / "s", some("pairs"))
    with pytest.raises(DataError, match="found format 1, key 'k'; want format 1, key 'other'"):
        load(tmp_path / "s", "other")


def test_a_process_that_lives_keeps_what_it_writes(tmp_path):
    aside = tmp_path / f".s.{os.uname().nodename}.{os.getppid()}"
    aside.mkdir()
    written(tmp_path / "s", some("pairs"))
    assert aside.exists()
