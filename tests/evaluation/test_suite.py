"""The whole evaluation of tiny models: what it says, what it compares, what it refuses, and that it leaves no trace."""

import json
import random

import numpy as np
import pytest
import torch
from evaluation_data import ALL, CHOICES, DEMONSTRATIONS, PAIRS, SUMS
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from uft.data.rows import BadRow, DataError
from uft.evaluation.config import EvaluationConfig
from uft.evaluation.data import read_data
from uft.evaluation.forgetting import sample_forgetting
from uft.evaluation.report import Report
from uft.evaluation.suite import evaluate
from uft.head import has_fused_head
from uft.recipe import RecipeError
from uft.undisturbed import undisturbed

TOKENIZER = tiny_tokenizer()


def config(**changes):
    return EvaluationConfig.of({key: value for key, value in (ALL | changes).items() if value is not None})


@pytest.fixture(scope="module")
def base():
    return evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, config(), tiny_model(TOKENIZER, 1))


@pytest.fixture(scope="module")
def later(base):
    return evaluate(tiny_model(TOKENIZER, 2), TOKENIZER, config(), tiny_model(TOKENIZER, 1), before=base)


def test_every_section_has_its_measures(base):
    wanted = {
        "demonstrations/nll", "demonstrations/nll_sequence", "pairs/rewards/margins", "pairs/likelihood/accuracies",
        "pairs/agreement", "pairs/drift/chosen", "divergence/given/responses/kl", "divergence/given/policy/kl",
        "divergence/prior/policy/reverse_kl_sequence", "divergence/prior/reference/kl", "verifiable/accuracy",
        "verifiable/number", "verifiable/exact/choices", "verifiable/behaviour/length",
        "verifiable/behaviour/sums/repetition", "refusals/refusal", "refusals/false_refusal", "prompts/behaviour/ended",
    }  # fmt: skip
    assert wanted <= base.metrics.keys()
    assert all(np.isfinite(value) for value in base.metrics.values())
    assert {name: len(columns["id"]) for name, columns in base.samples.items()} == {
        "demonstrations": 6, "pairs": 6, "verifiable": 7, "refusals": 6, "prompts": 3,
    }  # fmt: skip
    for columns in base.samples.values():
        assert len(set(columns["id"])) == len(columns["id"])
        assert {len(column) for column in columns.values()} == {len(columns["id"])}


def test_samples_make_the_metrics(base):
    rows = base.samples["demonstrations"]
    assert base.metrics["demonstrations/nll"] == pytest.approx(sum(rows["nll"]) / sum(rows["tokens"]))
    rows = base.samples["pairs"]
    likelier = [c > r for c, r in zip(rows["logp_chosen"], rows["logp_rejected"])]
    assert rows["correct"] == likelier and base.metrics["pairs/likelihood/accuracies"] == np.mean(likelier)
    drift = np.array(rows["logp_chosen"]) - np.array(rows["reference_logp_chosen"])
    assert base.metrics["pairs/drift/chosen"] == pytest.approx(drift.mean())
    assert base.samples["verifiable"]["options"] == [None] * 4 + [2, 4, 2]
    rows = base.samples["refusals"]
    assert rows["should_refuse"] == [True, False] * 3
    assert rows["correct"] == [False, True] * 3 and base.metrics["refusals/refusal"] == 0  # it refuses nothing
    assert base.metrics["verifiable/accuracy"] == np.mean(base.samples["verifiable"]["correct"])


def test_forgetting_is_that_of_the_samples(base, later):
    pre, post = (report.samples["pairs"]["correct"] for report in (base, later))
    expected = sample_forgetting(pre, post, 2)
    for name, value in expected._asdict().items():
        assert later.metrics[f"pairs/{name}"] == value
    assert expected.F > 0
    change = later.metrics["demonstrations/nll"] - base.metrics["demonstrations/nll"]
    assert later.metrics["demonstrations/nll_change"] == pytest.approx(change)
    assert "pairs/F" not in base.metrics and later.before == base.metrics
    same = evaluate(tiny_model(TOKENIZER, 2), TOKENIZER, config(), tiny_model(TOKENIZER, 1), before=later)
    assert same.metrics["pairs/F"] == same.metrics["pairs/BT"] == same.metrics["demonstrations/nll_change"] == 0


