"""Jobs: results are kept by content, an interrupted list goes on, a failure is not hidden."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.jobs import ROOT, Job, code_fingerprint, file_of, reached, run_jobs
from experiments.lab.training import run_plan


def double(x: int, log: str) -> dict:
    with open(log, "a") as file:
        file.write(f"{x}\n")
    if x < 0:
        raise ValueError(f"{x} is negative")
    return {"value": 2 * x}


def jobs(tmp_path, *values):
    return [Job(f"double {x}", double, {"x": x, "log": str(tmp_path / "log")}) for x in values]


def test_results_are_kept_and_only_what_is_missing_runs(tmp_path):
    cache = tmp_path / "cache"
    first = run_jobs(jobs(tmp_path, 1, 2), cache, workers=1)
    assert [result["value"] for result in first] == [2, 4]
    again = run_jobs(jobs(tmp_path, 2, 3, 1), cache, workers=2)
    assert [result["value"] for result in again] == [4, 6, 2]
    assert sorted((tmp_path / "log").read_text().split()) == ["1", "2", "3"]


def test_a_failure_is_raised_and_what_was_done_is_kept(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="-1 is negative"):
        run_jobs(jobs(tmp_path, 1, -1), cache, workers=1)
    kept = [json.loads(path.read_text())["value"] for path in cache.glob("*.json")]
    assert kept == [2]


def wait_long(log: str) -> dict:
    Path(log).write_text(str(os.getpid()))
    time.sleep(100)
    return {}


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    """Which can tell them nothing."""
    log = tmp_path / "log"
    code = (
        "from pathlib import Path; from experiments.jobs import Job, run_jobs; from test_jobs import wait_long\n"
        f"if __name__ == '__main__': run_jobs([Job('w', wait_long, {{'log': {str(log)!r}}})], Path({str(tmp_path)!r}))"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": path})
    try:
        worker = int(within(60, lambda: log.exists() and log.read_text()))
    finally:
        parent.kill()
        parent.wait()
    within(20, lambda: not alive(worker))


def within(seconds, wanted):
    for _ in range(10 * seconds):
        if found := wanted():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


def alive(process: int) -> bool:
    """Ended processes whose parent has not looked yet are in state Z."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_key_is_the_content(tmp_path):
    a, b = jobs(tmp_path, 1, 2)
    assert a.key != b.key
    assert a.key == Job("another name", double, dict(reversed(a.arguments.items()))).key


def test_the_key_knows_the_code_but_not_its_comments(tmp_path):
    module = tmp_path / "module.py"

    def fingerprint(text):
        module.write_text(text)
        code_fingerprint.cache_clear()
        return code_fingerprint(module)

    first = fingerprint('"""Says."""\nx = 1  # one\n')
    assert fingerprint('"""Says more."""\n\nx = 1\n') == first
    assert fingerprint('"""Says."""\nx = 2  # one\n') != first
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    assert fingerprint('"""Says."""\nx = 1  # one\n') != first


def test_the_key_knows_what_is_imported_and_nothing_else(tmp_path, monkeypatch):
    def written(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    monkeypatch.setattr("experiments.jobs.ROOT", tmp_path)
    imports = "import os, other\nfrom . import near\ndef f():\n    import experiments.lab.lazily\n"
    here = written("experiments/lab/here.py", imports)
    near = written("experiments/lab/near.py", "from ..deep.inside import thing\n")
    lazily, start = written("experiments/lab/lazily.py", ""), written("experiments/lab/__init__.py", "")
    inside, kernel = (
        written("experiments/deep/inside.py", "import uft_kernels\n"),
        written("kernels/uft_kernels/__init__.py", ""),
    )
    beside = written("experiments/__init__.py", "")
    never = written("experiments/lab/never.py", "")
    written("other/__init__.py", "")  # installed beside this project
    assert reached(here) == {here, near, lazily, start, inside, kernel, beside}
    code_fingerprint.cache_clear()
    before = code_fingerprint(here)
    for path, changes in ((never, False), (inside, True)):
        path.write_text(path.read_text() + "y = 1\n")
        code_fingerprint.cache_clear()
        assert (code_fingerprint(here) != before) == changes


def test_a_run_of_the_lab_does_not_depend_on_reports_or_commands():
    names = {path.name for path in reached(file_of(run_plan))}
    assert {"training.py", "world.py", "trainer.py", "pairwise.py", "linear_logprob.py", "runs.py"} <= names
    assert not {"report.py", "figures.py", "cli.py", "study.py", "sequential_vs_unified.py"} & names
