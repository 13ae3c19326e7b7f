"""The comparison on real data end to end at toy size, on made-up rows of the same schema, and its parts."""

import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from experiments import real_small
from experiments.real.base import llama
from experiments.real.data import asked
from experiments.real.measures import repetition, word_f1
from experiments.real.politeness import Judge
from experiments.real.settings import RECIPES, read_settings, settings_from
from experiments.real.splits import groups, split
from experiments.runs import SFT_STAGE

WORDS = tuple(
    "river stone lamp garden winter horse bread cloud letter music window harbour candle forest silver road".split()  # noqa: SIM905
)
QUICK = ["--quick", "--workers", "1"]


def sentence(rng, n=6):
    return " ".join(rng.choices(WORDS, k=n))


def write(folder, name, rows):
    parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few hundred rows; among the pairs one with equal and one with empty answers."""
    at, rng = tmp_path_factory.mktemp("rows"), random.Random(0)
    text = [{"source": s, "text": f"{sentence(rng, 120)}."} for s in ("novel", "wiki") for _ in range(40)]
    write(at, "pretrain", text)
    write(at, "pretrain_heldout", [{"source": row["source"], "text": f"{sentence(rng, 120)}."} for row in text[::4]])
    shown = [
        {"prompt": f"Which word comes first: {words}?", "completion": words.split()[0], "task": task, "source": "t0"}
        for task in ("qasc_qa_with_combined_facts_1", "common_gen_sentence_to_concepts", "not_used")
        for words in (sentence(rng) for _ in range(60))
    ]
    plain = [
        {"prompt": f"What about {words}?", "completion": f"It is {words}.", "task": "instruct",
         "source": "llms-from-scratch"}
        for words in (sentence(rng, 3) for _ in range(60))
    ]  # fmt: skip
    write(at, "demonstrations", shown + plain)
    write(at, "demonstrations_heldout_tasks", [row | {"task": "other"} for row in shown[:20]])
    polite = [
        {"prompt": row["prompt"], "chosen": f"I would gladly say: {row['completion']}", "rejected": row["completion"],
         "source": "llms-from-scratch-polite"}
        for row in plain
    ]  # fmt: skip
    harmless = [
        {"prompt": f"Human: {sentence(rng)}\n\nAssistant: {sentence(rng)}\n\nHuman: {sentence(rng)}",
         "chosen": sentence(rng), "rejected": sentence(rng), "source": "hh-harmless-test"}
        for _ in range(60)
    ]  # fmt: skip
    bad = [polite[0] | {"rejected": polite[0]["chosen"]}, polite[1] | {"chosen": " "}]
    write(at, "pairs", polite + harmless + bad)
    write(at, "pairs_eval", [row | {"source": "alpaca-eval-gpt4"} for row in harmless[:10]])
    return at


@pytest.fixture
def here(monkeypatch):
    """Jobs in this process; a pool's processes would each import torch anew."""

    def run_jobs(jobs, cache, **_):
        results = []
        for job in jobs:
            path = cache / f"{job.key}.json"
            if not path.exists():
                real_small.run_plan.calls += 1
                cache.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(job.function(**job.arguments)))
            results.append(json.loads(path.read_text()))
        return results

    monkeypatch.setattr(real_small.run_plan, "calls", 0, raising=False)
    monkeypatch.setattr(real_small, "run_jobs", run_jobs)
    monkeypatch.setattr(real_small, "keep_freed_memory", lambda: None)


def check(output):
    summary = json.loads((output / "summary.json").read_text())
    arms = summary["arms"]
    assert list(arms) == ["base", "sft", "sft_chosen", "sft_dpo", "sft_dpo_replay", "unified_dpo_nll"]
    flops = [each["flops"] for arm in arms.values() for each in arm["compute"] if each]
    assert max(flops) / min(flops) < 1.02
    assert [s["stage"] for s in arms["sft_dpo"]["stages"][0]] == ["sft", "dpo"]
    assert arms["sft_dpo"]["stages"][0][0] == arms["sft_dpo_replay"]["stages"][0][0]  # trained once
    base = arms["base"]["per_seed"]
    assert base["knowledge"]["0"] == 1.0 and base["kl/text"]["0"] == 0.0 and base["accuracy_reward"]["0"] == 0.5
    assert arms["sft"]["per_seed"]["kl/demonstrations"]["0"] > 0
    for arm in arms.values():
        measured = {name: values["0"] for name, values in arm["per_seed"].items()}
        assert None not in measured.values() and np.isfinite(list(measured.values())).all()
        kept = [measured[name] for name in ("knowledge", "demonstrations", "skill")]
        assert measured["retention"] == pytest.approx(np.mean(kept))
    assert set(summary["search"]) == {SFT_STAGE, *arms} - {"base"}
    assert {len(found["grid"]) for found in summary["search"].values()} == {2}
    report = (output / "report.md").read_text()
    for figure in ("tradeoff.png", "forgetting.png"):
        assert (output / figure).stat().st_size > 5000 and figure in report
    return summary