def test_planted_forgetting(base):
    """Two of the answers that were all right before are wrong now; those left to a judge count nowhere."""
    now = json.loads(json.dumps(base.as_dict()))
    now["samples"]["verifiable"]["correct"] = [True, True, None, False, False, True, True]
    then = json.loads(json.dumps(now))
    then["samples"]["verifiable"]["correct"] = [True] * 7
    from uft.evaluation.report import changes

    found = changes(now["samples"], Report.of(then))
    assert found["verifiable/F"] == pytest.approx(2 / 6) and found["verifiable/F_true"] == found["verifiable/F"]


def test_order_does_not_matter_but_identity_does(base, later):
    shuffled = json.loads(json.dumps(base.as_dict()))
    for columns in shuffled["samples"].values():
        order = list(range(len(columns["id"])))
        random.Random(0).shuffle(order)
        for name, column in columns.items():
            columns[name] = [column[i] for i in order]
    again = evaluate(tiny_model(TOKENIZER, 2), TOKENIZER, config(), tiny_model(TOKENIZER, 1), before=shuffled)
    assert again.metrics == later.metrics


OTHER_ROWS = {
    "another text": ({"pairs": {"preferences": [PAIRS[0] | {"chosen": " world"}, *PAIRS[1:]]}}, "pairs: .*1 too many"),
    "a row less": ({"pairs": {"preferences": PAIRS[:-1]}}, r"pairs: .*'preferences/5#.*1 too many, 0 too few"),
    "a row more": ({"pairs": {"preferences": [*PAIRS, PAIRS[0] | {"prompt": "new:"}]}}, "1 too few"),
    "another name": ({"pairs": {"others": PAIRS}}, "6 too many"),
    "another answer": (
        {"verifiable": {"sums": {"data": [SUMS[0] | {"answer": "9"}, *SUMS[1:]], "verify": "number"},
                        "choices": {"data": CHOICES, "verify": "exact"}}}, "verifiable: .*1 too many"),
    "a section more": ({"max_length": 64}, "want demonstrations, to compare with"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_ROWS)
def test_other_samples_are_refused(case, base):
    changes, message = OTHER_ROWS[case]
    before = base
    if case == "a section more":
        rest = {name: columns for name, columns in base.samples.items() if name != "demonstrations"}
        before = Report(base.metrics, rest)
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model(TOKENIZER, 2), TOKENIZER, config(**changes), tiny_model(TOKENIZER, 1), before=before)


def _sums(**options):
    verifiable = {name: dict(each) for name, each in ALL["verifiable"].items()}
    verifiable["sums"] |= options
    return {"verifiable": verifiable}


OTHER_WAYS = {
    "a temperature": ({"generation": {"max_new_tokens": 6, "temperature": 1.0}}, "generation: .*temperature 0.0 .*1.0"),
    "less room": ({"generation": {"max_new_tokens": 3}}, "generation: .*max_new_tokens 6 and .*3"),
    "another check": (_sums(verify="exact"), "verifiable.sums: .*verify 'number' and .*'exact'"),
    "options": (_sums(options=4), "verifiable.sums: .*options None and .*4"),
    "chat": (_sums(chat=True), "verifiable.sums: .*chat False and .*True"),
    "to be refused": ({"refusals": {"mixed": ALL["refusals"]["mixed"] | {"should_refuse": False}}},
                      "refusals.mixed: .*should_refuse None and .*False"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_WAYS)
def test_other_ways_to_ask_and_to_judge_are_refused_before_the_model_runs(case, base, monkeypatch):
    """Or the same model would have forgotten something."""
    monkeypatch.setattr("uft.evaluation.suite.Measuring", None)
    monkeypatch.setattr("uft.evaluation.suite.read_data", lambda *_: read_data(config(), TOKENIZER))
    changes, message = OTHER_WAYS[case]
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, config(**changes), tiny_model(TOKENIZER, 1), before=base)


def test_how_many_are_asked_at_once_is_no_other_way(base):
    changes = {"generation": {"max_new_tokens": 6, "batch_size": 2}}
    before = json.loads(json.dumps(base.as_dict()))
    found = evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, config(**changes), tiny_model(TOKENIZER, 1), before=before)
    assert found.metrics["verifiable/F"] == found.metrics["verifiable/BT"] == 0.0


