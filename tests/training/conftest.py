"""Scripts of this folder, and processes that know of each other."""

import importlib.util
import socket
from pathlib import Path

import pytest

from tests.helpers import processes


@pytest.fixture(scope="session")
def load_script():
    """Imports a script of this folder by its file's name."""

    def load(name):
        path = Path(__file__).with_name(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def run_two(tmp_path_factory):
    """Runs a Python command in two processes, as torchrun would; they must end well."""

    def run(*arguments):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        folder = tmp_path_factory.mktemp("ranks")
        both = [
            processes.start(_place(rank, port), arguments, folder / f"{rank}.log")
            for rank in range(2)
        ]
        for process in both:
            process.join(240)
        codes = [process.exitcode for process in both]
        for process in both:
            process.kill()
        said = [(folder / f"{rank}.log").read_text() for rank in range(2)]
        assert codes == [0, 0], "\n".join(said)

    return run


def _place(rank, port):
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
