"""A tokenizer and data sets as a script written for TRL hands them over, and what its config says of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from uft.data.sources import Source, as_sources, open_table

# TRL's columns that change what a prompt is and that are not read here
UNREAD = ("tools", "chat_template_kwargs", "images", "image")


def tokenizer_with(tokenizer: Any, names: Mapping[str, Any] | None) -> Any:
    """The tokenizer with TRL's `eos_token` and `chat_template_path`; the one given stays as it was.

    Raises ValueError for a token that it lacks.
    """
    names = names or {}
    if not {"eos_token", "chat_template_path"} & set(names):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    vocabulary = tokenizer.get_vocab()
    if (eos := names.get("eos_token")) is not None:
        if eos not in vocabulary:
            raise ValueError(f"eos_token is {eos!r}, which the tokenizer lacks; want a token of its vocabulary")
        tokenizer.eos_token = eos
    if path := names.get("chat_template_path"):
        if Path(path).suffix in (".jinja", ".j2"):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        else:
            other = AutoTokenizer.from_pretrained(path)
            if lacking := set(map(str, other.added_tokens_decoder.values())) - set(vocabulary):
                raise ValueError(
                    f"chat_template_path is {path!r}, with token {min(lacking)!r}, which the tokenizer lacks; want "
                    "its tokens added to tokenizer and model beforehand"
                )
            tokenizer.chat_template = other.chat_template
    return tokenizer


def is_one_data_set(data: Any) -> bool:
    """Whether it is rows in memory or on the hub as TRL takes them, not several data sets by name."""
    rows = isinstance(data, (list, tuple)) and bool(data) and isinstance(data[0], Mapping) and "path" not in data[0]
    return rows or (hasattr(data, "column_names") and not isinstance(data, Mapping))


def are_splits(data: Any) -> bool:
    """Whether it is {name: data}, as TRL has several sets to evaluate on, and not the options of one source."""
    return isinstance(data, Mapping) and not isinstance(data.get("path"), (str, Path))


def data_with(data: Any, formatting: Any, names: Mapping[str, Any] | None) -> Any:
    """Data as sources, with `formatting_func` and `dataset_text_field` applied.  Raises ValueError for what TRL would
    read otherwise."""
    if isinstance(data, Mapping) and hasattr(data, "column_names"):
        raise ValueError(f"found a DatasetDict of {', '.join(data)}; want one of its splits, such as data['train']")
    field = (names or {}).get("dataset_text_field", "text")
    parts = data.values() if isinstance(data, Mapping) else [data]
    for part in parts:
        _refuse_unread(part)
    if formatting is not None:
        if not is_one_data_set(data):
            raise ValueError("formatting_func is given, and several data sets or a path; want one data set in memory")
        return Source("train", data=_formatted(data, formatting), special_tokens=True)
    if field == "text":
        return data
    sources = as_sources(data)
    having = [field in (open_table(source).columns or ()) for source in sources]
    if not any(having):
        raise ValueError(f"dataset_text_field is {field!r}, and no data set has such a column; want the text's column")
    renamed = {"text": field}
    return [replace(s, columns={**s.columns, **renamed}) if has else s for s, has in zip(sources, having)]


def _formatted(data: Any, formatting: Any) -> Any:
    if not hasattr(data, "map"):
        return [{"text": formatting(row)} for row in data]
    return data.map(lambda row: {"text": formatting(row)}, remove_columns=list(data.column_names or []))


def _refuse_unread(data: Any) -> None:
    columns = getattr(data, "column_names", None)
    for name in UNREAD:
        if isinstance(columns, list) and name in columns and next(iter(data), {}).get(name):
            raise ValueError(
                f"column {name!r} is in the data, and is not read here; want it rendered into the text "
                "(formatting_func), or left out (data.remove_columns)"
            )
