"""How long it takes."""

from __future__ import annotations

from collections.abc import Sequence


def time_left(
    seconds: float, steps: int, to_go: int, total: int, costs: Sequence[float] | None = None, position: int = 0
) -> tuple[float | None, float | None]:
    """Seconds until the end of a stage, and of the whole run; None where that cannot be said.

    seconds   that `steps` steps have taken, evaluations and checkpoints among them
    to_go     steps of this stage that are left, of `total`
    costs     of all stages, in any unit; a later stage takes as long as its cost says beside this one's
    """
    if steps < 1 or total < 1:
        return None, None
    each = seconds / steps
    left = each * max(to_go, 0)
    if costs is None:
        return left, None
    here, later = costs[position], sum(costs[position + 1 :])
    return left, (left + each * total * later / here if here > 0 else None)
