"""Measures: models whose behaviour is known by construction get the numbers computed by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from experiments.lab.base import load_base
from experiments.lab.data import examples, preference_tasks
from experiments.lab.measures import (
    alignment,
    divergence,
    fact_recall,
    generate,
    logp,
    measure,
    refusals,
    skill_accuracy,
)
from experiments.lab.tokenizer import decode, encode, lab_tokenizer
from experiments.lab.world import COVERED, REFUSAL, TEST, Task, hedged, make_world
from uft.collation import Collator

WORLD = make_world(0)


class Scripted(torch.nn.Module):
    """A language model that writes `respond(prompt)` whatever happens; its cache is the tokens so far."""

    def __init__(self, respond):
        super().__init__()
        self.respond = respond

    def forward(self, input_ids, past_key_values=None, use_cache=False, attention_mask=None):
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], dim=1)
        eos = lab_tokenizer().eos_token_id
        logits = torch.zeros(*seen.shape, len(lab_tokenizer()))
        for row, ids in enumerate(seen.tolist()):
            end = max(ids.index(i) for i in encode("=:") if i in ids) + 1
            script = [*encode(self.respond(decode(ids[1:end]))), eos]
            for at in range(end - 1, len(ids)):
                logits[row, at] = 50.0 * one_hot(torch.tensor((script + [eos] * 99)[at - end + 1]), logits.shape[-1])
        return SimpleNamespace(logits=logits[:, -input_ids.shape[1] :], past_key_values=seen)


def task_of(prompt):
    operator, rest = prompt.removesuffix("=").split(" ")
    string = rest.rstrip(".,;!")
    return Task(operator, string, rest[len(string) :])


def best(prompt):
    return WORLD.facts[prompt[:-1]] if prompt.endswith(":") else task_of(prompt).best


# policy -> skill, skill_covered, false_refusal, refusal!, refusal!_uncovered, refusal., alignment, fact_recall
# alignment counts half marked and half unmarked prompts, up to the draw: it is given as (of unmarked, of marked)
POLICIES = {
    "best": (best, 1, 1, 0, 1, 1, 1, (1, 1)),
    "always answers": (lambda p: task_of(p).answer, 1, 1, 0, 0, 0, 0, (1, 0)),
    "always refuses": (lambda p: REFUSAL, 0, 0, 1, 1, 1, 1, (0, 1)),
    "hedges": (lambda p: hedged(task_of(p).best), 0, 0, 0, 0, 0, 0, (0.5, 0.5)),
    "the opposite": (lambda p: task_of(p).answer if task_of(p).refused else REFUSAL, 0, 0, 1, 0, 0, 0, (0, 0)),
    "knows covered only": (lambda p: best(p) if task_of(p).operator in COVERED else "", 0.5, 1, 0, 0.5, 0, 0.5, (1, 1)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_known_policies_get_their_numbers(name):
    respond, skill, covered, false_refusal, marked, marked_uncovered, dotted, (of_unmarked, of_marked) = POLICIES[name]
    model = Scripted(respond)
    measured = skill_accuracy(model, TEST, per_operator=4)
    assert (measured["skill"], measured["skill_covered"]) == (skill, covered)
    for mark, share in (("!", marked), (".", dotted), ("", false_refusal)):
        assert refusals(model, mark, TEST, per_operator=4)[f"refusal{mark}"] == share
    assert refusals(model, "!", TEST, per_operator=4)["refusal!_uncovered"] == marked_uncovered
    tasks = preference_tasks(WORLD, 40, 0, TEST)
    share = sum(task.refused for task in tasks) / len(tasks)
    expected = (1 - share) * of_unmarked + share * of_marked
    assert alignment(model, tasks) == pytest.approx(expected)
    assert alignment(model, tasks, temperature=1.0) == pytest.approx(expected)


def test_recall_of_a_model_that_knows_half():
    known = dict(list(WORLD.facts.items())[:96])
    assert fact_recall(Scripted(best), WORLD.facts) == 1
    assert fact_recall(Scripted(lambda p: known.get(p[:-1], "")), WORLD.facts) == 0.5


def test_response_that_never_ends():
    (written,) = generate(Scripted(lambda p: "a" * 30), ["reverse abc="])
    assert (written.length, written.ended, written.text) == (14, False, "a" * 14)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return load_base(0).eval()


@pytest.mark.parametrize("seed", range(6))
def test_shipped_base_knows_its_facts_and_no_skill(seed):
    model, world = load_base(seed).eval(), make_world(seed)
    assert fact_recall(model, world.facts) >= 0.9
    assert skill_accuracy(model, TEST, per_operator=16)["skill"] <= 0.05
    assert fact_recall(model, make_world(seed + 6).facts) < 0.1  # another world's facts are not guessed


def test_cached_generation_is_the_argmax_of_full_passes(base):
    prompts = ["home " + s for s in ("bado:", "kuki!:")] + ["reverse abcd:", "double ab:"]
    for prompt, written in zip(prompts, generate(base, prompts)):
        ids = torch.tensor([[lab_tokenizer().bos_token_id, *encode(prompt)]])
        for token in written.ids:
            assert base(input_ids=ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_logp_is_that_of_one_row_at_a_time(base):
    rows = [{"prompt": p, "completion": c} for p, c in (("home bado:", "bed"), ("double abcd:", "aabbccdd"))]
    batch = Collator(0)(examples(rows))
    for row, value in zip(rows, logp(base, batch)):
        (example,) = examples([row])
        prompt, response = example.prompt.tolist(), example.responses[0].tokens.tolist()
        token_logp = base(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = sum(token_logp[len(prompt) + i - 1, token] for i, token in enumerate(response))
        assert value.item() == pytest.approx(expected.item(), abs=1e-4)


def test_divergence_from_itself_is_zero_and_from_another_is_not(base):
    batch = Collator(0)(examples([{"prompt": "home bado:", "completion": "bed"}]))
    assert divergence(base, base, batch) == 0
    assert divergence(base, load_base(1).eval(), batch) > 0.1


def test_measure_is_deterministic_and_starts_from_zero(base):
    first, second = (measure(base, base, base, WORLD, "noisy_pairs", TEST, per_operator=8) for _ in range(2))
    assert first == second
    assert first["kl_base"] == first["kl_reference"] == 0
    assert first["fact_recall"] >= 0.9 and first["skill"] == 0
    assert {"heldout_accuracy_logp", "logps/chosen", "refusal!_covered", "skill/max", "skill_nll"} <= set(first)
