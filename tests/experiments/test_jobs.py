"""Jobs: results are kept by content, an interrupted list goes on, a failure is not hidden."""

import json

import pytest

from experiments.jobs import Job, run_jobs


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


def test_the_key_is_the_content(tmp_path):
    a, b = jobs(tmp_path, 1, 2)
    assert a.key != b.key
    assert a.key == Job("another name", double, dict(reversed(a.arguments.items()))).key


def test_the_key_knows_the_code_but_not_its_comments(tmp_path):
    from experiments.jobs import code_fingerprint

    def fingerprint(text):
        (tmp_path / "module.py").write_text(text)
        code_fingerprint.cache_clear()
        return code_fingerprint(tmp_path)

    first = fingerprint('"""Says."""\nx = 1  # one\n')
    assert fingerprint('"""Says more."""\n\nx = 1\n') == first
    assert fingerprint('"""Says."""\nx = 2  # one\n') != first
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    assert fingerprint('"""Says."""\nx = 1  # one\n') != first
