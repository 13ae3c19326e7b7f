"""Whether two rivals compute the same, step by step."""

from __future__ import annotations

import math

from .rivals import Run

# relative, of each logged step; logps are sums over a response, margins are differences of nearly equal sums
COMPARED = {"loss": 1.0, "grad_norm": 10.0, "logps/chosen": 1.0, "logps/rejected": 1.0}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def disagreement(ours: Run, theirs: Run) -> dict[str, float]:
    """The largest relative difference of any step, per logged quantity.

    Raises ValueError if a number of steps, or a quantity, is not there in both.
    """
    if len(ours.log) != len(theirs.log) or not ours.log:
        raise ValueError(f"found {len(ours.log)} and {len(theirs.log)} logged steps; want as many of each")
    found = {}
    for name in COMPARED:
        pairs = [(float(a[name]), float(b[name])) for a, b in zip(ours.log, theirs.log)]
        found[name] = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
    return found


def check(ours: Run, theirs: Run, dtype: str) -> dict[str, float]:
    """`disagreement`; raises ValueError where it is larger than rounding."""
    found, allowed = disagreement(ours, theirs), TOLERANCE[dtype]
    for name, factor in COMPARED.items():
        if not (math.isfinite(found[name]) and found[name] <= factor * allowed):
            steps = ", ".join(f"{a[name]:.6g} / {b[name]:.6g}" for a, b in zip(ours.log, theirs.log))
            raise ValueError(
                f"{ours.rival} and {theirs.rival} do not compute the same: {name} differs by {found[name]:.1e}, "
                f"allowed {factor * allowed:.0e}; step by step {steps}"
            )
    return found


def check_mean(first: Run, later: Run, dtype: str) -> None:
    """Raises ValueError where a later run of the same rival has not trained on the same losses."""
    if not abs(later.mean_loss / first.mean_loss - 1) <= 10 * TOLERANCE[dtype]:
        raise ValueError(
            f"{first.rival}: the mean loss is {later.mean_loss:.6g}, in the first run {first.mean_loss:.6g}"
        )
