"""Evaluation of data the trainer was not made to evaluate: the same numbers, and clear words where there are none."""

import pytest
import torch
from mixed import dataset, model, trainer

from uft.collation import Collator
from uft.feedback import mismatched
from uft.models import FrozenReference, score

OBJECTIVE = {
    "sft": {"loss": "nll", "weight": 0.5},
    "preference": {"loss": "dpo"},
    "kto": {"loss": "kto", "on": "labels"},
}
KINDS = ("demonstrations", "pairs", "labels")


def other():
    """Not the data of training."""
    return dataset(KINDS, n=5)


def made(**options):
    run = trainer(OBJECTIVE, dataset(KINDS), per_device_eval_batch_size=4, **options)
    run.reference = FrozenReference(model(seed=1))  # no term at its trivial starting value
    return run


def numbers(metrics, prefix="eval"):
    """Without the times."""
    found = {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second", "epoch"))}
    assert all(name.startswith(f"{prefix}_") for name in found)
    return {name.removeprefix(f"{prefix}_"): value for name, value in found.items()}


@pytest.fixture(scope="module")
def expected():
    """Those of a trainer that was made with the data."""
    return numbers(made(eval_dataset=other()).evaluate())


def test_other_data_give_the_numbers_of_a_trainer_made_with_them(expected):
    assert {f"loss/{name}" for name in OBJECTIVE} <= expected.keys()
    run = made(eval_dataset=dataset(("pairs",), n=2))
    assert numbers(run.evaluate(other())) == expected
    assert numbers(run.evaluate({"far": other()}), "eval_far") == expected
    assert numbers(made().evaluate(other())) == expected
    assert run.evaluate()["eval_loss"] != expected["loss"]  # its own data are still those


def test_prediction_is_evaluation_under_another_name(expected):
    output = made().predict(other())
    assert output.predictions is None and output.label_ids is None
    assert numbers(output.metrics, "test") == expected
    assert numbers(made().predict(other(), metric_key_prefix="held_out").metrics, "held_out") == expected


@torch.no_grad()
def test_the_numbers_by_hand(expected):
    reference = FrozenReference(model(seed=1))

    def scored(kind):
        batch = Collator(0, sources=KINDS)(mismatched(dataset((kind,), n=5)[:], kinds=("label",)))
        found = score(model(), batch, reference)
        return found, found.logp - found.reference_logp

    demonstrations, _ = scored("demonstrations")
    sft = -demonstrations.logp.sum() / demonstrations.length.sum()
    _, ratio = scored("pairs")
    dpo = -torch.nn.functional.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()
    labels, ratio = scored("labels")
    other_prompt = labels.batch.rows("mismatched")
    kl = ratio[other_prompt].mean()
    assert kl > 0.01  # or it would be taken for 0
    sign = 2.0 * labels.batch.target[~other_prompt] - 1
    kto = torch.sigmoid(-0.1 * sign * (ratio[~other_prompt] - kl)).mean()
    for name, value in {"sft": sft, "preference": dpo, "kto": kto}.items():
        assert expected[f"loss/{name}"] == pytest.approx(value.item(), rel=1e-5), name
    parts = 0.5 * expected["loss/sft"] + expected["loss/preference"] + expected["loss/kto"]
    assert expected["loss"] == pytest.approx(parts, rel=1e-6)


def test_the_data_of_training_are_not_prepared_twice():
    """They have the mismatched responses of KTO's KL already."""
    run = made(eval_dataset=dataset(KINDS))
    assert run.evaluate(run.train_dataset)["eval_loss"] == run.evaluate()["eval_loss"]
    again = trainer(OBJECTIVE, run.train_dataset, eval_dataset=run.eval_dataset)
    assert again.train_dataset.fingerprint == run.train_dataset.fingerprint
    assert [len(e.responses) for e in again.eval_dataset] == [len(e.responses) for e in run.eval_dataset]


def renamed():
    data = other()
    return type(data)({"elsewhere": data.examples["pairs"], "pairs": data.examples["pairs"]})


@pytest.mark.parametrize("how", ["evaluate", "predict"])
def test_unknown_sources_are_refused(how):
    run = made(eval_dataset=other())
    with pytest.raises(ValueError, match="data set 'elsewhere' is none of those the trainer was made with"):
        getattr(run, how)(renamed())
    with pytest.raises(ValueError, match="found list to evaluate on; want a FeedbackDataset"):
        getattr(run, how)([{"prompt": "a", "completion": "b"}])
    run = trainer("sft", dataset(("demonstrations",)))
    with pytest.raises(ValueError, match="'pairs' holds examples of kind pair, which no term of objective 'sft' uses"):
        getattr(run, how)(dataset(("pairs",)))


def test_a_cached_reference_knows_no_other_data(tmp_path):
    run = trainer("dpo", dataset(("pairs",)), reference="cached", output_dir=tmp_path)
    with pytest.raises(ValueError, match="reference 'cached' knows only the data sets the trainer was made with"):
        run.evaluate(dataset(("pairs",), n=5))
