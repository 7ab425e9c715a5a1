"""`buddy chat`: a terminal client that streams the answer and shows what it cost in layers."""

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx


class ChatError(Exception):
    """The server is unreachable or refused the request. The message is for the user, `code` is the API's error code."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class ChatClient:
    """A client of the server at `url`. `budget` is a number, "auto" or None for the tenant's default."""

    def __init__(self, url: str, api_key: str | None, budget: str | None, temperature: float) -> None:
        key = api_key or os.environ.get("BUDDY_API_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if budget is not None:
            headers["x-buddy-budget"] = budget
        # Accepts the base_url of an openai client, which people copy.
        url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(10, read=120))
        self._temperature = temperature

    def run(self, prompt: str) -> None:
        """Answer `prompt`; if it is empty, hold a conversation until end of input."""
        try:
            model = self._json("/v1/models")["data"][0]["id"]
            if prompt:
                self._answer(model, [{"role": "user", "content": prompt}])
            else:
                self._converse(model)
        except httpx.HTTPError as error:
            raise ChatError(f"no answer from {self._http.base_url}: {error}") from error

    def _converse(self, model: str) -> None:
        print(f"Talking to {model}. An empty line or Ctrl-D ends.", file=sys.stderr)
        messages: list[dict[str, str]] = []
        while line := _read_line():
            messages.append({"role": "user", "content": line})
            try:
                answer = self._answer_within_context(model, messages)
            except ChatError as error:
                messages.pop()
                print(f"buddy chat: {error}", file=sys.stderr)
            else:
                messages.append({"role": "assistant", "content": answer})

    def _answer_within_context(self, model: str, messages: list[dict[str, str]]) -> str:
        """The answer; drops the oldest turns if the conversation has become too long."""
        while True:
            try:
                return self._answer(model, messages)
            except ChatError as error:
                if error.code != "context_length_exceeded" or len(messages) < 3:
                    raise
                print("[the context is full: the oldest turn is forgotten]", file=sys.stderr)
                del messages[:2]

    def _answer(self, model: str, messages: list[dict[str, str]]) -> str:
        body = {
            "model": model,
            "messages": messages,
            "temperature": self._temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.monotonic()
        answer, last, reason = "", {}, None
        for chunk in self._stream(body):
            for choice in chunk["choices"]:
                answer += choice["delta"].get("content") or ""
                print(choice["delta"].get("content") or "", end="", flush=True)
                reason = choice["finish_reason"]
            last = chunk
        print(" [cut off: no room for more]" if reason == "length" else "")
        print(_summary(last, time.monotonic() - started), file=sys.stderr)
        return answer

    def _stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise _refusal(response)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ChatError(chunk["error"]["message"])
                yield chunk

    def _json(self, path: str) -> Any:
        response = self._http.get(path)
        if response.status_code != httpx.codes.OK:
            raise _refusal(response)
        return response.json()


def _summary(last_chunk: dict[str, Any], seconds: float) -> str:
    usage, buddy = last_chunk["usage"], last_chunk["buddy"]
    num_tokens = usage["completion_tokens"]
    return (
        f"[{num_tokens} tokens, {buddy['layers_per_token']:g} of {buddy['layers']} layers per token, "
        f"{buddy['distinct_paths']} paths, {num_tokens / seconds:.0f} tokens/s]"
    )


def _refusal(response: httpx.Response) -> ChatError:
    try:
        error = response.json()["error"]
        return ChatError(str(error["message"]), error["code"])
    except (ValueError, KeyError, TypeError):
        return ChatError(f"{response.url} answered {response.status_code}; is it a Buddy server?")


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
