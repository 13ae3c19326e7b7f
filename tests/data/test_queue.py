"""The labelling queue: sides that say nothing, answers checked against what was handed out, votes counted by hand."""

import json

import pytest

from uft.data import queue
from uft.data.quality.writing import write_lines
from uft.data.queue import item_id, pairs_of, queue_items, read_answers, read_queue, resolve
from uft.data.readers import read_text
from uft.data.rows import BadRow, DataError
from uft.data.sources import Source

PAIRS = [(f"question {i}?", f"good {i}", f"bad {i}") for i in range(6)]


@pytest.fixture
def handed_out(tmp_path):
    items = queue_items(PAIRS, "margin", [0.1 * i for i in range(6)], seed=3)
    write_lines(tmp_path / "queue.jsonl", items)
    return tmp_path, items


def fill(folder, name, items, choices, annotator="ann", **changes):
    rows = [item | {"choice": choice, "annotator": annotator} | changes for item, choice in zip(items, choices)]
    write_lines(folder / name, rows)
    return folder / name


def test_sides_are_drawn_and_do_not_depend_on_order():
    many = [(f"q{i}", f"good {i}", f"bad {i}") for i in range(400)]
    items = queue_items(many, seed=1)
    first = sum(item["response_a"].startswith("good") for item in items)
    assert 160 < first < 240  # 200 ± 4 standard deviations
    turned = queue_items([(p, b, a) for p, a, b in many[::-1]], seed=1)[::-1]
    assert turned == items
    assert queue_items(many, seed=2) != items
    assert len({item["id"] for item in items}) == 400


def test_ids_are_of_the_content_whichever_side():
    assert item_id("p", "a", "b") == item_id("p", "b", "a") != item_id("p", "a", "c")
    assert item_id("p", "a", "b") != item_id("pa", "", "b")
    messages = [{"role": "user", "content": "p"}]
    assert item_id(messages, "a", "b") != item_id("p", "a", "b")


def test_equal_responses_and_doubles_are_refused():
    with pytest.raises(ValueError, match="pair 1: found 'x' twice"):
        queue_items([("p", "a", "b"), ("p", "x", "x")])
    with pytest.raises(ValueError, match="pair 1: found the prompt and responses of pair 0"):
        queue_items([("p", "a", "b"), ("p", "b", "a")])


@pytest.mark.parametrize(
    "votes, outcome",
    [
        ("", "open"), ("skip", "skipped"), ("skip a", "a"), ("a b", "tie"), ("a a b", "a"), ("b b a", "b"),
        ("tie", "tie"), ("a tie", "tie"), ("a a b tie", "tie"), ("b b b tie", "b"), ("skip skip", "skipped"),
    ],
)  # fmt: skip
def test_majority(votes, outcome):
    assert resolve(dict(enumerate(votes.split()))) == outcome


def test_round_trip_gives_the_texts_that_were_chosen(handed_out):
    folder, items = handed_out
    best = ["a" if item["response_a"].startswith("good") else "b" for item in items]
    worst = ["b" if choice == "a" else "a" for choice in best]
    fill(folder, "ann.jsonl", items, [*best[:4], "skip", None])
    fill(folder, "bob.jsonl", items, [best[0], worst[1], best[2], "tie", "skip", None], "bob")
    fill(folder, "eve.jsonl", items[:2], [" A ".replace("A", best[0].upper()), best[1]], "eve")
    names = [str(folder / name) for name in ("ann.jsonl", "bob.jsonl", "eve.jsonl")]
    out = folder / "pairs.jsonl"
    assert queue.main(["import", *names, "--queue", str(folder / "queue.jsonl"), "--output", str(out)]) == 0
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [PAIRS[0], PAIRS[1], PAIRS[2]]
    assert [(p["votes"], round(p["agreement"], 2)) for p in pairs] == [(3, 1.0), (3, 0.67), (2, 1.0)]
    counts = json.loads(out.with_suffix(".counts.json").read_text())
    assert [counts[name] for name in ("items", "pairs", "tie", "skipped", "open")] == [6, 3, 1, 1, 1]
    assert (counts["votes_skip"], counts["votes_tie"], counts["lines_unfilled"], counts["annotators"]) == (2, 1, 2, 3)
    assert [text.kind for text in read_text(Source("made", out)).examples] == ["pair"] * 3


