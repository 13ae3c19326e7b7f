"""Data larger than memory: what a process holds does not grow with the file that it tokenises and goes through."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.tiny_tokenizers import make
from uft.data.sources import Source, read_rows

ROOT = Path(__file__).resolve().parents[2]

# prints examples, tokens, and by how many MB the peak of this process grew
CODE = """
import sys
import torch
from transformers import AutoTokenizer
from uft.data import MixtureSampler, Source, load_feedback
from uft.feedback import Collator
from uft.record import peak_memory_bytes, reset_peak_memory

path, folder, kind, rows = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
def load(source):
    return load_feedback(source, tokenizer, 256, cache=folder + "/kept" if kind == "kept" else None)[0]
def source(**options):
    return Source(kind, path, streaming=kind == "streaming", **options)
def through(data):
    collate = Collator(tokenizer.pad_token_id, data.sources)
    loader = torch.utils.data.DataLoader(data, 16, sampler=MixtureSampler(data.sizes), collate_fn=collate)
    tokens = sum(int(batch.attention_mask.sum()) for batch in loader)
    assert tokens == data.lengths.sum()
    return tokens
through(load(source(limit=2000)))
reset_peak_memory()
before = peak_memory_bytes()
data = load(source())
tokens = through(data)
print(len(data), tokens, (peak_memory_bytes() - before) / 2**20)
"""


def grown(folder, megabytes: int, kind: str) -> tuple[int, float, float]:
    """(examples, MB of tokens, MB by which memory grew) for a file of so many MB."""
    make().save_pretrained(folder)
    row = json.dumps({"prompt": "the cat sat on the mat " * 10, "completion": " hello world good bye" * 30}) + "\n"
    n = megabytes * 2**20 // len(row)
    path = folder / "rows.jsonl"
    with open(path, "w") as file:
        for i in range(n):
            file.write(row.replace("the cat", f"{i}", 1))
    command = [sys.executable, "-c", CODE, str(path), str(folder), kind, str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    examples, tokens, growth = done.stdout.split()
    path.unlink()
    return int(examples), 4 * int(tokens) / 2**20, float(growth)


STORE = """
import sys
from pathlib import Path
import numpy as np
from uft.data.columns import in_memory
from uft.data.mixture import FeedbackDataset
from uft.data.store import load, write
from uft.feedback import Example, Response
from uft.record import peak_memory_bytes, reset_peak_memory

def rows():
    for i in range(25_000):
        yield Example("document", np.zeros(0, np.int32), (Response(np.full(1000, i, np.int32)),), row=i)

folder = Path(sys.argv[1])
reset_peak_memory()
before = peak_memory_bytes()
if sys.argv[2] == "disk":
    write(folder, "k", rows(), dict)
    examples, _ = load(folder, "k")
else:
    examples = in_memory(rows())
data = FeedbackDataset({"s": examples})
assert sum(int(data[i].responses[0].tokens[-1]) for i in range(len(data))) == 25_000 * 24_999 // 2
assert data.lengths.sum() == 25_000_000 and data.fingerprint
print((peak_memory_bytes() - before) / 2**20)
"""


def growth(folder, where: str) -> float:
    command = [sys.executable, "-c", STORE, str(folder / "s"), where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_store_is_written_and_read_in_bounded_memory(tmp_path):
    """100 MB of tokens."""
    assert growth(tmp_path, "disk") < 25


def test_a_parquet_of_one_row_group_is_not_read_whole(tmp_path):
    texts = [os.urandom(1000).hex() for _ in range(10_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10**6, compression=None)
    before, held = pa.total_allocated_bytes(), []
    for row in read_rows(Source("s", tmp_path / "a.parquet")):
        assert row.values["text"] == texts[row.number]
        held.append(pa.total_allocated_bytes() - before)
    assert len(held) == 10_000 and max(held) < (tmp_path / "a.parquet").stat().st_size / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streaming", "kept"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    examples, tokens, growth = grown(tmp_path, 200, kind)
    assert (examples, int(tokens)) == (234843, 193)
    # 70 bytes per example are mapped, and its place in the order of an epoch; the rest does not grow
    assert growth < 60, f"{growth} MB"


@pytest.mark.slow
def test_it_does_in_memory(tmp_path):
    """The comparisons would notice."""
    assert growth(tmp_path, "memory") > 95
    _, tokens, more = grown(tmp_path, 50, "memory")
    assert more > tokens
