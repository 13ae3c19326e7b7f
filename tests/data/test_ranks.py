"""Several processes of one machine: one tokenises, the others read what it wrote; all raise what it raises."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(6)]

CODE = """
import json, sys, time
from accelerate import PartialState
from tests.data.tiny_tokenizers import make
from uft.data import DataError, Source, cache, load_feedback

state, read, folder = PartialState(cpu=True, backend="gloo"), cache.read_examples, sys.argv[1]

def counted(source, *rest):
    readings.append(source.name)
    time.sleep(0.3)  # the others have to wait
    yield from read(source, *rest)

cache.read_examples = counted
told = []
for source in (
    Source("kept", folder + "/a.jsonl"),
    Source("kept", folder + "/a.jsonl"),
    Source("unnamed", folder + "/a.jsonl", streaming=True),
    Source("bad", folder + "/bad.jsonl"),
    Source("gone", folder + "/gone.jsonl"),
):
    readings, found = [], ""
    try:
        data, report = load_feedback(source, make(), cache=None if source.streaming else folder + "/kept")
        found = data.fingerprint + str(report)
    except DataError as error:
        found = str(error)
    told.append((len(readings), found))
    state.wait_for_everyone()
with open(f"{folder}/{state.process_index}.json", "w") as file:
    json.dump(told, file)
state.destroy_process_group()
"""


def test_one_process_tokenises(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "completion": ""}) + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
    environment |= {"MASTER_ADDR": "127.0.0.1", "TMPDIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(tmp_path)], cwd=ROOT, env={**environment, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")
    assert [n for n, _ in first] == [1, 0, 1, 1, 0]
    assert [n for n, _ in second] == [0] * 5
    for (_, one), (_, other) in zip(first[:3], second[:3]):
        assert one == other and "demonstration" in one
    assert first[0] == [1, first[1][1]]
    assert "bad.jsonl, row 0 (line 1), column 'completion': empty response" in first[3][1]
    assert second[3][1].startswith("the first process of this machine could not make ") and first[3][1] in second[3][1]
    assert "gone.jsonl: found no such file" in first[4][1] and second[4][1] == first[4][1]
    assert not list(tmp_path.glob("uft-tokens-*"))