def test_problems_name_row_and_what_was_found(handed_out, capsys):
    folder, items = handed_out
    rows = [
        items[0] | {"choice": "a", "annotator": "ann"},
        items[1] | {"choice": "c", "annotator": "ann"},
        items[2] | {"choice": "b", "annotator": "ann", "id": "0000"},
        items[0] | {"choice": "b", "annotator": "ann"},
        items[3] | {"choice": "a", "response_a": items[3]["response_b"], "response_b": items[3]["response_a"]},
        items[4] | {"choice": 1},
        items[5] | {"choice": "tie", "annotator": 5},
    ]
    write_lines(folder / "ann.jsonl", rows)
    with open(folder / "ann.jsonl", "a") as file:
        file.write('{"id": ')
    answers = read_answers([folder / "ann.jsonl"], read_queue(folder / "queue.jsonl"))
    assert [(p.row, p.reason, p.column) for p in answers.problems] == [
        (1, "invalid choice", "choice"), (2, "unknown id", "id"), (3, "double", "choice"),
        (4, "other text", "response_a"), (5, "invalid choice", "choice"), (6, "wrong type", "annotator"),
        (7, "broken JSON", None),
    ]  # fmt: skip
    assert "'c'" in str(answers.problems[0]) and "a, b, tie, skip" in str(answers.problems[0])
    assert "'0000'" in str(answers.problems[1])
    assert f"{items[0]['id']}, who said 'a' in {folder / 'ann.jsonl'}, row 0" in str(answers.problems[2])
    assert answers.votes[items[0]["id"]] == {"ann": "a"}  # the first stands

    words = ["import", str(folder / "ann.jsonl"), "--queue", str(folder / "queue.jsonl")]
    out = folder / "pairs.jsonl"
    assert queue.main([*words, "--output", str(out)]) == 1 and not out.exists()
    assert queue.main([*words, "--output", str(out), "--drop"]) == 1
    assert len(out.read_text().splitlines()) == 1
    assert capsys.readouterr().out.count("problems: 7") == 2


def test_a_queue_that_is_none_is_refused(tmp_path):
    write_lines(tmp_path / "queue.jsonl", [{"id": "1", "prompt": "p", "response_a": "x"}])
    with pytest.raises(BadRow, match=r"queue.jsonl, row 0 \(line 1\), column 'response_b': missing value"):
        read_queue(tmp_path / "queue.jsonl")
    write_lines(tmp_path / "queue.jsonl", [item | {"id": "1"} for item in queue_items(PAIRS[:2])])
    with pytest.raises(BadRow, match="id twice: found 1 with other texts"):
        read_queue(tmp_path / "queue.jsonl")


def test_counts_add_up_without_answers(handed_out):
    folder, _ = handed_out
    answers = read_answers([folder / "queue.jsonl"], read_queue(folder / "queue.jsonl"))
    pairs, counts = pairs_of(answers)
    assert pairs == [] and counts["open"] == counts["items"] == counts["lines_unfilled"] == 6


def test_alpha_is_of_votes_without_skips(handed_out):
    """Votes aa, ab: n = 4, n_a = 3, n_b = 1.  D_o = 2 / 4, D_e = 2 · 3 · 1 / (4 · 3) = 1 / 2, so alpha is 0."""
    folder, items = handed_out
    files = [fill(folder, "ann.jsonl", items, ["a", "a", "a", "skip"])]
    files.append(fill(folder, "bob.jsonl", items, ["a", "b", "skip", "skip"], "bob"))
    out = folder / "pairs.jsonl"
    assert queue.run_import([str(file) for file in files], str(folder / "queue.jsonl"), out) == 0
    assert json.loads(out.with_suffix(".counts.json").read_text())["krippendorff_alpha"] == pytest.approx(0.0)


@pytest.mark.parametrize("there", ["pairs.jsonl", "pairs.counts.json"])
def test_what_is_there_is_not_lost(handed_out, there):
    folder, items = handed_out
    words = ["import", str(fill(folder, "ann.jsonl", items, "aaaaaa")), "--queue", str(folder / "queue.jsonl")]
    (folder / there).write_text("earlier work\n")
    with pytest.raises(DataError, match=f"{there}' is there already; want another --output, or --overwrite"):
        queue.main([*words, "--output", str(folder / "pairs.jsonl")])
    assert (folder / there).read_text() == "earlier work\n"
    assert queue.main([*words, "--output", str(folder / "pairs.jsonl"), "--overwrite"]) == 0
    assert len((folder / "pairs.jsonl").read_text().splitlines()) == 6
    assert json.loads((folder / "pairs.counts.json").read_text())["pairs"] == 6


@pytest.mark.parametrize("read", ["queue.jsonl", "ann.jsonl"])
def test_no_switch_writes_over_what_is_read(handed_out, read):
    folder, items = handed_out
    words = ["import", str(fill(folder, "ann.jsonl", items, "aaaaaa")), "--queue", str(folder / "queue.jsonl")]
    before = (folder / read).read_bytes()
    with pytest.raises(DataError, match=f"{read}' is a file that is read"):
        queue.main([*words, "--output", str(folder / "x" / ".." / read), "--overwrite"])
    assert (folder / read).read_bytes() == before


def test_a_folder_for_pairs_is_made(handed_out):
    folder, items = handed_out
    words = ["import", str(fill(folder, "ann.jsonl", items, "a")), "--queue", str(folder / "queue.jsonl")]
    assert queue.main([*words, "--output", str(folder / "new" / "pairs.jsonl")]) == 0
    assert (folder / "new" / "pairs.jsonl").exists()
