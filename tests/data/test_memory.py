"""Data larger than memory: what a process holds does not grow with the file that it tokenises and goes through."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.tiny_tokenizers import make

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


def test_memory_stays_below_the_file(tmp_path):
    examples, tokens, growth = grown(tmp_path, 16, "streaming")
    assert (examples, int(tokens)) == (18787, 15)
    assert growth < 10, f"{growth} MB"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streaming", "kept"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    _, tokens, growth = grown(tmp_path, 200, kind)
    assert tokens > 190
    assert growth < 20, f"{growth} MB"


@pytest.mark.slow
def test_it_does_in_memory(tmp_path):
    """The comparison would notice."""
    _, tokens, growth = grown(tmp_path, 50, "memory")
    assert growth > tokens
