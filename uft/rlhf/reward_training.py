"""Training a reward model on pairs, labels and scores.

    L = (1/P) Σ_pairs w [−log σ(r_w − r_l − m) + c (r_w + r_l)²]  +  (1/S) Σ_responses w l(r, target)

P pairs and S labelled or scored responses of the whole optimiser step, whatever the micro-batches, the accumulation and
the ranks; w is the weight of the row.  The equations are in `uft.losses.reward`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from uft.checkpoint import WholeCheckpoints, last_checkpoint
from uft.collation import Collator
from uft.compute import Cost
from uft.data.mixture import FeedbackDataset, MixtureSampler
from uft.feedback import Batch
from uft.loader import StepSampler, make_loader
from uft.loading import sources_of, without_dropout
from uft.losses import reward as losses
from uft.metrics import RunState, added_counters
from uft.record import environment
from uft.rlhf.reward_config import REGRESSION, RewardConfig
from uft.rlhf.reward_model import RewardModel, scores
from uft.run_identity import check_identity
from uft.watching.attach import watch

KINDS = ("pair", "label", "score")
# fields that decide what a run becomes, so that a checkpoint of another one is refused
_DECIDING = (
    "learning_rate", "max_steps", "num_train_epochs", "seed", "data_seed", "center_rewards_coefficient", "margin",
    "margin_scale", "regression", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm", "bf16",
    "fp16",
)  # fmt: skip
Sums = dict[str, tuple[Tensor, Tensor]]


def train_reward_model(
    model: RewardModel,
    data: FeedbackDataset,
    args: RewardConfig,
    eval_data: FeedbackDataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume_from_checkpoint: str | bool | None = None,
) -> RewardModel:
    """The model, trained in place on the pairs, labels and scores of `data`, with what that cost and reached in its
    `training_record`: examples, tokens and flops (forward and backward, without evaluations), seconds (with them), over
    all ranks and resumptions, and metrics over time.

    Raises ValueError for data of other kinds and for sequences of more than args.max_length tokens.
    """
    for each in (data, eval_data):
        if each is not None:
            _check(each, args.max_length)
    trainer = RewardTrainer(model, data, args, eval_data, callbacks)
    if resume_from_checkpoint is True:
        resume_from_checkpoint = last_checkpoint(args.output_dir)
        if resume_from_checkpoint is None:
            raise ValueError(f"no whole checkpoint in {args.output_dir!r} to resume from")
    trainer.check_folders(resume_from_checkpoint)
    if resume_from_checkpoint:
        check_identity(trainer.identity, Path(resume_from_checkpoint), ())
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.tick()
    final = trainer.evaluate() if eval_data is not None else {}
    model.model.eval()
    model.training_record = {
        **added_counters(trainer.gather([trainer.run_state.counters])),
        "steps": trainer.state.global_step,
        "eval": {name: value for name, value in final.items() if name.startswith("eval_")},
        "metrics": trainer.state.log_history,
        "config": args.to_sanitized_dict(),
        "data": {"fingerprint": data.fingerprint, "sizes": dict(zip(data.sources, data.sizes))},
        **environment(),
    }
    return model


def _check(data: FeedbackDataset, max_length: int) -> None:
    for name, kinds in data.kinds().items():
        if unused := kinds - set(KINDS):
            raise ValueError(
                f"data set {name!r} holds examples of kind {', '.join(sorted(unused))}; want {', '.join(KINDS)}, of "
                "which a reward model can be learnt"
            )
    first, length = data.sequences
    if (longest := int(length.max())) > max_length:
        i = int(np.searchsorted(first, int(length.argmax()), side="right")) - 1
        example = data[i]
        raise ValueError(
            f"data set {example.source!r}, row {example.row}: found {longest} tokens; want at most max_length, "
            f"{max_length}"
        )


class Scorer(nn.Module):
    """What the trainer runs: the rewards of a batch in one forward, so that wrappers of models see it."""

    def __init__(self, reward_model: RewardModel):
        super().__init__()
        self.model = reward_model.model
        self.center, self.scale = reward_model.center, reward_model.scale

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (scores(self.model, Batch(batch)) - self.center) / self.scale

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.model.gradient_checkpointing_enable(**kwargs)


class RewardTrainer(WholeCheckpoints):
    """See the top of the file.  A checkpoint is whole or absent, and one of another run is refused."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        reward_model: RewardModel,
        data: FeedbackDataset,
        args: RewardConfig,
        eval_data: FeedbackDataset | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if args.disable_dropout:
            without_dropout(reward_model.model)
        super().__init__(
            model=Scorer(reward_model),
            args=args,
            data_collator=Collator(reward_model.pad_token_id, sources_of(data, eval_data)),
            train_dataset=data,
            eval_dataset=eval_data,
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = True
        self.add_callback(RunState())
        self.cost = Cost.of(reward_model.model)
        self.identity = {
            "rewards": {name: repr(getattr(args, name)) for name in _DECIDING},
            "step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "data": data.fingerprint[:16],
            "optimiser_state": not args.save_only_model,
        }
        self.watched = watch(self)
        self._clock = time.perf_counter()

    # ---- data ----

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        data, args = train_dataset or self.train_dataset, self.args
        return MixtureSampler(data.sizes, data.weights, args.seed if args.data_seed is None else args.data_seed)

    def get_train_dataloader(self):
        return self._loader(self._get_train_sampler(), self.train_dataset, self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None):
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(range(len(data)), data, self.args.eval_batch_size)

    def _loader(self, sampler: Any, data: FeedbackDataset, size: int):
        args = self.args
        cost = data.lengths if args.world_size > 1 else None
        drop_last = args.dataloader_drop_last and data is self.train_dataset
        batches = StepSampler(sampler, size, args.process_index, args.world_size, cost, drop_last)
        return make_loader(data, batches, self.data_collator, args)

    # ---- the step ----

    @property
    def run_state(self) -> RunState:
        # transformers replaces stateful callbacks by new ones when it resumes, so this one is looked up
        return next(c for c in self.callback_handler.callbacks if isinstance(c, RunState))

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The step's micro-batches, and what has to be counted over all of them before the first is run."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counts = sum((_counts(batch) for batch in batches), torch.zeros(2, dtype=torch.float64))
        for batch in batches:
            self.run_state.count(**self.spent(batch))
        if self.args.world_size > 1:  # gradients of ranks are averaged
            counts = self.accelerator.reduce(counts.to(self.args.device), "sum") / self.accelerator.num_processes
        return batches, counts

    def spent(self, batch: Batch) -> dict[str, int]:
        """Forward and backward of a batch; padding is no cost of the method."""
        n = batch.length.numpy()
        flops = int((self.cost.forward(n) + self.cost.backward(n)).sum())
        return {"examples": len(batch.prompt.unique()), "tokens": int(n.sum()), "flops": flops}

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return Batch(inputs).to(self.args.device, non_blocking=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Tensor | None = None):
        batch = Batch(inputs)
        sums = self.sums(model(dict(batch)), batch)
        counts = (_counts(batch) if num_items_in_batch is None else num_items_in_batch).to(batch.target.device)
        loss = total(sums, counts, self.args.center_rewards_coefficient)
        if model.training:
            self.run_state.add(sums)
        return (loss, {"loss": loss}) if return_outputs else loss

    def sums(self, reward: Tensor, batch: Batch) -> Sums:
        """Sums over the batch of losses and metrics, and how many rows each is of."""
        args = self.args
        better, worse = batch.preferences.unbind(-1)
        chosen, rejected = reward[better], reward[worse]
        margin = args.margin_scale * margins(batch) if args.margin else None
        weight = batch.weight[better]
        single = batch.side == 0
        pointwise = REGRESSION[args.regression](reward[single], batch.target[single])
        found = {
            "loss/preference": weight * losses.bradley_terry(chosen, rejected, margin),
            "loss/centering": weight * losses.centering(chosen, rejected),
            "loss/regression": batch.weight[single] * pointwise,
            "rewards/accuracies": (chosen > rejected) + 0.5 * (chosen == rejected),
            "rewards/margins": chosen - rejected,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/mean": reward,
        }
        return {
            name: (values.sum(), torch.tensor(float(len(values)), device=reward.device))
            for name, values in found.items()
        }

    def floating_point_ops(self, inputs: Batch) -> int:
        return self.spent(inputs)["flops"]

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        pass  # transformers' way to count pads; see num_tokens in the log

    def tick(self) -> None:
        """Counts the seconds since the last call."""
        now = time.perf_counter()
        self.run_state.count(seconds=now - self._clock)
        self._clock = now

    def _save_checkpoint(self, model, trial) -> None:
        self.tick()
        self.run_state.collect(self.gather)
        super()._save_checkpoint(model, trial)

    # ---- logging and evaluation: exact means, whatever the batch size ----

    def gather(self, objects: list) -> list:
        from accelerate.utils import gather_object

        return gather_object(objects) if self.args.world_size > 1 else objects

    def means(self, state: RunState) -> dict[str, float]:
        found = state.take(self.gather)
        parts = [("loss/preference", 1.0), ("loss/regression", 1.0)]
        parts += [("loss/centering", self.args.center_rewards_coefficient)]
        return found | {"loss": sum(factor * found.get(name, 0.0) for name, factor in parts)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log
            logs.update(self.means(self.run_state))
            logs["num_tokens"] = added_counters(self.gather([self.run_state.counters])).get("tokens", 0)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        state, examples = RunState(), 0
        for batch in map(self._prepare_inputs, dataloader):
            with self.compute_loss_context_manager():
                state.add(self.sums(model(dict(batch)), batch))
            examples += len(batch.prompt.unique())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        named = {f"{metric_key_prefix}_{name}": value for name, value in self.means(state).items()}
        return EvalLoopOutput(None, None, named, sum(self.gather([examples])))


def margins(batch: Batch) -> Tensor:
    """float32 [pairs]: target of the better response less that of the worse one, and 0 for pairs without scores.

    Pairs without scores have the targets 1 and 0; scores that are just these count as none.
    """
    better, worse = batch.target[batch.preferences].unbind(-1)
    unscored = ((better == 1) & (worse == 0)) | better.isnan() | worse.isnan()
    return torch.where(unscored, 0.0, better - worse)


def total(sums: Sums, counts: Tensor, center_rewards_coefficient: float) -> Tensor:
    """The part of the step's loss that a batch has.

    counts   float64 [2]: pairs and single responses of the step, per rank, so perhaps a fraction
    """
    # where there are none the sum is 0 as well
    pairs, singles = torch.where(counts > 0, counts, 1.0).float()
    of_pairs = sums["loss/preference"][0] + center_rewards_coefficient * sums["loss/centering"][0]
    return of_pairs / pairs + sums["loss/regression"][0] / singles


def _counts(batch: Batch) -> Tensor:
    """float64 [2]: pairs and single responses.  Raises ValueError for a response that nothing is known of."""
    single = batch.side == 0
    if bool((unknown := single & batch.target.isnan()).any()):
        row = int(batch.row[unknown][0])
        raise ValueError(
            f"row {row}: found a response without a target and in no pair; want a label, a score or a pair"
        )
    return torch.tensor([len(batch.preferences), int(single.sum())], dtype=torch.float64)
