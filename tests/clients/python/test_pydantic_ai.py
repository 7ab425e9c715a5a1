"""pydantic-ai, unmodified."""

import asyncio

import pytest
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "Tell me a short story about a dog named Max."


@pytest.fixture(scope="module")
def model(base_url: str) -> OpenAIChatModel:
    return OpenAIChatModel("buddy-7m", provider=OpenAIProvider(base_url=base_url, api_key="sk-open"))


def test_agent_answers_in_text(model: OpenAIChatModel) -> None:
    agent = Agent(model, system_prompt="Be kind.", model_settings={"temperature": 0, "stop_sequences": ["\n"]})
    result = agent.run_sync(QUESTION)
    assert result.output
    assert result.usage.output_tokens > 0


def test_agent_streams_text(model: OpenAIChatModel) -> None:
    agent = Agent(model, model_settings={"temperature": 0, "stop_sequences": ["\n"], "extra_body": {"budget": 0.5}})

    async def texts() -> list[str]:
        async with agent.run_stream(QUESTION) as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    parts = asyncio.run(texts())
    assert len(parts) > 1
    assert "".join(parts) == agent.run_sync(QUESTION).output
