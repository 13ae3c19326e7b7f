"""Reports: what they say is what was planted, one file holds everything, and figures can be read with 22 arms."""

import base64
import json
import re
from collections import Counter
from html.parser import HTMLParser
from io import BytesIO
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import image

from experiments import figures, study_figures
from experiments.report import add_arms, main, markdown_table, write_report
from experiments.reporting.folders import ResultError, read_result
from experiments.reporting.labels import name_points
from tests.experiments import planted
from tests.experiments.overlaps import caught
from uft.comparison.statistics import holm, paired_difference, sign_flip
from uft.reporting.page import html_page, write_page

MANY = len(planted.NAMED)  # the base and 22 arms


class Page(HTMLParser):
    """Counts tags, checks that they nest, and keeps what the page would load."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.loaded, self.ids, self.targets = Counter(), [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [attributes[name] for name in ("src", "srcset", "poster", "data") if name in attributes]
        self.loaded += [attributes["href"]] if tag == "link" else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "a" and attributes.get("href", "").startswith("#"):
            self.targets.append(attributes["href"][1:])

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.open == [] and page.tags["script"] == 0
    assert all(source.startswith("data:image/") for source in page.loaded)
    assert not re.search(r"url\(|@import", text)  # in the style
    for source in page.loaded:
        picture = image.imread(BytesIO(base64.b64decode(source.split(",", 1)[1])))
        assert np.ptp(picture[..., :3]) > 0.5  # drawn, not blank
    assert set(page.targets) <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    return page


@pytest.fixture(scope="module", autouse=True)
def small_files():
    """Coarse pictures: what is on them is looked at before they are saved."""
    with figures.plt.rc_context({"savefig.dpi": 40}):
        yield


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "sequential_vs_unified"
    planted.write(folder, 9, 3)
    return folder


def study(folder, name="mixing_ratio", figure="mixing_ratio.png"):
    (folder / name).mkdir()
    point = {"line": "SFT → DPO", "x": 1.0, "per_seed": {}, "compute": [{"flops": 2e12, "seconds": 1800.0}] * 2}
    summary = {"study": name, "question": "How many?", "points": [point], "commit": "abc", "date": "2026-11-26T00"}
    (folder / name / "summary.json").write_text(json.dumps(summary))
    text = f"# How many?\n\nEqual: all.\n\n## A part\n\n```\n# no heading\n```\n\n![How many?]({figure})\n"
    (folder / name / "report.md").write_text(text)
    axes = figures.plt.subplots()[1]
    axes.plot([0, 1], [0, 1])
    figures.save(axes.get_figure(), folder / name / "mixing_ratio.png")
    return folder / name


# ---- a comparison ----


def test_the_report_of_a_comparison_says_what_was_planted(comparison):
    text, summary = (comparison / "report.md").read_text(), json.loads((comparison / "summary.json").read_text())
    own = planted.arms(9)
    found = planted.records(own, 3)
    chosen = planted.chosen(found)
    best = {f: max((a for a in chosen if own[a].family == f), key=lambda a: chosen[a]["score"])
            for f in ("unified", "sequential")}  # fmt: skip
    arms = summary["tables"]["Equal FLOPs"]["hedged_pairs"]
    scores = {arm: list(arms[arm]["per_seed"]["score"].values()) for arm in arms}
    differences = np.subtract(scores[best["unified"]], scores[best["sequential"]])
    # two tables hold the same numbers, so there are two rows of each contrast, and Holm counts all of them
    p = sign_flip(differences)
    contrasts = [line for line in text.splitlines() if line.startswith(f"| {own[best['unified']].label} − ")]
    named = [line for line in contrasts if " of 3 |" in line]
    assert len(named) == 2 * (1 + ("sft_chosen" in own)) and f"{differences.mean():+.3f} [" in named[0]
    assert f"| {p:.3f} |" in named[0]
    adjusted = holm({str(k): p for k in range(len(named))})
    assert len(named) > 2 or f"| {adjusted['0']:.3f} |" in named[0]
    for arm, spec in own.items():
        assert arms[arm]["family"] == spec.family and f"| {spec.label} | " in text
        assert list(arms[arm]["per_seed"]["fact_recall"]) == ["0", "1", "2"]
        assert set(planted.KL) <= set(arms[arm]["per_seed"])
    assert "lost" not in arms["base"] and set(arms["sft"]["lost"]["fact_recall"]) == {"0", "1", "2"}
    families = Counter(arms[arm]["family"] for arm in arms if "curve" in arms[arm])
    assert all(count <= 2 for count in families.values())
    page = assert_self_contained((comparison / "report.html").read_text())
    assert page.tags["img"] == page.tags["figure"] == text.count("![") == 2 * 5
    assert {path.name for path in comparison.glob("*.png")} == set(re.findall(r"\]\((.*?\.png)\)", text))


def test_differences_are_paired_by_seeds_that_both_have(tmp_path, monkeypatch):
    """Ten seeds for some arms and three for others: a difference is over what both have."""
    drawn = {}
    draw = figures.differences
    monkeypatch.setattr(
        figures, "differences", lambda path, found, *rest: (drawn.update(found), draw(path, found, *rest))
    )
    own = planted.arms(9)
    records = planted.records(own, 6)
    records["unified_kto_nll"] = records["unified_kto_nll"][:3]
    from experiments.report import write_report

    chosen = {"hedged_pairs": planted.chosen(records)}
    write_report(tmp_path, {"Equal FLOPs": {"hedged_pairs": records}}, own, chosen, {"description": ""})
    assert {arm: found["score"].n for arm, found in drawn.items()} == dict.fromkeys(drawn, 6) | {"unified_kto_nll": 3}
    assert "over 3 or 6 seeds" in (tmp_path / "report.md").read_text()


# ---- figures ----


@pytest.mark.parametrize("count, seeds", [(3, 1), (9, 3), (MANY, 10)])
def test_every_figure_can_be_read(count, seeds, tmp_path, monkeypatch):
    drawn = caught(monkeypatch)
    planted.write(tmp_path, count, seeds, titles=("Equal FLOPs",))
    assert {figure.name.split("-")[0] for figure in drawn} == {
        "tradeoff", "differences", "forgetting", "curves", "cost"
    }  # fmt: skip
    labels = {arm.label for name, arm in planted.arms(count).items() if name != "base"}
    for figure in drawn:
        assert figure.overlapping == [], figure.name
        assert figure.legend_entries <= 7
        texts = Counter(text for text, _ in figure.texts)
        if figure.name.startswith(("tradeoff", "forgetting", "cost")):  # each arm has its name there, once
            assert {name: texts[name] for name in labels} == dict.fromkeys(labels, 1), figure.name
        if figure.name.startswith("tradeoff"):
            assert figure.panels == (2 if count == MANY else figure.panels)


def test_families_nobody_has_named_have_a_mark_of_their_own():
    styles = figures.family_styles({"a": "unified", "b": "merged", "c": "reverse", "d": "control"})
    assert list(styles) == ["control", "unified", "merged", "reverse"]
    assert len({style.colour for style in styles.values()}) == len({s.marker for s in styles.values()}) == 4


def test_names_keep_clear_of_points_and_of_each_other():
    """Thirty points in a small disc, and two on the same spot."""
    random = np.random.default_rng(0)
    points = {str(k): tuple(random.normal(0, 0.06, 2)) for k in range(29)}
    points["same"] = points["0"]
    figure, axes = figures.plt.subplots(figsize=(6, 5))
    axes.set(xlim=(-1, 1), ylim=(-1, 1))
    names = {key: f"a name {key}" for key in points}
    texts = name_points(axes, points, names, dict.fromkeys(points, "black"))
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]
    frame = axes.get_window_extent()
    assert len(boxes) == 30 and not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform(xy)) for box in boxes for xy in points.values())
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    figures.plt.close(figure)


def test_a_crowd_is_a_corner_with_more_arms_than_its_area():
    crowd = np.random.default_rng(0).uniform(0.9, 1.0, (15, 2))
    far = np.array([[0.1, 0.2], [0.3, 0.1], [0.2, 0.5]])
    low, high = figures.crowded_corner(np.concatenate([crowd, far]))
    assert (low >= 0.9).all() and (high == crowd.max(0)).all()
    assert figures.crowded_corner(np.array([[k / 9, 1 - k / 9] for k in range(10)])) is None


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("kind", ["lines", "many lines", "dots", "heat"])
def test_figures_of_studies_can_be_read(kind, seeds, tmp_path, monkeypatch):
    drawn = caught(monkeypatch)
    lines = [f"unified DPO + NLL {k}" for k in range(9 if kind == "many lines" else 3)]
    xs = {"dots": ["before the stage", "moving (TR-DPO)"], "heat": [f"{r}|{b}" for r in (1e-4, 4e-4) for b in (1, 8)]}
    xs = xs.get(kind, [0.8, 1.6, 3.0, 6.5, 13.0])
    points = [SimpleNamespace(line=line, x=x, name=f"{line}, {x}") for line in lines for x in xs]
    random = np.random.default_rng(0)
    records = [
        [{"seed": s, "measures": {n: random.random() for n in ("retention", "alignment")}} for s in range(seeds)]
        for _ in points
    ]
    axis = "learning rate|beta" if kind == "heat" else "demonstrations drawn per preference"
    study = SimpleNamespace(name="study", kind=kind.split()[-1], axis=axis, logarithmic=True)
    assert study_figures.draw(tmp_path, study, points, records) == ["study.png"]
    [figure] = drawn
    assert figure.overlapping == [] and figure.legend_entries <= 7
    shown = " ".join(text for text, _ in figure.texts)
    assert all(line in shown for line in lines)  # none is dropped for want of a colour


# ---- one page of everything ----


def test_all_folders_become_one_page(comparison, tmp_path, capsys):
    own = study(comparison.parent)
    other = comparison.parent / "kl_law"
    other.mkdir()
    (other / "report.md").write_text("# Does KL predict?\n\nIn the lab, <b> it does.\n")
    unknown = comparison.parent / "training_speed"
    unknown.mkdir()
    assert main([str(p) for p in (unknown, other, own, comparison)] + ["--output", str(tmp_path / "out")]) == 0
    assert f"skipped {unknown}" in capsys.readouterr().err
    text = (tmp_path / "out" / "report.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert [h.split(":")[0].removeprefix("## ") for h in headings] == [
        "sequential_vs_unified", "How many?", "Does KL predict?", "Not shown"
    ]  # fmt: skip
    assert "### A part" in text and "\n# no heading" in text  # code is left alone
    assert "| How many? | mixing_ratio | 2 | 4.0 | 1.0 | 2026-11-26 | abc |" in text
    html = (tmp_path / "out" / "report.html").read_text()
    page = assert_self_contained(html)
    assert "&lt;b&gt; it does" in html  # what was written, not what a browser makes of it
    assert page.tags["img"] == text.count("![") == 2 * 5 + 1
    assert len(page.targets) >= 4 and page.tags["h1"] == 1
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert (tmp_path / "out" / name).is_file()


def test_an_old_summary_without_families_curves_and_losses_is_shown(comparison, tmp_path):
    old = json.loads((comparison / "summary.json").read_text())
    for variants in old["tables"].values():
        for arm in variants["hedged_pairs"].values():
            for name in ("family", "lost", "curve", "interquartile_mean"):
                arm.pop(name, None)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text(json.dumps(old))
    assert main([str(tmp_path / "old"), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("![") == 2 * 3 and "control" not in text


def spoilt(comparison, folder, change):
    summary = json.loads((comparison / "summary.json").read_text())
    change(summary)
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_what_is_broken_is_named(comparison, tmp_path, capsys):
    def refused(folder, *words):
        assert main([str(folder), "--output", str(tmp_path / "out")]) == 1
        printed = capsys.readouterr().err
        assert all(str(word) in printed for word in words), printed

    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "summary.json").write_text((comparison / "summary.json").read_text()[:1000])
    refused(torn, torn / "summary.json", "not JSON")
    (torn / "summary.json").write_text("[]")
    refused(torn, torn / "summary.json", "found a list")
    refused(tmp_path / "nowhere", "nowhere: no such folder")

    def without_retention(summary):
        del summary["tables"]["Equal FLOPs"]["hedged_pairs"]["sft"]["per_seed"]["retention"]

    refused(spoilt(comparison, tmp_path / "a", without_retention), "a/summary.json", "sft: per_seed: lacks retention")
    refused(spoilt(comparison, tmp_path / "b", lambda s: s.pop("search")), "b/summary.json", "lacks search")
    refused(study(tmp_path, "c", "gone.png"), "c/gone.png", "no such file")
    own = study(tmp_path, "d")
    (own / "report.md").unlink()
    refused(own, "d/report.md", "no such file")
    with pytest.raises(ResultError, match="two folders of one name"):
        from experiments.reporting.folders import joint_report

        (tmp_path / "e").mkdir()
        joint_report([study(tmp_path / "e", "d")] * 2, tmp_path / "out")


def test_a_folder_of_no_known_kind_is_none(tmp_path):
    assert read_result(tmp_path) is None


# ---- pages and tables ----


def test_a_page_holds_its_figures(tmp_path):
    axes = figures.plt.subplots()[1]
    axes.plot([0, 1], [0, 1])
    figures.save(axes.get_figure(), tmp_path / "a figure.png")
    write_page(
        tmp_path, "# A title & more\n\n| a | b |\n|---|--:|\n| 1 \\| 2 | 3 |\n\n![What](a%20figure.png)\n\n## Part\n"
    )
    text = (tmp_path / "report.html").read_text()
    page = assert_self_contained(text)
    assert page.tags["table"] == page.tags["img"] == 1 and "<figcaption>What</figcaption>" in text
    assert '<div class="table"' in text and "<td>1 | 2</td>" in text and "<title>A title &amp; more</title>" in text
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        html_page("![What](gone.png)", tmp_path)


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown_table(["a|b"], [["1|2"]]).splitlines()[2] == "| 1\\|2 |"


def test_differences_of_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_arms_are_added_to_results_that_are_there(tmp_path):
    """What was there stays as it was; the page shows both; nothing is written twice or to a table that is not there."""
    own = planted.arms(9)
    found = planted.records(own, 3)
    settings = {"description": "Planted numbers.", "seeds": [0, 1, 2], "arms": list(own)}
    added = next(name for name, arm in own.items() if arm.family == "sequential")
    part = {"Equal FLOPs": {"hedged_pairs": {name: runs for name, runs in found.items() if name != added}}}
    fewer = {name: arm for name, arm in own.items() if name != added}
    planted_settings = planted.chosen(found)
    write_report(tmp_path, part, fewer, {"hedged_pairs": planted_settings}, settings | {"arms": list(fewer)})
    before = json.loads((tmp_path / "summary.json").read_text())["tables"]["Equal FLOPs"]["hedged_pairs"]
    new = {"Equal FLOPs": {"hedged_pairs": {added: found[added]}}}
    add_arms(tmp_path, new, own, {"hedged_pairs": planted_settings})
    after = json.loads((tmp_path / "summary.json").read_text())
    table = after["tables"]["Equal FLOPs"]["hedged_pairs"]
    assert set(table) == set(own) and after["settings"]["arms"] == list(own)
    without = lambda arm: {name: value for name, value in arm.items() if name != "curve"}
    assert all(without(table[name]) == without(before[name]) for name in before)
    per_family = Counter(table[name]["family"] for name in table if "curve" in table[name])
    assert max(per_family.values()) <= 2, "curves are still those of the best two of a family"
    text = (tmp_path / "report.md").read_text()
    assert own[added].label in text and f"Added on {after['date'][:10]}" in text
    for tables, message in ((new, f"found results of {added}"), ({"Other": new["Equal FLOPs"]}, "no table 'Other'")):
        with pytest.raises(ResultError, match=message):
            add_arms(tmp_path, tables, own, {"hedged_pairs": planted_settings})
    with pytest.raises(ResultError, match="want the results of a whole comparison"):
        add_arms(tmp_path / "nothing", new, own, {"hedged_pairs": planted_settings})
