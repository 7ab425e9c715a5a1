"""Tools and structured output through pydantic-ai."""

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

SETTINGS: Any = {"temperature": 0, "max_tokens": 100}


# Of a schema that allows more properties, the embedded model would make more and more.
class Farm(BaseModel, extra="forbid"):
    name: Literal["Green Hill", "Old Mill"]
    num_cows: int = Field(ge=0, le=99)


class ForcedOnce(AbstractCapability[None]):
    """Makes the model call a tool in its first step alone: the embedded one calls none by itself."""

    def get_model_settings(self) -> Any:
        return lambda context: {"tool_choice": "required" if context.run_step == 1 else "auto"}


@pytest.fixture(scope="module")
def model(base_url: str) -> OpenAIChatModel:
    return OpenAIChatModel("buddy-7m", provider=OpenAIProvider(base_url=base_url, api_key="sk-open"))


@pytest.mark.parametrize("output", [ToolOutput(Farm), NativeOutput(Farm, strict=True)])
def test_output_is_of_its_class(model: OpenAIChatModel, output: Any) -> None:
    agent = Agent(model, output_type=output, model_settings=SETTINGS)
    assert isinstance(agent.run_sync("Describe a farm.").output, Farm)


@pytest.mark.parametrize("output", [ToolOutput(Farm), NativeOutput(Farm, strict=True)])
def test_streamed_output_is_of_its_class(model: OpenAIChatModel, output: Any) -> None:
    agent = Agent(model, output_type=output, model_settings=SETTINGS)

    async def run() -> Farm:
        async with agent.run_stream("Describe a farm.") as result:
            return await result.get_output()

    assert isinstance(asyncio.run(run()), Farm)


def test_agent_calls_a_tool_and_answers_in_text(model: OpenAIChatModel) -> None:
    seen: list[tuple[str, int]] = []
    agent = Agent(model, capabilities=[ForcedOnce()], model_settings=SETTINGS)

    @agent.tool
    def weather(context: RunContext[None], city: Literal["Oslo", "Paris", "Rome"], days: Literal[1, 2]) -> str:
        """The weather of a city for the next days."""
        seen.append((city, days))
        return "sunny"

    assert agent.run_sync("What is the weather in Paris?").output
    assert seen
