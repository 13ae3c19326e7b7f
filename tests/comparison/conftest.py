"""Folders in which a comparison and a sweep have been run once, for all tests that look at what they wrote."""

import os

import comparison_workplace
import pytest
from tiny import saved_tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny model with its tokenizer."""
    return saved_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def workplace(base, tmp_path, monkeypatch):
    comparison_workplace.fill(tmp_path, base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run_once(base, folder, *words):
    comparison_workplace.fill(folder, base)
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert comparison_workplace.uft(*words) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def compared(base, tmp_path_factory):
    return _run_once(base, tmp_path_factory.mktemp("compared"), "compare", "--config", "compare.yaml")


@pytest.fixture(scope="session")
def swept(base, tmp_path_factory):
    return _run_once(base, tmp_path_factory.mktemp("swept"), "sweep", "--config", "sweep.yaml")
