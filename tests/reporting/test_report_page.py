"""`uft report` from end to end: the page holds the numbers of the records, opens offline and reads as text."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image, rc_context
from matplotlib.figure import Figure
from reported_runs import evaluation, journal, record

from uft.cli import main
from uft.reporting.figures import WIDTH, curves
from uft.reporting.finding import find_runs
from uft.reporting.groups import grouped
from uft.reporting.page import html_page
from uft.reporting.runs import read_run
from uft.reporting.text import lines, plain
from uft.reporting.values import flops, memory, number, seconds

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    """The pages of the unified run alone, and of both."""
    outputs = [tmp_path_factory.mktemp("drawn") for _ in range(2)]
    runs = [str(trained / name) for name in ("unified", "sequential")]
    assert main(["report", runs[0], "--output", str(outputs[0])]) == 0
    assert main(["report", *runs, "--output", str(outputs[1]), "--title", "Now <this> & *that*"]) == 0
    return [output / "report.html" for output in outputs]


@pytest.fixture(autouse=True)
def not_drawn_again(monkeypatch):
    """Most of the time of a report goes into its figures."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).write_bytes(b""))


class Page(HTMLParser):
    """Text, what would be loaded, and the tags of a page, which must nest."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.text, self.loaded, self.links, self.open, self.tags = "", [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.loaded += [attributes[name] for name in ("src", "srcset", "poster", "data") if name in attributes]
        self.loaded += [attributes["href"]] if tag == "link" else []
        self.links += [attributes["href"]] if tag == "a" else []

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


def report(tmp_path, *runs, words=()):
    output = tmp_path / "page"
    assert main(["report", *map(str, runs), "--output", str(output), *words]) == 0
    return output / "report.html"


def read(path):
    page = Page(path.read_text())
    assert page.open == [] and "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\(|@import", path.read_text())
    return page


# ---- real runs ----


def test_the_page_of_one_run_holds_its_numbers(trained, drawn):
    page = read(drawn[0])
    run = json.loads((trained / "unified/run.json").read_text())
    last = [entry for entry in run["metrics"] if "eval_loss/sft" in entry][-1]
    for value in (last["eval_loss/sft"], last["eval_loss/preference"], last["eval_rewards/margins"]):
        assert number(value) in page.text
    compute = run["compute"]
    for said in (f"{compute['tokens']:,}", flops(compute["flops"]), seconds(compute["seconds"]),
                 memory(compute["peak_memory_bytes"]), f"{run['model']['parameters']:,} weights",
                 run["data"]["train"]["fingerprint"][:12], run["versions"]["torch"]):  # fmt: skip
        assert said in page.text
    assert {"Losses", "Rewards", "Optimisation", "By data source", "The plane of losses", "Compute", "Answers"} <= set(
        re.findall(r"^## (.*)", drawn[0].with_name("report.md").read_text(), re.MULTILINE)
    )
    assert "Before you compare" not in page.text and "What differs" not in page.text
    assert "upward) in evaluation" in page.text
    for source in page.loaded:
        picture = image.imread(BytesIO(base64.b64decode(source.split(",", 1)[1])))
        assert np.ptp(picture[..., :3]) > 0.5  # drawn, not blank


def test_sequential_and_unified_side_by_side(drawn):
    page = read(drawn[1])
    assert page.text.count("Now <this> & *that*") == 2  # in the tab and on the page
    for said in ("sft → dpo", "Same data by name and size only", "A single seed each", "after sft", "What differs",
                 "config.learning_rate", "sft: 0.001; dpo: 0.003"):  # fmt: skip
        assert said in page.text
    assert "upward) in training" in page.text  # the first stage's evaluations know no preference loss
    for file in ("losses.png", "plane.png", "compute.png"):
        assert drawn[1].with_name(file).is_file()


def test_a_folder_of_seeds_is_one_column(trained, tmp_path):
    page = read(report(tmp_path, trained / "seeds"))
    ends = [json.loads((trained / f"seeds/seed{s}/run.json").read_text())["compute"]["tokens"] for s in (0, 1)]
    assert "Run seeds" in page.text and "with 2 seeds" in page.text and "0, 1" in page.text
    assert f"{sum(ends) / 2:,.0f}" in page.text and "±" in page.text


def test_a_report_among_the_runs_is_no_run(trained):
    output = trained / "report"
    found = find_runs([trained], output)
    assert len(found.runs) == 4 and found.skipped == []
    output.mkdir()
    (output / "odd.json").write_text("{}")
    assert find_runs([trained], output).skipped == [] and len(find_runs([trained]).skipped) == 1
    shutil.rmtree(output)


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page with")
def test_a_browser_shows_it_and_asks_nobody_for_anything(trained, drawn, tmp_path):
    """The page as the browser has laid it out, with a log of every request that left it."""
    path, log = drawn[1], tmp_path / "net.json"
    shown = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
         "--disable-background-networking", "--disable-component-update", "--no-first-run", "--dump-dom",
         f"--log-net-log={log}", path.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    page = Page(shown)
    run = json.loads((trained / "unified/run.json").read_text())
    assert number([e for e in run["metrics"] if "eval_loss" in e][-1]["eval_loss"]) in page.text
    assert not re.search(r"""(?:src|href|srcset)=["']?(?:https?:)?//""", shown)
    # what this page started is told from what the browser does for itself by the initiator, the page's own address
    asked = [e["params"] for e in json.loads(log.read_text())["events"] if "url" in e.get("params", {})]
    mine = [each["url"] for each in asked if str(each.get("initiator", "")).startswith("file:")]
    assert not [url for url in mine if url.startswith("http")]


