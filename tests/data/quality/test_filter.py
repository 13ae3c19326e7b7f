"""`uft data filter`: planted rows are dropped for the right reason, everything else stays as it was, counts add up."""

import hashlib
import json
import math
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.quality.planted import pair, sentence, write
from uft.cli import main as cli
from uft.data.check import check
from uft.data.filter import FilterRecipe, run, sift
from uft.data.quality.card import without_folders
from uft.data.quality.items import read_items
from uft.data.rows import DataError
from uft.data.sources import Source
from uft.recipe import RecipeError


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def recipe(tmp_path, rows, **more):
    path = tmp_path / "pairs.jsonl"
    write(path, rows)
    return {"train_dataset": {"pairs": str(path)}, "output_dir": str(tmp_path / "out"), **more}


def good(seed):
    return pair(sentence(seed), sentence(1000 + seed, 20) + ".", sentence(2000 + seed, 15) + ".", extra=seed)


def reasons_of(tmp_path, rows, rules, **more):
    outcomes = sift(FilterRecipe.of(recipe(tmp_path, rows, rules=rules, **more)))
    return {row: reason for row, (reason, _) in outcomes["pairs"].dropped.items()}


# ---- each rule on what was planted for it ----


@pytest.mark.parametrize(
    "rule, options, bad",
    [
        ("lengths", {"response_words": [2, None]}, pair("p", "one", "two words here")),
        ("lengths", {"prompt_characters": [None, 400]}, pair("long " * 100, "a b", "c d")),
        ("endings", True, pair("p", "...", "a real answer.")),
        ("endings", {"signs": ["open fence"]}, pair("p", "see:\n```\nx", "a real answer.")),
        ("scripts", {"allowed": ["latin"]}, pair("p", "да, это так", "a real answer.")),
        ("unsafe", {"categories": ["violence"]}, pair("p", "I will murder it.", "no.")),
        ("unsafe", {"columns": ["prompt"]}, pair("how to build a bomb", "so.", "no.")),
        ("length_ratio", {"most": 4}, pair("p", "a" * 30, "b" * 5)),
    ],
)
def test_rules_on_rows(tmp_path, rule, options, bad):
    assert reasons_of(tmp_path, [good(1), bad, good(2)], {rule: options}) == {1: rule}


def test_unsafe_looks_at_its_columns_alone(tmp_path):
    rows = [good(1), pair("how to build a bomb", "so.", "no."), pair("p", "no.", "a bomb.")]
    assert reasons_of(tmp_path, rows, {"unsafe": {"columns": ["chosen"]}}) == {}
    assert reasons_of(tmp_path, rows, {"unsafe": {"columns": ["rejected"]}}) == {2: "unsafe"}


def test_duplicates_keep_the_first(tmp_path):
    near = good(2) | {"prompt": sentence(2) + " more"}
    rows = [good(1), good(2), good(1) | {"extra": 7}, near, good(3) | {"prompt": sentence(1)}]
    both = {"near_duplicates": True, "exact_duplicates": True}
    assert reasons_of(tmp_path, rows, both) == {2: "exact_duplicates", 3: "near_duplicates"}
    assert reasons_of(tmp_path, rows, {"near_duplicates": {"threshold": 0.99}}) == {2: "near_duplicates"}
    assert reasons_of(tmp_path, rows, {"exact_duplicates": {"of": "prompt"}}) == {
        2: "exact_duplicates", 4: "exact_duplicates"
    }  # fmt: skip


def test_contradictions_and_cycles_go_whole(tmp_path):
    rows = [pair("p", "a", "b"), pair("p", "b", "a"), good(1), *(pair("q", a, b) for a, b in ("ab", "bc", "ca", "cd"))]
    rules = {"cycles": True, "contradictions": True}
    assert reasons_of(tmp_path, rows, rules) == {
        0: "contradictions", 1: "contradictions", 3: "cycles", 4: "cycles", 5: "cycles"
    }  # fmt: skip


