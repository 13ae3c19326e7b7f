"""Data sets as people have them, read, checked, tokenised and mixed."""

# `check` the function is not here, for `uft.data.check` is the module
from uft.data.check import Report, SourceReport, run_check
from uft.data.mixture import FeedbackDataset, MixtureSampler, load_feedback
from uft.data.prompts import implicit_prompt
from uft.data.readers import READERS, Reader, TextExample, read_text
from uft.data.rows import BadRow, DataError
from uft.data.sources import Source, as_sources, read_rows
from uft.data.template import PLAIN_TEMPLATE, Template

__all__ = [
    "PLAIN_TEMPLATE",
    "READERS",
    "BadRow",
    "DataError",
    "FeedbackDataset",
    "MixtureSampler",
    "Reader",
    "Report",
    "Source",
    "SourceReport",
    "Template",
    "TextExample",
    "as_sources",
    "implicit_prompt",
    "load_feedback",
    "read_rows",
    "read_text",
    "run_check",
]
