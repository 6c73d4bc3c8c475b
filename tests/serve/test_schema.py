"""FAULTS.md S17: requests made from the server's own schema, valid and not, never fault it."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from retort.serve.openapi import document
from tests.serve import tiny

FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
OPERATIONS = {
    f"{operation.method} {operation.path}": operation
    for operation in (
        r.ok() for r in schemathesis.openapi.from_dict(document()).get_all_operations()
    )
}


# A request without parameters cannot be wrong.
CASES = [(name, GenerationMode.POSITIVE) for name in OPERATIONS]
CASES += [(name, GenerationMode.NEGATIVE) for name in OPERATIONS if name.startswith("post")]


@pytest.mark.parametrize(("name", "mode"), CASES, ids=lambda value: getattr(value, "value", value))
def test_s17_no_request_faults_the_server(served, name, mode):
    strategy = OPERATIONS[name].as_strategy(generation_mode=mode)

    @FEW
    @given(case=strategy)
    def run(case):
        check(send(served, case))

    run()
    served.wait_idle(30)
    assert served.http.get("/health").status_code == 200


def send(served, case):
    """What schemathesis made, with little work where it is accepted."""
    headers = {"content-type": "application/json"}
    return served.http.request(case.method, case.path, content=encode(case.body), headers=headers)


def encode(body) -> bytes:
    """The body as bytes; schemathesis also makes bytes of its own, and none at all."""
    if isinstance(body, bytes):
        return body
    if isinstance(body, dict) and isinstance(body.get("max_tokens"), int):
        body = {**body, "max_tokens": min(body["max_tokens"], 3)}
    try:
        return json.dumps(body).encode("utf-8", "surrogatepass")
    except TypeError:  # NOT_SET, or bytes inside
        return b""


def check(answer) -> None:
    """A documented status, and the shape that belongs to it."""
    assert answer.status_code in (200, 400, 404, 408, 413), answer.text
    if answer.status_code == 408:  # the request brought a deadline of its own that passed
        assert answer.json()["error"]["code"] == "deadline"
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert all("error" not in e or e["error"]["code"] for e in tiny.events(answer.text))


def test_the_document_is_served_and_describes_every_route(served):
    assert served.http.get("/openapi.json").json() == json.loads(json.dumps(document()))
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= document()["paths"].keys()