def test_a_row_that_is_dropped_before_contradicts_nothing(tmp_path):
    rows = [pair("p", "a good answer", "b"), pair("p", "b", "a good answer"), pair("p", "...", "a good answer")]
    assert reasons_of(tmp_path, rows[:2], {"contradictions": True}) == {0: "contradictions", 1: "contradictions"}
    rows[1]["prompt"] = "P"
    rules = {"contradictions": True, "lengths": {"prompt_characters": [1, None]}, "endings": True}
    assert reasons_of(tmp_path, rows, rules) == {0: "contradictions", 1: "contradictions", 2: "endings"}


def test_contamination_names_the_evaluation_row(tmp_path):
    write(tmp_path / "eval.jsonl", [{"prompt": sentence(90)}, {"prompt": sentence(91)}])
    rows = [
        good(1),
        good(2) | {"chosen": "See: " + sentence(91)},
        good(90),
        good(91) | {"prompt": sentence(91) + " more"},
    ]
    values = recipe(tmp_path, rows, rules={"contamination": True}, eval_dataset={"held": str(tmp_path / "eval.jsonl")})
    found = sift(FilterRecipe.of(values))["pairs"].dropped
    assert {row: text for row, (_, text) in found.items()} == {
        1: "13-gram of held row 1", 2: "the prompt is held row 0", 3: "the prompt is near held row 1"
    }  # fmt: skip


def test_the_filter_drops_copies_that_many_rows_hold(tmp_path):
    asked = sentence(90, 20)
    write(tmp_path / "eval.jsonl", [{"prompt": asked}])
    rows = [good(1), *(good(i) | {"prompt": f"{sentence(i)} {asked}"} for i in range(2, 14))]
    values = recipe(tmp_path, rows, rules={"contamination": True}, eval_dataset={"held": str(tmp_path / "eval.jsonl")})
    found = sift(FilterRecipe.of(values))["pairs"].dropped
    assert set(found) == set(range(1, 13))
    assert found[1] == ("contamination", "holds, as many prompts do, the whole of held row 0")


def test_rules_are_on_the_sources_they_name(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [pair("p", "...", f"good {name}")])
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
    values = {"train_dataset": sources, "output_dir": "o", "rules": {"endings": {"on": ["b"]}}}
    assert {name: len(o.kept) for name, o in sift(FilterRecipe.of(values)).items()} == {"a": 1, "b": 0}


def test_kinds_of_feedback_are_not_duplicates_of_each_other(tmp_path):
    write(tmp_path / "d.jsonl", [{"prompt": "p", "completion": "c"}])
    write(tmp_path / "l.jsonl", [{"prompt": "p", "completion": "c", "label": True}] * 2)
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in "dl"}
    values = {"train_dataset": sources, "output_dir": "o", "rules": {"exact_duplicates": True, "near_duplicates": True}}
    assert {name: len(o.kept) for name, o in sift(FilterRecipe.of(values)).items()} == {"d": 1, "l": 1}


# ---- what is written ----


RULES = {
    "endings": True, "length_ratio": {"most": 3}, "contradictions": True, "exact_duplicates": True, "near_duplicates":
True }  # fmt: skip


