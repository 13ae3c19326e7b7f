"""The paper's arms on published models: its numbers, the tasks, and a dry run that does all of it on a toy."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from safetensors.torch import load_file

from experiments import paper_uft
from experiments.paper import dry, running
from experiments.paper.arms import ARMS, BOTH, GROUPS, INSTRUCTIONS, key_of, stage_recipes
from experiments.paper.plan import config_of
from experiments.paper.published import AVERAGES, CLAIMED, CLAIMS, NEW, OLD, TABLES, published
from experiments.paper.report import by_seed, write_report
from experiments.paper.running import Setting, finished
from experiments.paper.tasks import TASKS, evaluate
from uft.recipe import parse

# one arm of every recipe and group, each of which is trained and evaluated
DRY_ARMS = (
    "base", "sft", "uft_instructions", "sft_dpo", "sft_kto", "sft_una", "uft", "uft_16k", "sft_1e-05",
    "uft_0.0001_0.3", "dpo", "sft_chosen", "dpo_nll",
)  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# ---- what is published ----


@pytest.mark.parametrize("table", TABLES[:2], ids=lambda table: table.number)
def test_published_averages_are_those_of_their_columns(table):
    for arm, values in table.rows.items():
        assert len(values) == len(table.columns) == 7
        assert abs(np.mean(values[:-1]) - values[-1]) < 0.0051, arm


def test_a_number_in_several_tables_is_one_number():
    seen = {}
    for table in TABLES:
        for arm, values in table.rows.items():
            assert arm in ARMS and len(values) == len(table.columns)
            for column, value in zip(table.columns, values):
                assert seen.setdefault((arm, column), value) == value == published(arm, column)
    assert published("uft", "avg new") == 32.81 and published("dpo_nll", "avg new") is None
    assert all(published(arm, column) is not None for a, b, _ in CLAIMS for arm in (a, b) for column in CLAIMED)


# ---- the tasks ----


def lm_eval_tasks() -> Path:
    return Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"


def test_columns():
    assert [task.column for task in TASKS] == [*NEW, *OLD]
    assert {task.column for task in TASKS if task.board == "new"} == set(NEW)
    assert [(real.column, real.metrics) for real in TASKS] == [(toy.column, toy.metrics) for toy in dry.dry_tasks()]


def test_lm_eval_has_these_tasks_metrics_and_numbers_of_examples():
    folders = ("leaderboard", "gsm8k", "truthfulqa", "winogrande", "arc", "hellaswag", "mmlu/default")
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=[lm_eval_tasks() / f for f in folders], include_defaults=False).task_index

    def leaves(name):
        config = index[name].cfg
        if config is None:  # a tag, which stands for all that bear it
            return [leaf for leaf, entry in index.items() if name in entry.tags]
        return [leaf for child in config["task"] for leaf in leaves(child)] if "group" in config else [name]

    for task in TASKS:
        names = leaves(task.name)
        assert len(names) == {"bbh": 24, "gpqa": 3, "musr": 3, "math-hard": 7, "mmlu": 57}.get(task.column, 1)
        for name in names:
            config = index[name].cfg
            metrics = {metric["metric"] for metric in config["metric_list"]}
            filters = {each["name"] for each in config.get("filter_list", [{"name": "none"}])}
            assert {key.split(",")[0] for key in task.metrics} <= metrics, name
            assert {key.split(",")[1] for key in task.metrics} <= filters, name
            assert config.get("num_fewshot") in (None, task.shots), name  # lm-eval refuses to change a 0


class Oracle:
    """Prefers the last choice per letter, and short ones as a whole; gives five answers whose scores are known."""

    answers = ("white #### 13", "14, or so", "#### 15.", "x" * 50, "a, " + "b" * 50)

    @classmethod
    def lm(cls):
        from lm_eval.api.model import LM

        rows = [json.loads(line) for line in (dry.TASK_FILES / "rows.jsonl").read_text().splitlines()]
        by_question = {row["question"]: row for row in rows}
        answers = dict(zip([row["question"] for row in rows[3:]], cls.answers))

        def asked(request):
            return request.args[0].rpartition("Question: ")[2].partition("\n")[0]

        class Known(LM):
            tokenizer = staticmethod(lambda text, **_: {"input_ids": text.split()})

            def loglikelihood(self, requests):
                return [(cls.logp(by_question[asked(r)], r.args[1].strip()), False) for r in requests]

            def generate_until(self, requests):
                return [answers[asked(request)] for request in requests]

            def loglikelihood_rolling(self, requests):
                raise NotImplementedError

        return Known(), rows[3:]

    @staticmethod
    def logp(row, choice):
        return -len(choice) * (1.1 - 0.01 * row["choices"].index(choice))


def test_scores_are_those_worked_out_by_hand(tmp_path):
    pytest.importorskip("lm_eval")
    lm, rows = Oracle.lm()
    manager = Setting("none", tmp_path, (), tasks_in=str(dry.TASK_FILES)).manager
    tasks = {task.column: task for task in dry.dry_tasks()}
    found = {column: evaluate(lm, task, manager) for column, task in tasks.items()}
    # the last choice is right once in five, in the group's first part of three; a mean of parts would be 1/6
    assert found["bbh"]["score"] == pytest.approx(20) and found["bbh"]["metrics"]["acc,none"] == 0
    assert found["bbh"]["documents"] == {"dry_bbh_first": 3, "dry_bbh_second": 2}
    assert found["arc"]["score"] == pytest.approx(20) and found["mmlu"]["score"] == 0 == found["winogrande"]["score"]
    shares = []
    for row in rows:
        weights = [math.exp(Oracle.logp(row, choice)) for choice in row["choices"]]
        shares.append(weights[row["label"]] / sum(weights))
    assert found["truthful"]["score"] == pytest.approx(100 * np.mean(shares))
    assert found["gsm8k"]["score"] == pytest.approx(40)
    assert found["gsm8k"]["metrics"]["exact_match,flexible-extract"] == pytest.approx(0.6)
    assert found["math-hard"]["score"] == pytest.approx(20) and found["math-hard"]["metrics"]["exact_match,none"] == 0
    assert found["ifeval"]["score"] == pytest.approx((40 + 60) / 2)
    assert found["ifeval"]["answers"] == {
        "n": 5, "characters": np.mean([len(answer) for answer in Oracle.answers]), "tokens": np.mean([3, 3, 2, 1, 2]),
    }  # fmt: skip
    assert evaluate(lm, tasks["mmlu"], manager, limit=1)["documents"] == {"dry_mmlu_first": 1, "dry_mmlu_second": 1}
    with pytest.raises(ValueError, match=r"dry_arc of lm-eval .* gives acc,none, acc_norm,none; want brier,none"):
        evaluate(lm, replace(tasks["arc"], metrics=("brier,none",)), manager)
    with pytest.raises(ValueError, match=r"dry_truthful: found \{'dry_truthful': 0\} examples shown; want 2"):
        evaluate(lm, replace(tasks["truthful"], shots=2), manager)


# ---- the arms ----


def parsed(arm, *words):
    return [parse(r | {"output_dir": "out"}) for r in stage_recipes(arm, ("--use_cpu=true", *words))]


def test_every_arm_is_recipes_that_can_be_run():
    assert sum(map(len, GROUPS.values())) == len(ARMS)
    for arm in ARMS:
        for plan in parsed(arm):
            (stage,) = plan.stages
            assert plan.args.lora_r == 16 and set(stage.on) == set(plan.train_dataset)


def test_arms_differ_in_what_they_are_called_after():
    def settings(arm):
        *_, plan = parsed(arm)
        (stage,) = plan.stages
        rate = stage.args.get("learning_rate", plan.args.learning_rate)
        return rate, [getattr(term, "beta", None) for term in stage.objective.terms], plan.train_dataset

    assert settings("uft")[:2] == (3e-5, [0.01]) and tuple(settings("uft")[2]) == BOTH
    assert tuple(settings("uft_instructions")[2]) == INSTRUCTIONS
    for arm in GROUPS["lr_beta"]:
        rate, (beta,), data = settings(arm)
        assert arm == f"uft_{rate:g}_{beta:g}" and tuple(data) == INSTRUCTIONS
    for arm in GROUPS["sft_lr"]:
        assert arm == f"sft_{settings(arm)[0]:g}" and tuple(settings(arm)[2]) == INSTRUCTIONS
    for arm in GROUPS["ratio"]:
        assert arm == f"uft_{settings(arm)[2]['ultrachat'].limit // 1000}k"
    assert [len(stage_recipes(arm)) for arm in ("base", "sft", "sft_dpo", "dpo", "uft")] == [0, 1, 2, 1, 1]


def test_arms_share_what_they_begin_with_and_nothing_else():
    first = {key_of(stage_recipes(arm)[:1]) for arm in ("sft", "sft_dpo", "sft_kto")}
    assert len(first) == 1
    # SFT → UNA reads another data set in its second stage, which must not matter to the first
    assert key_of(stage_recipes("sft_una")[:1]) in first
    whole = [key_of(stage_recipes(arm)) for arm in ARMS if ARMS[arm].recipe]
    assert len(set(whole)) == len(whole)
    assert len({key_of(stage_recipes("sft", words)) for words in ((), ("--seed=1",), ("--model=other",))}) == 3


def test_a_local_file_counts_by_its_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    local = {"HuggingFaceH4/ultrachat_200k": str(path)}
    keys = []
    for text in ("a", "b"):
        path.write_text(text)
        (recipe,) = stage_recipes("sft", (), local)
        assert recipe["train_dataset"]["ultrachat"] == {"path": str(path), "limit": 20000}
        keys.append(key_of([recipe]))
    assert keys[0] != keys[1]


# ---- a dry run ----


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("paper")
    assert paper_uft.main(["--dry-run", "--arms", *DRY_ARMS, "--output", str(folder)]) == 0
    return folder


def setting_of(output: Path) -> Setting:
    model, local = dry.build(output / "toy")
    return Setting(model, output / "cache", dry.dry_tasks(), dry.WORDS, local, tasks_in=str(dry.TASK_FILES))


def test_the_dry_run_writes_what_a_real_one_does(output):
    report, summary = (output / "report.md").read_text(), json.loads((output / "summary.json").read_text())
    assert report.startswith("# DRY RUN") and summary["dry_run"] and not summary["missing"]
    assert all(f"## {table.number}: " in report for table in TABLES)
    assert set(summary["arms"]) == set(DRY_ARMS) and len(summary["tasks"]) == 12
    for arm, found in summary["arms"].items():
        scores = {column: found["scores"][column]["ours"]["mean"] for column in found["scores"]}
        for average, columns in AVERAGES.items():
            assert scores[average] == pytest.approx(np.mean([scores[column] for column in columns]))
            assert f"{scores[average]:.2f}" in report
            if (theirs := published(arm, average)) is not None:
                assert f"| {theirs:.2f} |" in report and f"| {scores[average] - theirs:+.2f} |" in report
        assert found["answers"][0]["n"] == 5
    assert summary["arms"]["sft_dpo"]["compute"][0]["steps"] == 4
    assert "sft: 6 ultrachat; dpo: 6 helpsteer2" in report
    assert len(summary["claims"]) == len(CLAIMS)
    pixels = image.imread(output / "paper_uft.png")
    assert pixels.shape[0] > 300 and pixels.std() > 0.05


def test_each_arm_is_evaluated_with_its_own_weights(output):
    found = {arm: finished(setting_of(output), arm, 0) for arm in DRY_ARMS}
    scores = {arm: record["scores"]["truthful"]["score"] for arm, record in found.items()}
    # DPO's and KTO's first steps from one model have one direction, of which Adam takes the sign
    assert len(set(scores.values())) >= len(scores) - 3, scores
    assert len({scores[arm] for arm in ("base", "sft", "sft_dpo", "sft_una", "uft_instructions", "uft")}) == 6
    # the second stage begins at, and refers to, the supervised model
    sequential, direct = ([s for s in found[arm]["stages"] if s["stage"] == "dpo"] for arm in ("sft_dpo", "dpo"))
    first, alone = sequential[0]["metrics"][0], direct[0]["metrics"][0]
    assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["logps/chosen"] != pytest.approx(alone["logps/chosen"], abs=1e-3)


def test_half_precision_is_that_of_weights_alone(output):
    setting = setting_of(output)
    with running.trained_model(setting, setting.recipes("sft_dpo", 0), torch.bfloat16) as model:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_second_call_runs_nothing(output, monkeypatch):
    def no(*_, **__):
        raise AssertionError("this is there already")

    before = json.loads((output / "summary.json").read_text())
    monkeypatch.setattr(running, "run_stages", no)
    monkeypatch.setattr(running, "evaluate", no)
    monkeypatch.setattr(running, "load_policy", no)
    assert paper_uft.main(["--dry-run", "--arms", *DRY_ARMS, "--output", str(output)]) == 0
    after = json.loads((output / "summary.json").read_text())
    assert {**before, "date": ""} == {**after, "date": ""}
    # another task, seed or number of documents is another question
    for change in (["--seeds", "1"], ["--limit", "2"], ["--chat"]):
        with pytest.raises(AssertionError, match="there already"):
            paper_uft.main(["--dry-run", "--arms", "sft", "--output", str(output), *change])
    # only the report of what is there, and what is not
    assert paper_uft.main(["--dry-run", "--report", "--arms", "sft", "una", "--output", str(output)]) == 0
    report = (output / "report.md").read_text()
    assert "- UNA, no SFT, seed 0: bbh, gpqa" in report and "## UNA: " not in report


def test_an_interrupted_run_goes_on(output, tmp_path, monkeypatch):
    """Killed in the second stage and again between two scores, it ends with the weights of the uninterrupted run."""
    words = ("--max_steps=4", "--save_steps=1")
    three = dry.dry_tasks()[6:9]
    whole = replace(setting_of(output), cache=tmp_path / "whole", common=(*dry.WORDS, *words), tasks=three)
    parts = replace(whole, cache=tmp_path / "parts")
    running.run(whole, "sft_dpo", 0, lambda _: None)

    from uft.trainer import UnifiedTrainer

    steps, scores, step, score = [], [], UnifiedTrainer.training_step, running.evaluate

    def training_step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 14:  # two passes a step: in the third step of the second stage
            raise RuntimeError("power cut")
        return step(self, *args, **kwargs)

    def one_score(*args, **kwargs):
        scores.append(args[1].column)
        if len(scores) == 2:
            raise RuntimeError("power cut")
        return score(*args, **kwargs)

    monkeypatch.setattr(UnifiedTrainer, "training_step", training_step)
    monkeypatch.setattr(running, "evaluate", one_score)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="power cut"):
            running.run(parts, "sft_dpo", 0, lambda _: None)
        assert "gsm8k" in finished(parts, "sft_dpo", 0)["scores"] or len(scores) == 0
    record = running.run(parts, "sft_dpo", 0, lambda _: None)
    # three of eight steps were run twice at most: a stage that was finished is not trained again
    assert 16 < len(steps) <= 20
    assert scores == ["gsm8k", "truthful", "truthful", "winogrande"] and set(record["scores"]) == set(scores)
    recipes = whole.recipes("sft_dpo", 0)
    one, other = (load_file(s.folder(recipes) / "weights" / "adapter_model.safetensors") for s in (whole, parts))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert by_seed([finished(whole, "sft_dpo", 0)], "truthful") == by_seed([record], "truthful")
    assert not (whole.folder(recipes) / "training").exists()


# ---- the report ----


def record(seed: int, score: float) -> dict:
    """Every task scores `score` more than its column's number, and a tenth more for each seed."""
    columns = [*NEW, *OLD]
    about = {"documents": {"x": 10}, "versions": {"x": 1}, "lm_eval": "0.4.13", "commit": "abc", "seconds": 1.0}
    answers = {"n": 1, "characters": 100.0 + seed, "tokens": 20.0}
    scores = {
        column: {"score": score + k + 0.1 * seed, "metrics": {}, "answers": answers, **about}
        for k, column in enumerate(columns)
    }
    return {"seed": seed, "scores": scores, "stages": [], "compute": {}}


