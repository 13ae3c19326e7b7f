"""Stated compute: counted against torch's own FLOP counter, and by hand."""

import numpy as np
import pytest
import torch
from mixed import VOCABULARY, dataset, examples, model, trainer
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config

from uft.compute import Cost, Meter
from uft.feedback import mismatched
from uft.presets import make_objective


def gpt2():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("build", [model, gpt2], ids=["llama", "gpt2"])
def test_forward_and_backward_match_torchs_counter(build):
    policy, n = build(), 23
    policy.set_attn_implementation("eager")  # the counter does not see inside the CPU's fused attention
    ids = torch.randint(3, VOCABULARY, (1, n))
    with FlopCounterMode(display=False) as counter:
        logits = policy(input_ids=ids).logits
    forward = counter.get_total_flops()
    cost = Cost.of(policy)
    assert cost.forward(n) == pytest.approx(forward, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    # the first layer needs no gradient of its input; everything else is counted
    assert cost.backward(n) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_an_adapter_costs_less_to_train():
    full, lora = Cost.of(model()), Cost.of(get_peft_model(model(), LoraConfig(r=4, target_modules="all-linear")))
    assert lora.backward(20) < 0.85 * full.backward(20)
    assert lora.forward(20) > full.forward(20)


def test_a_pair_costs_two_of_everything_and_the_reference_comes_on_top():
    policy = model()
    cost = Cost.of(policy)
    [pair] = examples("pairs", 1)
    lengths = [len(pair.prompt) + len(response.tokens) for response in pair.responses]
    forward = sum(cost.forward(n) for n in lengths)
    backward = sum(cost.backward(n) for n in lengths)

    live = Meter(policy, make_objective("dpo"), reference_runs=True).of_examples([pair])
    assert (live.policy_forwards, live.backwards, live.reference_forwards) == (2, 2, 2)
    assert live.tokens == sum(lengths)
    assert live.flops == 2 * forward + backward
    cached = Meter(policy, make_objective("dpo"), reference_runs=False).of_examples([pair])
    assert cached.flops == forward + backward and cached.reference_forwards == 0


def test_demonstrations_of_a_joint_objective_need_no_reference_pass():
    meter = Meter(model(), make_objective("dpo_nll"), reference_runs=True)
    tally = meter.of_examples([*examples("demonstrations", 3), *examples("pairs", 2)])
    assert (tally.policy_forwards, tally.reference_forwards) == (3 + 4, 4)


def test_kto_counts_its_mismatched_passes():
    meter = Meter(model(), make_objective("kto"), reference_runs=True)
    tally = meter.of_examples(mismatched(examples("labels", 4)))
    assert (tally.policy_forwards, tally.backwards, tally.reference_forwards) == (8, 4, 8)


@pytest.mark.parametrize("objective, kinds", [("dpo_nll", ("demonstrations", "pairs")), ("kto", ("labels",))])
def test_the_trainer_counts_what_the_meter_plans(objective, kinds):
    run = trainer(objective, dataset(kinds), per_device_train_batch_size=3, num_train_epochs=1, max_steps=-1)
    run.train()
    planned = run.meter.of_examples(run.train_dataset)
    assert vars(planned).items() <= run.counters().items()
    assert run.state.total_flos == planned.flops
    assert np.isfinite(run.counters()["seconds"])
