"""The progress of a run where it was started: a bar in a terminal, now and then a line where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from uft.watching.text import duration, short

SECONDS = 30.0  # between two lines where there is no terminal
FORMAT = "{desc}{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}{postfix}"


class Progress(ProgressCallback):
    """Shows loss, the loss of each term, tokens per second and the time left: of this stage and of all of them.

    transformers' own prints every log as a dictionary.  Like that one it is only there without `disable_tqdm`.
    """

    def __init__(self, trainer: Any):
        super().__init__()
        self.trainer = trainer
        self.terminal = sys.stderr.isatty()
        self._line_at = -SECONDS
        self._latest = ""

    # ---- events ----

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.current_step = state.global_step
        self._line_at, self._latest = -SECONDS, ""
        if state.is_world_process_zero and self.terminal:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=FORMAT, mininterval=0.5
            )
            self.training_bar.set_description_str(self._stage())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(self._postfix(state), refresh=False)
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        if self.terminal:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        evaluated = next((n for n in logs if n.startswith("eval_") and n.endswith("loss")), None)
        if evaluated is None and "loss" not in logs:
            return
        text = self._evaluation(logs, evaluated) if evaluated else _losses(logs)
        if self.terminal:
            self._latest = self._latest if evaluated else text
            if self.training_bar is not None:
                self.training_bar.set_postfix_str(self._postfix(state))
            if evaluated:
                (self.training_bar or tqdm).write(f"step {state.global_step}: {text}")
            return
        last = state.global_step >= state.max_steps
        if evaluated or last or time.monotonic() - self._line_at >= SECONDS:
            self._latest = text
            share = f"{100 * state.global_step / max(state.max_steps, 1):.0f} %"
            rest = "" if evaluated else self._left(state)
            print(f"{self._stage()}step {state.global_step}/{state.max_steps}, {share}: {text}{rest}", flush=True)
            self._line_at = self._line_at if evaluated else time.monotonic()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    # ---- text ----

    def _stage(self) -> str:
        place = self.trainer.watched.place
        return f"{place.names[place.position]} ({place.position + 1} of {len(place.names)}) " if place else ""

    def _postfix(self, state: Any) -> str:
        return f"{self._latest}{self._left(state)}"

    def _left(self, state: Any) -> str:
        here, whole = self.trainer.watched.speed.left(state.global_step, state.max_steps)
        if here is None:
            return ""
        place = self.trainer.watched.place
        more = place is not None and place.position + 1 < len(place.names)
        of_all = f", about {duration(whole)} of all stages" if more and whole is not None else ""
        return f", {duration(here)} left{' in this stage' if more else ''}{of_all}"

    def _evaluation(self, logs: Mapping[str, Any], name: str) -> str:
        prefix = name.removesuffix("loss")
        own = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
        label = prefix.removeprefix("eval_").rstrip("_")
        kept = [f"{key.removeprefix('rewards/')} {short(own[key])}" for key in ("rewards/accuracies",) if key in own]
        return ", ".join([f"held out{f' ({label})' if label else ''}: {_losses(own)}", *kept])


def _losses(logs: Mapping[str, Any]) -> str:
    """loss 1.23 (sft 0.91, preference 0.64), 12.3k tokens/s"""
    numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
    parts = [f"{n.removeprefix('loss/')} {short(v)}" for n, v in numbers.items() if n.startswith("loss/")]
    text = f"loss {short(numbers.get('loss'))}" if "loss" in numbers else ""
    if len(parts) > 1 or not text:
        text += f" ({', '.join(parts)})" if parts else ""
    speed = numbers.get("tokens_per_second")
    return text + (f", {short(speed)} tokens/s" if speed is not None else "")