def test_rows_stay_as_they_were_and_counts_add_up(tmp_path):
    """Random mixtures of good and bad rows."""
    draw = random.Random(0)
    bad = [
        pair("p", "...", "x."),
        pair("p", "a" * 20, "b"),
        pair("p", "s", "s"),
        pair("p", "k", "l"),
        pair("p", "l", "k"),
    ]
    for attempt in range(5):
        rows = [draw.choice([good(draw.randrange(6)), draw.choice(bad)]) for _ in range(30)]
        write(tmp_path / "pairs.jsonl", rows)
        out = tmp_path / f"out{attempt}"
        outcomes, folder = run(recipe(tmp_path, rows, rules=RULES) | {"output_dir": str(out)})
        kept, dropped = read(folder / "pairs.jsonl"), read(folder / "dropped.jsonl")
        assert folder == out and len(kept) + len(dropped) == 30
        assert kept == [row for i, row in enumerate(rows) if i not in {each["row"] for each in dropped}]
        counts = json.loads((folder / "filter.json").read_text())["counts"]["pairs"]
        assert counts["read"] == 30 == counts["kept"] + sum(counts["dropped"].values())
        assert counts == outcomes["pairs"].counts()
        # and what is left can be used as it is
        (source,) = check(folder / "pairs.jsonl").sources
        assert source.kept == counts["kept"] and not source.bad_rows


def test_parquet_keeps_its_columns(tmp_path):
    schema = pa.schema(
        [("question", pa.string()), ("completion", pa.string()), ("score", pa.float32()), ("n", pa.int8())]
    )
    rows = [
        {"question": f"q{i}", "completion": f"answer {i}", "score": s, "n": i} for i, s in enumerate([3, 1, 2, 2, 9])
    ]
    rows.append({"question": "q", "completion": " ", "score": 1.0, "n": 5})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "s.parquet")
    source = {"path": str(tmp_path / "s.parquet"), "columns": {"prompt": "question"}, "score_range": [0, 10]}
    values = {"train_dataset": {"scores": source}, "output_dir": str(tmp_path / "out"), "scores": "rank"}
    outcomes, folder = run(values)
    table = pq.read_table(folder / "scores.parquet")
    assert table.schema.names == schema.names and table.schema.field("n").type == pa.int8()
    assert table.column("n").to_pylist() == [0, 1, 2, 3, 4]
    # ranks of 3 1 2 2 9 are 4 1 2.5 2.5 5, less a half, of 5
    assert table.column("score").to_pylist() == pytest.approx([0.7, 0.1, 0.4, 0.4, 0.9])
    assert outcomes["scores"].reasons == {"bad row: empty response": 1}
    # without scores the column keeps its type too
    _, folder = run(values | {"scores": None, "output_dir": str(tmp_path / "plain"), "format": "parquet"})
    assert pq.read_table(folder / "scores.parquet").schema.field("score").type == pa.float32()


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_mapped_file_comes_back_as_it_was_read(tmp_path, ending, form):
    """Read again with its mapping it is the same; of a CSV the mapping alone says which texts are numbers."""
    rows = [
        {"score": "mine", "question": f"q{i}", "completion": f"answer {i}", "rating": s, "w": i + 0.5, "zip": "007"}
        for i, s in enumerate([0.5, 0.25, 1.0])
    ]
    path = tmp_path / f"s.{ending}"
    if ending == "csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [rows[0], *(row.values() for row in rows)]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = {"prompt": "question", "score": "rating", "weight": "w"}
    source = {"path": str(path), "columns": columns}
    _, folder = run({"train_dataset": {"s": source}, "output_dir": str(tmp_path / "out"), "format": form})
    made = folder / f"s.{form}"
    assert (read(made) if form == "jsonl" else pq.read_table(made).to_pylist()) == rows
    again = [list(read_items(Source(name="s", path=each, columns=columns))) for each in (path, made)]
    assert again[0] == again[1] and [item.targets for item in again[1]] == [(0.5,), (0.25,), (1.0,)]


def test_a_score_made_of_columns_of_a_csv(tmp_path):
    (tmp_path / "s.csv").write_text("prompt,completion,a,b\np,c,0.5,1\n")
    source = {"path": str(tmp_path / "s.csv"), "score": {"a": 1.0, "b": 3.0}}
    _, folder = run({"train_dataset": {"s": source}, "output_dir": str(tmp_path / "out")})
    assert read(folder / "s.jsonl") == [{"prompt": "p", "completion": "c", "a": 0.5, "b": 1.0}]


