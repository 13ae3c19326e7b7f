"""The trainer's optimiser step equals that of TRL's trainers where the two objectives coincide.

The same rows go through our data path and through TRL's; compared are their tokens, the losses of several steps and
the weights after the last.  Where we differ from TRL by design, a test shows the difference and its reason.

TRL is imported inside, so that without it these tests fail instead of passing unseen.
"""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tokenizers import processors
from torch.utils.data import SequentialSampler

from uft.config import UnifiedConfig
from uft.data import load_feedback
from uft.trainer import UnifiedTrainer

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

BETA = 0.3
# the same for both trainers; beta2 is close to beta1, so that Adam does not blow up rounding where gradients vanish
COMMON = {
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
    "save_strategy": "no", "max_length": 128, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 1,
    "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_epsilon": 1e-4, "num_train_epochs": 1,
}  # fmt: skip

PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:", "1 + 2 =", "good:", "a b c", "? 3 g"]
GOOD = [
    " hello world", " the cat sat on the mat and on the hat", " c", " good bye good bye world", " 3", " bye bye bye",
    " d e f g", " the cat sat on the mat",
]  # fmt: skip
BAD = [" mat the on", " b", " a b c d e f g 1 2 3", " hello", " the cat sat", " g", " hello hello world", " 3"]
# ChatML as models have it: a newline behind the token that ends a turn
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the same with nothing behind the last turn, where TRL's tokens and ours are the same
TIGHT = CHATML.replace(
    "{% endif %}{{ '\n' }}{% endfor %}", "{% endif %}{{ '\n' if not loop.last }}{% endfor %}"
).replace("{{ '<|im_start|>assistant", "{{ '\n<|im_start|>assistant")


def says(role, text):
    return [{"role": role, "content": text.strip()}]


def pairs(conversational=False):
    return [
        {
            "prompt": says("user", prompt) if conversational else prompt,
            "chosen": says("assistant", good) if conversational else good,
            "rejected": says("assistant", bad) if conversational else bad,
        }
        for prompt, good, bad in zip(PROMPTS, GOOD, BAD)
    ]


def demonstrations(conversational=False):
    rows = pairs(conversational)
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def labels(conversational=False):
    """Desired and undesired responses, five and three."""
    sides = ["chosen", "rejected", "rejected", "chosen", "chosen", "chosen", "rejected", "chosen"]
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for side, row in zip(sides, pairs(conversational))
    ]


def conversations():
    """Several turns of the assistant, between others'."""
    return [
        {
            "messages": [
                *(says("system", "say a b c") if i % 2 else []),
                *says("user", PROMPTS[i]),
                *says("assistant", GOOD[i]),
                *says("user", PROMPTS[-i]),
                *says("assistant", BAD[i]),
            ]
        }
        for i in range(len(PROMPTS))
    ]


@cache
def tokenizer(bos=False, template=TIGHT):
    made = tiny_tokenizer()
    made.chat_template = template
    if bos:
        bos_token = [("<bos>", made.bos_token_id)]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=bos_token
        )
    return made


