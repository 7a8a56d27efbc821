import pytest

from tests.training.helpers import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Runs the command line in processes of its own, which may be killed."""
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    server.close()
