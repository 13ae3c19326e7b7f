"""`uft data check`: the report of planted files, on the terminal and on disk."""

import json

import pytest

from tests.data.quality.planted import pair, sentence, write
from uft.data.check_command import main
from uft.data.quality.markdown import markdown, table
from uft.data.quality.measure import Options, measure
from uft.data.rows import DataError
from uft.data.sources import Source


@pytest.fixture
def folder(tmp_path):
    """Two files of feedback and one of evaluation prompts, with one of everything planted."""
    pairs = [
        pair(sentence(i), sentence(100 + i, 30) + ".", sentence(200 + i, 20) + ".", origin="xy"[i % 2])
        for i in range(8)
    ]
    pairs += [pairs[0], pair(sentence(1) + " more", pairs[1]["chosen"], pairs[1]["rejected"], origin="y")]
    pairs += [pair(sentence(2), pairs[2]["rejected"], pairs[2]["chosen"], origin="x")]
    pairs += [pair("cycle", a, b, origin="y") for a, b in ("ab", "bc", "ca")]
    write(tmp_path / "pairs.jsonl", pairs)
    scores = [
        {"prompt": sentence(i), "completion": sentence(300 + i), "score": s} for i, s in enumerate([0.01] * 9 + [0.9])
    ]
    write(tmp_path / "scores.jsonl", scores)
    write(tmp_path / "eval.jsonl", [{"prompt": sentence(3), "answer": "4"}, {"prompt": sentence(50)}, {"answer": "5"}])
    return tmp_path


def test_findings(folder):
    sources = [Source(name=f"/anywhere/{n}.jsonl", path=folder / f"{n}.jsonl") for n in ("pairs", "scores")]
    found = measure(sources, [Source(name="eval", path=folder / "eval.jsonl")], Options(by="origin"))
    x, y, scores = found["duplicates"]["groups"]
    assert (x, y, scores) == ("pairs/x", "pairs/y", "scores")
    assert {g: f["rows"] for g, f in found["rows"]["groups"].items()} == {x: 6, y: 8, scores: 10}
    duplicates = found["duplicates"]
    assert duplicates["exact_row"]["repeats"] == {x: 1, y: 0, scores: 0}
    assert duplicates["near_row"]["repeats"] == {x: 1, y: 1, scores: 0}
    # prompts 0 to 7 of the scores are those of the pairs, the even ones of x
    assert duplicates["exact_prompt"]["shared"][2][:2] == [4, 4]
    conflicts = found["conflicts"]
    assert (conflicts["contradictions"], conflicts["cycles"], conflicts["shortest_cycles"]) == (1, 1, [3])
    assert conflicts["contradicting_rows"] == {x: 2, y: 0, scores: 0}
    assert conflicts["rows_on_cycles"] == {x: 0, y: 3, scores: 0}
    (file,) = found["contamination"]["files"].values()
    assert (file["prompts"], file["prompts_found"]["any"], file["rows_without_prompt"]) == (2, 1, 1)
    assert file["rows"]["any"] == {x: 0, y: 1, scores: 1}
    bias = found["length_bias"][x]["chosen_longer"]
    assert (bias["hits"], bias["of"]) == (5, 6)
    assert found["scores"]["scores"]["suggestion"].startswith("rank")
    assert found["agreement"][x]["pair"]["judged_more_than_once"] == 2


def test_the_command(folder, capsys):
    words = [str(folder / "pairs.jsonl"), str(folder / "scores.jsonl"), "--eval", str(folder / "eval.jsonl")]
    assert main([*words, "--report", str(folder / "report"), "--by", "origin"]) == 0
    out = capsys.readouterr().out
    assert "## Duplicates" in out and "## Evaluation prompts in training data" in out
    report = (folder / "report" / "report.md").read_text()
    assert report.replace("![", "") != report
    for name in ("lengths", "duplicates", "contamination", "length_bias", "scores"):
        assert f"({name}.png)" in report
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "report" / "report.json").read_text()
    json.loads(text)
    # numbers alone: no text of the data, no folder
    for held in (sentence(0), sentence(100, 30), str(folder)):
        assert held not in text and held not in report
    assert "1 pairs of responses are preferred both ways" in report


@pytest.mark.parametrize("label", [0, 1])
def test_terms_of_which_one_side_has_no_response(tmp_path, label):
    """All labels alike: there is a share of one side alone, and nothing to draw."""
    rows = [{"prompt": "p", "completion": f"{i} I will murder it.", "label": label} for i in range(4)]
    write(tmp_path / "labels.jsonl", rows)
    assert main([str(tmp_path / "labels.jsonl"), "--report", str(tmp_path / "report")]) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert "| violence |" in report and "unsafe.png" not in report