def test_means_intervals_and_differences_paired_by_seed(tmp_path):
    found = {
        "base": [record(0, 20.0)],
        "sft": [record(seed, 30.0) for seed in (0, 1, 2)],
        "uft_instructions": [record(seed, 31.0 + 0.2 * seed) for seed in (0, 1, 2)],
        "uft": [record(0, 30.0)],
    }
    del found["uft"][0]["scores"]["bbh"]
    about = {"seeds": [0, 1, 2], "limit": None, "chat": False, "words": (), "dry": False}
    write_report(tmp_path, found, TASKS, model="mistralai/Mistral-7B-v0.1", **about)
    report = (tmp_path / "report.md").read_text()
    # bbh is the first column: 30.0, 30.1, 30.2 have a standard deviation of 0.1, and t of two degrees is 4.303
    assert f"| ours | 30.10 ± {4.303 * 0.1 / 3**0.5:.2f} |" in report and "| difference | -15.94 |" in report
    # UFT less SFT: 1.0, 1.2, 1.4 on every column
    half = 4.303 * 0.2 / 3**0.5
    assert f"| ours | {' | '.join([f'+1.20 [{1.2 - half:+.2f}, {1.2 + half:+.2f}]'] * 4)} |" in report
    assert "| published | +0.22 | +1.08 | -0.61 | +0.12 |" in report
    # an average of five tasks is no average of six
    assert by_seed(found["uft"], "avg new") == {} and by_seed(found["uft"], "avg old")[0] == pytest.approx(38.5)
    assert "- UFT, mixed, seed 0: bbh" in report and "another model" not in report and "DRY" not in report
    assert "| SFT | 908 | 101.00 ± 2.48 | 20.00 ± 0.00 |" in report
    write_report(tmp_path, found, TASKS, model="Qwen/Qwen2.5-7B", **{**about, "limit": 10})
    report = (tmp_path / "report.md").read_text()
    assert "Ours is another model" in report and "(limit 10)" in report


