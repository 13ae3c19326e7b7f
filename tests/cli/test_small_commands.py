"""`uft recipe`, `uft kernels`, `uft completion`, and the pages of help."""

import subprocess

import pytest
import torch
import yaml

from uft.cli import kernels, main
from uft.cli.commands import COMMANDS, Command
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
    assert "generate" in script and "--token_budget" in script and "--max_new_tokens" in script


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