def policy_and_reference():
    """Two models, so that rewards are not 0 at the start."""
    policy, reference = tiny_model(tokenizer(), seed=0), tiny_model(tokenizer(), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return policy, reference


# ---- tokens ----


def our_tokens(rows, tokenizer):
    """(prompt, [response tokens], [mask]) of every row."""
    data, report = load_feedback(rows, tokenizer, max_length=128)
    assert report.ok
    found = []
    for example in data:
        masks = [np.ones(len(r.tokens), bool) if r.in_loss is None else r.in_loss for r in example.responses]
        found.append(
            (example.prompt.tolist(), [r.tokens.tolist() for r in example.responses], [m.tolist() for m in masks])
        )
    return found


def trl_trainer(name, rows, output_dir, processing_class, policy=None, reference=None, **options):
    import trl
    from datasets import Dataset

    policy = policy or policy_and_reference()[0]
    options = COMMON | {"gradient_checkpointing": False, "train_sampling_strategy": "sequential"} | options
    config = getattr(trl, f"{name}Config")(output_dir=str(output_dir), **options)
    with_reference = {} if name == "SFT" else {"ref_model": reference or policy_and_reference()[1]}
    return getattr(trl, f"{name}Trainer")(
        model=policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=processing_class,
        **with_reference,
    )  # fmt: skip


@pytest.mark.parametrize("bos", ["none", "tokenizer's", "template's", "both"])
@pytest.mark.parametrize("conversational", [False, True], ids=["strings", "conversations"])
def test_tokens_of_pairs(conversational, bos, tmp_path):
    """The same but for one BOS: where the tokenizer puts one in front of every text and the chat template writes none,
    TRL's conversations have none and ours do, as the model's pretraining had."""
    written = bos in ("template's", "both")
    known = tokenizer(bos in ("tokenizer's", "both"), "{{ bos_token }}" * written + TIGHT)
    theirs = trl_trainer("DPO", pairs(conversational), tmp_path, known).train_dataset
    added = [known.bos_token_id] if conversational and bos == "tokenizer's" else []
    ours = our_tokens(pairs(conversational), known)
    for row, (prompt, responses, _) in zip(theirs, ours, strict=True):
        assert prompt == added + row["prompt_ids"]
        assert responses == [row["chosen_ids"], row["rejected_ids"]]
        assert prompt.count(known.bos_token_id) == (bos in ("tokenizer's", "both") or (written and conversational))
        assert all(tokens.index(known.eos_token_id) == len(tokens) - 1 for tokens in responses)


@pytest.mark.parametrize("conversational", [False, True], ids=["strings", "conversations"])
def test_tokens_of_demonstrations(conversational, tmp_path):
    rows = demonstrations(conversational)
    theirs = trl_trainer("SFT", rows, tmp_path, tokenizer(), completion_only_loss=True).train_dataset
    ours = our_tokens(rows, tokenizer())
    assert [(row["input_ids"], row["labels"]) for row in theirs] == [
        (prompt + tokens, [-100] * len(prompt) + tokens) for prompt, (tokens,), _ in ours
    ]


def test_tokens_of_conversations_of_several_turns(tmp_path):
    theirs = trl_trainer("SFT", conversations(), tmp_path, tokenizer(), assistant_only_loss=True).train_dataset
    ours = our_tokens(conversations(), tokenizer())
    for row, (prompt, (tokens,), (mask,)) in zip(theirs, ours, strict=True):
        assert row["input_ids"] == prompt + tokens
        assert row["labels"] == [-100] * len(prompt) + [t if counts else -100 for t, counts in zip(tokens, mask)]
        assert mask.count(False) > 5  # the other's turn in the middle


def test_tokens_of_labels(tmp_path):
    theirs = trl_trainer("KTO", labels(), tmp_path, tokenizer()).train_dataset
    ours = our_tokens(labels(), tokenizer())
    assert [(row["prompt_ids"], [row["completion_ids"]]) for row in theirs] == [row[:2] for row in ours]


def test_what_a_template_writes_behind_the_last_turn_is_no_response_of_ours(tmp_path):
    """ChatML ends each turn with a newline behind <|im_end|>.  TRL trains on that newline as part of the response; a
    model in use never gets to write it, since generation stops at <|im_end|>, so it is not in our response."""
    chatml = tokenizer(template=CHATML)
    newline = chatml("\n")["input_ids"]
    theirs = trl_trainer("DPO", pairs(True), tmp_path, chatml).train_dataset
    for row, (prompt, responses, _) in zip(theirs, our_tokens(pairs(True), chatml), strict=True):
        assert row["prompt_ids"] == prompt
        assert [row["chosen_ids"], row["rejected_ids"]] == [tokens + newline for tokens in responses]


def test_a_turn_that_the_template_does_not_end_gets_an_end_from_us(tmp_path):
    """TRL adds EOS to strings only; a conversation ends as the template has it, and where that writes no end the model
    would never learn to stop."""
    endless = tokenizer(template=TIGHT.replace("+ '<|im_end|>' }}{% endgeneration", "}}{% endgeneration"))
    theirs = trl_trainer("DPO", pairs(True), tmp_path, endless).train_dataset
    for row, (_, responses, _) in zip(theirs, our_tokens(pairs(True), endless), strict=True):
        assert [row["chosen_ids"], row["rejected_ids"]] == [tokens[:-1] for tokens in responses]
        assert all(tokens[-1] == endless.eos_token_id for tokens in responses)


def test_a_token_across_the_boundary(tmp_path):
    """TRL takes the end of the prompt out of the sequence and into the response; we tokenise the two apart, so that
    training sees the prompt that generation will see."""
    rows = [{"prompt": "the ca", "chosen": "t sat", "rejected": "t on"}]
    known = tokenizer()
    theirs = trl_trainer("DPO", rows, tmp_path, known).train_dataset[0]
    ((prompt, (chosen, _), _),) = our_tokens(rows, known)
    assert known.decode(theirs["prompt_ids"]) != "the ca" == known.decode(prompt)
    assert known.decode(theirs["prompt_ids"] + theirs["chosen_ids"]) == known.decode(prompt + chosen)
    assert known.decode(chosen[:-1]) == "t sat"


# ---- steps ----


class InOrder(UnifiedTrainer):
    """Rows in the order of the data set, as TRL's "sequential"."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset or self.train_dataset)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def our_run(objective, rows, output_dir, processing_class=None, **options):
    policy, reference = policy_and_reference()
    run = InOrder(
        model=policy, objective=objective, args=UnifiedConfig(output_dir=str(output_dir), **COMMON | options),
        train_dataset=copy.deepcopy(rows), processing_class=processing_class or tokenizer(), reference=reference,
    )  # fmt: skip
    run.train()
    return run


def their_run(name, rows, output_dir, processing_class=None, **options):
    run = trl_trainer(name, rows, output_dir, processing_class or tokenizer(), **options)
    run.train()
    return run


def assert_same_run(ours, theirs, steps):
    """Losses and gradient norms of every step, and the weights after the last, to 1e-5."""
    assert len(logged(ours)) == len(logged(theirs)) == steps
    np.testing.assert_allclose(logged(ours), logged(theirs), rtol=1e-5)
    np.testing.assert_allclose(logged(ours, "grad_norm"), logged(theirs, "grad_norm"), rtol=1e-4)
    assert len(set(logged(ours))) >= steps - 1  # the first is taken at a learning rate of 0
    assert difference(ours.model, theirs.model) <= 1e-5


def difference(model, other):
    """Of the weights, relative to the way they went in training."""
    before, after, wanted = (weights_of(m) for m in (policy_and_reference()[0], model, other))
    gone = sum((wanted[name] - before[name]).square().sum() for name in before).sqrt()
    assert gone > 0.01
    return float(sum((wanted[name] - after[name]).square().sum() for name in before).sqrt() / gone)


@pytest.mark.parametrize("conversational", [False, True], ids=["strings", "conversations"])
def test_dpo_with_likelihood_of_chosen(conversational, tmp_path):
    rows, size = pairs(conversational) * 2, {"per_device_train_batch_size": 3}
    objective = {"preset": "dpo_chosen_nll", "beta": BETA, "preference_weight": 0.8, "sft_weight": 0.5}
    ours = our_run(objective, rows, tmp_path / "a", **size)
    theirs = their_run(
        "DPO", rows, tmp_path / "b", loss_type=["sigmoid", "sft"], loss_weights=[0.8, 0.5], beta=BETA, **size
    )
    assert_same_run(ours, theirs, steps=6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        np.testing.assert_allclose(logged(ours, name), logged(theirs, name), rtol=1e-4, atol=1e-5)
    assert logged(ours, "rewards/accuracies") == pytest.approx(logged(theirs, "rewards/accuracies"))


def test_mpo(tmp_path):
    rows, size = pairs() * 2, {"per_device_train_batch_size": 4}
    ours = our_run({"preset": "mpo", "beta": BETA}, rows, tmp_path / "a", **size)
    theirs = their_run(
        "DPO", rows, tmp_path / "b", loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=BETA,
        **size,
    )  # fmt: skip
    assert_same_run(ours, theirs, steps=4)


SUPERVISED = {
    "strings": (demonstrations, {"completion_only_loss": True}),
    "conversations": (lambda: demonstrations(True), {"completion_only_loss": True}),
    "several turns": (conversations, {"assistant_only_loss": True}),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", SUPERVISED)
def test_sft(kind, accumulation, tmp_path):
    """TRL's SFTTrainer divides by the tokens of the whole step, as we do, so accumulation changes nothing.  Eight rows
    in threes and then in ones: the last step is a short one."""
    make, options = SUPERVISED[kind]
    size = {"per_device_train_batch_size": 3 if accumulation == 1 else 1, "gradient_accumulation_steps": accumulation}
    ours = our_run("sft", make(), tmp_path / "a", num_train_epochs=2, **size)
    theirs = their_run("SFT", make(), tmp_path / "b", num_train_epochs=2, **options, **size)
    assert_same_run(ours, theirs, steps=6)


def test_sft_on_chatml(tmp_path):
    """The newline behind the last turn, which TRL keeps, bears no loss where only the assistant's tokens do."""
    chatml, size = tokenizer(template=CHATML), {"per_device_train_batch_size": 4}
    ours = our_run("sft", conversations(), tmp_path / "a", chatml, **size)
    theirs = their_run("SFT", conversations(), tmp_path / "b", chatml, assistant_only_loss=True, **size)
    assert_same_run(ours, theirs, steps=2)


@pytest.mark.parametrize("conversational", [False, True], ids=["strings", "conversations"])
def test_kto(conversational, tmp_path):
    """TRL pairs each prompt with the response before it in its micro-batch, we with the one before it in the data set;
    where one micro-batch holds the data set these are the same."""
    rows, size = labels(conversational), {"per_device_train_batch_size": 8, "num_train_epochs": 4}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    ours = our_run({"preset": "kto", "beta": BETA, **weights}, rows, tmp_path / "a", **size)
    theirs = their_run("KTO", rows, tmp_path / "b", beta=BETA, **weights, **size)
    assert_same_run(ours, theirs, steps=4)
    assert max(logged(theirs, "kl")) > 0.05  # not clamped everywhere
    names = {"kl/preference": "kl", "rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected"}
    for name, their_name in names.items():
        np.testing.assert_allclose(logged(ours, name), logged(theirs, their_name), rtol=1e-4, atol=1e-6)


def test_kto_over_several_micro_batches_of_a_data_set(tmp_path):
    """Steps of a part of the data set agree where the pairs do: here every micro-batch ends with the same response."""
    rows, size = labels(), {"per_device_train_batch_size": 4}
    rows[3] |= {key: rows[7][key] for key in ("completion", "label")}
    ours = our_run({"preset": "kto", "beta": BETA}, rows, tmp_path / "a", **size)
    theirs = their_run("KTO", rows, tmp_path / "b", beta=BETA, **size)
    assert_same_run(ours, theirs, steps=2)


# ---- what TRL's step depends on and ours does not ----

LAYOUTS = [(8, 1), (4, 2), (2, 4)]  # rows per micro-batch, micro-batches per step: the same eight rows


def changes(run):
    """How far the first step's loss and the weights after it move when the same rows are cut up otherwise."""
    whole, *parts = [run(per_device_train_batch_size=n, gradient_accumulation_steps=k) for n, k in LAYOUTS]
    loss = [abs(logged(part)[0] / logged(whole)[0] - 1) for part in parts]
    return loss, [difference(part.model, whole.model) for part in parts]


@pytest.mark.parametrize(
    "objective, trainer, rows, options",
    [
        ("dpo_chosen_nll", "DPO", pairs, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
        ("kto", "KTO", labels, {}),
    ],
    ids=["sft term", "KL of KTO"],
)
def test_layout_of_the_step(objective, trainer, rows, options, tmp_path):
    """TRL averages its sft term per micro-batch and then over them, so a token of a short micro-batch weighs more, and
    estimates KTO's KL from each micro-batch alone (and refuses micro-batches of one row)."""
    objective = {"preset": objective, "beta": BETA}
    plain = {"optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0, "max_grad_norm": 0.0}
    loss, weights = changes(lambda **layout: our_run(objective, rows(), tmp_path, **plain, **layout))
    assert max(loss) <= 1e-5 and max(weights) <= 1e-5
    loss, weights = changes(
        lambda **layout: their_run(trainer, rows(), tmp_path, beta=BETA, **plain, **options, **layout)
    )
    assert min(loss) > 1e-3 and min(weights) > 1e-3
