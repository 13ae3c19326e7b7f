"""Tokenizers that differ in what has gone wrong elsewhere: BOS added twice, EOS not written, ..."""

from tokenizers import processors

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# the template writes BOS too
WITH_BOS = "{{ bos_token }}" + CHAT_TEMPLATE
# a finished turn is rendered otherwise once another follows, as in templates that drop earlier thoughts
FORGETS = UNMARKED.replace(
    "{{ m['content'] }}<|im_end|>\n{% else", "{% if loop.last %}{{ m['content'] }}{% endif %}\n{% else"
)
# the prompt to generate opens the answer with more than a finished turn has
THINKS = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
# only the last turn of the assistant is marked
MARKS_LAST = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if loop.last %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n"
    "{% endfor %}"
)
REFUSES = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def make(template: str | None = CHAT_TEMPLATE, adds_bos: bool = False, eos: str = "<|im_end|>"):
    """The tiny tokenizer with this chat template, with a BOS put in front of every text or not, with this EOS."""
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}
