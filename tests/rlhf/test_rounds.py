"""Rounds of writing, labelling and training: what becomes of responses, lineage, and interruption."""

import functools
import hashlib
import json
from pathlib import Path

import pytest
import torch
from mixed import parameters
from transformers import LlamaForCausalLM

from experiments.lab.enumerable.policy import config_of, tokenizer_of
from experiments.lab.enumerable.world import World
from uft.compute import Cost
from uft.config import UnifiedConfig
from uft.data.rows import DataError
from uft.feedback import Example, Response
from uft.models import is_peft
from uft.rlhf.labelling import Labelled, checked, feedback_rows, scores_of
from uft.rlhf.rounds import RoundOptions, run_rounds
from uft.trainer import UnifiedTrainer

WORLD = World(letters="ab", uncovered=0)
TOKENIZER = tokenizer_of(WORLD)
OLD = [{"prompt": prompt, "completion": "ab"} for prompt in WORLD.prompts]
KEPT = ("generated_tokens", "tokens", "response_tokens", "policy_forwards", "backwards", "flops")


def policy(seed=1):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config_of(WORLD, width=16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model


def letters(prompt, response):
    """A verifier: how much of the response is the letter a."""
    return response.count("a") / len(response) if response else 0.0


def run(folder, label=letters, rounds=2, model=None, objective="dpo_nll", data=OLD, evaluate=None, **options):
    args = UnifiedConfig(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=4, save_strategy="steps",
        save_steps=1, logging_steps=2, disable_tqdm=True, learning_rate=1e-2, report_to="none", max_length=16,
        max_steps=options.pop("max_steps", 2),
        **{name: options.pop(name) for name in ("use_peft", "lora_r") if name in options},
    )  # fmt: skip
    more = RoundOptions(**{"samples": 8, "max_new_tokens": 5} | options)
    given = {"old": data} if data else None
    return run_rounds(
        model or policy(), WORLD.prompts, label, given, rounds, args, TOKENIZER, objective, options=more,
        evaluate=evaluate,
    )  # fmt: skip


def plain(lineage):
    """Without what differs between two runs of one thing: seconds and memory."""
    training = {name: lineage["compute"]["training"].get(name) for name in KEPT}
    return lineage | {"compute": lineage["compute"] | {"training": training}}


# ---- labelling ----


def said(text, score, ended=True):
    return Labelled(text, len(text), ended, score)


def test_pairs_by_hand():
    labelled = [
        [said("x", 0.2), said("y", 0.9), said("z", -1.0), said(" y", 5.0), said("w", 9.0, ended=False)],
        [said("x", 0.5), said("y", 0.5), said(" ", 1.0)],
        [said("x", 0.5), said("x", 0.5), said("w", 9.0, ended=False)],
    ]
    rows, counts = feedback_rows("pairs", ["p", "q", "r"], labelled)
    assert rows == [{"prompt": "p", "chosen": "y", "rejected": "z"}]
    assert counts == {
        "prompts": 3, "responses": 11, "cut": 2, "blank": 1, "repeated": 2, "too_few": 1, "ties": 1, "pairs": 1,
    }  # fmt: skip
    rows, counts = feedback_rows("pairs", ["p", "q", "r"], labelled, keep_cut=True)
    assert [row["chosen"] for row in rows] == ["w", "w"] and counts["cut"] == 0


def test_scores_by_hand():
    labelled = [[said("x", 0.0), said("y", 2.0)], [said("x", 0.5)]]
    chat = [{"role": "user", "content": "hello"}]
    rows, counts = feedback_rows("scores", ["p", chat], labelled)
    assert [row["completion"] for row in rows] == ["x", "y", [{"role": "assistant", "content": "x"}]]
    assert [row["score"] for row in rows] == pytest.approx([0.5, 0.880797, 0.622459], rel=1e-5)
    assert counts["scores"] == 3
    with pytest.raises(ValueError, match="found a reward of 2; want rewards in"):
        feedback_rows("scores", ["p", chat], labelled, squash="score")


class Scorer:
    def scores(self, prompts, responses):
        return [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]


def test_every_kind_of_labeller():
    texts = [["a", "bbb"], ["cc", "cc"]]
    examples = [
        Example("score", WORLD.ids("ab="), tuple(Response(WORLD.ids("ab" * len(text))) for text in each), row=i)
        for i, each in enumerate(texts)
    ]

    def asked(labeller):
        return scores_of(labeller, ["p", "qq"], texts, examples, TOKENIZER)

    assert asked(Scorer()) == [[2, 4], [4, 4]]
    assert asked(lambda prompt, response: len(response)) == [[1, 3], [2, 2]]
    assert asked(lambda given: [[len(r.tokens) for r in e.responses] for e in given]) == [[2, 6], [4, 4]]

    # the longer wins with 0.8, and what stands first gets 0.1 more: asked in both orders that cancels
    def judge(prompt, a, b):
        return 0.5 + 0.3 * ((len(a) > len(b)) - (len(a) < len(b))) + 0.1

    found = asked(judge)
    assert found[0] == pytest.approx([0.2, 0.8]) and found[1] == [0.5, 0.5]


@pytest.mark.parametrize(
    "labeller, message",
    [
        (lambda prompt, response: float("nan"), r"prompt 0 \('p'\): the labeller says nan; want a finite number"),
        (lambda prompt, response: 1 / 0, r"prompt 0 \('p'\): the labeller failed: ZeroDivisionError"),
        (lambda prompt, a, b: 1.5, "found 1.5; want a probability"),
        (Scorer, "label: found .*Scorer.*; want a function of examples"),
        (print, "label: found .*; want a function of examples"),
    ],
)
def test_a_labeller_that_cannot_be_used(labeller, message):
    example = Example("score", WORLD.ids("ab="), (Response(WORLD.ids("a.")), Response(WORLD.ids("b."))))
    with pytest.raises(ValueError, match=message):
        scores_of(labeller, ["p"], [["a", "b"]], [example], TOKENIZER)


def test_checked_answers():
    rows = [{"prompt": "2 + 2", "answer": "4", "kind": "number"}, {"prompt": "x", "answer": "y", "kind": "exact"}]
    right = checked(rows)
    assert [right("2 + 2", "The answer is 4."), right("2 + 2", "5"), right("x", "Y")] == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="row 1: found another answer to a prompt that stood before"):
        checked([rows[1], rows[1] | {"answer": "z"}])


