"""Requests made up from the server's own description never make it fail."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

POSTED = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"
)  # fmt: skip


@pytest.fixture(scope="module")
def operations(live):
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{live.port}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def test_the_description_names_every_route(operations):
    assert {operation.path for operation in operations} >= {
        *POSTED, "/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics",
        "/ping", "/version",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_makes_the_server_fail(operations, live, mode):
    statuses = list[int]()
    for operation in operations:
        posted = operation.path in POSTED
        if mode is GenerationMode.NEGATIVE and not posted:
            continue  # without parameters there is nothing to get wrong

        @settings(
            max_examples=20 if posted else 3,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(case.body, dict) and isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 2)
            response = case.call(timeout=60)
            statuses.append(response.status_code)
            assert response.status_code < 500, (case.body, response.content)
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        check()
    assert len(statuses) >= 40
    assert len(set(statuses)) > 1
    live.wait_until(lambda now: now.running == now.queued == 0)