def test_other_samples_are_refused_before_the_model_runs(base, monkeypatch):
    monkeypatch.setattr("uft.evaluation.measuring.score_data", None)
    for changes in ({"pairs": {"preferences": PAIRS[:-1]}}, {"demonstrations": {"x": DEMONSTRATIONS}}):
        with pytest.raises(ValueError, match="the earlier evaluation has"):
            evaluate(tiny_model(TOKENIZER, 2), TOKENIZER, config(**changes), tiny_model(TOKENIZER, 1), before=base)


def test_files(later, tmp_path):
    path = later.write(tmp_path / "a")
    for found in (Report.of(path), Report.of(tmp_path / "a"), Report.of(json.loads(path.read_text()))):
        assert found.metrics == pytest.approx(later.metrics) and found.samples == later.samples
        assert found.before == pytest.approx(later.before)
    info = json.loads(path.read_text())["info"]
    assert info["config"]["generation"] == {"max_new_tokens": 6} and info["versions"]["torch"]
    table = (tmp_path / "a" / "evaluation.md").read_text()
    assert "| metric | before | now | change |" in table and "6 pairs" in table
    row = next(line for line in table.splitlines() if line.startswith("| demonstrations/nll |"))
    assert f"{later.metrics['demonstrations/nll']:.4g}" in row
    assert f"{later.metrics['demonstrations/nll'] - later.before['demonstrations/nll']:+.4g}" in row
    nothing = Report({"a": float("nan")})
    assert "| a | – |" in nothing.markdown()
    assert np.isnan(Report.of(nothing.write(tmp_path / "b")).metrics["a"])
    for wrong, message in (("{", "not valid JSON"), ("[]", "no metrics and samples")):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            Report.of(tmp_path / "wrong.json")
    with pytest.raises(ValueError, match="no such file"):
        Report.of(tmp_path / "missing.json")


def test_a_judge(base):
    calls = []

    def win_rate(prompts, ours, theirs, judge):
        calls.append((list(prompts), ours, theirs, judge))
        return {"win": 0.5}

    import sys
    import types

    fake = types.ModuleType("uft.evaluation.judge")
    fake.win_rate = win_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "uft.evaluation.judge", fake)
        found = evaluate(
            tiny_model(TOKENIZER, 2), TOKENIZER, config(), tiny_model(TOKENIZER, 1), before=base, judge=max
        )
    assert found.metrics["verifiable/judge/win"] == found.metrics["prompts/judge/win"] == 0.5
    prompts, ours, theirs, judge = calls[0]
    assert prompts[0] == SUMS[0]["prompt"] and judge is max
    assert ours == found.samples["verifiable"]["text"] and theirs == base.samples["verifiable"]["text"]
    with pytest.raises(ValueError, match="want `before`"):
        evaluate(tiny_model(TOKENIZER, 2), TOKENIZER, config(), tiny_model(TOKENIZER, 1), judge=max)


# ---- no trace ----


def test_undisturbed():
    """Whoever draws numbers, changes modes or fails meanwhile."""

    def drawn():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected = drawn()
    torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])
    with pytest.raises(KeyError), undisturbed(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        drawn()
        model.train()
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]
    assert drawn() == expected and torch.is_grad_enabled()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_is_left_as_it_was(adapter):
    policy = tiny_model(TOKENIZER, 0)
    if adapter:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    policy.train()
    frozen = next(m for m in policy.modules() if type(m).__name__ == "LlamaMLP").eval()
    reference = None if adapter else tiny_model(TOKENIZER, 1).train()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    wanted = {name: p.requires_grad for name, p in policy.named_parameters()}
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3).tolist(), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    evaluate(policy, TOKENIZER, config(generation={"max_new_tokens": 3, "temperature": 1.0}), reference)
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == expected
    assert policy.training and not frozen.training
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == wanted
    assert all(p.grad is None for p in policy.parameters())