def test_ranks_of_a_mapped_csv_take_the_place_of_its_column(tmp_path):
    (tmp_path / "s.csv").write_text("prompt,completion,rating\np,c,3\nq,d,9\n")
    source = {"path": str(tmp_path / "s.csv"), "columns": {"score": "rating"}, "score_range": [0, 10]}
    _, folder = run({"train_dataset": {"s": source}, "output_dir": str(tmp_path / "out"), "scores": "rank"})
    assert [row["rating"] for row in read(folder / "s.jsonl")] == [0.25, 0.75]
    # scores in [0, 1] read with the range of the input would be others
    assert "leave `score_range` out where s is read" in (folder / "README.md").read_text()
    source = {"path": str(folder / "s.jsonl"), "columns": {"score": "rating"}}
    _, folder = run({"train_dataset": {"s": source}, "output_dir": str(tmp_path / "again"), "scores": "rank"})
    assert "leave `score_range` out" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("value", [math.nan, [1, {"a": math.inf}], "\ud800", {"a": "x\udfff"}])
def test_what_cannot_be_written_is_named(tmp_path, value):
    rows = [pair("p", "a", "a"), good(1), good(2) | {"extra": value}]
    values = recipe(tmp_path, rows)
    with pytest.raises(DataError, match=r"pairs.jsonl, row 2, column 'extra': cannot be written: found .*parquet"):
        run(values)
    assert not (tmp_path / "out").exists()


def test_what_parquet_cannot_hold_is_named(tmp_path):
    rows = [pair("p", "a", "a"), good(1) | {"extra": "a"}, good(2) | {"extra": "\ud800"}]
    with pytest.raises(DataError, match=r"pairs.jsonl, row 2, column 'extra': cannot be written"):
        run(recipe(tmp_path, rows, format="parquet"))
    rows = [good(1) | {"extra": math.nan}]
    _, folder = run(recipe(tmp_path, rows, format="parquet"))
    assert math.isnan(pq.read_table(folder / "pairs.parquet").to_pylist()[0]["extra"])


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path):
    rows = [pair("да", "нет", "так"), pair("p", "a", "a")]
    message = r"pairs.jsonl: found no row that is kept among 2 \(1 scripts, 1 bad row: equal responses\)"
    with pytest.raises(DataError, match=message):
        run(recipe(tmp_path, rows, rules={"scripts": True}))
    assert not (tmp_path / "out").exists()


def test_a_source_may_say_what_becomes_of_its_bad_rows(tmp_path):
    values = recipe(tmp_path, [good(1), pair("p", "a", "a")])
    path = values["train_dataset"]["pairs"]
    for own, whole, refused in (("error", "drop", True), ("drop", "error", False), (None, "error", True)):
        made = values | {"train_dataset": {"pairs": {"path": path, "on_bad_row": own}}, "on_bad_row": whole}
        if refused:
            with pytest.raises(DataError, match="row 1"):
                sift(FilterRecipe.of(made))
        else:
            assert sift(FilterRecipe.of(made))["pairs"].kept == [0]


def test_evaluation_files_are_opened_before_training_data(tmp_path, monkeypatch):
    def late(*_):
        raise AssertionError("training data were read")

    monkeypatch.setattr("uft.data.filter.Corpus.read", late)
    values = recipe(tmp_path, [good(1)], rules={"contamination": True}, eval_dataset={"held": "gone.jsonl"})
    with pytest.raises(DataError, match=r"gone.jsonl: found no such file"):
        sift(FilterRecipe.of(values))


def test_scores_of_pairs_are_taken_together(tmp_path):
    rows = [
        good(1) | {"score_chosen": 0.9, "score_rejected": 0.1},
        good(2) | {"score_chosen": 0.5, "score_rejected": 0.2},
    ]
    _, folder = run(recipe(tmp_path, rows, scores="rank"))
    found = [(row["score_chosen"], row["score_rejected"]) for row in read(folder / "pairs.jsonl")]
    assert found == [(0.875, 0.125), (0.625, 0.375)]


