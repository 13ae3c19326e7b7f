"""Tokens: one BOS, one EOS, which tokens the assistant wrote, where prompt and response part, what is cut."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from tests.data.tiny_tokenizers import (
    CHAT_TEMPLATE,
    FORGETS,
    MARKS_LAST,
    REFUSES,
    THINKS,
    UNMARKED,
    WITH_BOS,
    assistant,
    make,
    user,
)
from uft.data.readers import TextExample
from uft.data.sources import BadRow, DataError
from uft.data.template import PLAIN_TEMPLATE, Template

TURNS = [user("hi"), assistant("hello"), user("the cat?"), assistant("on the mat")]


def demonstration(prompt, response, **options):
    return TextExample("demonstration", prompt, (response,), (1.0,), **options)


def pair(prompt, chosen, rejected):
    return TextExample("pair", prompt, (chosen, rejected), (1.0, 0.0), ((0, 1),), ("chosen", "rejected"), row=4)


def document(text):
    return TextExample("document", "", (text,), (float("nan"),), columns=("text",), row=2)


def decoded(template, tokens):
    return template.tokenizer.decode(tokens)


def in_loss(template, response):
    """The text of the tokens in the loss; tokens that are not stand as |."""
    mask = np.ones(len(response.tokens), bool) if response.in_loss is None else response.in_loss
    assert mask.shape == response.tokens.shape and mask.dtype == bool
    pieces = [decoded(template, [token]) if on else "|" for token, on in zip(response.tokens, mask)]
    text = "".join(pieces)
    while "||" in text:
        text = text.replace("||", "|")
    return text


TOKENIZERS = {
    "plain": {"template": None, "eos": "<eos>"},
    "plain with BOS": {"template": None, "eos": "<eos>", "adds_bos": True},
    "chat": {},
    "chat, tokenizer adds BOS": {"adds_bos": True},
    "chat, template writes BOS": {"template": WITH_BOS},
    "chat, both do": {"template": WITH_BOS, "adds_bos": True},
    "chat, turn ends with another token": {"eos": "<eos>"},
    "chat, no markers": {"template": UNMARKED, "adds_bos": True},
}


@pytest.fixture(scope="module", params=TOKENIZERS, ids=str)
def template(request):
    return Template(make(**TOKENIZERS[request.param]))


# ---- BOS and EOS ----


@pytest.mark.parametrize(
    "text",
    [
        demonstration("the cat", " sat on"),
        demonstration("<bos>the cat", " sat", special_tokens=True),
        demonstration("", "hello"),
        demonstration([user("hi")], [assistant("hello")]),
        demonstration(TURNS[:1], TURNS[1:]),
        pair("the cat", " sat on", " on"),
        pair(TURNS[:3], [assistant("a")], [assistant("b\n")]),
    ],
    ids=["strings", "BOS in the text", "no prompt", "chat", "turns", "pair", "chat pair"],
)
def test_one_bos_and_one_eos(template, text):
    (example,) = template(text).examples
    bos, eos = template.bos, template.eos
    chat = not isinstance(text.prompt, str)
    has_bos = template.adds_bos or "bos_token" in template.chat_template * chat or "<bos>" in text.prompt
    assert example.prompt.dtype == np.int32
    assert (example.prompt == bos).sum() == has_bos
    assert not has_bos or example.prompt[0] == bos
    for response in example.responses:
        assert response.tokens.dtype == np.int32
        assert response.tokens[-1] == eos
        assert response.tokens[-2] != eos
        assert bos not in response.tokens
        assert response.in_loss is None or response.in_loss[-1]


def test_an_eos_in_the_text_is_not_doubled():
    template = Template(make(None, eos="<eos>"))
    (example,) = template(demonstration("a", "b<eos><eos>", special_tokens=True)).examples
    assert decoded(template, example.responses[0].tokens) == "b<eos>"


@pytest.mark.parametrize(
    "eos, end", [("<|im_end|>", "hello<|im_end|>"), ("<eos>", "hello<|im_end|><eos>")], ids=["same", "another"]
)
def test_nothing_stands_behind_the_turn_but_eos(eos, end):
    """The newline that the template writes behind <|im_end|> is never generated, so it is not learnt."""
    template = Template(make(eos=eos))
    (example,) = template(demonstration([user("hi")], [assistant("hello")])).examples
    assert decoded(template, example.prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(template, example.responses[0].tokens) == end


def test_plain_template():
    template = Template(make(None, eos="<eos>"))
    assert template.chat_template == PLAIN_TEMPLATE
    (example,) = template(demonstration(TURNS[:1], TURNS[1:])).examples
    assert decoded(template, example.prompt) == "User: hi\n\nAssistant:"
    text = " hello<eos>\n\nUser: the cat?\n\nAssistant: on the mat<eos>"
    assert decoded(template, example.responses[0].tokens) == text
    assert in_loss(template, example.responses[0]) == " hello<eos>| on the mat<eos>"
    assert list(template.prompt(TURNS[:1])) == list(example.prompt)


def test_a_tokenizer_needs_an_eos():
    tokenizer = make()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos_token"):
        Template(tokenizer)
    for wrong in (1, "64", 2.5):
        with pytest.raises(DataError, match=f"max_length is {wrong!r}; want at least 2, as a whole number"):
            Template(make(), max_length=wrong)
    with pytest.raises(DataError, match=r"chat_template is 5 \(int\); want a Jinja template"):
        Template(make(), chat_template=5)


# ---- which tokens the assistant wrote ----


@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, UNMARKED, WITH_BOS], ids=["marked", "not marked", "with BOS"])
def test_turns_of_the_assistant(chat_template):
    template = Template(make(chat_template))
    (example,) = template(demonstration(TURNS[:1], TURNS[1:])).examples
    assert decoded(template, example.prompt).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert in_loss(template, example.responses[0]) == "hello<|im_end|>|on the mat<|im_end|>"


def test_masks_are_transformers():
    tokenizer = make()
    theirs = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    (example,) = Template(tokenizer)(demonstration(TURNS[:1], TURNS[1:])).examples
    response, m = example.responses[0], len(example.prompt)
    ids = [*example.prompt, *response.tokens]
    assert theirs["input_ids"][: len(ids)] == ids  # theirs has the newline behind the last turn
    assert theirs["assistant_masks"][m : len(ids)] == response.in_loss.astype(int).tolist()
    assert not any(theirs["assistant_masks"][:m])


def test_white_space_at_the_edge_of_a_turn_belongs_to_it():
    """Where it would join the header's newline in one token, the two are tokenised apart."""
    turns = [user("a"), assistant("b"), user("c"), assistant("\n\n d \n")]
    for chat_template in (CHAT_TEMPLATE, UNMARKED):
        template = Template(make(chat_template))
        (example,) = template(demonstration(turns[:1], turns[1:])).examples
        assert in_loss(template, example.responses[0]) == "b<|im_end|>|\n\n d \n<|im_end|>"


