"""What every test shares."""

import os
import signal
import tempfile
from importlib.util import find_spec

import pytest
import torch

# Without a GPU kernels run through Triton's interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a shell lets what it runs in the background ignore Ctrl-C, and children would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Shapes and dtypes in annotations are enforced here; 2 counts as a float, as PEP 484 has it. `make test` installs both
# packages; kernels are also tested on machines that have only what training needs.
if find_spec("jaxtyping") and find_spec("beartype"):
    from jaxtyping import install_import_hook

    install_import_hook(
        ["uft.losses", "uft.objective", "uft.terms"],
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )


@pytest.fixture(scope="session", autouse=True)
def temporary_files_go_away(tmp_path_factory):
    """What tests put into temporary folders goes where pytest cleans up."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = None


@pytest.fixture(scope="module", autouse=True)
def losses_of_a_module_go_away():
    """Losses that tests register are not there for the tests of other files."""
    from uft.losses import tables

    found = (tables.LIKELIHOOD, tables.PAIRWISE, tables.POINTWISE)
    before = [dict(table) for table in found]
    yield
    for table, entries in zip(found, before):
        table.clear()
        table.update(entries)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A comparison with a peer that is skipped has compared nothing, so it counts as failed."""
    report = yield
    if report.skipped and item.get_closest_marker("peers") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though peers must be compared: {report.longrepr}"
    return report