def test_parquet_from_lines(tmp_path):
    rows = [good(1), good(2) | {"more": [1, 2]}]
    _, folder = run(recipe(tmp_path, rows, format="parquet"))
    assert pq.read_table(folder / "pairs.parquet").to_pylist() == [rows[0] | {"more": None}, rows[1]]


def test_the_card(tmp_path):
    write(tmp_path / "eval.jsonl", [{"prompt": sentence(90)}])
    values = recipe(tmp_path, [good(1), good(90)], rules={"contamination": {"near": {"threshold": 0.9}}})
    _, folder = run(values | {"eval_dataset": {"held": str(tmp_path / "eval.jsonl")}})
    card, facts = (folder / "README.md").read_text(), json.loads((folder / "filter.json").read_text())
    sha = hashlib.sha256((tmp_path / "pairs.jsonl").read_bytes()).hexdigest()
    assert facts["inputs"] == {"pairs": {"from": "pairs.jsonl", "sha256": sha}} and sha in card
    assert facts["rules"]["contamination"]["near"]["threshold"] == 0.9
    assert facts["counts"] == {"pairs": {"read": 2, "kept": 1, "dropped": {"contamination": 1}}}
    # file names alone, no folder of this machine and no text of the data
    assert str(tmp_path) not in card + json.dumps(facts) and sentence(90) not in card
    assert card.startswith("---\nconfigs:\n- config_name: pairs\n  data_files: pairs.jsonl\n---\n")


def test_paths_lose_their_folders_and_ids_do_not():
    assert without_folders({"a": ["/x/y.jsonl", "org/data", "~/z"], "b": 1}) == {
        "a": ["y.jsonl", "org/data", "z"],
        "b": 1,
    }


@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_leaves_no_half_data_set(tmp_path, monkeypatch, there):
    values = recipe(tmp_path, [good(1), good(2)], overwrite=True)
    if there:
        run(values)
        (tmp_path / "out" / "mark").write_text("from before")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("uft.data.filter.write_card", stop)
    with pytest.raises(KeyboardInterrupt):
        run(values)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"} | ({"out"} if there else set())
    assert (tmp_path / "out" / "mark").exists() == there
    monkeypatch.undo()
    run(values)
    assert not (tmp_path / "out" / "mark").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "out"}


def test_what_was_there_comes_back_where_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    values = recipe(tmp_path, [good(1)], overwrite=True)
    run(values)
    (tmp_path / "out" / "mark").write_text("from before")
    rename, refused = os.rename, []

    def once(source, target):
        if str(target) == str(tmp_path / "out") and not refused:
            refused.append(source)
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr("uft.data.quality.writing.os.rename", once)
    with pytest.raises(OSError, match="no space"):
        run(values)
    assert (tmp_path / "out" / "mark").read_text() == "from before"
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "out"}


def test_a_folder_that_is_there_is_not_replaced_unasked(tmp_path):
    values = recipe(tmp_path, [good(1)])
    run(values)
    with pytest.raises(RecipeError, match="is there already"):
        run(values)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("held", ["train", "train itself", "train by a link", "eval", "unsafe"])
def test_a_folder_that_holds_what_is_read_is_refused(tmp_path, held, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / "filter.json").write_text("{}")
    write(out / "held.jsonl", [good(1), good(2)])
    (out / "terms.txt").write_text("all: murder\n")
    values = recipe(tmp_path, [good(1)], overwrite=overwrite)
    if held == "eval":
        more = {"eval_dataset": {"e": str(out / "held.jsonl")}, "rules": {"contamination": True}}
    elif held == "unsafe":
        more = {"rules": {"unsafe": {"file": str(out / "terms.txt")}}}
    else:
        (tmp_path / "link.jsonl").symlink_to(out / "held.jsonl")
        path = {"train": out / "held.jsonl", "train itself": out, "train by a link": tmp_path / "link.jsonl"}[held]
        more = {"train_dataset": {"t": str(path)}}
    # the same folder by another way
    with pytest.raises(RecipeError, match=r"holds .*; want a folder in which nothing is that is read"):
        run(values | more | {"output_dir": str(tmp_path / "x" / ".." / "out")})
    assert {path.name for path in out.iterdir()} == {"filter.json", "held.jsonl", "terms.txt"}
    assert len(read(out / "held.jsonl")) == 2