# ---- planted runs ----


def test_evaluations_guards_and_rewards_are_shown(plant, tmp_path):
    before = {"demonstrations/nll": 1.25, "pairs/F_true": 0.0}
    now = {"demonstrations/nll": 1.5, "pairs/F_true": 0.125, "demonstrations/nll_change": 0.25}
    a = plant("a", "run.json", record())
    plant("a", "evaluation.json", evaluation("a", now, before=before))
    b = plant("b", "run.json", record(learning_rate=1e-4))
    plant("b", "evaluation.json", evaluation("b", {"demonstrations/nll": 1.75}))
    guard = {
        "limits": {"kl": 10.0, "ended": None},
        "alarms": [{"step": 7, "name": "kl"}],
        "stopped": "step 8: kl is 12",
    }
    plant("b", "guard.json", guard)
    c = plant("c", "rewards.json", {"metrics": {"pairs/accuracy": 0.875, "pairs/ece": None}, "samples": {}})
    page = read(report(tmp_path, a, b, c))
    for said in ("of pairs 12.5 % was forgotten beyond chance", "demonstrations changed by +0.2500 nats per token",
                 "Stopped by its guard", "1, first at step 7: kl", "0.8750", "+0.2500", "Reward models"):  # fmt: skip
        assert said in page.text, said
    assert "**1.5000**" in (tmp_path / "page/report.md").read_text()  # less than 1.75, of the same samples


def test_runs_by_reinforcement_and_runs_still_going(plant, tmp_path):
    logs = [{"reward": 0.5 * i, "kl_sequence": 0.25 * i, "loss": 1.0, "step": i} for i in (1, 2)]
    rl = plant("rl", "run.json", {"config": {"advantage": "rloo"}, "prompts": 8, "steps": 2, "planned_steps": 2,
                                  "compute": {"tokens": 5}, "metrics": logs})  # fmt: skip
    going = plant("going", "progress.jsonl", journal(3.0, 2.0, of=50))
    page = read(report(tmp_path, rl, going))
    for said in ("reinforcement", "rloo", "prompts (8)", "step 2 of 50", "Not finished", "Reinforcement", "dpo_nll"):
        assert said in page.text, said


def test_a_run_that_has_diverged_is_drawn_as_far_as_it_was_finite(plant, tmp_path):
    folder = plant("diverged", "progress.jsonl", journal(3.0, 2.0, float("inf"), float("nan")))
    page = read(report(tmp_path, folder))
    assert "loss from 3.0000 at step 1 to 2.0000 at step 2" in page.text


def test_what_lora_trains_is_said_once(plant, tmp_path):
    lora = record()
    lora["model"] |= {"parameters": 54048, "trained_parameters": 16384}
    page = read(report(tmp_path, plant("lora", "run.json", lora)))
    assert "LlamaForCausalLM (54,048 weights, 16,384 of them trained) trained by dpo_nll" in page.text


def test_figures_are_as_large_whatever_matplotlib_was_told(plant, tmp_path, monkeypatch):
    monkeypatch.undo()  # for once it is drawn
    run = read_run(plant("r", "run.json", record()))
    with rc_context({"savefig.dpi": 300, "figure.dpi": 300}):
        assert curves(tmp_path / "losses.png", grouped([run]), ["loss"])
    assert image.imread(tmp_path / "losses.png").shape[1] == pytest.approx(130 * WIDTH / 2, abs=1)


