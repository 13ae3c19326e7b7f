"""Generating against a plain loop that runs the model on each prompt alone; what is measured of the text, by hand."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from tests.data.tiny_tokenizers import THINKS, WITH_BOS, make, user
from tests.tiny import tiny_model, tiny_tokenizer
from uft.data.readers import TextExample
from uft.data.template import Template
from uft.evaluation.generation import Generation, behaviour, generate, is_refusal, refusal_rates
from uft.responding import Sampler

PROMPTS = ["the cat", "a", [user("hello world good bye a b c")], "1 2 3 + = ? the mat sat", [user("g")], "hello hello"]
NEW = 12


def model_of(tokenizer, architecture, seed=0):
    if architecture == "gpt2":  # learnt positions: padding that moves them is loud
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(config)
        with torch.no_grad():
            model.transformer.wpe.weight.mul_(3)
        return model
    return tiny_model(tokenizer, seed, architecture)


def with_frequent_eos(model, eos, strength=2.0):
    """A bias on the head raises the logit of EOS."""
    head = model.get_output_embeddings()
    bias = torch.zeros(head.out_features)
    bias[eos] = strength
    head.bias = torch.nn.Parameter(bias)
    return model


@torch.no_grad()
def alone(model, tokenizer, prompt, temperature=0.0, seed=0, place=0, new=NEW):
    """Tokens of one response, the model run on the whole sequence for each, without cache or padding."""
    model.eval()
    ids = Template(tokenizer).prompt(prompt).tolist()
    uniform = np.random.default_rng([seed, place]).random(new)
    written = []
    for t in range(new):
        logits = model(torch.tensor([ids + written])).logits[0, -1].double()
        if temperature:
            below = (logits / temperature).softmax(-1).cumsum(-1)
            token = int((below <= uniform[t] * below[-1]).sum())
        else:
            token = int(logits.argmax())
        written.append(token)
        if token == tokenizer.eos_token_id:
            break
    return written


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_is_what_the_model_says_of_each_prompt_alone(architecture, temperature):
    tokenizer = tiny_tokenizer()
    model = with_frequent_eos(model_of(tokenizer, architecture), tokenizer.eos_token_id)
    wanted = [alone(model, tokenizer, p, temperature, 3, i) for i, p in enumerate(PROMPTS)]
    ended = [ids[-1] == tokenizer.eos_token_id for ids in wanted]
    assert any(ended) and not all(ended) and len({tuple(ids) for ids in wanted}) > 4, "inputs that show nothing"
    for batch_size in (1, 2, 4, 100):
        found = generate(
            model, tokenizer, PROMPTS, max_new_tokens=NEW, temperature=temperature, seed=3, batch_size=batch_size
        )
        assert [g.prompt for g in found] == PROMPTS
        assert [g.tokens for g in found] == [len(ids) for ids in wanted]
        assert [g.ended for g in found] == ended
        assert [g.text for g in found] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]


def asked(model):
    """Has the model note the input of each prefill."""
    seen, original = [], model.forward

    def forward(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            seen.append((kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist()))
        return original(*args, **kwargs)

    model.forward = forward
    return seen


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("chat_template", [None, WITH_BOS, THINKS])
def test_prompts_are_those_of_training(chat_template, adds_bos):
    tokenizer = make(chat_template, adds_bos)
    model = tiny_model(tokenizer, 0)
    seen = asked(model)
    prompts = ["the cat", [user("hello")]]
    generate(model, tokenizer, prompts, max_new_tokens=1, batch_size=1)
    template = Template(tokenizer)
    of_training = [
        template(TextExample("demonstration", "the cat", (" sat",), (1.0,))),
        template(TextExample("demonstration", prompts[1], ([{"role": "assistant", "content": "a"}],), (1.0,))),
    ]
    found = {tuple(ids[0]) for ids, _ in seen}
    for row in of_training:
        prompt = row.examples[0].prompt.tolist()
        assert prompt.count(tokenizer.bos_token_id) == int(adds_bos or (chat_template == WITH_BOS and prompt[0] == 2))
        # a template that opens the answer with more than a finished turn has keeps what it opens it with
        assert any(list(ids[: len(prompt)]) == prompt for ids in found)
    assert len({i for ids in found for i in range(1, len(ids)) if ids[i] == tokenizer.bos_token_id}) == 0


def test_a_chat_template_can_be_given_and_special_tokens_meant():
    tokenizer = make(None)
    model = tiny_model(tokenizer, 0)
    seen = asked(model)
    generate(model, tokenizer, [[user("a")]], max_new_tokens=1, chat_template="{{ messages[0]['content'] }} b")
    assert tokenizer.decode(seen[0][0][0]) == "a b"
    with pytest.raises(ValueError, match=r"prompt 1: .*special_tokens"):
        generate(model, tokenizer, ["a", "a<eos>"], max_new_tokens=1)
    generate(model, tokenizer, ["b", "a<eos>"], max_new_tokens=1, special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<eos>") in seen[1][0][1] + seen[1][0][0]


def test_batches_are_of_alike_lengths_and_padded_on_the_left():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, 0)
    seen = asked(model)
    lengths = [5, 30, 6, 31]
    generate(model, tokenizer, ["a" * n for n in lengths], max_new_tokens=1, batch_size=2)
    assert [sorted(map(sum, mask)) for _, mask in seen] == [[30, 31], [5, 6]]
    for _, mask in seen:
        assert all(row == sorted(row) for row in mask)


def test_nothing_outside_changes():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.pad_token = None  # EOS takes its place
    model = tiny_model(tokenizer, 0)
    model.train()
    model.model.layers[0].eval()  # a part that was frozen on purpose
    model.generation_config.repetition_penalty = 1.7
    config, modes = model.generation_config, [m.training for m in model.modules()]
    before = config.to_dict()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    generate(model, tokenizer, PROMPTS, max_new_tokens=3, temperature=1.0, seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert model.generation_config is config and config.to_dict() == before
    assert [m.training for m in model.modules()] == modes
    assert tokenizer.padding_side == "right" and tokenizer.pad_token is None

    def fails(*args, **kwargs):
        raise RuntimeError("no more memory")

    model.forward = fails
    with pytest.raises(RuntimeError, match="no more memory"):
        generate(model, tokenizer, ["a"])
    assert [m.training for m in model.modules()] == modes and model.generation_config is config


def test_settings_that_come_with_a_model_do_not_count_but_for_eos():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, 0)
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=NEW)
    for name, value in dict(repetition_penalty=1.7, no_repeat_ngram_size=1, top_k=1, suppress_tokens=[5]).items():
        setattr(model.generation_config, name, value)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=NEW) == plain

    first = alone(model, tokenizer, "the cat")
    assert len(first) > 3
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, first[2]]
    found = generate(model, tokenizer, ["the cat"], max_new_tokens=NEW)[0]
    assert (found.tokens, found.ended) == (first.index(first[2]) + 1, True)


def test_seeds_and_temperature():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, 0)

    def sampled(seed, temperature=1.0, prompts=("the cat",) * 4):
        return [
            g.text for g in generate(model, tokenizer, prompts, max_new_tokens=16, seed=seed, temperature=temperature)
        ]

    assert sampled(0) == sampled(0) != sampled(1)
    assert len(set(sampled(0))) == 4  # each place in the list has its own luck
    assert sampled(0, 1e-4) == sampled(7, 1e-4) == sampled(0, 0.0)


def test_samples_have_the_probabilities():
    """p = softmax(log [1, 2, 0, 5] / T) at T = 1 is [1, 2, 0, 5] / 8, at T = 1/2 [1, 4, 0, 25] / 30."""
    n = 4000
    logits = torch.tensor([1.0, 2.0, 0.0, 5.0]).log().expand(n, 4)
    even = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    for temperature, wanted in [(1.0, [1 / 8, 2 / 8, 0, 5 / 8]), (0.5, [1 / 30, 4 / 30, 0, 25 / 30])]:
        left = Sampler(even, temperature)(torch.zeros(n, 3, dtype=torch.long), logits)
        assert ((left == 0).sum(-1) == 1).all() and torch.isneginf(left).sum() == 3 * n
        assert torch.allclose((left == 0).double().mean(0), torch.tensor(wanted).double(), atol=1 / n)
    # neither end falls on a token without probability
    edges = torch.tensor([[0.0], [1.0 - 2.0**-53]], dtype=torch.float64)
    impossible = torch.tensor([0.0, 1.0, 1.0, 0.0]).log().expand(2, 4)
    assert Sampler(edges, 1.0)(torch.zeros(2, 1, dtype=torch.long), impossible).argmax(-1).tolist() == [1, 2]


def test_with_an_adapter():
    tokenizer = tiny_tokenizer()
    base = tiny_model(tokenizer, 0)
    plain = generate(base, tokenizer, PROMPTS, max_new_tokens=NEW)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=NEW)
    wanted = [alone(model, tokenizer, p) for p in PROMPTS]
    assert [g.text for g in found] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
    assert found != plain


def test_what_is_refused():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, 0)
    assert generate(model, tokenizer, []) == []
    with pytest.raises(ValueError, match="a string"):
        generate(model, tokenizer, "the cat")
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(model, tokenizer, ["a"], temperature=-1)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, tokenizer, ["a"], max_new_tokens=0)
    with pytest.raises(ValueError, match="prompt 1: found no token"):
        generate(model, tokenizer, ["a", ""])
    with pytest.raises(ValueError, match="prompt 1: found 250 tokens and 7 to come; want at most 256"):
        generate(model, tokenizer, ["a", "x" * 250], max_new_tokens=7)
    generate(model, tokenizer, ["a", "x" * 250], max_new_tokens=6)


# --- behaviour ----------------------------------------------------------------------------------------------------


def written(text, tokens=1, ended=True):
    return Generation("", text, tokens, ended)


def test_behaviour_by_hand():
    """ "a b a b a b": its 4-grams are abab, baba, abab: 1 of 3 was there before.  "C d.": no 4-gram.

    Together: words a b a b a b c d . : 5 different of 9; pairs ab ba ab ba ab, cd d. : 4 of 7; triples aba bab aba bab,
    cd. : 3 of 5.
    """
    found = behaviour([written("a b a b a b", 7, True), written("C d.", 4, False)])
    assert found == {
        "length": 5.5,
        "length_characters": 7.5,
        "ended": 0.5,
        "repetition": pytest.approx(1 / 3),
        "distinct_1": pytest.approx(5 / 9),
        "distinct_2": pytest.approx(4 / 7),
        "distinct_3": pytest.approx(3 / 5),
        "refusal": 0.0,
    }


def test_repetition_is_within_responses_and_diversity_between_them():
    twice = behaviour([written("one two three four")] * 2)
    assert twice["repetition"] == 0.0 and twice["distinct_3"] == 0.5
    assert behaviour([written("a b a b a b a b")])["repetition"] == 3 / 5  # abab baba abab baba abab
    assert behaviour([written("!" * 12)])["repetition"] == pytest.approx(8 / 9)  # a loop without spaces: 9 grams, 1 new
    nothing = behaviour([written("", 1)])
    assert nothing["repetition"] == nothing["distinct_1"] == 0.0
    with pytest.raises(ValueError, match="at least one"):
        behaviour([])


def test_refusals_are_those_of_the_given_function():
    texts = [written("No."), written("Sure.")]
    assert behaviour(texts, refusal=lambda text: text == "No.")["refusal"] == 0.5
    assert refusal_rates(texts, [True, True], refusal=lambda text: text == "No.") == {"refusal": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I cannot help with that.",
        "I’m sorry, but I cannot assist you with this request.",
        "I can’t provide instructions for that.",
        "Sorry, I\nwon't do that.",
        "I am unable to answer this question.",
        "As an AI language model, I am not able to browse the web.",
        "I will not write that.",
        "I can't in good conscience recommend this.",
        "I must respectfully decline to answer.",
        "I apologize, but we are unable to do so.",
        "I'm not comfortable with this.",
        "I do not feel comfortable writing that.",
    ],
)
def test_what_is_a_refusal(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, I can help with that.",
        "I'm sorry for your loss. Here is a letter.",
        "I can't wait to help you plan!",
        "You cannot provide too much water to a cactus.",
        "As an AI, I find this fun: 1 + 1 = 2.",
        "The committee refused to answer.",
        "A story. " * 40 + "I cannot help you, said the wizard.",  # not in the opening
    ],
)
def test_what_is_none(text):
    assert not is_refusal(text)


def test_refusal_rates_by_hand():
    no, yes = written("I can't help with that."), written("Of course.")
    generations, should = [no, yes, no, yes, yes], [True, True, False, False, False]
    assert refusal_rates(generations, should) == {"refusal": 1 / 2, "false_refusal": 1 / 3}
    assert refusal_rates(generations, should, ["drugs", "arms", "arms", "arms", "drugs"]) == {
        "refusal": 1 / 2,
        "refusal/drugs": 1.0,
        "refusal/arms": 0.0,
        "false_refusal": 1 / 3,
        "false_refusal/arms": 1 / 2,
        "false_refusal/drugs": 0.0,
    }
    with pytest.raises(ValueError, match="5 generations and 1 should_refuse"):
        refusal_rates(generations, [True])
    with pytest.raises(ValueError, match="5 generations and 2 groups"):
        refusal_rates(generations, should, ["a", "b"])
