"""Runs to look at: those of the tests of trainings."""

from tests.train.conftest import (  # noqa: F401
    _read_once,
    _switches_back,
    module_launches,
    module_runs,
    rank_server,
    runs,
)