def test_an_adapter_is_measured_against_its_base():
    policy = get_peft_model(
        tiny_model(TOKENIZER, 0), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    few = config(demonstrations=None, verifiable=None, refusals=None, prompts=None)
    fresh = evaluate(policy, TOKENIZER, few)
    assert fresh.metrics["pairs/rewards/margins"] == 0 and fresh.metrics["pairs/rewards/accuracies"] == 0.5
    assert fresh.metrics["divergence/given/responses/kl"] == pytest.approx(0, abs=1e-6)
    assert fresh.info["reference"] == "the same model without its adapter"
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    moved = evaluate(policy, TOKENIZER, few)
    against = evaluate(policy, TOKENIZER, few, tiny_model(TOKENIZER, 0))
    assert moved.metrics == pytest.approx(against.metrics, rel=1e-4, abs=1e-5)
    assert moved.metrics["divergence/given/responses/kl"] > 1e-3


def test_layouts_and_heads_give_the_same(base):
    policy = tiny_model(TOKENIZER, 0)
    plain = evaluate(
        policy, TOKENIZER, config(layout="padded", fused_head=False, token_budget=50), tiny_model(TOKENIZER, 1)
    )
    assert not has_fused_head(policy)
    assert plain.metrics == pytest.approx(base.metrics, rel=1e-3, abs=1e-4)
    assert {name: c["id"] for name, c in plain.samples.items()} == {name: c["id"] for name, c in base.samples.items()}


def test_parts_alone():
    """What is left out is neither measured nor asked for."""
    only = EvaluationConfig.of({"demonstrations": {"held_out": DEMONSTRATIONS}})
    found = evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, only)
    assert set(found.metrics) == {f"demonstrations/{name}" for name in ("nll", "nll_sequence", "perplexity")}
    pairs = EvaluationConfig.of({"pairs": {"a": PAIRS}})
    found = evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, pairs)
    assert "pairs/likelihood/accuracies" in found.metrics and "pairs/rewards/accuracies" not in found.metrics


# ---- faults ----


def test_divergence_without_reference():
    with pytest.raises(ValueError, match="divergence needs a reference"):
        evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, config())
    policy = tiny_model(TOKENIZER, 0)
    with pytest.raises(ValueError, match="reference is the model that is evaluated"):
        evaluate(policy, TOKENIZER, config(), policy)


