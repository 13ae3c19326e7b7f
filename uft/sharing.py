"""What of a run's folder is shared, and its way to the hub.

    shared       weights as safetensors, their index and configuration, tokenizer and chat template, the card
                 (README.md), the record (run.json), licences, code that the model brings (modeling_*.py)
    not shared   optimizer, scheduler, random states, pickled arguments, checkpoints and stages, data, caches, samples,
                 evaluations sample by sample, whatever else lies there

Folders of this machine are named nowhere in what is shared: of a path its last part is kept (uft/redaction.py), and an
adapter on a base model from a folder names no base model, since that name would mean somebody else's model on the hub.
Whether it was a folder is known from the record, wherever this is called.

What is shared is laid out in a folder of its own, by hard links where possible, so that training can go on and remove
checkpoints while an upload is under way.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from uft.model_card import TAGS, write_model_card
from uft.record import write_json
from uft.redaction import is_folder, without_paths

logger = logging.get_logger(__name__)

SHARED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template.*", "README.md", "run.json", "LICENSE*", "NOTICE*",
    "modeling_*.py", "configuration_*.py", "tokenization_*.py",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
RECORD = "run.json"
CARD = "README.md"
ASIDE = "sharing-"  # what the folders begin with in which uploads are laid out
# which models, tokenizers and adapters say where they were loaded from
_ORIGINS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file")
_CONFIGURATIONS = ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json")


def shared_files(folder: str | Path) -> list[Path]:
    """The files of a folder that are shared; of its subfolders only further chat templates."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if any(path.match(pattern) for pattern in SHARED)]
    return sorted(path for path in [*found, *(folder / TEMPLATES).glob("*.jinja")] if path.is_file())


def lay_out_shared(folder: Path, aside: Path, card: Path, record: Mapping[str, Any] | None = None) -> None:
    """Links to what is shared of a folder, and copies without paths of what says where things came from.

    card     where the README.md is; a checkpoint's own is peft's, which names folders
    record   instead of the folder's run.json
    """
    keep = _keeper(folder, record)
    for path in shared_files(folder):
        to = aside / path.relative_to(folder)
        if path.name in _CONFIGURATIONS:
            write_json(to, _without_origins(json.loads(path.read_text(encoding="utf-8")), keep))
        elif path.name == RECORD:
            write_json(to, without_paths(json.loads(path.read_text(encoding="utf-8")), folder))
        elif path.name != CARD:
            to.parent.mkdir(exist_ok=True)
            link(path, to)
    if card.exists():
        link(card, aside / CARD)
    if record is not None:
        write_json(aside / RECORD, without_paths(record, folder))


def link(path: Path, new: Path) -> None:
    """A second name of a file; a copy where the file system has none."""
    try:
        os.link(path, new)
    except OSError:
        shutil.copy(path, new)


def _keeper(folder: Path, record: Mapping[str, Any] | None) -> Callable[[Any], bool]:
    """Which names of models may be shared: the base model's, if the record of the training says that it is on the hub.

    Whether `models/base` was a folder is seen from where training ran, and perhaps from nowhere else; without a record
    it is looked for in the model's folder and the folders around that.
    """
    if record is None:
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            record = {}
    models = [each["model"] for each in record.get("stages") or [record] if "base" in each.get("model", {})]
    if not models:
        return lambda name: not is_folder(name, folder)
    return lambda name: name == models[-1]["base"]


def _without_origins(values: Any, keep: Callable[[Any], bool]) -> Any:
    if not isinstance(values, dict):
        return values
    return {k: None if k in _ORIGINS and not keep(v) else _without_origins(v, keep) for k, v in values.items()}


@dataclass(frozen=True)
class Shared:
    """A folder and the repository on the hub that it is pushed to, which is there.

    Shared.at("runs/first", "me/first").push()
    """

    folder: Path
    repo: str
    token: str | None = None
    revision: str | None = None

    @classmethod
    def at(
        cls, folder: str | Path, repo: str | None = None, *, token: str | None = None, private: bool | None = None,
        revision: str | None = None,
    ) -> Shared:  # fmt: skip
        """Makes the repository unless it is there; by default it is called as the folder is.

        Raises OSError where the hub is out of reach or refuses.
        """
        name = repo or Path(folder).absolute().name
        with _in_a_sentence(
            f"{name}: the repository cannot be made on the hub", "a network and a token that may write"
        ):
            made = hf_api().create_repo(name, token=token, private=private, exist_ok=True)
        return cls(Path(folder), made.repo_id, token, revision)

    @classmethod
    def of(cls, args: TrainingArguments) -> Shared | None:
        """As `push_to_hub` and `hub_...` say; None where nothing is pushed, and on all ranks but the first."""
        if not args.push_to_hub or args.process_index:
            return None
        options = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
        return cls.at(args.output_dir, args.hub_model_id, **options)

    @property
    def name(self) -> str:
        return self.repo.split("/")[-1]

    def push(self, message: str = "End of training") -> Any:
        """What training or stages have written into the folder.  Raises ValueError where there are no weights."""
        if not any(path.suffix == ".safetensors" for path in shared_files(self.folder)):
            raise ValueError(f"{self.folder}: found no *.safetensors; want the folder of a trained model or adapter")
        options: dict[str, Any] = {"token": self.token, "revision": self.revision}
        return upload(self.folder, self.repo, within=self.folder, commit_message=message, **options)


