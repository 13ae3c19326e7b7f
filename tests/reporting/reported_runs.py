"""Records of runs as `uft train` writes them, with numbers that a test chooses."""

TERMS = [
    {"name": "sft", "type": "Likelihood", "on": "demonstrations", "weight": 1.0, "loss": "token_nll"},
    {"name": "preference", "type": "Pairwise", "on": "pairs", "weight": 0.5, "loss": "dpo", "beta": 0.1},
]


def record(
    loss=(3.0, 2.0, 1.0), *, seed=0, flops=4e12, commit="abc123", held_out=None, data="f" * 64, planned=None, **config
):
    """`loss` at steps 1, 2, ...; `held_out` is the last evaluation's loss/sft."""
    logs = [{"loss": x, "loss/sft": x / 2, "loss/preference": x, "num_tokens": 100 * i, "step": i}
            for i, x in enumerate(loss, 1)]  # fmt: skip
    logs += [] if held_out is None else [{"eval_loss/sft": held_out, "step": len(loss)}]
    part = {"fingerprint": data, "sizes": {"instructions": 12, "pairs": 34}}
    return {
        "objective": {"name": "dpo_nll", "terms": TERMS, "balance": None},
        "data": {"train": part, "eval": part},
        "config": {"learning_rate": 1e-3, "seed": seed, "output_dir": f"runs/{seed}", **config},
        "model": {"architecture": "LlamaForCausalLM", "parameters": 1000, "trained_parameters": 1000},
        "seed": seed, "steps": len(loss), "planned_steps": planned or len(loss),
        "compute": {"tokens": 100 * len(loss), "flops": flops, "seconds": 75.0, "peak_memory_bytes": 3 * 2**30},
        "metrics": logs, "commit": commit, "hardware": {"cpu": "a", "threads": 1}, "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip


def evaluation(model, metrics, *, before=None, ids=("a", "b"), date="2026-01-02"):
    info = {"model": model, "date": date, "compared_with": "base"}
    return {"metrics": metrics, "before": before, "info": info, "samples": {"demonstrations": {"id": list(ids)}}}


def journal(*losses, of=10, **begun):
    """progress.jsonl of a run that is still going."""
    import json

    lines = [{"event": "begin", "time": 0, "step": 0, "max_steps": of, "objective": "dpo_nll", **begun}]
    lines += [{"event": "log", "time": i, "step": i, "loss": x, "num_tokens": 10 * i} for i, x in enumerate(losses, 1)]
    return "".join(json.dumps(line) + "\n" for line in lines)
