"""The benchmark of training beside TRL's, at a size that only shows that everything runs; no time is judged."""

import json

import numpy as np
import pytest

from experiments import training_speed
from experiments.speed.agreement import check
from experiments.speed.parts import PARTS
from experiments.speed.rivals import OURS, TRL, Setting, run
from experiments.speed.workloads import as_example, make_workload, random_rows, unordered
from uft.data.mixture import FeedbackDataset, MixtureSampler

pytestmark = pytest.mark.peers
QUICK = ["--quick", "--start", "here", "--steps", "1", "--batch-size", "2", "--max-length", "64", "--cases"]


@pytest.fixture(scope="module")
def rows():
    return random_rows()


def setting(rows, **options):
    options = {"shape": "toy", "batch_size": 3, "max_length": 96, "warmup": 1, "learning_rate": 1e-3} | options
    return Setting(workload=make_workload("long", rows, 6, options["max_length"]), **options)


@pytest.mark.slow
def test_everything_is_written(tmp_path):
    assert training_speed.main([*QUICK, "long full live", "stages", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert {"hardware", "python", "versions", "date", "commit", "goals", "cases"} <= set(record)
    assert record["versions"]["trl"]
    case, stages = record["cases"]
    assert next(iter(case["rivals"])) == OURS and TRL in case["rivals"]
    for name, found in case["rivals"].items():
        assert max(case["agreement"][name].values()) < 1e-4
        (timed,) = found["rounds"]
        assert len(timed["seconds"]) == case["setting"]["steps"] == 2
        assert found["rate"]["median"] == pytest.approx(timed["response_tokens"] / timed["timed_seconds"])
        assert set(found["parts"]) == set(PARTS) and found["parts"]["backward"] > 0
        assert found["parts"]["reference"] > 0 and found["parts"]["head"] > 0
        assert name in case["to_trl"]
    assert stages["unified_to_sequential"]["flops"] == pytest.approx(1.0, abs=1e-6)
    assert all(shown in (tmp_path / "cpu.md").read_text() for shown in ("Goals", "TRL, short head", "one joint stage"))
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    # what differs between the objectives is noticed, and nothing is timed
    before = (tmp_path / "cpu.json").read_bytes()
    with pytest.raises(ValueError, match="ours and TRL do not compute the same"):
        training_speed.main([*QUICK, "long full cached", "--output", str(tmp_path)], altered={TRL: {"beta": 0.2}})
    assert (tmp_path / "cpu.json").read_bytes() == before


def test_cached_reference_and_adapters_agree(rows):
    for options in ({"reference": "cached"}, {"tuning": "lora"}):
        ours, theirs = (run(name, setting(rows, **options), log_every=1) for name in (OURS, TRL))
        check(ours, theirs, "float32")
        assert (ours.prepared > 0) == (theirs.prepared > 0) == ("reference" in options)


def test_order_of_a_workload(rows):
    """Our sampler draws the rows as TRL reads them."""
    workload = make_workload("short", rows, 7, 128, seed=3)
    data = workload.feedback()
    assert isinstance(data, FeedbackDataset)
    drawn = [data[i] for i in MixtureSampler(data.sizes, seed=3)]
    for example, pair, ids in zip(drawn, workload.pairs, workload.columns()["chosen_ids"], strict=True):
        assert example.prompt.tolist() == pair.prompt
        assert example.responses[0].tokens.tolist() == pair.chosen == ids
    examples = [as_example(pair) for pair in workload.pairs]
    assert len({example.row for example in unordered(examples, 0)}) == 7


def test_statistics_of_a_workload(rows):
    found = make_workload("long", rows, 50, 384).statistics()
    P, R = found["P"], found["R"]
    assert P > 4 * R and found["limit_of_sharing"] == pytest.approx(2 * (P + R) / (P + 2 * R))
    assert found["tokens"] == pytest.approx(50 * 2 * (P + R))
    assert make_workload("short", rows, 50, 384).statistics()["longer_to_shorter_response"] > 2


def test_lengths_are_lengths():
    """No text and no token is in the repository."""
    kept = json.loads(training_speed.workloads.LENGTHS.read_text())
    assert set(kept) == {"long", "short", "demonstrations"}
    for name, each in kept.items():
        assert np.array(each).shape[1] == (2 if name == "demonstrations" else 3)


def test_without_trl(rows, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.speed.rivals.find_spec", lambda name: None)
    training_speed.main([*QUICK, "short lora cached", "--output", str(tmp_path)])
    (case,) = json.loads((tmp_path / "cpu.json").read_text())["cases"]
    assert "not installed" in case["rivals"][TRL]["missing"] and "rate" in case["rivals"][OURS]
    assert "not installed" in (tmp_path / "cpu.md").read_text()
