"""Stages: what a budget buys, and what the reference is at the boundary."""

import json

import pytest
import torch
from mixed import Tokenizer, dataset, model, parameters, trainer
from peft import LoraConfig

from uft.config import UnifiedConfig
from uft.models import AdapterReference, FrozenReference
from uft.stages import Budget, Stage, run_stages, steps_within

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def config(folder, **args):
    defaults = dict(use_cpu=True, per_device_train_batch_size=4, max_steps=3, logging_steps=1, save_strategy="no",
                    disable_tqdm=True, learning_rate=1e-2, report_to="none")  # fmt: skip
    return UnifiedConfig(output_dir=str(folder), **defaults | args)


def first_margins(records):
    return [next((m["rewards/margins"] for m in r["metrics"] if "rewards/margins" in m), None) for r in records]


@pytest.mark.parametrize("boundary", ["full", "merge", "keep"])
def test_the_second_stage_starts_from_the_first(tmp_path, boundary):
    stages = [
        Stage("sft", "sft", on=("demonstrations",)),
        Stage("dpo", "dpo", on=("pairs",), boundary="merge" if boundary == "full" else boundary),
    ]
    after = {}

    def measure(stage, policy):
        after[stage.name] = {n: p.detach().clone() for n, p in policy.named_parameters()}
        return {"norm": float(parameters(policy).norm())}

    _, records = run_stages(
        model(), stages, dataset(("demonstrations", "pairs")), config(tmp_path), Tokenizer(),
        peft_config=None if boundary == "full" else LORA, after=measure,
    )  # fmt: skip
    assert first_margins(records) == [None, 0.0]  # its reference is the model it starts from
    assert records[1]["reference"] == ("FrozenReference" if boundary == "full" else "AdapterReference")
    assert [r["stage"] for r in records] == ["sft", "dpo"]
    assert records[0]["measures"]["norm"] != records[1]["measures"]["norm"]
    written = json.loads((tmp_path / "run.json").read_text())
    assert [s["compute"]["backwards"] for s in written["stages"]] == [12, 24]


def test_adapter_off_alone_would_be_the_base(tmp_path):
    """What several libraries got wrong: after SFT with an adapter, switching it off is not the SFT model."""
    stages = [Stage("sft", "sft", on=("demonstrations",), args={"learning_rate": 0.1})]
    policy, _ = run_stages(
        model(), stages, dataset(("demonstrations", "pairs")), config(tmp_path), Tokenizer(), peft_config=LORA
    )
    right = trainer("dpo", dataset(("pairs",)), policy, eval_dataset=dataset(("pairs",)))
    assert right.evaluate()["eval_rewards/margins"] == 0.0
    wrong = trainer("dpo", dataset(("pairs",)), policy, eval_dataset=dataset(("pairs",)))
    wrong.reference = AdapterReference(None)
    assert abs(wrong.evaluate()["eval_rewards/margins"]) > 1e-3


def test_base_reference_in_a_later_stage(tmp_path):
    base = parameters(model()).clone()
    stages = [
        Stage("sft", "sft", on=("demonstrations",)),
        Stage("dpo", "dpo", on=("pairs",), reference="base"),
    ]
    seen = {}

    class Spy(FrozenReference):
        pass

    _, records = run_stages(
        model(), stages, dataset(("demonstrations", "pairs")), config(tmp_path), Tokenizer(),
        after=lambda stage, policy: seen.setdefault(stage.name, parameters(policy).clone()) is None or {},
    )  # fmt: skip
    assert first_margins(records)[1] != 0.0
    assert not torch.equal(seen["sft"], base)


@pytest.mark.parametrize("size, accumulation", [(4, 1), (3, 2)])
def test_a_flops_budget_buys_the_nearest_number_of_steps(size, accumulation):
    def fresh(**args):
        return trainer(
            "dpo_nll", dataset(("demonstrations", "pairs")), per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, **args,
        )  # fmt: skip

    spent = []
    for steps in range(1, 9):
        run = fresh(max_steps=steps)
        run.train()
        spent.append(run.counters()["flops"])
    for steps, flops in enumerate(spent, start=1):
        assert steps_within(fresh(), flops) == steps
    between = spent[4] + 0.4 * (spent[5] - spent[4])
    assert steps_within(fresh(), between) == 5
    assert steps_within(fresh(), spent[5] - 0.4 * (spent[5] - spent[4])) == 6


def test_other_budgets():
    run = trainer("dpo", dataset(("pairs",)), per_device_train_batch_size=4)
    Budget(examples=22).apply(run)
    assert run.args.max_steps == 6  # 5.5 rounds to even
    Budget(epochs=2).apply(run)
    run.train()
    assert run.state.global_step == 4


@pytest.mark.parametrize("wrong", [dict(steps=1, flops=2), dict(steps=0), dict(flops=-1.0)])
def test_a_budget_is_one_positive_number(wrong):
    with pytest.raises(ValueError, match="budget"):
        Budget(**wrong)


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="asks for data set 'labels'; there are demonstrations, pairs"):
        run_stages(
            model(), [Stage("kto", "kto", on=("labels",))], dataset(("demonstrations", "pairs")), config(tmp_path),
            Tokenizer(),
        )  # fmt: skip


def test_an_interrupted_list_of_stages_goes_on(tmp_path):
    stages = [Stage("sft", "sft", on=("demonstrations",)), Stage("dpo", "dpo", on=("pairs",))]
    data = dataset(("demonstrations", "pairs"))
    whole, _ = run_stages(
        model(), stages, data, config(tmp_path / "a", save_strategy="steps", save_steps=2), Tokenizer()
    )

    class Stop(Exception):
        pass

    def stop_after_sft(stage, policy):
        raise Stop

    again = config(tmp_path / "b", save_strategy="steps", save_steps=2)
    with pytest.raises(Stop):
        run_stages(model(), stages, data, again, Tokenizer(), after=stop_after_sft)
    resumed, records = run_stages(model(), stages, data, again, Tokenizer(), resume=True)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert records[0]["steps"] == 3


def test_a_flops_budget_pays_for_a_cached_reference(tmp_path):
    def spent(mode):
        run = trainer("dpo_nll", dataset(("demonstrations", "pairs")), reference=mode, output_dir=tmp_path,
                      per_device_train_batch_size=2)  # fmt: skip
        Budget(flops=3e8).apply(run)
        run.train()
        return run.counters()["flops"]

    first, read_from_disk = spent("cached"), spent("cached")
    assert first == read_from_disk  # whoever paid for the file
    assert first == pytest.approx(3e8, rel=0.02)
    assert spent("frozen") == pytest.approx(3e8, rel=0.02)
