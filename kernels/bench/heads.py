"""Operations of a linear head against every peer and against the bare matrix products, side by side in one run.

    make bench-kernels                        everything that this machine can show: a GPU's shapes, or the CPU's
    python kernels/bench/heads.py --help      a part of it

Writes  kernels/bench/results/heads-<machine>.{json,md,png}

Floors are the plain products of the same shapes and dtype: G logits, Gh gradient of hidden states, Gw of the head.
Memory is what a call holds beyond its inputs and the gradients it returns.  Errors are against float64: of a value the
largest in nats on some tokens, of a gradient of hidden states the largest relative one of these tokens' rows, of the
gradient of the head the relative one of some rows together.  KL by ours comes with both log-probabilities, the other KL
and the entropy; by the others alone (TRL: with the entropy).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import rivals  # noqa: E402
from figure import draw  # noqa: E402
from measure import environment, machine_name, median_and_spread, peak_bytes, times, worst_error  # noqa: E402
from rivals import DPO, KL, LOGP, Inputs, Made, Missing  # noqa: E402

RESULTS = Path(__file__).parent / "results"


class Shape(NamedTuple):
    name: str
    N: int
    D: int
    V: int


HEADS = {"Qwen 0.6B": (1024, 151_936), "Llama 1B": (2048, 128_256), "Llama 8B": (4096, 128_256),
         "Gemma 2B": (2304, 256_000)}  # fmt: skip
TOKENS = (8192,)  # and 4096 and 16384 by --tokens; about 10 s a row
ON_CPU = [Shape("small", 512, 256, 8192), Shape("wide", 256, 512, 32_768)]


class Case(NamedTuple):
    """One thing to compute.

    makers   rival -> what makes its call
    floor    the fewest products that any rival needs: G, Gh, Gw
    wants    what wants a gradient: hidden states, head
    ours     the products of our scheme where nothing fits into memory, and the goal as a ratio to them
    """

    makers: dict[str, Callable[[Inputs], Made]]
    floor: tuple[int, int, int]
    wants: tuple[bool, bool]
    ours: tuple[int, int, int]
    goal: float


CASES = {
    "log-probability, no gradient": Case(LOGP, (1, 0, 0), (False, False), (1, 0, 0), 1.08),
    "log-probability, frozen head": Case(LOGP, (1, 1, 0), (True, False), (1, 1, 0), 1.12),
    "log-probability, trained head": Case(LOGP, (1, 1, 1), (True, True), (2, 1, 1), 1.10),
    "DPO, trained head": Case(DPO, (1, 1, 1), (True, True), (1, 1, 1), 1.12),
    "KL, no gradient": Case(KL, (2, 0, 0), (False, False), (2, 0, 0), 1.12),
    "KL, frozen head": Case(KL, (2, 1, 0), (True, False), (2, 1, 0), 1.15),
    "KL, trained head": Case(KL, (2, 1, 1), (True, True), (4, 1, 1), 1.15),
}


# ---- inputs ----


def make_inputs(shape: Shape, wants: tuple[bool, bool], device: torch.device, dtype: torch.dtype, peaked: bool):
    """Random hidden states with logits of standard deviation 3.

    peaked   the target has a probability of about 0.9, and of the other entries about 0.02 % have one above 2^-12, as
             in trained models (arXiv:2411.09009, section 5)
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32)

    _, N, D, V = shape
    weight = normal(V, D)
    target = torch.randint(0, V, (N,), generator=generator, device=device)
    spread = 3.0
    if peaked:
        # logits of standard deviation s sum to V e^(s^2 / 2), the target has nine times that; an entry is above 2^-12
        # where it is log(9 V) + s^2 / 2 - 8.3 above 0, which shall be 3.5 s
        whole = 3.5 - max(0.0, 3.5**2 - 2 * (math.log(9 * V) - 8.3)) ** 0.5
        reach = math.log(9 * V) + whole**2 / 2
        # reaching for the target moves every other logit as well, by reach / sqrt(D)
        spread = max(0.0, whole**2 - reach**2 / D) ** 0.5
    hidden = normal(N, D) * spread / D**0.5
    if peaked:
        hidden = hidden + weight[target] * (reach / weight[target].square().sum(-1, keepdim=True))
    other = hidden + normal(N, D) * 0.5 / D**0.5, weight + normal(V, D) * 0.02
    sequence = torch.arange(N, device=device) // max(1, N // 16)
    return Inputs(
        hidden.to(dtype), weight.to(dtype), target, *(t.to(dtype) for t in other),
        upstream=normal(N) / N, sequence=sequence, sequences=int(sequence[-1]) + 1 + (int(sequence[-1]) + 1) % 2,
        wants=wants,
    )  # fmt: skip