def test_only_an_earlier_result_is_replaced(tmp_path, monkeypatch):
    values = recipe(tmp_path, [good(1)], overwrite=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match=r"has no filter.json"):
        run(values)
    assert (out / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="file' is a file"):
        run(values | {"output_dir": str(tmp_path / "file")})
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(RecipeError, match="is a symbolic link to"):
        run(values | {"output_dir": str(tmp_path / "link")})
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    for here in (".", "..", ""):
        with pytest.raises(RecipeError, match=r"holds the folder this runs in|is missing"):
            run(values | {"output_dir": here})
    (tmp_path / "empty").mkdir()
    run(values | {"output_dir": str(tmp_path / "empty")})
    assert (tmp_path / "empty" / "pairs.jsonl").exists()


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    values = recipe(tmp_path, [good(1), good(2)])

    def sifted(made):
        found = sift(made)
        write(tmp_path / "pairs.jsonl", [good(1)])
        return found

    monkeypatch.setattr("uft.data.filter.sift", sifted)
    with pytest.raises(DataError, match="found 1 rows, 1 of them kept, when read again"):
        run(values)
    assert not (tmp_path / "out").exists()


# ---- recipes that cannot be used ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rule": {}}, "unknown key 'rule'; did you mean 'rules'"),
        ({"rules": {"near_duplicate": True}}, "rules: unknown key 'near_duplicate'; did you mean 'near_duplicates'"),
        (
            {"rules": {"near_duplicates": {"treshold": 1}}},
            "rules.near_duplicates: unknown key 'treshold'; did you mean 'thres",
        ),
        ({"rules": {"near_duplicates": {"threshold": 2}}}, "rules.near_duplicates: threshold is 2"),
        ({"rules": {"contamination": {"near": {"n": 2}}}}, "rules.contamination.near: unknown key 'n'"),
        ({"rules": {"contamination": {"near": 0.8}}}, r"rules.contamination.near is 0.8 .* \{threshold: 0.8\}"),
        ({"rules": {"contamination": {"near": True}}}, "rules.contamination.near is True"),
        ({"rules": {"near_duplicates": {"threshold": True}}}, "rules.near_duplicates: threshold is True"),
        (
            {"rules": {"near_duplicates": {"threshold": 0.99, "permutations": 16}}},
            "rules.near_duplicates: threshold is 0.99 and permutations is 16",
        ),
        ({"rules": {"scripts": {"allowed": ["LATYN"]}}}, "allowed has 'LATYN'.*did you mean 'LATIN'"),
        ({"eval_dataset": {"e": "e.jsonl"}}, "eval_dataset is there and no rule reads it"),
        (
            {"eval_dataset": {"e": {"path": "e", "on_bad_row": "drop"}}, "rules": {"contamination": True}},
            "eval_dataset.e: on_bad_row is 'drop'",
        ),
        ({"rules": {"endings": {"signs": ["cut"]}}}, "rules.endings: signs is .*mid word"),
        ({"rules": {"endings": {"signs": ["max length"]}}}, "rules.endings: max_length is None"),
        ({"rules": {"lengths": {"tokens": 5}}}, r"rules.lengths: tokens is 5 .*\[least, most\]"),
        ({"rules": {"lengths": {"tokens": [9, 5]}}}, "rules.lengths: tokens"),
        ({"rules": {"scripts": {"share": 2}}}, "rules.scripts: share is 2"),
        ({"rules": {"unsafe": {"categories": ["x"]}}}, "rules.unsafe: categories is"),
        ({"rules": {"unsafe": {"file": "gone.txt"}}}, "rules.unsafe: gone.txt: cannot be read"),
        ({"rules": {"cycles": {"on": "pears"}}}, "rules.cycles.on: unknown key 'pears'; did you mean 'pairs'"),
        ({"rules": {"cycles": 3}}, "rules.cycles is 3"),
        ({"rules": [1]}, "rules is"),
        ({"rules": {"contamination": True}}, "rules.contamination needs 'eval_dataset'"),
        ({"scores": "ranks"}, "scores is 'ranks'; want rank or centre"),
        ({"scores": "rank"}, "no source has scores"),
        ({"format": "csv"}, "format is 'csv'"),
        ({"overwrite": "yes"}, "overwrite is 'yes'"),
        ({"train_dataset": {"a/b": "x.jsonl"}}, "train_dataset: name 'a/b'"),
        ({"train_dataset": {"dropped": "x.jsonl"}}, "train_dataset: name 'dropped'"),
        ({"train_dataset": {}}, "key 'train_dataset' is missing"),
        ({"output_dir": None}, "key 'output_dir' is missing"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, change, message):
    values = recipe(tmp_path, [good(1)]) | change
    with pytest.raises(RecipeError, match=message):
        sift(FilterRecipe.of(values))


