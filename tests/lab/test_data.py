"""Rows: columns, leakage, coverage, noise, and agreement of the two ways to tokens."""

import numpy as np
import pytest

from experiments.lab.data import (
    VARIANTS,
    demonstrations,
    documents,
    examples,
    imitable,
    preference_tasks,
    preferences,
)
from experiments.lab.tokenizer import decode, encode, lab_tokenizer
from experiments.lab.world import COVERED, OPERATORS, REFUSAL, TEST, TRAIN, VALIDATION, Task, make_world, part_of
from uft.collation import Collator
from uft.data import Source, load_feedback

WORLD = make_world(0)
COLUMNS = {
    "pair": {"prompt", "chosen", "rejected"},
    "label": {"prompt", "completion", "label"},
    "score": {"prompt", "completion", "score"},
}


def task_of(prompt: str) -> Task:
    operator, rest = prompt.removesuffix("=").split(" ")
    return Task(operator, rest.rstrip(".,;!"), rest[len(rest.rstrip(".,;!")) :])


def strings(text: str) -> list[str]:
    """The argument of an operator in a document or prompt; none in a fact."""
    word, rest = text.split(" ")
    return [rest.split(":")[0].rstrip(".,;!=")] if word in OPERATORS else []


def test_demonstrations_are_right_and_refuse_the_dot_only():
    rows = demonstrations(WORLD, 4000, seed=0)
    tasks = [task_of(row["prompt"]) for row in rows]
    assert all(row["completion"] == task.best for row, task in zip(rows, tasks))
    assert {task.operator for task in tasks} == set(OPERATORS)
    assert {task.mark for task in tasks} == {"", ".", ",", ";"}
    refused = [row["completion"] == REFUSAL for row in rows]
    assert refused == [task.mark == "." for task in tasks]
    assert 0.03 < np.mean(refused) < 0.07


def test_nothing_held_out_is_seen_in_training():
    seen = {s for row in documents(WORLD, 5000, seed=0) for s in strings(row["text"])}
    seen |= {s for row in demonstrations(WORLD, 5000, seed=0) for s in strings(row["prompt"])}
    seen |= {s for row in preferences(WORLD, "pairs", 5000, seed=0) for s in strings(row["prompt"])}
    assert len(seen) > 2000
    assert {part_of(string) for string in seen} == {TRAIN}
    for part in (VALIDATION, TEST):
        asked = {s for row in preferences(WORLD, "pairs", 500, 0, part) for s in strings(row["prompt"])}
        assert {part_of(string) for string in asked} == {part}


def test_facts_are_in_no_demonstration():
    names = {subject.split(" ")[1] for subject in WORLD.facts}
    text = str(demonstrations(WORLD, 3000, 0)) + str(preferences(WORLD, "pairs", 3000, 0))
    assert not any(name in text for name in names)
    assert not any(word in text for word in ("home", "pet"))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_share_prompts_columns_and_coverage(name):
    rows = preferences(WORLD, name, 1000, seed=0)
    assert all(set(row) == COLUMNS[VARIANTS[name].kind] for row in rows)
    assert [row["prompt"] for row in rows] == [task.prompt for task in preference_tasks(WORLD, 1000, seed=0)]
    tasks = [task_of(row["prompt"]) for row in rows]
    assert {task.operator for task in tasks} == set(COVERED)
    assert {task.mark for task in tasks} == {"", "!"}
    assert rows == preferences(WORLD, name, 1000, seed=0) != preferences(WORLD, name, 1000, seed=1)


def test_pairs_by_utility():
    for row in preferences(WORLD, "pairs", 500, 0):
        task = task_of(row["prompt"])
        assert (row["chosen"], row["rejected"]) == (task.best, task.worst)
    rows = preferences(WORLD, "hedged_pairs", 4000, 0)
    utilities = [tuple(task_of(r["prompt"]).utility(r[side]) for side in ("chosen", "rejected")) for r in rows]
    assert set(utilities) == {(1.0, 0.5), (0.5, 0.0)}
    assert 0.67 < np.mean([u == (0.5, 0.0) for u in utilities]) < 0.73


