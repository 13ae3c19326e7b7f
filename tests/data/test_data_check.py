"""`uft data check`: every bad row on a line of its own, then the counts; on real files too."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.tiny_tokenizers import make
from uft.data.check import check, run_check
from uft.data.check_command import main
from uft.data.sources import DataError

ROOT = Path(__file__).resolve().parents[2]
GOOD = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3
BAD = [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": 3}]


def write(path, rows, more=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return str(path)


def run(*paths, **options):
    out = io.StringIO()
    return run_check(paths, file=out, **options), out.getvalue().splitlines()


def test_a_good_file(tmp_path):
    path = write(tmp_path / "pairs.jsonl", GOOD)
    code, lines = run(path)
    assert code == 0
    assert len(lines) == 2
    assert lines[1].split()[:5] == [path, "pair", "3", "3", "0"]


def test_all_bad_rows_are_listed(tmp_path):
    path = write(tmp_path / "pairs.jsonl", GOOD[:1] + BAD + GOOD, more="{broken\n")
    code, lines = run(path)
    assert code == 1
    assert [line.split(": ")[0] for line in lines[:3]] == [
        f"{path}, row 1 (line 2), column 'rejected'",
        f"{path}, row 2 (line 3), column 'rejected'",
        f"{path}, row 6 (line 7)",
    ]
    assert lines[3] == ""
    assert lines[5].split()[:5] == [path, "pair", "7", "4", "3"]
    assert lines[6:] == [f"{path}: 1 dropped: {reason}" for reason in ("equal responses", "wrong type", "broken JSON")]


def test_bad_sources_do_not_stop_the_others(tmp_path):
    good = write(tmp_path / "good.jsonl", GOOD)
    other = write(tmp_path / "other.jsonl", [{"question": "q"}])
    code, lines = run(str(tmp_path / "gone.jsonl"), other, good)
    assert code == 1
    assert [line.split()[1:4] for line in lines[1:4]] == [["?", "0", "0"], ["?", "0", "0"], ["pair", "3", "3"]]
    assert lines[4].startswith(f"{tmp_path}/gone.jsonl: found no such file")
    assert lines[5].startswith(f"{other}: found columns question; want those of a kind")


def test_lengths_need_a_tokenizer(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "completion": "a b c d e f g"}])
    assert run(path)[0] == 0
    code, lines = run(path, tokenizer=make(), max_length=4)
    assert code == 1
    assert lines[0].startswith(f"{path}, row 0 (line 1), column 'completion': too long: found a response of ")
    assert run(path, max_length=4) == (1, ["max_length is 4 and there is no tokenizer; want one, to count tokens with"])
    code, lines = run(path, tokenizer=str(tmp_path))
    assert code == 1 and lines[0].startswith(f"tokenizer '{tmp_path}': cannot be loaded")
    make().save_pretrained(tmp_path / "tokenizer")
    assert run(path, tokenizer=str(tmp_path / "tokenizer"))[0] == 0


def test_options_of_the_source(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": "p", "completion": "c", "score": 7}])
    assert run(path, columns={"prompt": "q"}, score_range=(0, 10))[0] == 0
    assert run(path, limit=0) == (1, [f"source {path!r}: limit is 0 (int); want a whole number from 1 on"])
    with pytest.raises(DataError):
        check([path, path])


def test_command_line(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", BAD + GOOD)
    assert main([path, "--limit", "1", "--kind", "pair"]) == 1
    out, err = capsys.readouterr()
    assert "pair     1     0        1" in out
    assert err == ""  # no progress bar where nobody looks


def test_the_command_shows_no_traceback(tmp_path):
    path = write(tmp_path / "pairs.jsonl", BAD + GOOD)
    command = [sys.executable, "-c", "import sys; from uft.cli import main; sys.exit(main())", "data", "check"]
    done = subprocess.run([*command, path, "gone.csv"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert f"{path}, row 0 (line 1), column 'rejected': equal responses: found 'a' twice" in done.stdout
    assert "gone.csv: found no such file" in done.stdout


# ---- real files ----


@pytest.fixture
def folder():
    if not os.environ.get("UFT_DATA"):
        pytest.skip("UFT_DATA names no folder of real data")
    return Path(os.environ["UFT_DATA"])


@pytest.mark.parametrize(
    "name, kind, rows, dropped",
    [
        ("pairs", "pair", 5613, {"equal responses": 6, "empty response": 5}),
        ("pairs_eval", "pair", 1132, {"empty response": 1}),
        ("labels", "label", 12495, {}),
        ("scores", "score", 8750, {}),
        ("demonstrations", "demonstration", 36355, {}),
        ("pretrain_heldout", "document", 614, {}),
    ],
)
def test_real_files(folder, name, kind, rows, dropped):
    (source,) = check(folder / f"{name}.parquet").sources
    assert (source.kind, source.rows, source.dropped) == (kind, rows, dropped)


def test_real_pairs_in_tokens(folder):
    (source,) = check({"pairs": {"path": folder / "pairs.parquet", "limit": 500}}, make(), max_length=256).sources
    assert source.rows == 500 == source.kept + source.dropped.total()
    assert source.cut > 0 and source.dropped["too long"] > 0
