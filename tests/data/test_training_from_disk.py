"""Training on tokens that lie on disk is training on the same tokens in memory."""

import json

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from uft.config import UnifiedConfig
from uft.data import Source
from uft.data.columns import Examples
from uft.trainer import UnifiedTrainer

ROWS = {
    "demonstrations": [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(12)],
    "labels": [{"prompt": f"say {i % 4}", "completion": f" {i}", "label": i % 3 == 0} for i in range(12)],
}


def trained(folder, sources, **args):
    tokenizer = tiny_tokenizer()
    run = UnifiedTrainer(
        tiny_model(tokenizer, 0),
        {"sft": {"loss": "nll", "on": "demonstrations"}, "kto": {"loss": "kto", "on": "labels"}},
        UnifiedConfig(
            output_dir=str(folder / "run"),
            use_cpu=True,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=3,
            report_to="none",
            disable_tqdm=True,
            **args,
        ),
        train_dataset=sources,
        eval_dataset=sources,
        processing_class=tokenizer,
    )
    run.train()
    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_weights(tmp_path, workers):
    sources = {}
    for name, rows in ROWS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[name] = {"path": str(path), "streaming": name == "labels"}
    memory = trained(tmp_path, {name: Source(name, data=rows) for name, rows in ROWS.items()})
    disk = trained(tmp_path, sources, data_cache=str(tmp_path / "kept"), dataloader_num_workers=workers)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    for one, other in zip(memory.model.parameters(), disk.model.parameters()):
        assert torch.equal(one, other)
    assert memory.train_dataset.fingerprint == disk.train_dataset.fingerprint
    assert disk.reports["train"]["labels"].kept == 12
    examples = disk.train_dataset.examples
    assert isinstance(examples["demonstrations"], Examples)
    for columns in (examples["demonstrations"].columns, examples["labels"].examples.columns):
        assert columns.folder.parent == tmp_path / "kept"
