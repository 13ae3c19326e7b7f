"""A checkpoint is whole, or it is refused by name; of another run it is refused too; a full disk costs no older one."""

import dataclasses
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from mixed import dataset, model, parameters, trainer
from peft import LoraConfig
from transformers import TrainerCallback

from uft import checkpoint as checkpoints
from uft import manifest, run_identity
from uft.checkpoint import check_writable, is_whole, last_checkpoint, superfluous
from uft.config import UnifiedConfig
from uft.presets import make_objective
from uft.run_identity import ARGUMENTS

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
BASE = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}


def run(folder, objective="dpo_nll", kinds=("demonstrations", "pairs"), policy=None, **options):
    return trainer(objective, dataset(kinds), policy, output_dir=folder, **BASE | options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run(folder).train()
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


# ---- torn ----


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def zeroed(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\x01" * 64 if not any(content[middle : middle + 64]) else bytes(64)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
             "run_identity.json", "config.json"],
)  # fmt: skip
@pytest.mark.parametrize("tear, said", [(cut, "bytes; want"), (zeroed, "other bytes"), (Path.unlink, "no such file")])
def test_a_torn_checkpoint_is_refused_and_the_one_before_it_used(name, tear, said, folder, monkeypatch):
    warnings = []
    monkeypatch.setattr(checkpoints.logger, "warning", warnings.append)
    torn = folder / "checkpoint-4"
    tear(torn / name)
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert str(torn / name) in warnings[0] and said in warnings[0]
    with pytest.raises(ValueError, match=f"cannot resume: {torn / name}: .*{said}.*checkpoint-2 is whole"):
        checkpoints.check_whole(torn)


def test_training_goes_on_from_the_whole_one(folder, made):
    cut(folder / "checkpoint-4" / "optimizer.pt")
    again = run(folder)
    with pytest.raises(ValueError, match=r"optimizer\.pt: found .* bytes; want"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    again.train(resume_from_checkpoint=True)
    for name in ("model.safetensors", "optimizer.pt"):
        assert (folder / "checkpoint-4" / name).read_bytes() == (made / "checkpoint-4" / name).read_bytes()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"files": 3}', '{"files": {"a": {}}}'])
def test_without_its_list_of_files_it_is_torn(content, folder):
    path = folder / "checkpoint-4" / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    assert not is_whole(path.parent)
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")


def test_an_edited_card_is_no_damage(folder):
    (folder / "checkpoint-4" / "README.md").write_text("mine")
    assert is_whole(folder / "checkpoint-4")


