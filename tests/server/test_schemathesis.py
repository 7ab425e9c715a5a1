"""Random requests, made from the server's own OpenAPI document: each answer is a documented one."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

import openai_fields
from buddy_server.api.app import create_app
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from buddy_server.tokenizer import ChatTokenizer
from fakes.engine import INFO, FakeEngine
from fakes.serving import listening
from fakes.site import Site
from fakes.tenancy import tenancy_of

NUM_CASES = 200
"""For every operation and kind of request; one without parameters has fewer."""
LONGEST_S = 5.0
OPERATIONS = [
    (path, method.upper(), mode)
    for path, methods in openai_fields.our_document()["paths"].items()
    for method in methods
    # A GET has nothing that could be wrong.
    for mode in ([GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if method == "post" else [GenerationMode.POSITIVE])
]


@pytest.fixture(scope="module")
def site(tokenizer_directory: Path) -> Iterator[Site]:
    engine, config = FakeEngine(delay_s=0), ServerConfig()
    metrics = Metrics(engine.info, config.tenants)
    tokenizer = ChatTokenizer.from_directory(tokenizer_directory)
    with listening() as served, ExitStack() as stack:
        served.app = create_app(config, engine, tokenizer, metrics, tenancy_of(engine, config, metrics))
        http = stack.enter_context(httpx.Client(base_url=served.url, timeout=LONGEST_S))
        yield Site(served.url, engine, metrics, http, stack)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_random_requests_get_documented_answers(site: Site, path: str, method: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
    # A list that is too long may be too large a body as well.
    rejection = schema.config.checks.negative_data_rejection
    rejection.expected_statuses = [*rejection.expected_statuses, "413"]
    operation = schema[path][method]
    statuses = Counter[int]()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_CASES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = INFO.model_id
        # What fits the schema may still be too long for the model.
        response = case.call_and_validate(timeout=LONGEST_S, excluded_checks=[positive_data_acceptance])
        statuses[response.status_code] += 1

    check()
    if method == "POST":
        assert statuses.total() >= NUM_CASES
        assert statuses[200 if mode is GenerationMode.POSITIVE else 400] > NUM_CASES / 10, statuses
    assert site.chat().status_code == 200
