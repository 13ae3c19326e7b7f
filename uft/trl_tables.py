"""The tables of docs/from_trl.md, written from `uft.trl_names`:  python -m uft.trl_tables docs/from_trl.md"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from uft.trl_names import ARGUMENTS, DPO, KTO, NAMES, OTHERS, REFUSED, SAME, SFT, TRANSLATED, Name

REWARD = ("RewardConfig",)
# of TRL's RewardConfig: for `uft.rlhf.reward_config.RewardConfig`, which takes no other names
OF_REWARD = (
    Name("model_init_kwargs", REWARD, None, REFUSED, "want a loaded model"),
    Name("trust_remote_code", REWARD, False, REFUSED, "want a loaded model"),
    Name("chat_template_path", REWARD, None, REFUSED, "want the tokenizer with that template"),
    Name("disable_dropout", REWARD, True, SAME, ""),
    Name("dataset_num_proc", REWARD, None, REFUSED, "the tokenizer's own threads work on all rows"),
    Name("eos_token", REWARD, None, REFUSED, "want the tokenizer with that token"),
    Name("max_length", REWARD, 1024, SAME, "", "a response that does not fit is a bad row; TRL leaves the pair out"),
    Name("pad_to_multiple_of", REWARD, "auto", REFUSED, "batches are padded to their longest row"),
    Name("center_rewards_coefficient", REWARD, None, SAME, "`None` is 0.0"),
    Name("activation_offloading", REWARD, False, REFUSED, "want gradient_checkpointing"),
    Name("pad_token", REWARD, None, REFUSED, "want tokenizer.pad_token set"),
)


class Default(NamedTuple):
    """A field that both have, with another default."""

    name: str
    theirs: dict[str, object]
    ours: object
    text: str


_ALIKE = lambda value: dict.fromkeys((SFT, DPO, KTO), value)
DEFAULTS = (
    Default("learning_rate", {SFT: 2e-5, DPO: 1e-6, KTO: 1e-6}, 2e-5, "one default cannot suit all objectives; where "
            "TRL's names say what the objective is and no rate is given, a warning tells"),
    Default("bf16", _ALIKE(None), False, "TRL's None is True unless fp16 is on; ours is as in transformers, so that a "
            "laptop runs the same script. Set `bf16=True` on a GPU that has it"),
    Default("gradient_checkpointing", _ALIKE(True), None, "off, for speed; `token_budget` bounds memory without "
            "computing anything twice"),
    Default("logging_nan_inf_filter", _ALIKE(True), False, "a loss that is not finite stops the run (`on_non_finite`)"),
    Default("remove_unused_columns", _ALIKE(True), False, "columns are chosen by the kind of the data"),
    Default("train_sampling_strategy", {SFT: "random", DPO: "random", KTO: "sequential"}, "random", "the responses "
            "that KTO's KL is estimated from are those of neighbours in the data set, whatever the order of training"),
)  # fmt: skip


class Metric(NamedTuple):
    theirs: str
    ours: str
    text: str = ""


METRICS = (
    Metric("loss, grad_norm, learning_rate, epoch", "the same", "`loss` is the mean of the steps since the last log"),
    Metric("rewards/chosen, rewards/rejected, rewards/margins", "the same", "`margins` of pairs only"),
    Metric("rewards/accuracies", "the same", "a tie is half right; TRL counts it as wrong, and so starts at 0"),
    Metric("logps/chosen, logps/rejected", "the same"),
    Metric("kl", "kl/preference", "KTO's estimate, in nats per response, of the whole step"),
    Metric("num_tokens", "the same", "a resumed run goes on counting; TRL's starts again"),
    Metric("entropy", "entropy", "only where a term compares whole distributions (`kl_weight`)"),
    Metric("mean_token_accuracy", "–", "`uft eval` measures generations"),
    Metric("logits/chosen, logits/rejected", "–", "logits are never formed"),
    Metric("aux_loss", "–", "there is none"),
    Metric("eval_loss, eval_SPLIT_loss", "the same", "exact means, whatever the batch size"),
    Metric("–", "loss/TERM, weight/TERM", "each term by itself"),
    Metric("–", "SOURCE/nll, SOURCE/...", "each data set by itself"),
)  # fmt: skip


def tables() -> dict[str, str]:
    """Each table by the name of its markers."""
    ours = {SAME: "same", TRANSLATED: "→", REFUSED: "✗"}
    rows = [[_code(row.name), _of(row), _shown(row.default), ours[row.state], _sentence(row)] for row in NAMES]
    reward = [[_code(row.name), _shown(row.default), ours[row.state], _sentence(row)] for row in OF_REWARD]
    others = [[_code(row.name), ", ".join(row.of), ours[row.state], row.text] for row in OTHERS]
    arguments = [[_code(row.name), ", ".join(row.of), ours[row.state], row.text] for row in ARGUMENTS]
    defaults = [
        [_code(row.name), " / ".join(_shown(row.theirs[c]) for c in (SFT, DPO, KTO)), _shown(row.ours), row.text]
        for row in DEFAULTS
    ]
    return {
        "arguments": table(["argument", "of", "here", "what it means here"], arguments),
        "fields": table(["field", "of", "TRL's default", "here", "what it means here"], rows),
        "defaults": table(["field", "TRL: SFT / DPO / KTO", "ours", "why"], defaults),
        "others": table(["name", "of", "here", "what it means here"], others),
        "transformers": table(["field", "why it is refused"], [[_code(n), why] for n, why in _of_transformers()]),
        "reward": table(["field", "TRL's default", "here", "what it means here"], reward),
        "metrics": table(["TRL", "here", ""], [[_codes(m.theirs), _codes(m.ours), m.text] for m in METRICS]),
    }


def _of_transformers() -> Iterable[tuple[str, str]]:
    from uft.config import MEANINGLESS

    yield from MEANINGLESS.items()
    yield "label_smoothing_factor", "smoothing is an option of a term's loss"
    yield "neftune_noise_alpha", "with noise in the policy's embeddings alone, rewards would not start at 0"
    yield "train_sampling_strategy", "other than random: the mixture of data sets decides the order"
    yield "enable_jit_checkpoint", "SIGTERM saves a checkpoint anyway"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _sentence(row: Name) -> str:
    differs = f"At the default: {row.differs}" if row.differs else ""
    return ". ".join(part for part in (row.text, differs) if part)


def _of(row: Name) -> str:
    return ", ".join(name.removesuffix("Config") for name in row.of)


def _code(name: str) -> str:
    return f"`{name}`"


def _codes(names: str) -> str:
    return ", ".join(_code(name) if re.fullmatch(r"[\w/]+", name) else name for name in names.split(", "))


def _shown(value: object) -> str:
    return f"`{value!r}`".replace("'", '"')


def written(text: str) -> str:
    """A page with every table in it made anew, between its markers `<!-- table NAME -->` and `<!-- end -->`."""
    for name, made in tables().items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"found no markers of table {name!r}; want <!-- table {name} --> and <!-- end -->")
        text = pattern.sub(lambda match, made=made: match[1] + made + "\n" + match[2], text, count=1)
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