WRONG = {
    "unknown key": ({"demonstration": {}}, "unknown key 'demonstration'; did you mean 'demonstrations'"),
    "unknown option": ({"pairs": {"a": {"data": PAIRS, "wieght": 2}}}, "pairs.a: unknown key 'wieght'"),
    "option of another section": ({"pairs": {"a": {"data": PAIRS, "along": "policy"}}}, "pairs.a: unknown key 'along'"),
    "no path": ({"refusals": {"a": {"chat": True}}}, "refusals.a: path is None"),
    "no mapping": ({"pairs": "pairs.jsonl"}, "pairs is 'pairs.jsonl'; want a mapping"),
    "nothing": ({"beta": 0.1}, "nothing is measured"),
    "no data in a section": ({"pairs": {}}, "pairs is {}; want a mapping"),
    "beta": ({"pairs": {"a": PAIRS}, "beta": -1}, "beta is -1"),
    "max_length": ({"pairs": {"a": PAIRS}, "max_length": "long"}, "max_length is 'long'"),
    "generation": ({"pairs": {"a": PAIRS}, "generation": {"max_tokens": 3}}, "generation: unknown key 'max_tokens'"),
    "temperature": ({"pairs": {"a": PAIRS}, "generation": {"temperature": -1}}, "generation: temperature is -1"),
    "generation of wrong type": ({"pairs": {"a": PAIRS}, "generation": 5}, "generation is 5"),
    "along": ({"divergence": {"a": {"data": SUMS, "along": ["both"]}}}, r"divergence.a: along is \['both'\]"),
    "verify": ({"verifiable": {"a": {"data": SUMS, "verify": 3}}}, "verifiable.a: verify is 3"),
    "options": ({"verifiable": {"a": {"data": SUMS, "options": 1}}}, "verifiable.a: options is 1"),
    "should_refuse": ({"refusals": {"a": {"data": SUMS, "should_refuse": "yes"}}}, "should_refuse is 'yes'"),
    "layout": ({"pairs": {"a": PAIRS}, "layout": "tight"}, "layout is 'tight'"),
    "weight of a source": ({"pairs": {"a": {"data": PAIRS, "limit": 0}}}, "pairs.a: .*limit is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_configuration_must_say(case):
    values, message = WRONG[case]
    with pytest.raises(RecipeError, match=message):
        EvaluationConfig.of(values)


BAD_ROWS = {
    "no prompt": ({"prompts": {"a": [{"text": "x"}]}}, "column 'prompt': no prompt"),
    "blank prompt": ({"prompts": {"a": [{"prompt": "x"}, {"prompt": " "}]}}, "row 1, column 'prompt'"),
    "answers itself": (
        {"prompts": {"a": [{"prompt": [{"role": "assistant", "content": "x"}]}]}}, "ends with the assistant"),
    "too long": ({"prompts": {"a": [{"prompt": "a b c d e f g " * 30}]}, "max_length": 20}, "prompt too long"),
    "special tokens": ({"prompts": {"a": [{"prompt": "x<|im_end|>"}]}}, "special token in text"),
    "no answer": ({"verifiable": {"a": {"data": [{"prompt": "x"}], "verify": "number"}}}, "'number' and answer None"),
    "no check": ({"verifiable": {"a": SUMS}}, "no check: found kind None and answer '2'; want .*exact"),
    "options": (
        {"verifiable": {"a": {"data": [SUMS[0] | {"options": 1}], "verify": "exact"}}}, "column 'options'"),
    "whether to refuse": ({"refusals": {"a": SUMS}}, "column 'should_refuse'"),
    "no truth value": ({"refusals": {"a": [{"prompt": "x", "should_refuse": "no"}]}}, "found 'no'; want true or false"),
    "no pairs": ({"pairs": {"a": DEMONSTRATIONS}}, "examples of kind demonstration; want pairs"),
    "empty": ({"demonstrations": {"a": []}}, "no rows"),
    "empty prompts": ({"prompts": {"a": []}}, "no rows"),
    "no responses": ({"divergence": {"a": {"data": [{"prompt": "x"}]}}}, "want those of a kind"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_data_are_refused_with_their_place(case):
    values, message = BAD_ROWS[case]
    with pytest.raises(DataError, match=message):
        read_data(EvaluationConfig.of(values), TOKENIZER)


def test_bad_rows_can_be_dropped(caplog):
    rows = [{"prompt": "x:"}, {"prompt": ""}, {"prompt": "y:"}]
    data = read_data(EvaluationConfig.of({"prompts": {"a": rows}, "on_bad_row": "drop"}), TOKENIZER)
    assert [prompt.prompt for prompt in data.prompts["prompts"]["a"]] == ["x:", "y:"]
    assert "dropped 1 of 3 rows" in caplog.text
    with pytest.raises(DataError, match="no prompt that can be used among 1"):
        read_data(EvaluationConfig.of({"prompts": {"a": rows[1:2]}, "on_bad_row": "drop"}), TOKENIZER)
    with pytest.raises(BadRow):
        read_data(EvaluationConfig.of({"prompts": {"a": {"data": rows, "on_bad_row": "error"}}}), TOKENIZER)


def test_prompts_are_the_tokens_of_training():
    """As strings, and as what a user says; messages with nothing where parquet puts it."""
    messages = [{"role": "user", "content": "hello", "name": None}]
    sets = {"plain": [{"prompt": "hello"}], "chat": {"data": [{"prompt": "hello"}], "chat": True},
            "messages": [{"prompt": messages}]}  # fmt: skip
    found = read_data(EvaluationConfig.of({"prompts": sets}), TOKENIZER).prompts["prompts"]
    assert found["plain"][0].tokens.tolist() == TOKENIZER("hello")["input_ids"]
    rendered = TOKENIZER("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert found["chat"][0].tokens.tolist() == found["messages"][0].tokens.tolist() == rendered
    assert found["chat"][0].prompt == [{"role": "user", "content": "hello"}]


def test_columns_as_csv_has_them(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,should_refuse\nhello,true\nworld,False\n")
    (tmp_path / "b.csv").write_text("prompt,answer,options,kind\nhello,4,4,exact\n")
    values = {"refusals": {"a": str(tmp_path / "a.csv")}, "verifiable": {"b": str(tmp_path / "b.csv")}}
    found = evaluate(tiny_model(TOKENIZER, 0), TOKENIZER, EvaluationConfig.of(values))
    assert found.samples["refusals"]["should_refuse"] == [True, False]
    assert found.samples["verifiable"]["options"] == [4]
