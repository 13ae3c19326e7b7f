"""Imports point one way, and what must not be installed is not needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(path))


def forbidden(folder: str, *packages: str) -> list[str]:
    files = (ROOT / folder).rglob("*.py") if (ROOT / folder).is_dir() else [ROOT / folder]
    return [f"{file.relative_to(ROOT)} imports {p}" for file in files for p in packages if uses(file, p)]


@pytest.mark.parametrize(
    "folder, packages",
    [
        ("kernels", ("uft", "experiments", "transformers")),
        ("uft", ("experiments", "liger_kernel", "cut_cross_entropy")),
        ("uft/losses", ("transformers", "uft.models", "uft.trainer", "uft.objective", "uft.feedback", "uft_kernels")),
        ("uft/feedback.py", ("transformers", "uft.models", "uft.trainer", "uft.objective", "uft.losses")),
        ("uft/objective.py", ("uft.trainer", "uft.config", "uft.stages", "transformers")),
    ],
)
def test_imports_point_one_way(folder, packages):
    assert forbidden(folder, *packages) == []


def test_only_one_module_meets_trl():
    meets = {f.relative_to(ROOT / "uft").as_posix() for f in (ROOT / "uft").rglob("*.py") if uses(f, "trl")}
    assert meets == {"rlhf/through_trl.py"}


def test_only_models_and_their_head_meet_kernels():
    meets = {f.relative_to(ROOT / "uft").as_posix() for f in (ROOT / "uft").rglob("*.py") if uses(f, "uft_kernels")}
    # memory.py reads the budgets of their buffers
    assert meets <= {"head.py", "memory.py", "models.py", "objective.py", "cli/kernels.py"}


def python(code: str, *, hidden: tuple[str, ...] = ()) -> None:
    """Runs code in a fresh interpreter at the repository root, with some packages made impossible to import."""
    hide = f"import sys; sys.modules.update({{name: None for name in {hidden!r}}})\n"
    run = subprocess.run(
        [sys.executable, "-c", hide + code], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HOME": "/tmp"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_transformers_imports_from_the_repository_root():
    """A package called `kernels` would shadow Hugging Face's, which transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    python("import transformers; from transformers import AutoModelForCausalLM, Trainer")


def test_uft_needs_neither_triton_nor_datasets():
    modules = "uft, uft.trainer, uft.rlhf.reward, uft.rlhf.through_trl, uft_kernels"
    python(f"import {modules}", hidden=("triton", "datasets", "pyarrow", "jaxtyping", "trl"))