def floor_calls(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """G, Gh and Gw: one product each, of the inputs' dtype, into memory that is there."""
    logits = inputs.hidden.new_empty(len(inputs.hidden), len(inputs.weight)).normal_()
    grad_hidden, grad_weight = torch.empty_like(inputs.hidden), torch.empty_like(inputs.weight)
    return {
        "G": lambda: torch.mm(inputs.hidden, inputs.weight.T, out=logits),
        "Gh": lambda: torch.mm(logits, inputs.weight, out=grad_hidden),
        "Gw": lambda: torch.mm(logits.T, inputs.hidden, out=grad_weight),
    }


# ---- truth ----


def truth(case: str, inputs: Inputs, tokens: Tensor, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: values and gradients of hidden states of some tokens, gradient of some rows of the head."""
    weight = inputs.weight.double()
    wide = None if not case.startswith("KL") else inputs.reference_weight.double()
    values, of_hidden, of_head = [], [], weight.new_zeros(len(entries), weight.shape[1])
    chosen = torch.zeros(len(inputs.hidden), dtype=torch.bool, device=weight.device)
    chosen[tokens] = True
    for part in torch.arange(len(chosen), device=weight.device).split(256):
        hidden, g = inputs.hidden[part].double(), inputs.upstream[part].double()[:, None]
        log_p = (hidden @ weight.T).log_softmax(-1)
        p = log_p.exp()
        if wide is None:
            value = log_p.gather(-1, inputs.target[part][:, None]).squeeze(-1)
            dz = g * -p
            dz.scatter_add_(-1, inputs.target[part][:, None], g)
        else:
            ratio = log_p - (inputs.reference_hidden[part].double() @ wide.T).log_softmax(-1)
            value = (p * ratio).sum(-1)
            dz = g * p * (ratio - value[:, None])
        of_head += dz[:, entries].T @ hidden
        values.append(value[chosen[part]])
        of_hidden.append(dz[chosen[part]] @ weight)
    return torch.cat(values), torch.cat(of_hidden), of_head


def errors(case: str, made: Made, inputs: Inputs) -> dict[str, float]:
    if case.startswith("DPO"):  # a scalar of all tokens; its parts are those of the log-probability
        return {}
    N, V = len(inputs.hidden), len(inputs.weight)
    tokens = torch.arange(0, N, max(1, N // 32), device=inputs.hidden.device)
    # targets, whose rows have gradients that matter, and rows that are nobody's target
    entries = torch.cat([inputs.target[:8], torch.arange(0, V, max(1, V // 8), device=inputs.hidden.device)])
    if "truth" not in inputs.cache:
        inputs.cache["truth"] = truth(case, inputs, tokens, entries)
    value, of_hidden, of_head = inputs.cache["truth"]
    found, gradients = made()
    result = {"value": worst_error(found[tokens], value)}
    if gradients:
        result["hidden"] = worst_error(gradients[0][tokens], of_hidden)
    if len(gradients) > 1:
        result["head"] = float((gradients[1][entries].double() - of_head).norm() / of_head.norm())
    return result


# ---- running ----


def bench(case: str, shape: Shape, device: torch.device, dtype: torch.dtype, peaked: bool, rounds: int) -> dict:
    makers, floor, wants, scheme, goal = CASES[case]
    inputs = make_inputs(shape, wants, device, dtype, peaked)
    made, found = {}, {}
    returned = sum(t.nbytes for t, w in zip((inputs.hidden, inputs.weight), wants) if w)
    for name, maker in makers.items():
        try:
            run = maker(inputs)
            run()  # compiles
            found[name] = {"error": errors(case, run, inputs), "extra_bytes": peak_bytes(run, device) - returned}
            made[name] = run
        except Missing as why:
            found[name] = {"missing": str(why)}
        except Exception as error:  # a peer that fails or runs out of memory is a result too
            found[name] = {"missing": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
        _cleared(device)
    inputs.cache.clear()
    floors = floor_calls(inputs)
    try:
        timed = times({**floors, **made}, device, rounds)
    except torch.OutOfMemoryError:  # beside the floor's logits; apart from them each has run
        timed = times(floors, device, rounds)
        del floors
        _cleared(device)
        timed |= times(made, device, rounds)
    _cleared(device)
    G, Gh, Gw = (median_and_spread(timed[name]) for name in ("G", "Gh", "Gw"))

    def total(products: tuple[int, int, int]) -> float:
        return sum(k * product["median"] for k, product in zip(products, (G, Gh, Gw)))

    for name in made:
        time = median_and_spread(timed[name])
        found[name] |= {"ms": time, "to_floor": time["median"] / total(floor)}
    return {
        "case": case, "shape": shape._asdict(), "peaked": peaked, "dtype": str(dtype).removeprefix("torch."),
        "floor_ms": {"G": G, "Gh": Gh, "Gw": Gw, "sum": total(floor)},
        "goal_to_floor": goal * total(scheme) / total(floor), "rivals": {name: found[name] for name in makers},
    }  # fmt: skip


def _cleared(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(rows: list[dict]) -> str:
    """Markdown: a block per case; time as a ratio to the floor, extra memory, errors."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        names = [n for n in CASES[case].makers if any("ms" in row["rivals"][n] for row in of_case)]
        floor, scheme = (_products(products) for products in (CASES[case].floor, CASES[case].ours))
        lines += [f"\n### {case}\n", f"Floor {floor}; goal for ours on a GPU {CASES[case].goal:.2f} ({scheme}).\n"]
        lines += ["| N x D x V | floor ms | goal | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
        for row in of_case:
            shape = " x ".join(str(row["shape"][k]) for k in "NDV") + (" peaked" if row["peaked"] else "")
            cells = [f"{row['floor_ms']['sum']:.2f}", f"{row['goal_to_floor']:.2f}"]
            lines.append(f"| {shape} | " + " | ".join(cells + [_cell(row["rivals"][name]) for name in names]) + " |")
        everything = [(name, row["rivals"][name]) for row in of_case for name in CASES[case].makers]
        absent = {name: found["missing"] for name, found in everything if "missing" in found}
        lines += ["", *(f"- {name}: {why}." for name, why in absent.items())]
    return "\n".join(lines).strip() + "\n"


def _products(products: tuple[int, int, int]) -> str:
    named = zip(products, ("G", "Gh", "Gw"))
    return " + ".join(name if k == 1 else f"{k}{name}" for k, name in named if k)


def _cell(found: dict[str, Any]) -> str:
    if "ms" not in found:
        return "-"
    low, high = (found["ms"][k] / found["ms"]["median"] * found["to_floor"] for k in ("low", "high"))
    told = "".join(f" · {name} {error:.0e}" for name, error in found["error"].items())
    return f"**{found['to_floor']:.2f}** [{low:.2f}, {high:.2f}] · {found['extra_bytes'] / 2**20:.0f} MiB{told}"


def _key(row: dict) -> tuple:
    return row["case"], *row["shape"].values(), row["peaked"], row["dtype"]


def _earlier(path: Path, about: dict[str, Any]) -> list[dict]:
    """Rows of the same machine and versions, which a run in parts goes on with."""
    found = json.loads(path.read_text()) if path.exists() else {}
    same = all(found.get(name) == value for name, value in about.items())
    return found["rows"] if same else []


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--heads", nargs="+", choices=tuple(HEADS), default=list(HEADS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), help="this shape alone")
    parser.add_argument("--rounds", type=int, help="default: 12 on a GPU, else 5")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--only", nargs="+", help="these rivals alone (ours is always there)")
    parser.add_argument("--peers", type=Path, help="folder that holds trl/kernels, where TRL is not installed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rivals.PEERS[0] = arguments.peers
    rounds = arguments.rounds or (12 if device.type == "cuda" else 5)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if arguments.shape:
        shapes = [Shape("given", *arguments.shape)]
    elif device.type == "cpu":
        shapes = ON_CPU
    else:
        shapes = [Shape(name, N, *HEADS[name]) for name in arguments.heads for N in arguments.tokens]
    for case in CASES.values() if arguments.only else ():
        for name in [n for n in case.makers if not n.startswith("ours") and n not in arguments.only]:
            del case.makers[name]

    about = environment(device)
    planned = [(case, shape, peaked) for case in arguments.cases for shape in shapes for peaked in (False, True)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"heads-{machine_name(about, device)}.json"
    machine_told = f"{about['hardware']}; torch {about['torch']}, triton {about['triton']}; {about['date']}."
    title = "# Heads: time as a ratio to the floor with quartiles, memory beyond inputs and gradients, errors"
    rows = _earlier(path, about)
    for number, (case, shape, peaked) in enumerate(planned, 1):
        row = bench(case, shape, device, dtype, peaked, rounds)
        rows = [other for other in rows if _key(other) != _key(row)] + [row]
        rows.sort(key=lambda row: list(CASES).index(row["case"]))
        told = ", ".join(f"{n} {r['to_floor']:.2f}" for n, r in row["rivals"].items() if "ms" in r)
        print(
            f"{number}/{len(planned)} {case}, {shape.N} x {shape.D} x {shape.V}{' peaked' * peaked}: {told}", flush=True
        )
        # after each row: a run that is cut off keeps what it has
        path.write_text(json.dumps({**about, "rounds": rounds, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(f"{title}\n\n{machine_told}\n\n{table(rows)}")
        draw(rows, machine_told, path.with_suffix(".png"))
    print(table(rows))
    print(f"{path}, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