def test_numbers_are_written_before_figures(folder, monkeypatch):
    def broken(*_):
        raise RuntimeError("no figure")

    monkeypatch.setattr("uft.data.quality.figures.draw", broken)
    with pytest.raises(RuntimeError, match="no figure"):
        main([str(folder / "pairs.jsonl"), "--report", str(folder / "report")])
    assert "## Duplicates" in (folder / "report" / "report.md").read_text()
    assert json.loads((folder / "report" / "report.json").read_text())["rows"]


def test_quick_is_validation_alone(folder, capsys):
    assert main([str(folder / "pairs.jsonl"), "--quick"]) == 0
    assert "# Data report" not in capsys.readouterr().out


def test_bad_rows_and_sources_do_not_stop_the_report(folder, capsys):
    write(folder / "bad.jsonl", [pair("p", "a", "a"), pair("p", "good one.", "b")])
    assert main([str(folder / "bad.jsonl"), str(folder / "gone.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "1 rows left out: equal responses" in out and "gone.jsonl: found no such file" in out
    write(folder / "none.jsonl", [pair("p", "a", "a")])
    assert main([str(folder / "none.jsonl")]) == 1
    assert "# Data report" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--threshold", "1.5"], "threshold is 1.5"),
        (["--eval", "gone.jsonl"], "gone.jsonl: found no such file"),
        (["--terms", "gone.txt"], "gone.txt: cannot be read"),
        (["--beta", "0"], "beta is 0.0"),
        (["--permutations", "16", "--threshold", "0.99"], "threshold is 0.99 and permutations is 16"),
        (["--by", "nope"], "by is 'nope': found no row of any source"),
        (["--annotator", "nope"], "annotator is 'nope': found no row of any source"),
    ],
)
def test_options_that_cannot_be_used(folder, capsys, words, message):
    assert main([str(folder / "pairs.jsonl"), *words]) == 1
    assert message in capsys.readouterr().out


def test_every_kind_of_source():
    """Rows in memory, conversations and documents; no evaluation file."""
    chat = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(2)
    ]
    documents = [{"text": "A whole text."}, {"text": "A  whole TEXT."}]
    found = measure([Source(name="chat", data=chat), Source(name="documents", data=documents)])
    assert found["duplicates"]["exact_row"]["repeats"] == {"chat": 0, "documents": 1}
    # no prompt is no prompt in common
    assert found["duplicates"]["near_prompt"]["repeats"] == {"chat": 0, "documents": 0}
    assert found["contamination"] == {}


def test_tokens_are_counted_where_there_is_a_tokenizer():
    from tests.data.tiny_tokenizers import make

    rows = [{"prompt": "p", "completion": "a b c d"}, {"prompt": "p q", "completion": "a"}]
    found = measure([Source(name="d", data=rows)], options=Options(tokenizer=make(), max_length=5))
    assert found["lengths"]["d"]["response_tokens"]["1"] > found["lengths"]["d"]["response_tokens"]["0.05"]
    assert found["endings"]["d"]["max length"] >= 1


def test_a_column_of_many_values_splits_nothing():
    rows = [pair("p", "a", str(i), id=i, part=i % 40) for i in range(60)]
    assert len(measure([Source(name="s", data=rows)], options=Options(by="part"))["rows"]["groups"]) == 40
    with pytest.raises(
        DataError, match="by is 'id': found more than 40 different values in this column by row 40 of s"
    ):
        measure([Source(name="s", data=rows)], options=Options(by="id"))


def test_other_files_are_opened_first(folder, capsys, monkeypatch):
    def late(*_):
        raise AssertionError("training data were read")

    monkeypatch.setattr("uft.data.check.check", late)
    for option in ("--eval", "--terms", "--unsafe"):
        assert main([str(folder / "pairs.jsonl"), option, "gone.jsonl"]) == 1
        assert "gone.jsonl" in capsys.readouterr().out


def test_scores_of_pairs_are_described():
    rows = [pair("p", "a", str(i), score_chosen=0.9, score_rejected=0.2) for i in range(3)]
    found = measure([Source(name="s", data=rows), Source(name="plain", data=[pair("p", "a", "b")])])
    assert list(found["scores"]) == ["s"]
    assert found["scores"]["s"]["responses"] == 6 and found["scores"]["s"]["mean"] == pytest.approx(0.55)
    assert "| s, both sides |" in markdown(found)


def test_values_on_several_lines_do_not_break_tables():
    assert table(("a\nb", "c"), [("x\n\ny", "p|q")]).splitlines()[2] == "| x y | p\\|q |"
    assert len(table(("a\nb", "c"), [("x\n\ny", "p|q")]).splitlines()) == 3
    rows = [pair("p", "a", "b", part="one\n| two")]
    assert "| s/one \\| two |" in markdown(measure([Source(name="s", data=rows)], options=Options(by="part")))


def test_beta_is_checked():
    with pytest.raises(DataError, match="beta is -1"):
        Options(beta=-1)
