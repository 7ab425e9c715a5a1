"""The Responses API through the clients that can use it in place of chat completions."""

import litellm
from langchain_openai import ChatOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is 34 + 25?"


def test_langchain_openai(base_url: str) -> None:
    chat = ChatOpenAI(
        model="buddy-7m", base_url=base_url, api_key="sk-open", temperature=0, max_retries=0, use_responses_api=True
    )
    whole, chunks = chat.invoke(QUESTION), list(chat.stream(QUESTION))
    assert whole.text
    assert whole.usage_metadata is not None
    assert sum(chunks[1:], start=chunks[0]).text == whole.text


def test_pydantic_ai(base_url: str) -> None:
    model = OpenAIResponsesModel("buddy-7m", provider=OpenAIProvider(base_url=base_url, api_key="sk-open"))
    first = Agent(model, instructions="Be kind.").run_sync(QUESTION)
    assert first.output
    assert first.usage.output_tokens > 0
    assert Agent(model).run_sync("And 1 more?", message_history=first.all_messages()).output


def test_litellm(base_url: str) -> None:
    asked = {
        "model": "openai/buddy-7m",
        "input": QUESTION,
        "api_base": base_url,
        "api_key": "sk-open",
        "temperature": 0,
    }
    whole = litellm.responses(**asked)
    assert whole.output_text
    events = list(litellm.responses(**asked, stream=True))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text
