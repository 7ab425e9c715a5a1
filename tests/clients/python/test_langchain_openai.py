"""langchain-openai, unmodified."""

import asyncio

import pytest
from langchain_openai import ChatOpenAI, OpenAI

QUESTION = "Tell me a short story about a dog named Max."


@pytest.fixture(scope="module")
def chat(base_url: str) -> ChatOpenAI:
    return ChatOpenAI(
        model="buddy-7m", base_url=base_url, api_key="sk-open", temperature=0, stop_sequences=["\n"], max_retries=0,
        stream_usage=True, extra_body={"budget": 0.75},
    )  # fmt: skip


def test_invoke_gives_text_usage_and_reason(chat: ChatOpenAI) -> None:
    answer = chat.invoke(QUESTION)
    assert answer.text
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == "buddy-7m"
    usage = answer.usage_metadata
    assert usage is not None
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0


def test_stream_adds_up_to_the_whole_answer(chat: ChatOpenAI) -> None:
    whole, chunks = chat.invoke(QUESTION), list(chat.stream(QUESTION))
    assert sum(bool(chunk.text) for chunk in chunks) > 1
    added = sum(chunks[1:], start=chunks[0])
    assert added.text == whole.text
    assert added.usage_metadata == whole.usage_metadata


def test_several_questions_are_answered_at_once(chat: ChatOpenAI) -> None:
    whole = chat.invoke(QUESTION).text
    assert [answer.text for answer in asyncio.run(chat.abatch([QUESTION] * 3))] == [whole] * 3


def test_plain_completion_gives_text(base_url: str) -> None:
    llm = OpenAI(model="buddy-7m", base_url=base_url, api_key="sk-open", temperature=0, max_tokens=12)
    assert llm.invoke("Once upon a time")