# ---- rounds ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    model, lineages = run(folder, evaluate=lambda model, r: {"round": r})
    return folder, parameters(model), lineages


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_rounds_learn_what_is_labelled(whole):
    folder, trained, lineages = whole
    assert sorted(path.name for path in folder.iterdir()) == ["round-00", "round-01"]
    assert torch.equal(parameters(LlamaForCausalLM.from_pretrained(folder / "round-01" / "model")), trained)
    assert lineages[1]["scores"]["mean"] > lineages[0]["scores"]["mean"] + 0.1
    for r, lineage in enumerate(lineages):
        here = folder / f"round-{r:02d}"
        lines = [json.loads(line) for line in (here / "responses.jsonl").read_text().splitlines()]
        assert len(lines) == lineage["counts"]["responses"] == 8 * 4
        assert all(line["score"] == letters(line["prompt"], line["response"]) for line in lines)
        rows = [json.loads(line) for line in (here / "feedback.jsonl").read_text().splitlines()]
        assert len(rows) == lineage["counts"]["pairs"] > 0
        best = {p: max(x["score"] for x in lines if x["prompt"] == p and x["ended"]) for p in WORLD.prompts}
        assert all(letters(row["prompt"], row["chosen"]) == best[row["prompt"]] for row in rows)
        n = [len(line["prompt"]) + line["tokens"] for line in lines]
        cost = Cost.of(policy()).forward(torch.tensor(n).numpy(), torch.tensor([x["tokens"] for x in lines]).numpy())
        assert lineage["compute"]["writing"] == {
            "generated_tokens": sum(line["tokens"] for line in lines), "flops": int(cost.sum()),
        }  # fmt: skip
        assert lineage["measures"] == {"round": r} and lineage["seed"] == 42 + r
        assert lineage["labeller"] == "letters"


