import pytest

from tests.training.helpers import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Run the command line in subprocesses, which may be killed."""
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    server.close()