@pytest.mark.slow
def test_the_comparison_runs_end_to_end_and_remembers(folder, tmp_path, here, capsys):
    words = ["--data", str(folder), *QUICK, "--output", str(tmp_path)]
    assert real_small.main(words) == 0
    summary = check(tmp_path)
    assert "unified DPO + NLL" in capsys.readouterr().out
    rows = summary["report"]["preferences"]
    assert rows["rows"] == 122 and rows["dropped"] == {"equal responses": 1, "empty response": 1}
    assert sum(rows["used"].values()) + sum(rows["longer than max_length"].values()) == 120
    assert "not_used" not in summary["report"]["demonstrations"]["used"]
    assert str(folder) not in (tmp_path / "summary.json").read_text()

    calls = real_small.run_plan.calls
    real_small.main(words)
    assert real_small.run_plan.calls == calls


def test_without_data_it_is_skipped_with_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("UFT_DATA", raising=False)
    assert real_small.main([]) == 0
    assert "--data" in capsys.readouterr().out
    assert real_small.main(["--data", str(tmp_path)]) == 0
    assert "pairs_eval.parquet" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif("UFT_DATA" not in os.environ, reason="UFT_DATA does not say where the real files are")
def test_the_comparison_runs_on_the_real_files(tmp_path, here):
    assert real_small.main(["--data", os.environ["UFT_DATA"], *QUICK, "--output", str(tmp_path)]) == 0
    summary = check(tmp_path)
    rows = summary["report"]["preferences"]
    assert rows["dropped"] == {"equal responses": 6, "empty response": 5}


# ---- parts ----


@pytest.mark.parametrize("recipe, low, high", [("real_small", 1.2e6, 1.5e6), ("real_gpu", 15e6, 30e6)])
def test_recipes(recipe, low, high):
    settings = read_settings(RECIPES / f"{recipe}.yaml")
    with torch.device("meta"):
        model = llama(settings.scale.base, Sized(settings.scale.base.vocabulary), settings.scale.max_length)
    assert low < sum(p.numel() for p in model.parameters()) < high
    assert set(settings.learning_rates) == {SFT_STAGE} | {arm for arm, spec in real_small.ARMS.items() if spec.last}
    assert {len(grid) for grid in settings.learning_rates.values()} == {4}
    assert len(settings.seeds) == 3


class Sized:
    """As much of a tokenizer as a model's configuration needs."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


def test_an_unknown_setting_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((RECIPES / "real_small.yaml").read_text().replace("micro_batch_size", "mikro"))
    with pytest.raises(ValueError, match=r"mine\.yaml.*mikro"):
        read_settings(path)
    with pytest.raises(KeyError, match="scale"):
        settings_from({})


def test_what_is_about_the_same_is_held_out_together():
    template = "Given the two facts above, answer the question: "
    fact = "the old lighthouse keeper counted seven grey ships at dawn"
    prompts = [template + fact, f"{fact}. What did he count?", template + "why do tall birds sleep on one thin leg"]
    prompts += [f"{template}{word} {word}" for word in WORDS * 4]
    answers = ["ships"] * len(prompts)
    found = groups(prompts, prompts, answers)
    assert found[0] == found[1] != found[2]
    # the template alone ties nothing together: it stands in many rows
    assert len(set(found)) == 2 + len(WORDS)
    assert groups(["a", "b"], ["", ""], ["to feel better", "to feel better."]) == ["a", "a"]
    assert groups(["a", "a"], ["", ""], ["", ""]) == ["a", "a"]
    parts = split([str(i) for i in range(2000)], [""] * 2000, [""] * 2000)
    assert parts.count("validation") / 2000 == pytest.approx(0.1, abs=0.03)
    assert parts.count("test") / 2000 == pytest.approx(0.2, abs=0.03)


def test_dialogues_become_the_plain_template():
    assert (
        asked("Human: Hi\n\nAssistant: Yes?\n\nHuman: Bye ") == "User: Hi\n\nAssistant: Yes?\n\nUser: Bye\n\nAssistant:"
    )
    assert asked("Name a bird.") == "User: Name a bird.\n\nAssistant:"
    assert asked(" ") == " " and asked(None) is None


def test_word_f1():
    assert word_f1("Key Lime, pie", "key lime pie") == 1.0
    assert word_f1("lime", "key lime pie") == pytest.approx(2 * 1 / (1 + 3))
    assert word_f1("pie pie", "pie") == pytest.approx(2 / 3)
    assert word_f1("", "pie") == 0.0


def test_repetition():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert repetition([1]) == 0.0


def test_the_judge_learns_what_is_polite():
    judge = Judge.learnt([f"I would gladly say {w}" for w in WORDS], [f"It is {w}" for w in WORDS] * 2)
    assert judge.polite("I would gladly name the sea") and not judge.polite("It is the sea") and not judge.polite("")