def test_many_runs_are_rows(plant, tmp_path):
    folders = [plant(f"all/r{i}", "run.json", record(learning_rate=1e-3 * (i + 1))) for i in range(9)]
    page = read(report(tmp_path, *folders))
    assert "9 runs side by side" in page.text
    text = (tmp_path / "page/report.md").read_text()
    assert re.search(r"^\| run \| objective \|", text, re.MULTILINE) and re.search(r"^\| r8 \| dpo", text, re.MULTILINE)


def test_answers_of_models_cannot_break_the_page(plant, tmp_path):
    nasty = "# a | b\n\n<script>alert(1)</script> ![x](http://a.b/c.png) `c` *d* </td> & https://e.f\u2028g <br>"
    sample = {"step": 3, "source": "s", "prompt": "p | q\nr", "answer": nasty, "reference": None}
    folders = []
    for name in ("a", "b"):
        folders.append(plant(name, "run.json", record(learning_rate=1e-3 if name == "a" else 2e-3)))
        plant(name, "samples.jsonl", json.dumps({**sample, "step": 1, "answer": "early"}) + "\n" + json.dumps(sample))
    page = read(report(tmp_path, *folders))
    assert "<script>alert(1)</script> ![x](http://a.b/c.png) `c` *d* </td> & https://e.f g <br>" in page.text
    assert "# a | b" in page.text and "p | q" in page.text and "a, step 3" in page.text
    assert "early" not in page.text  # of several runs, what was written last


def test_a_run_alone_shows_how_its_answers_changed(plant, tmp_path):
    folder = plant("a", "run.json", record())
    said = [{"step": i, "source": "s", "prompt": "p", "answer": f"answer {i}!", "reference": "good"} for i in range(9)]
    plant("a", "samples.jsonl", "".join(json.dumps(each) + "\n" for each in said))
    page = read(report(tmp_path, folder))
    assert re.findall(r"answer (\d)!", page.text) == ["0", "3", "5", "8"] and "good" in page.text


def test_the_command_says_what_is_wrong(plant, tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"uft: {tmp_path}/none: no such folder; want what a run has written\n"
    good = plant("good", "run.json", record())
    plant("good", "notes.json", {})
    plant("bad", "run.json", "{")
    path = report(tmp_path, good, tmp_path / "bad")
    error = capsys.readouterr().err
    assert "skipped" in error and f"{tmp_path}/bad/run.json: not JSON" in error
    assert f"{good}/notes.json: no file that this report knows" in read(path).text


def test_open_shows_the_page_in_a_browser(plant, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    path = report(tmp_path, plant("good", "run.json", record()), words=["--open"])
    assert opened == [path.resolve().as_uri()]


def test_torch_is_not_loaded():
    """A page is there in a second or two."""
    code = "import sys, uft.reporting.sections; assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={"PYTHONPATH": f"{root}:{root}/kernels"})


# ---- text ----


@pytest.mark.parametrize("text", ["a_b __c__ *d*", "1 < 2 & 3 > 2", "[x](y) ![z](w)", "`q` | $m$ ~~s~~", r"\n \* \_"])
def test_plain_text_reads_as_it_is(text, tmp_path):
    assert f"before {text} behind" in Page(html_page(f"before {plain(text)} behind", tmp_path)).text


def test_long_answers_are_cut_and_said_to_be():
    assert lines("x" * 705) == f"{'x' * 700} … *(5 more characters)*"
    assert lines("a\nb") == "a<br>b" and lines("") == "*nothing*"


def test_sections_fold(tmp_path):
    text = "# T\n\n## One\n\ntext\n\n## Two\n\nhidden\n\n### Deeper\n\nhidden too\n\n## Three\n\nseen"
    page = html_page(text, tmp_path, folded=("Two",))
    inside = re.search(r"<details class=\"part\">(.*?)</details>", page, re.DOTALL)[1]
    assert "hidden too" in inside and "Deeper" in inside and "seen" not in inside and "text" not in inside
    assert html_page(text, tmp_path).count("<details") == 1  # the contents


def test_numbers():
    assert [number(v) for v in (0.12345, 12.3456, 1234.5, 12345.6, 1e-5, 2e9, 12345, None, float("nan"))] == [
        "0.1235", "12.35", "1,234.50", "12,346", "1.00e-05", "2,000,000,000", "12,345", "–", "–"]  # fmt: skip
    assert [seconds(v) for v in (0.5, 12.34, 75, 3700)] == ["0.5 s", "12.3 s", "1 min 15 s", "1 h 01 min"]
    assert [flops(v) for v in (0, 5e6, 1.234e15)] == ["–", "5 MFLOPs", "1.23 PFLOPs"]
    assert memory(2**29) == "512 MiB" and memory(3 * 2**29) == "1.50 GiB"