def upload(
    folder: Path, repo: str, *, within: Path, record: Mapping[str, Any] | None = None, wait: bool = True, **options: Any
) -> Any:
    """Uploads what is shared of a folder.  Laid out in a folder `within`, which is gone when the upload is done."""
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=within))
    try:
        lay_out_shared(folder, aside, within / CARD, record)
        with _in_a_sentence(
            f"{folder}: cannot be uploaded to {repo}", "to try again: uft.sharing.Shared.at(...).push()"
        ):
            done = hf_api().upload_folder(repo_id=repo, folder_path=str(aside), run_as_future=not wait, **options)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if isinstance(done, Future):
        done.add_done_callback(lambda _: shutil.rmtree(aside, ignore_errors=True))
    else:
        shutil.rmtree(aside, ignore_errors=True)
    return done


@contextmanager
def _in_a_sentence(what: str, wanted: str) -> Iterator[None]:
    """What libraries raise without a network has as many types as there are reasons."""
    try:
        yield
    except Exception as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise OSError(f"{what} ({type(error).__name__}: {why}); want {wanted}") from error


class SharingTrainer(Trainer):
    """A Trainer that pushes what is meant to be shared, and not all of its folder."""

    _totals: dict[str, float]
    push_in_progress: Any

    def record(self, counters: Mapping[str, float] | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def create_model_card(
        self, model_name: str | None = None, dataset_name: Any = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """README.md of the output folder: objective, data, compute and measures of this run."""
        if self.is_world_process_zero():
            more = [tags] if isinstance(tags, str) else tags or []
            write_model_card(self.args.output_dir, self._own_record(), model_name, [*TAGS, *more])

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository.  Raises OSError where the hub is out of reach or refuses."""
        if self.is_world_process_zero():
            args = self.args
            token, private = token or args.hub_token, args.hub_private_repo if private is None else private
            self.hub_model_id = Shared.at(args.output_dir, args.hub_model_id, token=token, private=private).repo
            self.push_in_progress = None

    def _own_record(self) -> dict[str, Any]:
        # pushing happens on one rank alone, which cannot ask the others
        return self.record(self._totals if self.args.world_size > 1 else None)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Shares the model as it is now with card and record, see the top of the file; arguments as in transformers."""
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = token if token is not None else args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = kwargs.pop("model_name", None) or (args.hub_model_id or Path(args.output_dir).absolute().name)
        self.create_model_card(model_name=name.split("/")[-1], **kwargs)
        self._finish_current_push()
        return upload(
            Path(args.output_dir), self.hub_model_id, within=Path(args.output_dir), record=self._own_record(),
            wait=blocking, commit_message=commit_message, token=token, revision=revision or args.hub_revision,
        )  # fmt: skip

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Shares the model of a checkpoint while training goes on; the whole checkpoint, optimizer and paths included,
        only where hub_strategy asks for it."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.create_model_card((args.hub_model_id or Path(args.output_dir).absolute().name).split("/")[-1])
        when = f"step {self.state.global_step}"
        if args.save_strategy != SaveStrategy.STEPS:
            when = f"epoch {int(self.state.epoch or 0)}"
        options = {"commit_message": f"Training in progress, {when}", "token": args.hub_token}
        options |= {"revision": args.hub_revision}
        out, checkpoint = Path(args.output_dir), Path(checkpoint_folder)
        jobs = [upload(checkpoint, self.hub_model_id, within=out, record=self._own_record(), wait=False, **options)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            kept = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            options["commit_message"] += ", checkpoint"
            options |= {"path_in_repo": kept, "folder_path": str(checkpoint)}
            jobs.append(hf_api().upload_folder(repo_id=self.hub_model_id, run_as_future=True, **options))
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
