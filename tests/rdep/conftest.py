"""One process for the module's tests from which all ranks are forked."""

import pytest

from tests.rdep.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    server = Ranks(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()
