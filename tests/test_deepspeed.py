"""DeepSpeed's ZeRO on CPUs takes the step that one process takes, with every kind of feedback and with token budgets.

`make test-deepspeed` installs DeepSpeed and runs this.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from mixed import dataset, model, parameters, trainer
from ranks import run
from test_trainer import EVERYTHING

from uft.head import has_fused_head

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed, the extra `deepspeed`: make test-deepspeed")

STEPS = 4


def zero(stage: int) -> dict:
    return {
        # small weights would stay whole
        "zero_optimization": {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "communication_data_type": "fp32",
    }


def train(folder: Path, name: str, world: int, stage: int = 0, resume: str | None = None, **options) -> None:
    """Some steps of 8 rows."""
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with which accelerate would look no further
    start = parameters(model())
    defaults = dict(max_steps=STEPS, token_budget=64, max_length=64, output_dir=folder / f"run-{name}")
    if stage:
        defaults["deepspeed"] = zero(stage)
    if world > 1:
        defaults["ddp_backend"] = "gloo"
    path = options.pop("path", None)
    run = trainer(
        EVERYTHING, dataset(), path, per_device_train_batch_size=8 // world, optim="adamw_torch",
        # far from where the sign of a rounding error decides
        adam_epsilon=1e-3, max_grad_norm=1.0, **defaults | options,
    )  # fmt: skip
    assert run.args.world_size == world
    assert bool(stage) == run.is_deepspeed_enabled and has_fused_head(run.model)
    run.train(resume_from_checkpoint=resume)
    held = sum(p.numel() for p in run.reference.model.parameters())  # the head's weight waits for a backward
    assert (held < run.meter.reference_cost.linear_weights) == (stage == 3)
    weights = list(run.model.parameters())
    with deepspeed.zero.GatheredParameters(weights, enabled=stage == 3):
        ends = torch.cat([p.detach().float().flatten() for p in weights])
    if run.args.process_index == 0:
        torch.save(ends - start, folder / f"{name}.pt")
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        (folder / f"{name}.json").write_text(json.dumps(losses))


def _train(folder, name, world, options):  # `run` hands arguments on by position
    train(folder, name, world, **options)


def moved(folder: Path, name: str) -> tuple[torch.Tensor, list[float]]:
    return torch.load(folder / f"{name}.pt"), json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("stage, loaded", [(2, False), (3, False), (3, True)])
def test_zero_takes_the_step_of_one_process(stage, loaded, tmp_path):
    """Also where the trainer loads the model: transformers would hand out its weights at once under ZeRO-3."""
    path = {"path": str(tmp_path / "model")} if loaded else {}
    if loaded:
        model().save_pretrained(path["path"])
    run(_train, tmp_path, 1, "one", 1, {})
    run(_train, tmp_path, 2, "many", 2, {"stage": stage} | path)
    (one, losses), (many, theirs) = moved(tmp_path, "one"), moved(tmp_path, "many")
    assert theirs == pytest.approx(losses, rel=1e-5) and len(losses) == STEPS
    assert (one - many).norm() <= 1e-4 * one.norm() and one.norm() > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_zero_is_resumed(stage, tmp_path):
    saving = {"stage": stage, "save_strategy": "steps", "save_steps": 2}
    run(_train, tmp_path, 2, "whole", 2, saving)
    folder = tmp_path / "run-whole"
    assert (folder / "checkpoint-2" / "global_step2").is_dir()
    again = {"stage": stage, "output_dir": folder, "resume": str(folder / "checkpoint-2")}
    run(_train, tmp_path, 2, "resumed", 2, again)
    (whole, losses), (resumed, theirs) = moved(tmp_path, "whole"), moved(tmp_path, "resumed")
    assert theirs == pytest.approx(losses, rel=1e-6)
    assert torch.equal(whole, resumed)
