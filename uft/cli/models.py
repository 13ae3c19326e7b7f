"""What commands that ask a model share: how it is named and loaded."""

from __future__ import annotations

import argparse
from typing import Any


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    more = {"action": "append", "metavar": "MODEL"} if several else {"metavar": "MODEL"}
    text = "hub id or folder; an adapter is put onto its base model" + ("; several answer side by side" * several)
    parser.add_argument("--model", required=True, help=text, **more)
    parser.add_argument("--dtype", default="auto", help="of the weights; auto is the checkpoint's")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code from the model's repository")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="of an answer; default 256")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled")


def model_and_tokenizer(name: str, given: argparse.Namespace) -> tuple[Any, Any]:
    from uft.loading import load_for_use, load_tokenizer

    tokenizer = load_tokenizer(name, given.trust_remote_code)
    options = {"dtype": given.dtype, "device": given.device, "trust_remote_code": given.trust_remote_code}
    return load_for_use(name, **options), tokenizer
