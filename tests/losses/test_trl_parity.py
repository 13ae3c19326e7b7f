"""Equality with TRL's own code: its trainers run on a tiny model, and our functions get the log-probabilities they saw.

Compared are the loss and its gradient with respect to every token's log-probability, which the mean over the batch
cannot hide.  Policy and reference are different models; responses differ in length and are padded.
"""

import inspect
import warnings
from contextlib import contextmanager

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from uft.losses import PAIRWISE, POINTWISE, implicit_reward, orpo, response_logp, token_nll

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

BETA = 0.3
PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:"]
CHOSEN = [" hello world", " the cat sat on the mat and on the hat", " c", " good bye good bye world"]
REJECTED = [" mat the on", " b", " a b c d e f g 1 2 3", " hello"]


@pytest.fixture(scope="module")
def models():
    """(tokenizer, policy, reference); the policy is the reference and some noise."""
    tokenizer = tiny_tokenizer(chat_template=False)
    policy, reference = tiny_model(tokenizer, seed=0), tiny_model(tokenizer, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return tokenizer, policy, reference


@pytest.fixture
def arguments(tmp_path):
    return {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": len(CHOSEN), "gradient_checkpointing": False, "beta": BETA,
    }  # fmt: skip


def pairs():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})


@contextmanager
def outputs_of(model):
    """The outputs of this model's forward passes, as its caller gets them."""
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def call(function, found, options):
    wanted = inspect.signature(function).parameters
    return function(**{key: value for key, value in found.items() if key in wanted}, **options)


