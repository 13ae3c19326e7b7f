"""Findings as Markdown, which is also what the terminal shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uft.data.quality.endings import SIGNS

ENDS = 3  # smallest, and largest, of many values
FEW = 12  # groups up to which a matrix is shown in full


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Padded, so that it can be read as it is; columns of texts to the left, those that begin with digits to the "
    "right."""
    lines = [list(map(cell, header)), *(list(map(cell, row)) for row in rows)]
    width = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    left = [i == 0 or any(line[i][:1].isalpha() for line in lines[1:]) for i in range(len(header))]
    pad = [str.ljust if each else str.rjust for each in left]
    rule = ["-" * w if each else "-" * (w - 1) + ":" for each, w in zip(left, width)]
    padded = [[p(c, w) for p, c, w in zip(pad, line, width)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def cell(value: Any) -> str:
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return " ".join(str(value).split()).replace("|", "\\|")
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(found: Mapping[str, Any], key: str = "share") -> str:
    if found[key] is None:
        return "–"
    if found["low"] is None:
        return cell(found[key])
    return f"{cell(found[key])} [{cell(found['low'])}, {cell(found['high'])}]"


def markdown(findings: Mapping[str, Any], figures: Mapping[str, str] | None = None) -> str:
    """The report; `figures` says which figure (a file's name) stands in which section."""
    figures = figures or {}
    parts = ["# Data report"]
    for title, name, section in SECTIONS:
        text = section(findings)
        if text:
            shown = [f"![{title}]({figures[name]})"] if name in figures else []
            parts += [f"## {title}", text, *shown]
    return "\n\n".join(parts) + "\n"


# ---- sections ----


def _rows(findings: Mapping[str, Any]) -> str:
    found = findings["rows"]
    lines = [(g, f["kind"], f["rows"], f["prompts"], f["responses"]) for g, f in found["groups"].items()]
    bad = [
        f"- {g}: {n:,} rows left out: {reason}" for g, reasons in found["bad"].items() for reason, n in reasons.items()
    ]
    return "\n\n".join(
        [table(("source", "kind", "rows", "different prompts", "responses"), lines), *["\n".join(bad)] * bool(bad)]
    )


def _lengths(findings: Mapping[str, Any]) -> str:
    lines = []
    for group, found in findings["lengths"].items():
        for what, q in found.items():
            lines.append(
                (group, what.replace("_", ", "), *(q[k] for k in ("mean", "0.05", "0.25", "0.5", "0.75", "0.95", "1")))
            )
    return table(("source", "of", "mean", "5 %", "25 %", "median", "75 %", "95 %", "longest"), lines)


def _scripts(findings: Mapping[str, Any]) -> str:
    found = findings["scripts"]
    total: dict[str, int] = {}
    for counts in found.values():
        for name, n in counts.items():
            total[name] = total.get(name, 0) + n
    names = sorted(total, key=total.get, reverse=True)[:8]
    lines = []
    for group, counts in found.items():
        rest = sum(n for name, n in counts.items() if name not in names)
        lines.append((group, *(counts.get(name, 0) for name in names), rest))
    note = "Responses by the script of most of their letters; none: without a letter. A script is not a language."
    return f"{table(('source', *(n.lower() for n in names), 'others'), lines)}\n\n{note}"


def _endings(findings: Mapping[str, Any]) -> str:
    lines = []
    for group, found in findings["endings"].items():
        n = found["responses"]
        lines.append((group, n, *(f"{found[sign]:,} ({found[sign] / n:.1%})" for sign in SIGNS)))
    note = (
        "Signs, each a heuristic (a response may show several). No text: punctuation at most. Mid word: the last word "
        "stands nowhere else and begins a longer one that does. Open fence: an odd number of \\`\\`\\`. Longest: as "
        "long as the longest of its source, shared by three or more. Max length: prompt and response reach max_length "
        "tokens. No final mark: eight words or more without punctuation at the end; titles, lists and code end so "
        "too. Blank responses are rows left out above."
    )
    return f"{table(('source', 'responses', *SIGNS), lines)}\n\n{note}"


WAYS = {
    "exact_prompt": "prompt, exact", "near_prompt": "prompt, near", "exact_response": "prompt + response, exact",
    "exact_row": "row, exact", "near_row": "row, near",
}  # fmt: skip


def _duplicates(findings: Mapping[str, Any]) -> str:
    found, near = findings["duplicates"], findings["settings"]["near"]
    groups, rows = found["groups"], findings["rows"]["groups"]
    lines = [
        (
            g,
            rows[g]["rows"],
            *(f"{n:,} ({n / rows[g]['rows']:.1%})" for way in WAYS for n in [found[way]["repeats"][g]]),
        )
        for g in groups
    ]
    text = [table(("source", "rows", *WAYS.values()), lines)]
    recall = "; ".join(f"{r:.3f} at similarity {s}" for s, r in near["recall_at_similarity"].items())
    text.append(
        "Rows that repeat an earlier row of any source; a prompt with several responses repeats by nature. A row is "
        "its prompt with all its responses. Exact: after Unicode NFKC, case folding and joining of white space. Near: "
        f"of the prompt and of every response, sets of {near['ngram']}-grams of words and marks with a Jaccard "
        f"similarity of at least {near['threshold']:g}, exact duplicates included. MinHash LSH with "
        f"{near['permutations']} permutations finds candidates with probability {recall}; each was then compared "
        "exactly."
    )
    for way in ("near_prompt", "exact_response", "near_row"):
        shared = found[way]["shared"]
        across = [
            (a, b, shared[i][j]) for i, a in enumerate(groups) for j, b in enumerate(groups) if i != j and shared[i][j]
        ]
        across.sort(key=lambda each: -each[2])
        if across:
            more = f"\n\nand {len(across) - FEW} more in the JSON" if len(across) > FEW else ""
            text.append(f"Across sources, {WAYS[way]}:")
            text.append(table(("rows of", "shared with", "rows"), across[:FEW]) + more)
    return "\n\n".join(text)


def _contamination(findings: Mapping[str, Any]) -> str:
    found, n = findings["contamination"], findings["settings"]["overlap"]["ngram"]
    if not found:
        return ""
    ways = {
        "exact": "exact",
        "near": "near",
        "ngram": f"{n}-gram",
        "whole": "whole, taken for a template",
        "any": "any",
    }
    lines = [
        (name, f["prompts"], *(f"{k:,} ({k / f['prompts']:.1%})" for way in ways for k in [f["prompts_found"][way]]))
        for name, f in found["files"].items()
    ]
    text = [table(("evaluation file", "prompts", *ways.values()), lines)]
    text.append(
        "Evaluation prompts that are in the training data. Exact and near: a training prompt, or a user's turn in one, "
        f"is the same or near (as above). {n}-gram: a text of the row shares {n} words in a row with it, as in GPT-3 "
        f"(arXiv:2005.14165, App. C); prompts of 8 to {n - 1} words as a whole. {found['templates_ignored']:,} n-grams "
        f"that stand in more than {findings['settings']['overlap']['max_documents']} different prompts on either side "
        "are taken for templates and ignored. Whole, taken for a template: all n-grams of the evaluation prompt were "
        "ignored so, and are in one row together: a template that is an evaluation prompt itself, or a copy that many "
        "rows hold."
    )
    text += [
        f"{name}: {f['rows_without_prompt']:,} rows without a prompt"
        for name, f in found["files"].items()
        if f["rows_without_prompt"]
    ]
    rows = [
        (group, name, *(f["rows"][way][group] for way in ways))
        for name, f in found["files"].items()
        for group in f["rows"]["any"]
        if f["rows"]["any"][group]
    ]
    if rows:
        text += ["Training rows that hold one:", table(("source", "evaluation file", *ways.values()), rows)]
    return "\n\n".join(text)


def _judgements(findings: Mapping[str, Any]) -> str:
    text = []
    if findings["labels"]:
        lines = [(g, f["of"], interval(f)) for g, f in findings["labels"].items()]
        text.append(table(("labels", "rows", "share of label 1"), lines))
    if findings["length_bias"]:
        lines = [
            (
                g,
                f["pairs"],
                f["ties"],
                interval(f["chosen_longer"]),
                f["p"],
                interval(f["difference"], "mean"),
                f["rule_accuracy"],
            )
            for g, f in findings["length_bias"].items()
        ]
        header = (
            "pairs",
            "number",
            "ties",
            "chosen is longer",
            "p",
            "characters more",
            "accuracy of “longer is better”",
        )
        text += [table(header, lines), "Intervals: 95 %, Wilson for shares, Student's t for means; p: sign test."]
    if findings["length_and_target"]:
        lines = [(g, f["responses"], f["rho"], f["p"]) for g, f in findings["length_and_target"].items()]
        text.append(table(("labels and scores", "responses", "Spearman's ρ with length", "p"), lines))
    return "\n\n".join(text)


def _conflicts(findings: Mapping[str, Any]) -> str:
    found = findings["conflicts"]
    kinds = {f["kind"] for f in findings["rows"]["groups"].values()}
    if not kinds & {"pair", "label"}:
        return ""
    lines = [
        (g, *(found[what][g] for what in ("contradicting_rows", "rows_on_cycles", "label_contradicting_rows")))
        for g in findings["rows"]["groups"]
        if any(found[what][g] for what in ("contradicting_rows", "rows_on_cycles", "label_contradicting_rows"))
    ]
    lengths = found["shortest_cycles"]
    cycles = f", shortest of {min(lengths)} to {max(lengths)} responses" if lengths else ""
    text = [
        f"{found['contradictions']:,} pairs of responses are preferred both ways (a > b and b > a); "
        f"{found['cycles']:,} groups of responses hold cycles (a > b > c > a{cycles}); "
        f"{found['label_contradictions']:,} responses are labelled both ways."
    ]
    if lines:
        text.append(table(("rows of", "contradicting", "on cycles", "labels contradicting"), lines))
    return "\n\n".join(text)


def _agreement(findings: Mapping[str, Any]) -> str:
    lines, kappas = [], []
    for group, kinds in findings["agreement"].items():
        for kind, f in kinds.items():
            counts = ("items", "judged_more_than_once", "judgements", "own_repeats")
            cells = (*(f[count] for count in counts), f["level"], f["alpha"], f["unanimous"])
            lines.append((f"{group}, {kind}", *cells))
            kappas += _kappas(f"{group}, {kind}", f["kappa"])
    if not lines:
        return ""
    header = (
        "judgements", "items", "judged again", "judgements of these", "own repeats", "level", "Krippendorff's α",
        "unanimous",
    )  # fmt: skip
    text = [table(header, lines)]
    text.append(
        "Of one annotator's several judgements of an item the first counts; own repeats are the others, left out. "
        "Without names rows that were merely copied count as judgements that agree: see exact duplicates. α of –: "
        "nothing differs."
    )
    if kappas:
        text.append(table(("annotators", "items both judged", "Cohen's κ"), kappas))
        text.append("κ of few items says little; –: both always gave one and the same answer.")
    return "\n\n".join(text)


def _kappas(name: str, found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int, float]]:
    """All pairs of annotators, or where they are many the smallest and largest κ and the median."""
    ordered = sorted(found.items(), key=lambda each: (math.isnan(each[1]["kappa"]), each[1]["kappa"]))
    if len(ordered) > 2 * ENDS + 1:
        values = [each for each in ordered if not math.isnan(each[1]["kappa"])]
        middle = statistics.median([each["kappa"] for _, each in values]) if values else math.nan
        both = sum(each["items"] for _, each in ordered)
        chosen = values if len(values) <= 2 * ENDS else values[:ENDS] + values[-ENDS:]
        lines = [(f"{name}: {who}", each["items"], each["kappa"]) for who, each in chosen]
        total = (f"{name}: median of {len(values):,} of {len(ordered):,} pairs; all are in the JSON", both, middle)
        return [*lines[:ENDS], total, *lines[ENDS:]]
    return [(f"{name}: {who}", each["items"], each["kappa"]) for who, each in ordered]


def _scores(findings: Mapping[str, Any]) -> str:
    found = findings["scores"]
    if not found:
        return ""
    lines = [
        (
            f"{g}, both sides" if f["kind"] == "pair" else g, f["responses"], f["mean"], f["quantiles"]["0.5"],
            f["skewness"], f["share_above_half"], f["mean_target_log_ratio"], f["median_target_log_ratio"],
        )
        for g, f in found.items()
    ]  # fmt: skip
    beta = findings["settings"]["beta"]
    header = ("scores", "responses", "mean", "median", "skewness", "share above 0.5", "mean target log-ratio", "median")
    note = (
        f"UNA's losses are least at a log-ratio of logit(s) / β nats (β = {beta:g}; scores within 1e-6 of 0 and 1 "
        "clipped): a response with s > 0.5 is made likelier, every other one less likely, whatever scale was meant."
    )
    hints = [f"- {g}: {f['suggestion']}" for g, f in found.items()]
    return "\n\n".join([table(header, lines), note, "\n".join(hints)])


def _terms(name: str):
    def section(findings: Mapping[str, Any]) -> str:
        lines = []
        for group, found in findings[name].items():
            for term, f in found["responses"].items():
                worse = interval(f["worse"]) if f["worse"]["of"] else "–"
                prompts = found["prompts"].get(term)
                p = f["p"] if f["better"]["of"] and f["worse"]["of"] else None
                lines.append((group, term, interval(prompts) if prompts else 0, interval(f["better"]), worse, p))
        if not lines:
            return ""
        lines.sort(key=lambda line: 1 if line[-1] is None else line[-1])
        more = f"\n\n{len(lines) - SHOWN} more in the JSON." if len(lines) > SHOWN else ""
        note = (
            "Share of prompts and responses that hold a term of the list. Better and worse: chosen and rejected, "
            "labels 1 and 0, scores above the median and not; other kinds have one sort of responses. p: McNemar's "
            "exact test for pairs, Fisher's otherwise, not corrected for the number of rows here; smallest first. "
            "Longer responses hold more of any word. A match is a word and no verdict."
        )
        lines = lines[:SHOWN]
        return f"{table(('source', 'terms', 'prompts', 'better', 'worse', 'p'), lines)}{more}\n\n{note}"

    return section


SHOWN = 25
SECTIONS = (
    ("Rows", "rows", _rows),
    ("Lengths", "lengths", _lengths),
    ("Scripts", "scripts", _scripts),
    ("Empty and cut responses", "endings", _endings),
    ("Duplicates", "duplicates", _duplicates),
    ("Evaluation prompts in training data", "contamination", _contamination),
    ("Labels, and length", "length_bias", _judgements),
    ("Contradictions and cycles", "conflicts", _conflicts),
    ("Agreement of annotators", "agreement", _agreement),
    ("Scores", "scores", _scores),
    ("Groups of people", "terms", _terms("terms")),
    ("Unsafe content", "unsafe", _terms("unsafe")),
)
