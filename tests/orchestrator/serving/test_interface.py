"""The interface as its OpenAPI document describes it, asked at random: nothing that a client may send is the
server's fault."""

from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from orchestrator.serving.client import Client

pytestmark = pytest.mark.slow


@schemathesis.hook
def map_query(context: Any, query: Any) -> Any:
    """An endless stream would never be answered in full."""
    if context.operation.path == "/v1/streams" and isinstance(query, dict):
        frames = query.get("frames")
        if not isinstance(frames, str) and (not isinstance(frames, int) or frames > 4):
            query["frames"] = 4
    return query


def test_nothing_that_is_asked_is_a_fault_of_the_server(client: Client) -> None:
    schema = schemathesis.openapi.from_url(f"{client.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/v1/streams", "/v1/videos", "/v1/tickets", "/healthz"} <= {
        operation.path for operation in operations
    }
    for operation, mode in product(operations, GenerationMode):

        @settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            case.call_and_validate(checks=[not_a_server_error, response_schema_conformance], timeout=60)

        # There is nothing wrong to say to what takes nothing.
        with suppress(Unsatisfiable):
            ask()