def test_one_answer_needs_no_mask():
    for chat_template in (CHAT_TEMPLATE, UNMARKED, FORGETS, None):
        (example,) = Template(make(chat_template))(demonstration(TURNS[:1], TURNS[1:2])).examples
        assert example.responses[0].in_loss is None


def test_masks_that_cannot_be_known_are_refused():
    with pytest.raises(DataError, match=r"found no {% generation %} blocks, and a turn that is rendered otherwise"):
        Template(make(FORGETS))(demonstration(TURNS[:1], TURNS[1:]))
    with pytest.raises(DataError, match=r"found 1 generation blocks for the roles user, assistant, user, assistant"):
        Template(make(MARKS_LAST))(demonstration(TURNS[:1], TURNS[1:]))
    with pytest.raises(DataError, match="source 's', row 0: chat template: found 1 generation blocks"):
        Template(make(MARKS_LAST)).many([demonstration(TURNS[:1], TURNS[1:])], "s")


def test_a_template_that_opens_the_answer_with_a_thought():
    template = Template(make(THINKS))
    (example,) = template(pair(TURNS[:1], [assistant("yes")], [assistant("no")])).examples
    assert decoded(template, example.prompt).endswith("<|im_start|>assistant\n")
    assert [decoded(template, r.tokens) for r in example.responses] == ["yes<|im_end|>", "no<|im_end|>"]
    lost = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"  # counts the messages to come
    with pytest.raises(DataError, match="renders a prompt otherwise when a response follows"):
        Template(make(lost))(demonstration(TURNS[:1], TURNS[1:2]))