def test_bad_rows_may_be_refused(tmp_path):
    rows = [good(1), pair("p", "a", "a")]
    assert reasons_of(tmp_path, rows, {}) == {1: "bad row: equal responses"}
    with pytest.raises(DataError, match=r"pairs.jsonl, row 1 \(line 2\)"):
        sift(FilterRecipe.of(recipe(tmp_path, rows, on_bad_row="error")))


def test_tokens_need_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match="needs a tokenizer"):
        reasons_of(tmp_path, [good(1)], {"lengths": {"tokens": [None, 100]}})
    from tests.data.tiny_tokenizers import make

    make().save_pretrained(tmp_path / "tokenizer")
    rules, tokenizer = {"lengths": {"tokens": [None, 100]}}, str(tmp_path / "tokenizer")
    assert reasons_of(tmp_path, [good(1), pair("p", "a b", "c")], rules, tokenizer=tokenizer) == {0: "lengths"}
    rules = {"endings": {"signs": ["max length"], "max_length": 100}}
    assert reasons_of(tmp_path, [good(1), pair("p", "a b", "c")], rules, tokenizer=tokenizer) == {0: "endings"}


def test_the_command(tmp_path, capsys):
    write(tmp_path / "pairs.jsonl", [good(1), good(1), good(2)])
    (tmp_path / "recipe.yaml").write_text(
        f"train_dataset:\n  pairs: {{path: {tmp_path}/pairs.jsonl}}\nrules: {{exact_duplicates: true}}\n"
        f"output_dir: {tmp_path}/out\n"
    )
    assert cli(["data", "filter", "--config", str(tmp_path / "recipe.yaml"), "--list_dropped", "false"]) == 0
    assert "| pairs  |         3 |    2 |       1 |                1 |" in capsys.readouterr().out
    assert not (tmp_path / "out" / "dropped.jsonl").exists()
    assert cli(["data", "filter", "--config", str(tmp_path / "recipe.yaml"), "--rules.cycle", "true"]) == 1
    assert "uft: rules: unknown key 'cycle'; did you mean 'cycles'?" in capsys.readouterr().err


def test_the_recipe_that_comes_along_is_one():
    from pathlib import Path

    from uft.recipe import read_yaml

    made = FilterRecipe.of(read_yaml(str(Path(__file__).parents[3] / "experiments" / "recipes" / "data_filter.yaml")))
    assert made.on == {"near_duplicates": ("pairs", "scores", "labels")} and made.scores == "rank"
