"""`uft recipe`, `uft kernels`, `uft completion`, and the pages of help."""

import contextlib
import dataclasses
import os
import pty
import re
import select
import subprocess

import pytest
import torch
import yaml

from uft.cli import kernels, main
from uft.cli.commands import COMMANDS, Command
from uft.cli.completion import values_of
from uft.config import UnifiedConfig
from uft.models import REFERENCE_MODES
from uft.presets import make_objective
from uft.recipe import read_yaml

ALL = {
    f"{name} {word}".strip(): each
    for name, command in COMMANDS.items()
    for word, each in ({"": command} if isinstance(command, Command) else command).items()
}


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_a_page_with_an_example(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: uft {name}") and "example" in page and f"uft {name}" in page.partition("example")[2]


def test_every_key_of_a_recipe_is_listed(capsys):
    assert main(["train", "--help", "all"]) == 0
    page = capsys.readouterr().out
    assert "--token_budget" in page and "--per_device_train_batch_size" in page


def test_the_list_of_commands(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"  {name} " in page for name in ALL)
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("uft 0.")
    assert main(["data"]) == 2 and "uft data COMMAND" in capsys.readouterr().err
    assert main(["data", "--help"]) == 0 and "noise" in capsys.readouterr().out
    assert main(["trian"]) == 2 and "did you mean 'train'?" in capsys.readouterr().err
    assert main(["data", "xyz"]) == 2 and "want one of check, filter" in capsys.readouterr().err


def test_a_traceback_where_it_is_asked_for(capsys):
    assert main(["train", "--config", "lost.yaml"]) == 1
    assert capsys.readouterr().err == "uft: lost.yaml: no such file\n"
    with pytest.raises(ValueError, match="no such file"):
        main(["train", "--config", "lost.yaml", "--traceback"])


def test_recipes_come_along(capsys, tmp_path):
    assert main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert "first" in listed and "accelerate/fsdp2" in listed
    assert main(["recipe", "first"]) == 0
    (tmp_path / "first.yaml").write_text(text := capsys.readouterr().out)
    assert "#" in text and read_yaml(str(tmp_path / "first.yaml"))["objective"] == "dpo_nll"
    assert main(["recipe", "frist"]) == 1 and "want one of" in capsys.readouterr().err


def test_every_recipe_says_what_it_is(capsys):
    assert main(["recipe"]) == 0
    for line in capsys.readouterr().out.splitlines():
        name, _, about = line.partition(" ")
        assert about.strip() or name.endswith(".json"), f"recipe {name} has no comment at its top"
        assert main(["recipe", name]) == 0
        yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_keys(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "generate" in script
    assert shell == "tcsh" or ("--token_budget" in script and "--max_new_tokens" in script)  # tcsh: commands alone


def test_bash_completes(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "uft.bash").write_text(capsys.readouterr().out)

    def completed(*words):
        typed = " ".join(f"'{word}'" for word in ("uft", *words))
        ask = (
            f"source {tmp_path}/uft.bash; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; COMP_LINE='uft'; "
            "_shtab_uft uft; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        run = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
        return run.stdout.split()

    assert completed("tr") == ["train"]
    assert completed("data", "se") == ["select"]
    assert completed("train", "--token_b") == ["--token_budget"]
    assert completed("recipe", "fir") == ["first"]
    assert completed("train", "--objective", "dpo_n") == ["dpo_nll", "dpo_norm"]
    assert completed("train", "--config", "a.yaml", "--reference", "") == list(REFERENCE_MODES)
    assert completed("compare", "--lr_scheduler_type", "cosine_with_r") == ["cosine_with_restarts"]
    assert completed("sweep", "--layout", "pa") == ["packed", "padded"]
    assert completed("rl", "--advantage", "gr") == ["grpo"]
    assert completed("reward", "train", "--bf16", "t") == ["true"]


def test_values_of_completion_are_those_that_are_taken():
    for key, values in values_of("train").items():
        if key == "objective":
            assert all(map(make_objective, values))
        else:
            assert key in {field.name for field in dataclasses.fields(UnifiedConfig)} and len(values) > 1
    assert values_of("train")["save_strategy"] == ("no", "steps", "epoch", "best")
    assert values_of("chat") == {} and "objective" not in values_of("rl")


def test_bash_completes_names_of_files_with_spaces(capsys, tmp_path):
    (tmp_path / "my recipe.yaml").write_text("")
    (tmp_path / "my runs").mkdir()
    assert main(["completion", "bash"]) == 0
    (tmp_path / "uft.bash").write_text(capsys.readouterr().out)

    def typed(line):
        """What the command is given after a tab at the end of a line, in an interactive bash."""
        setup = "bind 'set enable-bracketed-paste off'; source uft.bash; uft() { printf 'GIVEN<%s>' \"$@\"; echo; }"
        shown, terminal = pty.openpty()
        run = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"], stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path,
            start_new_session=True, env=os.environ | {"TERM": "dumb"},
        )  # fmt: skip
        os.close(terminal)
        os.write(shown, f"{setup}\n{line}\t\nexit\n".encode())
        text = b""
        with contextlib.suppress(OSError):  # the end of a terminal whose shell is gone
            while select.select([shown], [], [], 20)[0] and (some := os.read(shown, 65536)):
                text += some
        run.kill()
        run.wait()
        os.close(shown)
        return re.findall(r"GIVEN<([^%]*?)>", text.decode())

    assert typed("uft train --config my\\ rec") == ["train", "--config", "my recipe.yaml"]
    assert typed("uft report my\\ ru") == ["report", "my runs/"]


# ---- uft kernels ----

SMALL = ["kernels", "--tokens", "16", "--hidden", "16", "--vocabulary", "200", "--rounds", "1", "--device", "cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_are_right_here(dtype, capsys):
    assert main([*SMALL, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    assert "all as exact as they must be" in out and out.count("trained head") == 2


def test_a_wrong_kernel_is_noticed(monkeypatch, capsys):
    name = "log-probability, trained head"
    ours, eager, trained = kernels.CASES[name]
    monkeypatch.setitem(kernels.CASES, name, (lambda x: ours(x) * (1 + 1e-4), eager, trained))
    assert main([*SMALL, "--dtype", "float32"]) == 1
    assert capsys.readouterr().out.endswith(f"less exact than they must be: {name}\n")


def test_what_is_timed_computes_the_same():
    inputs = kernels.make_inputs(12, 8, 50, torch.float64, "cpu")
    for ours, eager, trained in kernels.CASES.values():
        for x, y in zip(kernels.run(ours, inputs, trained), kernels.run(eager, inputs, trained)):
            assert (x is None) == (y is None) == (not trained and x is None)
            if x is not None:
                torch.testing.assert_close(x, y)


def test_numbers_that_mean_nothing(capsys):
    assert main(["kernels", "--tokens", "0"]) == 1
    assert main(["kernels", "--device", "nowhere"]) == 1
    assert "device is 'nowhere'" in capsys.readouterr().err