def assert_same(theirs, ours, leaf, counts):
    """Loss to 1e-5, and its gradient at the positions of `leaf` that count to 1e-5 of its largest entry."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    their_gradient, our_gradient = (torch.autograd.grad(x, leaf, retain_graph=True)[0][counts] for x in (theirs, ours))
    scale = their_gradient.abs().max()
    assert scale > 0
    torch.testing.assert_close(our_gradient / scale, their_gradient / scale, rtol=1e-5, atol=1e-5)


def paired(logp, length, reference_logp=None):
    """What a pairwise loss may ask for, from rows that are chosen first and rejected after."""
    found = {"beta": BETA}
    names = {"logp": logp, "length": length.float()}
    if reference_logp is not None:
        names |= {"reference_logp": reference_logp, "reward": implicit_reward(logp, reference_logp, BETA)}
    for name, value in names.items():
        found[f"chosen_{name}"], found[f"rejected_{name}"] = value.chunk(2)
    return found


# --- DPOTrainer ---------------------------------------------------------------------------------------------------

# TRL's loss_type, our name, TRL's configuration, our options
DPO_LOSSES = [
    ("sigmoid", "dpo", {}, {}),
    ("sigmoid", "dpo", {"label_smoothing": 0.2}, {}),  # which TRL's sigmoid does not look at
    ("sigmoid_norm", "dpo_norm", {}, {}),
    ("hinge", "hinge", {}, {}),
    ("ipo", "ipo", {}, {}),
    ("exo_pair", "exo", {"label_smoothing": 1e-3}, {"label_smoothing": 1e-3}),
    ("exo_pair", "exo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("nca_pair", "nca", {}, {}),
    ("robust", "robust_dpo", {}, {"label_smoothing": 0.0}),
    ("robust", "robust_dpo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("bco_pair", "bco_pair", {}, {}),
    ("sppo_hard", "sppo", {}, {}),
    ("apo_zero", "apo_zero", {}, {}),
    ("apo_down", "apo_down", {}, {}),
    ("discopop", "discopop", {}, {}),
    ("discopop", "discopop", {"discopop_tau": 0.5}, {"tau": 0.5}),
]


@pytest.fixture
def dpo_run(models, arguments):
    """Runs TRL's DPOTrainer on one batch: its loss and the log-probabilities of policy and reference."""
    from trl import DPOConfig, DPOTrainer

    def run(loss_type, **config):
        tokenizer, policy, reference = models
        trainer = DPOTrainer(
            model=policy, ref_model=reference, processing_class=tokenizer, train_dataset=pairs(),
            args=DPOConfig(**arguments, loss_type=loss_type, **config),
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        with outputs_of(policy) as seen, outputs_of(reference) as seen_by_reference:
            loss = trainer.compute_loss(policy, batch)
        (output,), (reference_output,) = seen, seen_by_reference
        return loss, output.log_probs, reference_output.log_probs, batch["completion_mask"][:, 1:].bool()

    return run


@pytest.mark.parametrize("loss_type, name, config, options", DPO_LOSSES)
def test_dpo_trainer(dpo_run, loss_type, name, config, options):
    loss, token_logp, reference_token_logp, in_response = dpo_run([loss_type], **config)
    logp, reference_logp = response_logp(token_logp, in_response), response_logp(reference_token_logp, in_response)
    found = paired(logp, in_response.sum(-1), reference_logp)
    margin = found["chosen_reward"] - found["rejected_reward"]
    assert margin.abs().min() > 1e-3 and margin.min() < 0 < margin.max(), "the batch would not tell losses apart"
    assert_same(loss, call(PAIRWISE[name], found, options).mean(), token_logp, in_response)


def test_dpo_trainer_sft(dpo_run):
    """The mean over the tokens of the chosen responses."""
    loss, token_logp, _, in_response = dpo_run(["sft"])
    chosen = in_response & (torch.arange(len(in_response)) < len(CHOSEN))[:, None]
    assert_same(loss, token_nll(token_logp)[chosen].mean(), token_logp, in_response)


def test_dpo_trainer_mpo(dpo_run):
    """Several losses with weights, as MPO has them."""
    loss, token_logp, reference_token_logp, in_response = dpo_run(
        ["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]
    )
    logp, reference_logp = response_logp(token_logp, in_response), response_logp(reference_token_logp, in_response)
    found = paired(logp, in_response.sum(-1), reference_logp)
    chosen = in_response & (torch.arange(len(in_response)) < len(CHOSEN))[:, None]
    dpo, bco_pair = (call(PAIRWISE[name], found, {}).mean() for name in ("dpo", "bco_pair"))
    assert_same(loss, 0.8 * dpo + 0.2 * bco_pair + token_nll(token_logp)[chosen].mean(), token_logp, in_response)


# --- KTOTrainer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type, name", [("kto", "kto"), ("apo_zero_unpaired", "apo_zero_unpaired")])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
@pytest.mark.parametrize("exchanged", [False, True], ids=["", "exchanged"])
def test_kto_trainer(models, arguments, loss_type, name, weights, exchanged):
    """Once with policy and reference exchanged, so that the mean log-ratio has either sign and is clamped once."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    tokenizer, policy, reference = models
    if exchanged:
        policy, reference = reference, policy
    # three desired responses and five undesired ones, interleaved
    labels = [True, False, False, True, False, False, True, False]
    rows = {"prompt": PROMPTS * 2, "completion": CHOSEN + REJECTED, "label": labels}
    desirable_weight, undesirable_weight = weights
    trainer = KTOTrainer(
        model=policy, ref_model=reference, processing_class=tokenizer, train_dataset=Dataset.from_dict(rows),
        args=KTOConfig(
            **arguments | {"per_device_train_batch_size": len(labels)}, loss_type=loss_type,
            train_sampling_strategy="sequential",
            desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
        ),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    with outputs_of(policy) as seen, outputs_of(reference) as seen_by_reference:
        loss = trainer.compute_loss(policy, batch)

    def log_ratio(output, reference_output, mask):
        in_response = mask[:, 1:].bool()
        return response_logp(output.log_probs, in_response), response_logp(reference_output.log_probs, in_response)

    # the mismatched responses come first, where the loss asks for them
    logp, reference_logp = log_ratio(seen[-1], seen_by_reference[-1], batch["completion_mask"])
    found = {
        "reward": implicit_reward(logp, reference_logp, BETA),
        "target": torch.as_tensor(batch["label"]).float(),
        "beta": BETA,
    }
    options = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    if name == "kto":
        assert len(seen) == len(seen_by_reference) == 2
        mismatched, mismatched_reference = log_ratio(seen[0], seen_by_reference[0], batch["KL_completion_mask"])
        found["kl"] = (mismatched - mismatched_reference).mean()
        assert found["kl"].abs() > 0.1 and (found["kl"] > 0) == exchanged
    assert_same(
        loss, call(POINTWISE[name], found, options).mean(), seen[-1].log_probs, batch["completion_mask"][:, 1:].bool()
    )


# --- CPOTrainer and ORPOTrainer -----------------------------------------------------------------------------------


def logits_and_labels(trainer, model, run):
    """TRL's loss, the logits it was made of, and the labels of prompt and response (chosen rows, then rejected)."""
    batch = next(iter(trainer.get_train_dataloader()))
    with outputs_of(model) as seen:
        loss = run(batch)
    (output,) = seen
    joined = trainer.concatenated_inputs(batch, padding_value=trainer.processing_class.pad_token_id)
    input_ids, attention_mask, labels = (
        joined[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")
    )
    token_logp = output.logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return loss, output.logits, token_logp, labels[:, 1:] != -100, attention_mask[:, 1:].bool()


# TRL's loss_type, our name, TRL's configuration, our options
CPO_LOSSES = [
    ("sigmoid", "cpo", {}, {}),
    ("sigmoid", "cpo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("sigmoid", "dpo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),  # with a uniform reference
    ("simpo", "simpo", {}, {}),
    ("simpo", "simpo", {"simpo_gamma": 1.0, "label_smoothing": 0.2}, {"gamma": 1.0, "label_smoothing": 0.2}),
]


@pytest.mark.parametrize("loss_type, name, config, options", CPO_LOSSES)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_cpo_trainer(models, arguments, loss_type, name, config, options, alpha):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOConfig, CPOTrainer

    tokenizer, policy, _ = models
    trainer = CPOTrainer(
        model=policy, processing_class=tokenizer, train_dataset=pairs(),
        args=CPOConfig(**arguments, loss_type=loss_type, cpo_alpha=alpha, max_length=64, **config),
    )  # fmt: skip
    loss, logits, token_logp, in_response, _ = logits_and_labels(
        trainer, policy, lambda batch: trainer.get_batch_loss_metrics(policy, batch)[0]
    )
    logp = response_logp(token_logp, in_response)
    found = paired(logp, in_response.sum(-1), torch.zeros_like(logp))
    chosen = in_response & (torch.arange(len(in_response)) < len(CHOSEN))[:, None]
    ours = call(PAIRWISE[name], found, options).mean() + alpha * token_nll(token_logp)[chosen].mean()
    assert_same(loss, ours, logits, ...)


def test_orpo_trainer(models, arguments):
    """TRL's `beta` is the weight of the odds-ratio term, and its likelihood counts the prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    tokenizer, policy, _ = models
    trainer = ORPOTrainer(
        model=policy, processing_class=tokenizer, train_dataset=pairs(), args=ORPOConfig(**arguments, max_length=64)
    )
    loss, logits, token_logp, in_response, in_text = logits_and_labels(
        trainer, policy, lambda batch: trainer.get_batch_loss_metrics(policy, batch)[0]
    )
    found = paired(response_logp(token_logp, in_response), in_response.sum(-1))
    chosen = in_text & (torch.arange(len(in_text)) < len(CHOSEN))[:, None]
    ours = token_nll(token_logp)[chosen].mean() + BETA * call(orpo, found, {}).mean()
    assert_same(loss, ours, logits, ...)
