"""Keys, rates, sizes and origins."""

import logging

import pytest

from dspark.errors import UsageError
from dspark.serving.context import Settings
from dspark.serving.middleware import JsonLines, RateLimit
from dspark.serving.openai.errors import ApiError
from dspark.serving.server import read_keys


@pytest.fixture(scope="module")
def guarded(model, kit):
    settings = Settings(
        "bundled",
        api_keys=("first", "sécond"),
        cors_origins=("https://page.example",),
        max_body_bytes=1000,
        body_timeout_s=0.5,
    )
    with kit.serve(model, settings) as started:
        yield started


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/nothing"])
@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), bearer(""), bearer("firstx"), {"authorization": "first"},
     {"authorization": "Basic first"}],
)  # fmt: skip
def test_a_wrong_key(guarded, path, headers):
    reply = guarded.ask("GET", path, headers=headers)
    assert reply.status == 401
    assert reply.error["type"] == "authentication_error"
    assert reply.headers["www-authenticate"] == "Bearer"


def test_a_right_key(guarded):
    assert guarded.ask("GET", "/v1/models", headers=bearer("first")).status == 200
    assert guarded.client("first").models.list().data[0].id == "bundled"


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_is_open(guarded, path):
    assert guarded.ask("GET", path).status == 200


def test_a_large_body(guarded):
    reply = guarded.ask("POST", "/v1/completions", b"x" * 1001, bearer("first"))
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")


def test_a_body_that_does_not_come(guarded):
    headers = {**bearer("first"), "content-length": "10"}
    reply = guarded.ask("POST", "/v1/completions", b"x", headers)
    assert (reply.status, reply.error["code"]) == (408, "timeout")


def test_origins(guarded, live):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert guarded.ask("OPTIONS", "/v1/models", headers=asked).status == 200
    headers = bearer("first")
    for origin, wanted in (("https://page.example", True), ("https://other.example", False)):
        reply = guarded.ask("GET", "/v1/models", headers={**headers, "origin": origin})
        assert ("access-control-allow-origin" in reply.headers) is wanted
    reply = live.ask("GET", "/v1/models", headers={"origin": "https://page.example"})
    assert "access-control-allow-origin" not in reply.headers


def test_request_ids(live):
    own = live.ask("GET", "/health", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    for wrong in ("a b", "x" * 65, "é"):
        made = live.ask("GET", "/health", headers={"x-request-id": wrong.encode().decode("latin1")})
        assert len(made.headers["x-request-id"]) == 24
    reply = live.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, x_request_id="mine-2")
    assert reply.json["id"] == "cmpl-mine-2"


def test_rates_are_kept_per_client():
    limit = RateLimit(2, most_clients=2)
    limit.check(b"a", 0.0)
    limit.check(b"a", 0.0)
    limit.check(b"b", 0.0)
    with pytest.raises(ApiError) as refused:
        limit.check(b"a", 1.0)
    assert refused.value.status == 429
    assert refused.value.headers == {"retry-after": "30"}
    limit.check(b"a", 31.0)
    limit.check(b"b", 31.0)
    limit.check(b"c", 31.0)  # now a is forgotten
    assert len(limit._buckets) == 2


def test_a_rate_over_http(model, kit):
    with kit.serve(model, Settings("bundled", requests_per_minute=2)) as live:
        ask = {"prompt": "x", "max_tokens": 1}
        replies = [live.post("/v1/completions", ask) for _ in range(3)]
        assert [reply.status for reply in replies] == [200, 200, 429]
        assert int(replies[2].headers["retry-after"]) > 0
        assert live.ask("GET", "/health").status == 200


def test_the_queue_over_http(model, kit):
    with kit.serve(model, max_requests=1, max_queue=0) as live, live.client() as client:
        ask = {"prompt": "x", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(model="bundled", stream=True, **ask)
        next(iter(stream))
        reply = live.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
        assert reply.headers["retry-after"] == "1"
        stream.close()
        live.wait_until(lambda now: now.running == 0)
        assert live.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status == 200


def test_key_files(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# who\nalpha\n\n beta \n")
    assert read_keys(["own"], str(path)) == ("own", "alpha", "beta")
    path.write_text("# nobody\n")
    with pytest.raises(UsageError, match="holds no key"):
        read_keys([], str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys([], str(tmp_path / "none"))


@pytest.mark.parametrize(
    "wrong", [{"api_keys": ("",)}, {"max_body_bytes": 0}, {"request_timeout_s": 0}, {"drain_s": -1}]
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(UsageError):
        Settings("x", **wrong)


@pytest.mark.parametrize("log_prompts", [False, True])
def test_logs_hold_texts_only_when_asked(model, kit, caplog, log_prompts):
    caplog.set_level(logging.INFO, "dspark")
    with kit.serve(model, Settings("bundled", log_prompts=log_prompts)) as live:
        live.chat(max_tokens=4)
        live.post("/v1/completions", {"prompt": "The command", "max_tokens": 4})
        live.post("/v1/secret", {})
    lines = [JsonLines().format(record) for record in caplog.records]
    asked = [line for line in lines if '"message": "request"' in line]
    assert len(asked) == 3
    assert '"path": "/v1/chat/completions", "status": 200' in asked[0]
    assert '"completion_tokens": 4' in asked[0]
    text = "\n".join(lines)
    assert ("The command" in text) is log_prompts
    assert (kit.prompts[0] in text) is log_prompts
    assert "secret" not in text
