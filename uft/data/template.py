"""From text to tokens: chat templates, one BOS, one EOS, which tokens the assistant wrote, and what does not fit.

BOS          once, in front of the prompt, if the tokenizer puts one there or the chat template writes it
EOS          once, at the end of each final response, whatever ends the template's turn
in_loss      in a response of several turns, the assistant's; each turn ends with the token that ends it
tokens       those of prompt and response as one text, if the prompt's are a prefix of them; else those of the two
             texts apart, so that no token is half prompt and half response, and generation starts from the same
special      special tokens come from the chat template and from here, never from a text: a row in which one is written
             out ("<|im_end|>") is a bad row, unless its source says that they are meant
max_length   prompts lose tokens on the left, behind the BOS; a response is never cut, and a row whose response does
             not fit is a bad row; documents are split into chunks
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from uft.data.readers import TextExample
from uft.data.rows import BadRow, DataError, Messages, shown
from uft.feedback import Example, Response

# For tokenizers without a chat template.  The space belongs to the response: most tokenizers join it to the next word.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "Assistant:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Tokenised(NamedTuple):
    """A row in tokens: one example, or the chunks of a document; what was done to it, for the report."""

    examples: list[Example]
    cut: bool = False
    apart: int = 0


class Template:
    """How a tokenizer's model reads conversations and plain texts.  See the top of the file.

    `chat_template` replaces the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None, chat_template: str | None = None):
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token; want one, or responses have no end")
        if max_length is not None and not (isinstance(max_length, Integral) and max_length >= 2):
            raise DataError(f"max_length is {max_length!r}; want at least 2, as a whole number")
        if not isinstance(chat_template, (str, type(None))):
            raise DataError(f"chat_template is {shown(chat_template)}; want a Jinja template as a string")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)
        self.written_out = _any_of(_special_tokens(tokenizer))
        if chat_template is None and tokenizer.chat_template:
            chat_template = tokenizer.get_chat_template()
        self.chat_template = chat_template or PLAIN_TEMPLATE
        self._known: dict[str, list[int]] = {}  # tokens of whole texts, while `many` is at work

    def __call__(self, text: TextExample, source: str = "train") -> Tokenised:
        """Raises `BadRow` for a response that does not fit or that the chat template refuses, and for special tokens
        written out in a text."""
        if not text.special_tokens:
            self._refuse_special_tokens(text.prompt, text.prompt_column)
            for response, column in zip(text.responses, text.columns):
                self._refuse_special_tokens(response, column)
        if text.kind == "document":
            return self._document(text, source)
        chat = not isinstance(text.prompt, str)
        prompt, *wholes = self._strings(text)

        prompt_ids = self._with_bos(self._ids(prompt))
        responses, apart = [], 0
        for response, whole, target, column in zip(text.responses, wholes, text.targets, text.columns):
            turns = self._turns(text.prompt, response, whole, len(prompt)) if chat and len(response) > 1 else None
            ids, in_loss, joint = self._response(whole, len(prompt), turns, chat)
            apart += not joint
            self._must_fit(ids, column)
            mask = None if turns is None else np.array(in_loss, dtype=bool)
            responses.append(Response(np.array(ids, dtype=np.int32), mask, target, text.weight))
        _must_differ(text, responses)

        room = None if self.max_length is None else self.max_length - max(len(r.tokens) for r in responses)
        kept = self._cut(prompt_ids, room)
        example = Example(
            text.kind, np.array(kept, dtype=np.int32), tuple(responses), text.preferences, source, text.row
        )
        return Tokenised([example], len(kept) < len(prompt_ids), apart)

    def many(self, texts: Sequence[TextExample], source: str = "train") -> list[Tokenised | BadRow]:
        """Each row in tokens, or what is wrong with it.  The tokenizer's threads work on all the rows at once."""

        def tokenised(text):
            try:
                return self(text, source)
            except BadRow as problem:
                return problem
            except DataError as error:
                raise DataError(f"source {source!r}, row {text.row}: {error}") from None

        strings: dict[str, None] = {}
        for text in texts:
            with suppress(BadRow, DataError):  # these come again below, where they belong
                strings |= dict.fromkeys(self._strings(text))
        strings.pop("", None)
        try:
            if strings:
                ids = self.tokenizer(list(strings), add_special_tokens=False, verbose=False)["input_ids"]
                self._known = dict(zip(strings, ids))
            return [tokenised(text) for text in texts]
        finally:
            self._known = {}

    def prompt(self, prompt: str | Messages, special_tokens: bool = False) -> np.ndarray:
        """int32 tokens to generate a response from, uncut: BOS, and what the chat template opens the answer with.

        `special_tokens` says whether those written out in the prompt are meant to be such; if not, raises `BadRow`.
        """
        if not special_tokens:
            self._refuse_special_tokens(prompt, "prompt")
        text = prompt if isinstance(prompt, str) else self._render(prompt, True)
        return np.array(self._with_bos(self._ids(text)), dtype=np.int32)

    def fingerprint(self) -> str:
        """Changes when the same texts might become other tokens."""
        tokenizer = self.tokenizer
        if hasattr(tokenizer, "backend_tokenizer"):
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            state["truncation"] = state["padding"] = None  # these are what the last call left there
        else:
            state = _saved(tokenizer)
        # special tokens are names in chat templates, and refused in texts
        special = [tokenizer.special_tokens_map, sorted(self.special), sorted(_special_tokens(tokenizer))]
        special.append(getattr(tokenizer, "split_special_tokens", None))
        parts = [type(tokenizer).__name__, state, special, self.chat_template]
        parts += [self.max_length, self.bos, self.eos, self.adds_bos]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    # ---- text ----

    def _refuse_special_tokens(self, text: str | Messages, column: str) -> None:
        # Chat templates render to one text, in which what was content can no longer be told from what is markup, so
        # the tokenizer cannot be asked to read the one as plain text and the other not.
        for string in _strings_in(text):
            if found := self.written_out.search(string):
                around = shown(string[max(0, found.start() - 20) : found.end() + 20])
                wanted = "text without special tokens of the tokenizer; or set special_tokens, if they are meant"
                raise BadRow("special token in text", f"{found[0]!r} in {around}", wanted, column)

    def _render(self, messages: Messages, generation_prompt: bool = False, column: str = "messages") -> str:
        return self._render_with_marks(messages, generation_prompt, False, column)[0]

    def _render_with_marks(self, messages, generation_prompt, marks, column="messages"):
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.chat_template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marks,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise BadRow("refused by chat template", f"roles {roles}", str(error), column) from None
        return texts[0], spans[0] if marks else None

    def _strings(self, text: TextExample) -> list[str]:
        """The prompt, and prompt and response together for each response; all of them start with the prompt."""
        if isinstance(text.prompt, str):
            return [text.prompt, *(text.prompt + response for response in text.responses)]
        prompt = self._render(text.prompt, True, text.columns[0])
        wholes = [self._render(text.prompt + r, False, column) for r, column in zip(text.responses, text.columns)]
        same = [
            next((i for i, (a, b) in enumerate(zip(prompt, w)) if a != b), min(len(prompt), len(w))) for w in wholes
        ]
        shared = prompt[: min(same)]
        if shared != prompt:
            # Some templates open the assistant's turn with more than a finished turn has ("<think>").
            # TRL keeps what the two share, and so do we, as long as nothing of the prompt's messages is lost.
            bare = self._render(text.prompt, False, text.columns[0])
            if not shared.startswith(bare):
                raise DataError(
                    f"chat template: found that it renders a prompt otherwise when a response follows ({bare[-80:]!r} "
                    "is not kept); want a template under which the prompt is the beginning of the conversation"
                )
        return [shared, *wholes]

    def _turns(self, prompt: Messages, response: Messages, whole: str, start: int) -> list[tuple[int, int]]:
        """Where in the text the assistant wrote: [begin, end) of each of the turns in the response."""
        messages = prompt + response
        if MARKED.search(self.chat_template):
            _, spans = self._render_with_marks(messages, False, True)
            roles = [message["role"] for message in messages]
            if len(spans) < roles.count("assistant"):
                raise DataError(
                    f"chat template: found {len(spans)} generation blocks for the roles {', '.join(roles)}; "
                    "want at least one for each turn of the assistant"
                )
            return [(max(begin, start), end) for begin, end in spans if end > start]
        spans = []
        for i in range(len(prompt), len(messages)):
            if messages[i]["role"] == "assistant":
                before, after = self._render(messages[:i], True), self._render(messages[: i + 1])
                if not (whole.startswith(after) and after.startswith(before)):
                    raise DataError(
                        "chat template: found no {% generation %} blocks, and a turn that is rendered otherwise when "
                        "more follow; want {% generation %} blocks around what the assistant writes, to know its tokens"
                    )
                spans.append((len(before), len(after)))
        return spans

    # ---- tokens ----

    def _ids(self, text: str) -> list[int]:
        if text and text not in self._known:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(self._known.get(text, ()))

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None:
            return ids
        written = next((i for i, token in enumerate(ids) if token != self.bos), len(ids))
        return [self.bos] * (self.adds_bos or written > 0) + ids[written:]

    def _response(self, whole: str, start: int, turns, chat: bool) -> tuple[list[int], list[bool], bool]:
        """Tokens and mask of the text behind `start`, and whether they are those of the whole text."""
        pieces = [(start, len(whole), True)] if turns is None else []
        for begin, end in turns or ():
            pieces += [(start, begin, False), (begin, end, True)]
            start = end
        if turns and start < len(whole):
            pieces.append((start, len(whole), False))
        tokens, joint = self._pieces(whole, [begin for begin, _, _ in pieces])
        ids, in_loss = [], []
        for piece, (_, _, assistant) in zip(tokens, pieces):
            written = self._turn_end(piece) if chat else len(piece)
            ids += piece
            in_loss += [assistant and i < written for i in range(len(piece))]
        while (n := self._turn_end(ids) if chat else len(ids)) and ids[n - 1] == self.eos:
            ids = ids[: n - 1]
        ids = ids[:n]
        return [*ids, self.eos], [*in_loss[:n], True], joint

    def _pieces(self, text: str, cuts: Sequence[int]) -> tuple[list[list[int]], bool]:
        """Tokens of the pieces of a text that start at the cuts; those before the first are left out."""
        whole, lengths = self._ids(text), []
        for cut in cuts:
            head = self._ids(text[:cut])
            if whole[: len(head)] != head:
                return [self._ids(text[a:b]) for a, b in zip(cuts, [*cuts[1:], len(text)])], False
            lengths.append(len(head))
        return [whole[a:b] for a, b in zip(lengths, [*lengths[1:], len(whole)])], True

    def _turn_end(self, ids: list[int]) -> int:
        """Length without the white space that a template writes behind the special token that ends a turn."""
        last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self.special), None)
        if last is None or (last + 1 < len(ids) and self.tokenizer.decode(ids[last + 1 :]).strip()):
            return len(ids)
        return last + 1

    def _must_fit(self, ids: list[int], column: str) -> None:
        if self.max_length is not None and len(ids) > self.max_length - 1:
            wanted = f"at most {self.max_length - 1}, one less than max_length"
            raise BadRow("too long", f"a response of {len(ids)} tokens", wanted, column)

    def _cut(self, prompt: list[int], room: int | None) -> list[int]:
        if room is None or len(prompt) <= room:
            return prompt
        keep = 1 if prompt[0] == self.bos else 0
        return prompt[:keep] + prompt[len(prompt) - room + keep :]

    def _document(self, text: TextExample, source: str) -> Tokenised:
        ids = self._with_bos(self._ids(text.responses[0]))
        while ids and ids[-1] == self.eos:
            ids.pop()
        tokens = np.array([*ids, self.eos], dtype=np.int32)
        cuts = list(range(self.max_length, len(tokens), self.max_length)) if self.max_length else []
        if cuts and cuts[-1] == len(tokens) - 1 and self.max_length > 2:
            cuts[-1] -= 1  # a last chunk of one token would have nothing to be predicted from
        empty = np.zeros(0, dtype=np.int32)
        chunks = [Response(chunk, weight=text.weight) for chunk in np.split(tokens, cuts)]
        return Tokenised([Example("document", empty, (chunk,), (), source, text.row) for chunk in chunks])


