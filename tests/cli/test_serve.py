"""`dspark serve` in a process of its own, until it is told to stop."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import dspark as package
from dspark.cli import serve
from dspark.cli.serve import cache_sentence


def ask(url, body=None, key=None):
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def wait_for(url):
    """The answer of a server that has yet to listen."""
    until = time.monotonic() + 60
    while True:
        try:
            return ask(url)
        except urllib.error.URLError:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_serves_until_it_is_told_to_stop(pair, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    words = ["serve", pair.attached, "--port", "0", "--served-model-name", "mine", "--json"]
    words += ["--api-key-file", keys, "--threads", "1", "--offline"]
    started = subprocess.Popen(
        [sys.executable, "-m", "dspark", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with started as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)  # where something below fails
        line = ""
        while "http://" not in line:
            line = process.stderr.readline()
            assert line, "it ended"
        base = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        assert wait_for(f"{base}/health") == {"status": "ok"}
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(f"{base}/v1/models")
        refused.value.close()
        assert ask(f"{base}/v1/models", key="secret")["data"][0]["id"] == "mine"
        answer = ask(f"{base}/v1/completions", {"prompt": "how many", "max_tokens": 5}, "secret")
        assert answer["usage"]["completion_tokens"] <= 5
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    report = json.loads(out.splitlines()[-1])
    assert report["ok"] is True
    assert report["steps"] > 0
    lines = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    asked = [line for line in lines if line["message"] == "request"]
    assert [line["status"] for line in asked] == [200, 401, 200, 200]
    assert "how many" not in rest


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learn-dir", "learned"], "give --learn as well"),
        (["--learn-share", "0.5"], "give --learn as well"),
        (["--learn", "--learn-share", "1.5"], "--learn-share is 1.5"),
        (["--port", "70000"], "--port is 70000"),
        (["--max-requests", "0"], "--max-requests is 0"),
        (["--draft", "none", "--schedule", "fixed"], "--schedule is fixed"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--max-model-len", "1"], "max_length is 1"),
        (["--request-timeout", "-1"], "request_timeout_s is -1"),
        (["--schedule", "threshold"], "threshold"),
    ],
)
def test_wrong_usage(dspark, pair, words, named):
    result = dspark("serve", pair.attached, *words)
    assert result.status == 2
    assert named in result.err


def test_a_port_that_is_taken(dspark, pair):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = dspark("serve", pair.attached, "--port", taken.getsockname()[1])
    assert result.status == 2
    assert "cannot listen" in result.err


def test_without_the_extra_it_says_so(dspark, pair, monkeypatch):
    monkeypatch.setattr(
        serve.importlib.util, "find_spec", lambda name: None if name == "fastapi" else object()
    )
    assert importlib.util.find_spec is not None
    result = dspark("serve", pair.attached)
    assert result.status == 2
    assert "dspark[serve]" in result.err


def test_it_says_what_the_cache_holds(pair):
    model = package.load(pair.attached)
    engine = model.open_engine(max_requests=4, max_length=64, schedule="fixed")
    assert re.fullmatch(
        r"The cache holds [\d,]+ tokens, taking up to \d+\.\d\d GB as they are used: "
        r"4 requests at once, of 64 tokens at most\.",
        cache_sentence(engine),
    )
    small = model.open_engine(max_requests=4, max_length=64, cache_tokens=64, schedule="fixed")
    assert "4 requests at once (1 at full length)" in cache_sentence(small)
