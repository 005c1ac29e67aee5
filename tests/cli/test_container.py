"""The Dockerfile, as far as it can be held without Docker: what it copies, installs and runs."""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dspark.cli.main import build_parser
from dspark.serving.context import Settings

tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def steps():
    """[(instruction, arguments)], lines that go on joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def last(steps, name):
    return [arguments for instruction, arguments in steps if instruction == name][-1]


def health_command(steps, port):
    words = json.loads(last(steps, "HEALTHCHECK").partition(" CMD ")[2])
    assert words[0] == "python"
    assert words[2].count(":8000/") == 1
    return [sys.executable, words[1], words[2].replace(":8000/", f":{port}/")]


def test_what_the_build_needs_is_copied_and_not_left_out(steps, project):
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = set()
    for arguments in (a for name, a in steps if name == "COPY" and not a.startswith("--from")):
        *sources, _ = arguments.split()
        copied |= set(sources)
        for source in sources:
            assert (ROOT / source).exists()
            assert not any(fnmatch(source, pattern) for pattern in ignored)
    needed = {project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == needed | {"constraints.txt", "pyproject.toml", "dspark"}


def test_its_extras_serve_and_its_torch_is_pinned(steps, project):
    installs = [each for name, each in steps if name == "RUN" and "pip install" in each]
    (extras,) = re.findall(r'"\.\[(.*?)\]"', installs[-1])
    known = project["project"]["optional-dependencies"]
    assert {"serve", "json"} <= set(extras.split(",")) <= set(known)
    assert all("-c constraints.txt" in each for each in installs)
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_it_runs_a_command_that_is_there(steps, project):
    (command,) = json.loads(last(steps, "ENTRYPOINT"))
    assert command in project["project"]["scripts"]
    options = build_parser().parse_args(json.loads(last(steps, "CMD")))
    assert options.target == "bundled"
    assert options.host == "0.0.0.0"
    assert str(options.port) == last(steps, "EXPOSE")
    assert f":{options.port}/health" in last(steps, "HEALTHCHECK")
    assert last(steps, "USER") not in ("0", "root")
    assert Settings("x").drain_s == 30  # what the docs' --stop-timeout leaves time for


@pytest.mark.parametrize("status", [200, 503])
def test_health_is_asked_of_the_server_itself(steps, status):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # A container that is told of a proxy for its downloads is not to ask that.
        proxies = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        found = subprocess.run(
            health_command(steps, server.server_port),
            env={**os.environ, **proxies},
            capture_output=True,
            timeout=60,
            check=False,
        )
        server.shutdown()
    assert (found.returncode == 0) == (status == 200), found.stderr


def test_it_stops_at_its_signal(steps):
    words = [*json.loads(last(steps, "CMD")), "--port", "0", "--threads", "1"]
    started = subprocess.Popen(
        [sys.executable, "-m", "dspark", *words], stderr=subprocess.PIPE, text=True
    )
    with started as process:
        try:
            said = ""
            while "startup complete" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            (port,) = re.findall(r"http://0\.0\.0\.0:(\d+)", said)
            subprocess.run(health_command(steps, port), check=True, timeout=60)
            process.send_signal(signal.Signals[last(steps, "STOPSIGNAL")])
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, rest
