// The Responses API through the official Node client.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.SERVER_URL}/v1`, apiKey: "sk-open", maxRetries: 0 });
const asked = { model: "buddy-7m", input: "What is 34 + 25?", max_output_tokens: 60, temperature: 0 };

test("a response has text and usage", async () => {
  const answer = await client.responses.create({ ...asked, instructions: "Be kind." });
  assert.ok(answer.output_text);
  assert.equal(answer.status, "completed");
  assert.equal(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens);
});

test("events add up to the whole text", async () => {
  const whole = await client.responses.create(asked);
  let text = "";
  let sequence = 0;
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    assert.equal(event.sequence_number, sequence++);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole.output_text);
});

test("the stream helper gives the final response", async () => {
  const whole = await client.responses.create(asked);
  const final = await client.responses.stream(asked).finalResponse();
  assert.equal(final.output_text, whole.output_text);
  assert.equal(final.status, "completed");
});

test("what needs a store is refused by name", async () => {
  await assert.rejects(client.responses.create({ ...asked, previous_response_id: "resp_1" }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "previous_response_id");
    return true;
  });
});