def _saved(tokenizer: Any) -> list[tuple[str, str]]:
    """Name and sha256 of each file that a tokenizer in Python saves: merges, a sentencepiece model, ..."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def _special_tokens(tokenizer: Any) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {""}


def _any_of(words: set[str]) -> re.Pattern:
    """Matches any of the words, the longest where several begin alike."""
    # by their first letters: one list of a tokenizer's 1,000 words would be gone through at every "<" of a text
    ordered = sorted(words, key=lambda word: (-len(word[:3]), word[:3], -len(word)))
    groups = groupby(ordered, key=lambda word: word[:3])
    return re.compile("|".join(f"{re.escape(start)}(?:{_either(each, len(start))})" for start, each in groups))


def _either(words: Iterable[str], start: int) -> str:
    return "|".join(re.escape(word[start:]) for word in words)


def _strings_in(value: Any) -> Iterator[str]:
    """Every string in messages, those of tool calls and names included: a chat template may write any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _strings_in(key)
            yield from _strings_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings_in(each)


def _must_differ(text: TextExample, responses: Sequence[Response]) -> None:
    """Texts that differ may be the same tokens: the chat template trims them, the tokenizer normalises them."""
    for better, worse in text.preferences:
        if np.array_equal(responses[better].tokens, responses[worse].tokens):
            found = f"the same {len(responses[worse].tokens)} tokens as in {text.columns[better]}"
            raise BadRow("equal responses", found, "chosen and rejected to differ in tokens", text.columns[worse])