def test_what_the_chat_template_refuses_is_a_bad_row():
    with pytest.raises(BadRow, match=r"refused by chat template: found roles system.*; want no system here"):
        Template(make(REFUSES))(demonstration([{"role": "system", "content": "s"}], [assistant("a")]))


# ---- where prompt and response part ----


def test_a_token_across_the_border_is_split():
    template = Template(make(None, eos="<eos>"))
    assert decoded(template, template.tokenizer("the cat")["input_ids"][-1:]) == " cat"
    together = template(demonstration("the cat", " sat"))
    assert together.apart == 0
    apart = template(pair("the c", "at", " sat"))
    assert apart.apart == 1
    (example,) = apart.examples
    assert decoded(template, example.prompt) == "the c"
    assert [decoded(template, r.tokens) for r in example.responses] == ["at<eos>", " sat<eos>"]
    assert list(example.prompt) == template.tokenizer("the c")["input_ids"]


@cache
def cached(**options):
    return Template(make(**options))


texts = st.text(alphabet="the catsond\n 1é", min_size=1, max_size=12)
different = st.lists(texts, min_size=2, max_size=5, unique=True)


@settings(max_examples=150, deadline=None)
@given(texts, different)
def test_nothing_is_lost_or_doubled(prompt, responses):
    """Strings and conversations decode to what was put in, with the assistant's words in the loss and no others."""
    for options in ({"template": None, "eos": "<eos>", "adds_bos": True}, {"template": UNMARKED}, {}):
        template = cached(**options)
        (example,) = template(pair(prompt, *responses[:2])).examples
        assert decoded(template, example.prompt) == "<bos>" * template.adds_bos + prompt
        for text, response in zip(responses, example.responses):
            assert decoded(template, response.tokens) == text + template.tokenizer.eos_token
        turns = [assistant(text) if i % 2 else user(text) for i, text in enumerate([prompt, *responses])]
        turns = turns[: len(turns) // 2 * 2]
        (example,) = template(demonstration(turns[:1], turns[1:])).examples
        whole = template.tokenizer.apply_chat_template(turns, chat_template=template.chat_template, tokenize=False)
        ids = [*example.prompt[template.adds_bos :], *example.responses[0].tokens]
        assert decoded(template, ids) == (whole.removesuffix("\n") if "im_end" in whole else whole)
        opening = " " if template.chat_template == PLAIN_TEMPLATE else ""
        end = template.tokenizer.eos_token
        written = "|".join(opening + turn["content"] + end for turn in turns[1::2])
        # characters of several bytes are several tokens, which decode only together
        if written.isascii():
            assert in_loss(template, example.responses[0]) == written


def test_many_is_one_by_one():
    template = Template(make(), max_length=12)
    rows = [
        demonstration("the c", "at"),
        pair(TURNS[:3], [assistant("a")], [assistant("b" * 30)]),
        document("a b c " * 9),
    ]
    many = template.many(rows)
    assert isinstance(many[1], BadRow)
    for row, result in zip(rows, many):
        if not isinstance(result, BadRow):
            assert repr(result) == repr(template(row))


def test_a_pair_of_the_same_tokens_is_no_pair():
    """Texts may differ in what the chat template trims, or the tokenizer normalises."""
    trims = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    rows = [
        (make(trims), pair([user("hi")], [assistant("yes ")], [assistant("yes")])),
        (lower_case(), pair("hi", " Yes", " yes")),
    ]
    for tokenizer, row in rows:
        with pytest.raises(BadRow, match=r"column 'rejected': equal responses: found the same \d tokens as in chosen"):
            Template(tokenizer)(row)


def lower_case():
    tokenizer = make(None, eos="<eos>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


# ---- length ----


@pytest.mark.parametrize("adds_bos", [False, True], ids=["no BOS", "BOS"])
def test_prompts_are_cut_on_the_left(adds_bos):
    tokenizer = make(None, adds_bos=adds_bos, eos="<eos>")
    whole = Template(tokenizer)(pair("a b c d e f g", " 1 2 3", " 1")).examples[0]
    longest = len(whole.responses[0].tokens)
    for max_length in range(longest + 1, longest + len(whole.prompt) + 3):
        result = Template(tokenizer, max_length)(pair("a b c d e f g", " 1 2 3", " 1"))
        (example,) = result.examples
        n = min(len(whole.prompt), max_length - longest)
        assert len(example.prompt) == n
        assert result.cut == (n < len(whole.prompt))
        assert list(example.prompt[adds_bos:]) == list(whole.prompt[len(whole.prompt) - n + adds_bos :])
        assert not adds_bos or example.prompt[0] == tokenizer.bos_token_id
        assert all(list(a.tokens) == list(b.tokens) for a, b in zip(example.responses, whole.responses))


def test_a_response_is_never_cut():
    template = Template(make(None, eos="<eos>"), max_length=4)
    assert len(template(demonstration("a", "1 2")).examples[0].responses[0].tokens) == 3
    with pytest.raises(
        BadRow, match="column 'rejected': too long: found a response of 4 tokens; want at most 3, one"
    ) as e:
        template(pair("a", "1", "1 2 3"))
    assert e.value.reason == "too long"


@pytest.mark.parametrize("adds_bos", [False, True], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("words", range(1, 12))
def test_documents_are_chunked(adds_bos, words):
    tokenizer = make(adds_bos=adds_bos, template=None, eos="<eos>")
    text = " ".join("abcdefg"[i % 7] for i in range(words))
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    chunks = Template(tokenizer, max_length=4)(document(text), "novels").examples
    assert [token for chunk in chunks for token in chunk.responses[0].tokens] == whole
    sizes = [len(chunk.responses[0].tokens) for chunk in chunks]
    assert max(sizes) <= 4
    assert min(sizes) > 1  # a token alone would be predicted from nothing
    assert len(sizes) == -(-len(whole) // 4)
    for chunk in chunks:
        assert (chunk.kind, len(chunk.prompt), chunk.source, chunk.row) == ("document", 0, "novels", 2)
        assert np.isnan(chunk.responses[0].target)
    assert len(Template(tokenizer)(document(text)).examples) == 1


def test_fingerprint():
    tokenizer = make()
    template = Template(tokenizer, 64)
    same = template.fingerprint()
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves its mark on the tokenizer
    assert template.fingerprint() == same == Template(make(), 64).fingerprint()
    others = [
        Template(make(), 65),
        Template(make(UNMARKED), 64),
        Template(make(), 64, chat_template=PLAIN_TEMPLATE),
        Template(make(eos="<eos>"), 64),
        Template(make(adds_bos=True), 64),
    ]
    assert len({same, *(other.fingerprint() for other in others)}) == 6


def test_tokens_do_not_depend_on_what_the_tokenizer_was_told_before():
    tokenizer = make()
    template = Template(tokenizer)
    before = template(demonstration("a b c", " d e f")).examples[0]
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    after = template(demonstration("a b c", " d e f")).examples[0]
    assert list(before.prompt) == list(after.prompt)
    assert list(before.responses[0].tokens) == list(after.responses[0].tokens)
