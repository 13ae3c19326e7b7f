"""`uft chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uft.cli.models import add_model_options, model_and_tokenizer

HELP = """/reset          begin anew        /undo           take the last turn back
/again          another answer    /system TEXT    set the system message, and begin anew
/save FILE      the conversation as a demonstration (JSON lines, appended)
/exit           or Ctrl-D"""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "uft chat",
        description="Talk with a model. Its chat template is used as in training; a tokenizer without one gets the "
        f"plain one of this library. In the conversation:\n\n{HELP}",
        epilog='example: uft chat --model runs/first --system "You are brief." --temperature 0.7',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(found)
    found.add_argument("--system", metavar="TEXT", help="system message")
    return found


@dataclass
class Conversation:
    """Messages, and what each word of the user does to them.

    answer   makes the answer to the messages so far, and shows it while it comes; gets the number of the try
    """

    answer: Callable[[list[dict[str, str]], int], str]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    tries: int = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def says(self, text: str) -> str | None:
        """Answers, or does what a command says.  What is to be printed; None ends the conversation."""
        command, _, rest = text.strip().partition(" ")
        if not command.startswith("/"):
            return self._answered(text) if text.strip() else ""
        if command in ("/exit", "/quit"):
            return None
        if command == "/reset":
            self.reset()
            return "(begun anew)"
        if command == "/system":
            self.system = rest.strip() or None
            self.reset()
            return f"(system message: {self.system})"
        if command == "/undo":
            self._take_back()
            return "(last turn taken back)"
        if command == "/again":
            asked = self._take_back()
            return "(nothing was asked yet)" if asked is None else self._answered(asked, self.tries + 1)
        if command == "/save":
            return self._save(rest.strip())
        return HELP

    def _answered(self, text: str, tries: int = 0) -> str:
        self.tries = tries
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self.answer(asked, tries)  # one that is broken off leaves no trace
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return ""

    def _take_back(self) -> str | None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        asked, self.messages = self.messages[-2]["content"], self.messages[:-2]
        return asked

    def _save(self, name: str) -> str:
        if not name or not any(m["role"] == "assistant" for m in self.messages):
            return "(want a file's name, and an answer to save: /save demonstrations.jsonl)"
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"({error})"
        return f"(appended to {name}, as a demonstration)"


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(list(words))
    if given.max_new_tokens < 1 or given.temperature < 0:
        raise ValueError(
            f"max_new_tokens is {given.max_new_tokens} and temperature {given.temperature:g}; want at least 1 and 0"
        )
    model, tokenizer = model_and_tokenizer(given.model, given)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, lines can be edited, and earlier ones come back
    talk = Conversation(_answering(model, tokenizer, given), given.system)
    print(f"{given.model}; /help for what can be done, /exit to leave")
    while True:
        try:
            shown = talk.says(input("\n> "))
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:  # ends an answer, not the conversation
            print(" (broken off)")
            continue
        except ValueError as error:  # too long, or a special token written out
            shown = f"({error})"
        if shown is None:
            return 0
        if shown:
            print(shown)


def _answering(model: Any, tokenizer: Any, given: argparse.Namespace) -> Callable[[list[dict[str, str]], int], str]:
    import torch
    from transformers import GenerationConfig, TextStreamer

    from uft.data.template import Template
    from uft.head import causal_model
    from uft.responding import ends_of

    template, causal = Template(tokenizer), causal_model(model)
    ends = sorted(ends_of(model, tokenizer))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=given.max_new_tokens, do_sample=given.temperature > 0, temperature=given.temperature or None,
        top_k=0, eos_token_id=ends, pad_token_id=pad,
    )  # fmt: skip
    # what a given configuration leaves open is filled in from the model's
    causal.generation_config = config
    room = getattr(causal.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def answer(messages: list[dict[str, str]], tries: int) -> str:
        ids = torch.tensor([template.prompt(messages).tolist()], device=causal.device)
        if room is not None and ids.shape[1] + given.max_new_tokens > room:
            raise ValueError(
                f"the conversation has {ids.shape[1]} tokens, and with {given.max_new_tokens} to come more than the "
                f"model's {room}: /reset begins anew"
            )
        torch.manual_seed(given.seed + tries)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
        )
        sys.stdout.flush()
        return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()

    return answer