def test_of_a_long_file_the_ends_and_pieces_between_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MIB", 16)
    path = tmp_path / "long"
    size = 16 * 64 * 100
    path.write_bytes(bytes(size))
    whole = manifest.checksum(path)
    for position, noticed in ((0, True), (size - 1, True), (size // 63, True), (100, False)):
        content = bytearray(size)
        content[position] = 1
        path.write_bytes(content)
        assert (manifest.checksum(path) != whole) == noticed, position


# ---- of another run ----

OTHERS = {
    "objective": ({"objective": {"sft": {"loss": "nll"}, "preference": {"loss": "ipo"}}}, "objective.preference.loss"),
    "beta": ({"objective": {"preset": "dpo_nll", "beta": 0.3}}, "objective.preference.beta is 0.1 there and 0.3 here"),
    "data": ({"kinds": ("demonstrations",), "objective": "sft"}, "data.sources.pairs"),
    "shape": ({"policy": {"hidden_size": 16}}, "model.parameters is 22,?432 there"),
    "reference": ({"policy": {"seed": 1}}, "frozen_weights.of_the_reference"),
    "batch": ({"per_device_train_batch_size": 2}, "per_device_train_batch_size is 4 there and 2 here"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 1 there and 2 here"),
    "seed": ({"seed": 1}, "seed is 42 there and 1 here"),
    "learning rate": ({"learning_rate": 0.5}, "learning_rate is 0.01 there and 0.5 here"),
    "padding": ({"padding_side": "left"}, "padding_side"),
    "layout": ({"layout": "padded"}, "packed is true there and false here"),
    "configuration": ({"policy": {"rms_norm_eps": 0.1}}, "configuration is"),
    "weight": ({"objective": {"sft": {"loss": "nll", "weight": 2.0}, "preference": {"loss": "dpo"}}}, "sft.weight"),
}


def test_an_adapter_of_another_scale_is_another_run(tmp_path):
    run(tmp_path, "sft", ("demonstrations",), peft_config=LORA).train()
    other = dataclasses.replace(LORA, lora_alpha=64)
    with pytest.raises(ValueError, match=r"adapter is"):
        run(tmp_path, "sft", ("demonstrations",), peft_config=other).train(resume_from_checkpoint=True)


def test_weights_over_time_are_compared_by_their_values():
    constant, falling, slower = (
        run_identity._objective(make_objective("dpo_nll").with_weights(sft=weight))
        for weight in (1.0, lambda p: 1 - p, lambda p: 1 - p / 2)
    )
    assert falling != slower != constant
    assert falling == run_identity._objective(make_objective("dpo_nll").with_weights(sft=lambda p: 1 - p))


def test_checkpoints_that_are_newer_by_name_alone_go_first(tmp_path):
    """Torn ones that were passed over, or those of an older run, must not outlive what was just written."""
    for step in (3, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    written = tmp_path / "checkpoint-4"
    assert [path.name for path in superfluous(tmp_path, 1, None, written)] == ["checkpoint-6", "checkpoint-3"]
    assert [path.name for path in superfluous(tmp_path, 2, None, written)] == ["checkpoint-6"]
    assert [path.name for path in superfluous(tmp_path, 1, None)] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("other", OTHERS)
def test_another_runs_checkpoint_is_refused(other, folder):
    options, said = OTHERS[other]
    options = dict(options)
    if "policy" in options:
        options["policy"] = model(**options["policy"])
    with pytest.raises(ValueError, match=f"checkpoint-4: is of another run: .*{said}"):
        run(folder, **options).train(resume_from_checkpoint=True)
    assert is_whole(folder / "checkpoint-4")


def test_an_adapter_does_not_go_on_over_another_base(tmp_path):
    run(tmp_path, "sft", ("demonstrations",), model(), peft_config=LORA).train()
    with pytest.raises(ValueError, match=r"frozen_weights\.under_the_adapter"):
        run(tmp_path, "sft", ("demonstrations",), model(seed=1), peft_config=LORA).train(resume_from_checkpoint=True)


def test_a_cached_reference_belongs_to_the_run(tmp_path):
    run(tmp_path, reference="cached").train()
    with pytest.raises(ValueError, match=r"frozen_weights\.of_the_reference"):
        run(tmp_path, policy=model(seed=1), reference="cached").train(resume_from_checkpoint=True)


def test_what_may_change_between_a_run_and_its_resumption(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    again = run(
        tmp_path / "elsewhere", max_steps=6, save_steps=5, logging_steps=2, eval_strategy="steps", eval_steps=3,
        eval_dataset=dataset(("pairs",), n=3), save_total_limit=1, per_device_eval_batch_size=2,
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_a_difference_that_is_accepted(folder):
    refused = {"per_device_train_batch_size": 8, "learning_rate": 0.02, "max_steps": 6}
    with pytest.raises(ValueError, match=r"`resume_despite: \[per_device_train_batch_size, learning_rate\]`"):
        run(folder, **refused).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"resume_despite: \[learning_rate\]"):
        run(folder, **refused, resume_despite=["per_device_train_batch_size"]).train(resume_from_checkpoint=True)
    again = run(folder, **refused, resume_despite=["per_device_train_batch_size", "learning_rate"])
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_weights_of_another_shape_cannot_be_accepted(folder):
    with pytest.raises(ValueError, match=r"model\.parameters") as raised:
        run(folder, policy=model(hidden_size=16), resume_despite=["all"]).train(resume_from_checkpoint=True)
    assert "resume_despite" not in str(raised.value)


def test_weights_alone_are_not_gone_on_from(tmp_path):
    run(tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match="optimiser_state is false there and true here"):
        run(tmp_path).train(resume_from_checkpoint=True)


def test_the_arguments_compared_are_arguments():
    known = {*UnifiedConfig.__dataclass_fields__, "world_size", "warmup_ratio"}  # the last in older transformers only
    assert set(ARGUMENTS) <= known


# ---- a disk that takes no more ----


class FullAfter(TrainerCallback):
    """From a step on, no file may be longer than so many bytes: what writers meet on a full disk, in all of them."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("limit, first", [(60_000, "model.safetensors"), (130_000, "optimizer.pt")])
def test_a_disk_that_is_full_while_a_checkpoint_is_written(limit, first, tmp_path):
    sizes = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as raised:
            run(tmp_path, callbacks=[FullAfter(3, limit)]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
    said = str(raised.value)
    assert f"{tmp_path}/checkpoint-4: the checkpoint could not be written" in said and "\n" not in said
    assert f"{tmp_path}/checkpoint-2 is the newest whole one" in said
    assert is_whole(tmp_path / "checkpoint-2")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["checkpoint-2"]  # no half of one
    again = run(tmp_path)
    again.train(resume_from_checkpoint=True)
    other = run(tmp_path / "other")
    other.train()
    assert torch.equal(parameters(again.model), parameters(other.model))


@pytest.mark.parametrize("moment", ["write_manifest", "publish"])
def test_no_space_at_the_last_moment(moment, tmp_path, monkeypatch):
    real = getattr(checkpoints, moment)

    def full(path, *rest):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *rest)

    monkeypatch.setattr(checkpoints, moment, full)
    with pytest.raises(OSError, match=r"checkpoint-4: .*No space left on device.*checkpoint-2 is the newest whole one"):
        run(tmp_path).train()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["checkpoint-2"]


def test_a_full_disk_under_the_reference_cache(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("uft.logps.np.savez", full)
    with pytest.raises(OSError, match=r"_reference-.*npz: .*could not be written \(No space left on device\)"):
        run(tmp_path, reference="cached").train()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_known_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run: cannot be written to \(Not a directory\)"):
        check_writable(tmp_path / "file" / "run")
    again = run(tmp_path / "run")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
    with pytest.raises(OSError, match=r"run: cannot be written to \(Read-only\); want a folder"):
        again.train()
    assert again.state.global_step == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
def test_a_folder_of_somebody_elses(tmp_path):
    tmp_path.chmod(0o555)
    os.seteuid(65534)
    try:
        with pytest.raises(OSError, match=r"cannot be written to \(Permission denied\)"):
            check_writable(tmp_path)
    finally:
        os.seteuid(0)


def test_a_corrupted_cache_of_data_is_refused_by_name(tmp_path):
    """A folder of `Dataset.save_to_disk`, whose table is cut short, or whose description is no JSON."""
    import datasets

    from uft.data.sources import DataError, Source, read_rows

    rows = [{"prompt": f"p {i}", "completion": " c" * 50} for i in range(200)]
    for tear, name in ((cut, "data-00000-of-00001.arrow"), (lambda p: p.write_text("{"), "state.json")):
        folder = tmp_path / name
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if tear is cut else tear(path)
        with pytest.raises(DataError, match=f"{folder}: found a folder that cannot be loaded"):
            list(read_rows(Source("cached", folder)))


def test_the_identity_is_small_and_readable(made):
    found = json.loads((made / "checkpoint-4" / "run_identity.json").read_text())
    assert found["data"]["sources"] == {"demonstrations": [8, 1.0], "pairs": [8, 1.0]}
    assert found["objective"]["preference"]["beta"] == 0.1