def test_lineage_says_where_a_round_comes_from(whole):
    folder, _, (first, second) = whole
    weights = folder / "round-00" / "model" / "model.safetensors"
    assert second["parent"]["files"]["model.safetensors"] == first["model"]["model.safetensors"] == sha256(weights)
    assert second["parent"]["model"] == "round-00" and len(first["parent"]["weights_sha256"]) == 64
    feedback = second["data"]["feedback"]
    assert [*feedback] == ["round-00", "round-01"]
    assert all(sha256(folder / each["path"]) == each["sha256"] for each in feedback.values())
    assert second["data"]["responses_sha256"] == sha256(folder / "round-01" / "responses.jsonl")
    assert set(second["rows"]) == {"old", "round-00", "round-01"} and second["rows"]["old"] == 4
    assert json.loads((folder / "round-01" / "lineage.json").read_text()) == second


class Stop(BaseException):
    """As a kill, nobody catches it."""


def raises_at(n, function):
    calls = []

    @functools.wraps(function)
    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise Stop
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize("where", ["labelling", "training", "behind the training"])
def test_interrupted_it_ends_the_same(where, whole, tmp_path, monkeypatch):
    _, expected, lineages = whole
    measure = {"evaluate": lambda model, r: {"round": r}}
    with monkeypatch.context() as patched, pytest.raises(Stop):
        if where == "labelling":  # 32 responses a round
            run(tmp_path, label=raises_at(40, letters), **measure)
        elif where == "training":  # the last step of the second round, behind its checkpoint
            patched.setattr(UnifiedTrainer, "training_step", raises_at(4, UnifiedTrainer.training_step))
            run(tmp_path, **measure)
        else:
            run(tmp_path, evaluate=raises_at(2, measure["evaluate"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00", "round-01.partial"]
    calls = []

    @functools.wraps(letters)
    def counted(prompt, response):
        calls.append(prompt)
        return letters(prompt, response)

    model, again = run(tmp_path, label=counted, **measure)
    assert len(calls) == (32 if where == "labelling" else 0)  # what was labelled stays
    assert torch.equal(parameters(model), expected)
    assert [plain(lineage) for lineage in again] == [plain(lineage) for lineage in lineages]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00", "round-01"]


def test_finished_rounds_are_not_made_again_and_more_may_follow(whole, tmp_path):
    folder, expected, lineages = whole
    model, again = run(folder, label=raises_at(1, letters), evaluate=None)
    assert torch.equal(parameters(model), expected) and again == lineages
    with pytest.raises(ValueError, match=r"was made otherwise: options\.samples is 8 there and 6 here; want the same"):
        run(folder, samples=6)
    with pytest.raises(ValueError, match="was made otherwise: model is"):
        run(folder, model=policy(seed=5))
    with pytest.raises(ValueError, match="was made otherwise: labeller is"):
        run(folder, label=lambda prompt, response: 0.0)


def test_last_rounds_feedback_alone_at_a_share(tmp_path):
    _, (first, second) = run(
        tmp_path, keep="last", share=0.75, reference="base", feedback="scores", objective="uft_nll"
    )
    assert set(second["rows"]) == {"old", "round-01"}
    for lineage, name in ((first, "round-00"), (second, "round-01")):
        draws = {key: lineage["rows"][key] * lineage["weights"][key] for key in lineage["rows"]}
        assert draws[name] / sum(draws.values()) == pytest.approx(0.75)


def test_an_adapter_goes_on_from_round_to_round(tmp_path):
    folder = tmp_path / "base"
    policy().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    model, (_, second) = run(
        tmp_path / "run", model=str(folder), use_peft=True, lora_r=2, data=None, objective="dpo", max_steps=1
    )
    assert is_peft(model) and "adapter_model.safetensors" in second["parent"]["files"]
    log = json.loads((tmp_path / "run" / "round-01" / "training" / "run.json").read_text())
    assert log["reference"] == "AdapterReference" and log["model"]["adapter"]


def test_a_round_that_says_nothing(tmp_path):
    with pytest.raises(DataError, match=r"found nothing to train on among 32 responses .* prompts tied"):
        run(tmp_path, label=lambda prompt, response: 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["round-00.partial"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feedback": "labels"}, "feedback is 'labels'; want pairs or scores"),
        ({"samples": 1}, "found samples 1"),
        ({"temperature": 0.0}, "temperature is 0.0; want a number > 0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"max_new_tokens": 14}, "prompt 0: found 3 tokens and 14 to come; want at least 1, and at most 16 together"),
        ({"rounds": 0}, "found 0 rounds"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