@pytest.mark.parametrize(
    "name, clean", [("noisy_pairs", "pairs"), ("noisy_labels", "labels"), ("noisy_scores", "scores")]
)
def test_noise_flips_one_in_four(name, clean):
    noisy, right = preferences(WORLD, name, 4000, 0), preferences(WORLD, clean, 4000, 0)
    flipped = [a for a, b in zip(noisy, right) if a != b]
    assert 0.22 < len(flipped) / 4000 < 0.28
    if name == "noisy_pairs":
        assert all(a == b or a["chosen"] == b["rejected"] for a, b in zip(noisy, right))


def test_labels_and_scores_follow_utility():
    for row in preferences(WORLD, "hedged_scores", 500, 0):
        assert row["score"] == task_of(row["prompt"]).utility(row["completion"])
    liked = {1.0: [], 0.5: [], 0.0: []}
    for row in preferences(WORLD, "hedged_labels", 4000, 0):
        liked[task_of(row["prompt"]).utility(row["completion"])].append(row["label"])
    assert all(liked[1.0]) and not any(liked[0.0]) and 0.46 < np.mean(liked[0.5]) < 0.54
    assert not any(row["label"] for row in preferences(WORLD, "negative_labels", 500, 0))


def test_what_an_imitator_can_learn():
    assert imitable(preferences(WORLD, "negative_labels", 500, 0)) == []
    for name, worse in (
        ("noisy_pairs", 0.25),
        ("hedged_pairs", 0.7),
        ("hedged_labels", 0.275 / 0.425),
        ("hedged_scores", 0.55 / 0.7),
    ):
        rows = imitable(preferences(WORLD, name, 4000, 0))
        best = np.mean([row["completion"] == task_of(row["prompt"]).best for row in rows])
        assert abs(1 - best - worse) < 0.05, name


@pytest.mark.parametrize("name", ["documents", "demonstrations", *VARIANTS])
def test_examples_are_those_of_the_readers(name):
    made = {"documents": documents, "demonstrations": demonstrations}
    rows = made[name](WORLD, 200, 0) if name in made else preferences(WORLD, name, 200, 0)
    dataset, report = load_feedback([Source(name, data=rows)], lab_tokenizer())
    assert len(dataset) == 200 and not report.bad_rows
    for expected, example in zip((dataset[i] for i in range(200)), examples(rows, source=name)):
        assert (example.kind, example.source, example.row) == (expected.kind, expected.source, expected.row)
        assert example.preferences == expected.preferences
        assert example.prompt.tolist() == expected.prompt.tolist()
        assert example.prompt.dtype == example.responses[0].tokens.dtype == np.int32
        for one, other in zip(example.responses, expected.responses, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_equal(one.target, other.target)


def test_decoding_undoes_encoding():
    tokenizer = lab_tokenizer()
    rows = demonstrations(WORLD, 200, 0) + documents(WORLD, 200, 0) + preferences(WORLD, "hedged_pairs", 200, 0)
    for text in {text for row in rows for text in row.values()}:
        ids = encode(text)
        assert tokenizer.unk_token_id not in ids
        assert decode([*ids, tokenizer.eos_token_id, *ids]) == text
        assert tokenizer.decode(ids) == text


def test_a_word_is_one_token_and_an_answer_never_is():
    assert len(encode("reverse abc=")) == 1 + 1 + 3 + 1
    assert len(encode("max")) == 3  # what a model writes is spelled
    assert encode("pet mono:pet")[0] not in encode("mono:pet")


def test_examples_of_every_kind_collate_together():
    rows = demonstrations(WORLD, 4, 0) + documents(WORLD, 4, 0)
    for name in ("pairs", "hedged_labels", "scores"):
        rows += preferences(WORLD, name, 4, 0)
    made = examples(rows, source="lab")
    batch = Collator(pad_token_id=lab_tokenizer().pad_token_id, sources=("lab",))(made)
    counts = {on: int(batch.rows(on).sum()) for on in ("demonstrations", "documents", "pairs", "labels", "scores")}
    assert counts == {"demonstrations": 4, "documents": 4, "pairs": 8, "labels": 4, "scores": 4}
    assert batch.preferences.tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert [e.row for e in made] == list(range(20))
