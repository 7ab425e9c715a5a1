"""Valid JSON at every depth: the official client against `buddy serve` with the embedded model."""

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from buddy_process import serving
from buddy_routing.embedded import MODEL_ID
from random_schemas import harmful_schemas, random_schema

BUDGETS = (1.0, 0.5, 0.25)
END_TOKEN = 1
FORMATS = jsonschema.FormatChecker(["email", "ipv4", "uuid"])
"""Not those of times: Python's own have no year 0 and few digits of a second."""
QUESTION = [{"role": "user", "content": "Tell me about a dog named Max."}]


Name = Annotated[str, Field(max_length=10)]


class Dog(BaseModel):
    """With limits, since texts of a small model have no end."""

    name: Name
    age: Annotated[int, Field(ge=0, le=30)]
    size: Literal["small", "large"]
    friends: Annotated[list[Name], Field(max_length=3)]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, /, budget: float = 1.0, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL_ID, "messages": QUESTION, "max_completion_tokens": 300, "seed": 1}
    return client.chat.completions.create(**fields | options, extra_body={"budget": budget} | (extra or {}))


def as_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def is_valid(choice: Any, schema: dict[str, Any]) -> bool:
    """Whether the answer ended by itself and is what `schema` describes, or reached its length."""
    if choice.finish_reason == "stop":
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(choice.message.content))
    return choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize("budget", BUDGETS)
def test_json_object_is_one_or_is_cut_off(client: openai.OpenAI, budget: float) -> None:
    answer = ask(client, budget, response_format={"type": "json_object"}, n=8)
    assert all(is_valid(choice, {"type": "object"}) for choice in answer.choices)
    assert all(choice.message.content.startswith("{") for choice in answer.choices)


@pytest.mark.parametrize("budget", BUDGETS)
def test_parse_gives_the_pydantic_model(client: openai.OpenAI, budget: float) -> None:
    answer = client.chat.completions.parse(
        model=MODEL_ID,
        messages=QUESTION,  # type: ignore[arg-type]
        response_format=Dog,
        max_completion_tokens=300,
        extra_body={"budget": budget},
    )
    assert isinstance(answer.choices[0].message.parsed, Dog)


def test_streamed_answer_is_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"response_format": as_format(Dog.model_json_schema()), "temperature": 0}
    whole = ask(client, **options)
    chunks = list(ask(client, **options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]{1,9}x"}, "[0-9]{3}-[a-f]{1,9}x"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "<" [a-z] ">" | "none"'}, "<[a-z]>|none"),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
    ],
)
def test_fields_of_vllm_shape_chat_and_plain_completions(
    client: openai.OpenAI, extra: dict[str, Any], pattern: str
) -> None:
    chat = ask(client, extra=extra).choices[0]
    plain = client.completions.create(model=MODEL_ID, prompt="Once", max_tokens=300, extra_body=extra).choices[0]
    for text, reason in ((chat.message.content, chat.finish_reason), (plain.text, plain.finish_reason)):
        assert re.fullmatch(pattern, text)
        assert reason == "stop"


def test_harmful_schemas_are_refused_within_five_seconds_and_hold_nobody_up(client: openai.OpenAI) -> None:
    def refused(schema: dict[str, Any]) -> tuple[int, float]:
        started_s = time.perf_counter()
        body = {"model": MODEL_ID, "messages": QUESTION, "response_format": as_format(schema)}
        response = httpx.post(f"{client.base_url}chat/completions", json=body, timeout=60)
        assert response.json()["error"]["param"] == "response_format.json_schema.schema"
        return response.status_code, time.perf_counter() - started_s

    schemas = harmful_schemas()
    with ThreadPoolExecutor(len(schemas)) as pool:
        answers = dict(zip(schemas, pool.map(refused, schemas.values()), strict=True))
        assert {name: status for name, (status, _) in answers.items() if status != 400} == {}
        assert {name: passed_s for name, (_, passed_s) in answers.items() if passed_s > 5} == {}
    assert ask(client, max_completion_tokens=5).usage.completion_tokens == 5


def test_answer_whose_grammar_needs_too_much_work_fails_alone(client: openai.OpenAI) -> None:
    ambiguous = {"guided_grammar": 'start: s\ns: s s s | s s | "a" | ""'}
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(ask, client, max_completion_tokens=300, temperature=0)
        with pytest.raises(openai.BadRequestError, match="could not be kept within its grammar"):
            ask(client, extra=ambiguous, max_completion_tokens=1000, logit_bias={str(END_TOKEN): -100})
        assert beside.result().choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("num_schemas", [12, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_random_schemas_are_kept_at_every_budget(client: openai.OpenAI, num_schemas: int) -> None:
    rng = random.Random(0)
    tasks = [(random_schema(rng), budget) for _ in range(num_schemas) for budget in BUDGETS]

    def choice_of(task: tuple[dict[str, Any], float]) -> Any:
        options = {"max_completion_tokens": 400, "frequency_penalty": 1}
        return ask(client, task[1], response_format=as_format(task[0]), **options).choices[0]

    with ThreadPoolExecutor(8) as pool:
        choices = list(pool.map(choice_of, tasks))
    for (schema, budget), choice in zip(tasks, choices, strict=True):
        assert is_valid(choice, schema), (schema, budget, choice.message.content)
    assert sum(choice.finish_reason == "stop" for choice in choices) > len(choices) / 3
