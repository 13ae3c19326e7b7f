"""`uft generate`: answers to prompts, of one model or of several side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uft.cli.models import add_model_options, model_and_tokenizer


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "uft generate",
        description="Answers of a model to prompts of a file, or of the command line. Prompts become the tokens that "
        "training makes of them, and of the model's own settings only its EOS tokens are kept.",
        epilog="""examples:
  uft generate --model runs/first --chat --prompt "What is the capital of France?"
  uft generate --model BASE --model runs/first held_out.jsonl --limit 20 --output answers.jsonl""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("data", nargs="?", metavar="FILE", help="file or hub data set with a column prompt")
    found.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add_model_options(found, several=True)
    found.add_argument("--chat", action="store_true", help="prompts that are strings are what a user says")
    found.add_argument("--split", default="train", help="of a hub data set")
    found.add_argument("--limit", type=int, help="the first so many rows only")
    found.add_argument("--batch_size", type=int, default=16, help="prompts that are answered together")
    found.add_argument("--output", type=Path, help="JSON lines with model, prompt, response; default: printed")
    found.add_argument("--overwrite", action="store_true", help="replace an output that is there already")
    return found


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(list(words))
    if given.output is not None and given.output.exists() and not given.overwrite:
        raise ValueError(f"{given.output}: exists already; want another file, or --overwrite")
    prompts: list[Any] = []
    rows = []
    for name in given.model:
        from uft.evaluation.generation import generate

        model, tokenizer = model_and_tokenizer(name, given)
        prompts = prompts or _prompts(given, tokenizer)
        answers = generate(
            model, tokenizer, prompts, max_new_tokens=given.max_new_tokens, temperature=given.temperature,
            seed=given.seed, batch_size=given.batch_size,
        )  # fmt: skip
        rows.append([
            {"model": name, "prompt": a.prompt, "response": a.text, "tokens": a.tokens, "ended": a.ended}
            for a in answers
        ])  # fmt: skip
        del model  # before the next one is loaded
    if given.output is None:
        print("\n\n".join(_shown(answers) for answers in zip(*rows)))
        return 0
    given.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for answers in zip(*rows) for row in answers]
    given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} answers in {given.output}", file=sys.stderr)
    return 0


def _prompts(given: argparse.Namespace, tokenizer: Any) -> list[Any]:
    from uft.data.sources import Source
    from uft.data.template import Template
    from uft.evaluation.prompts import read_prompts

    if bool(given.data) == bool(given.prompt):
        raise ValueError("want prompts: either a FILE, or --prompt TEXT")
    if given.prompt:
        return [[{"role": "user", "content": text}] if given.chat else text for text in given.prompt]
    source = Source("prompts", given.data, chat=given.chat, split=given.split, limit=given.limit)
    return [prompt.prompt for prompt in read_prompts(source, Template(tokenizer))]


def _shown(answers: Sequence[dict[str, Any]]) -> str:
    prompt = answers[0]["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    several = len(answers) > 1
    return "\n".join([f"> {text}", *((f"[{a['model']}] " if several else "") + a["response"].strip() for a in answers)])
