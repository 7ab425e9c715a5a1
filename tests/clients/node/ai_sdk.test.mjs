// The AI SDK through its provider for OpenAI-compatible servers, unmodified.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";

const provider = createOpenAICompatible({
  name: "buddy",
  baseURL: `${process.env.SERVER_URL}/v1`,
  apiKey: "sk-open",
  includeUsage: true,
});
const asked = {
  model: provider("buddy-7m"),
  prompt: "Tell me a short story about a dog named Max.",
  stopSequences: ["\n"],
  temperature: 0,
  maxRetries: 0,
};

test("generateText gives text, usage and the reason of its end", async () => {
  const { text, finishReason, usage } = await generateText(asked);
  assert.ok(text);
  assert.equal(finishReason, "stop");
  assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
});

test("generateText passes the budget on", async () => {
  const { response } = await generateText({ ...asked, providerOptions: { buddy: { budget: 0.5 } } });
  assert.equal(response.body.buddy.layers_per_token, response.body.buddy.layers / 2);
});

test("streamText adds up to the whole text", async () => {
  const whole = await generateText(asked);
  const streamed = streamText(asked);
  const parts = [];
  for await (const part of streamed.textStream) parts.push(part);
  assert.ok(parts.length > 1);
  assert.equal(parts.join(""), whole.text);
  assert.equal(await streamed.finishReason, "stop");
  assert.equal((await streamed.usage).totalTokens, whole.usage.totalTokens);
});

test("an error is told by its message", async () => {
  const refused = generateText({ ...asked, providerOptions: { buddy: { budget: 7 } } });
  await assert.rejects(refused, (error) => {
    assert.ok(APICallError.isInstance(error));
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /from 0\.125/);
    return true;
  });
});