# ---- what is refused, and what would be run ----


def refusal(capsys, *words) -> str:
    assert paper_uft.main(list(words)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def test_without_lm_eval_one_sentence_names_the_extra(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refusal(capsys, "--dry-run", "--output", str(tmp_path))
    assert line == "paper_uft: lm-eval is not installed; want the extra `eval`: " \
        "pip install -c constraints.txt -e '.[eval]'"  # fmt: skip
    assert not (tmp_path / "cache").exists()


def test_mistakes_are_found_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    toy = ("--dry-run", "--output", str(tmp_path), "--arms", "uft")
    assert "unknown key 'learning_rat'; did you mean 'learning_rate'?" in refusal(capsys, *toy, "--learning_rat", "1")
    assert "arm 'uft': the recipe paper_unified has no stages" in refusal(capsys, *toy, "--stages.0.name", "x")
    monkeypatch.setattr(paper_uft, "OF_TASKS", {"dry_ifeval": ("json", "no_such_package")})
    assert "dry_ifeval needs no_such_package; want the extra `eval`" in refusal(capsys, *toy)
    assert "no score of these arms and seeds in" in refusal(capsys, *toy, "--report")
    monkeypatch.setattr(dry, "dry_tasks", lambda: (replace(TASKS[0], name="leaderboard_bhb"),))
    assert "lm-eval has no task 'leaderboard_bhb'" in refusal(capsys, *toy)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(SystemExit):
        paper_uft.main(["--data", "helpsteer2.jsonl"])
    assert "--data helpsteer2.jsonl: want ID=FILE" in capsys.readouterr().err


def test_the_plan_needs_neither_network_nor_lm_eval(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert paper_uft.main(["--plan", "--groups", "main", "ratio"]) == 0
    text = capsys.readouterr().out
    rows = {tuple(cells[:2]): cells[2:] for line in text.splitlines() if len(cells := _cells(line)) == 9}
    assert rows["UFT, mixed", "unified"][:4] == ["ultrachat 20,000, helpsteer2 20,000", "3e-05", "0.01", "5,000"]
    assert rows["SFT → DPO", "dpo"][1:4] == ["5e-06", "0.03", "900"]
    assert rows["SFT → DPO", "sft"][-1] == "shared" and float(rows["SFT", "sft"][-1]) > 0
    # a third more than SFT per token: the reference runs too
    assert 1.3 < float(rows["UFT, instructions only", "unified"][-1]) / float(rows["SFT", "sft"][-1]) < 1.7
    assert 30 < float(rows["SFT", "sft"][-2]) < 60  # GiB: 7.2 billion weights of 4 bytes are 27
    assert "What the paper does not state" in text and "batch size" in text
    config = config_of("mistralai/Mistral-7B-v0.1")
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    assert (*shape, config.num_key_value_heads, config.vocab_size) == (4096, 14336, 32, 32, 8, 32000)


def test_the_plan_says_what_it_does_not_know(capsys, tmp_path):
    assert paper_uft.main(["--plan", "--arms", "sft", "--model", str(tmp_path / "no_model")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| SFT ")]
    assert _cells(row)[-2:] == ["?", "?"]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]
