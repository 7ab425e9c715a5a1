// Structured output through the official Node client.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.SERVER_URL}/v1`, apiKey: "sk-open", maxRetries: 0 });
const Animal = z.object({ kind: z.enum(["bird", "cat", "dog"]), legs: z.number().int().min(0).max(8) });
const Farm = z.object({ name: z.enum(["Green Hill", "Old Mill"]), animals: z.array(Animal).min(1).max(2), isOpen: z.boolean() });
const asked = {
  model: "buddy-7m",
  messages: [{ role: "user", content: "Describe a farm." }],
  response_format: zodResponseFormat(Farm, "farm"),
  temperature: 0,
};

for (const budget of [1.0, 0.5, 0.125]) {
  test(`parse gives what the schema says at budget ${budget}`, async () => {
    const answer = await client.chat.completions.parse({ ...asked, budget });
    assert.equal(answer.choices[0].finish_reason, "stop");
    Farm.parse(answer.choices[0].message.parsed);
  });
}

test("the stream helper parses what parse does", async () => {
  const whole = await client.chat.completions.parse(asked);
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.deepEqual(final.choices[0].message.parsed, whole.choices[0].message.parsed);
});

test("the Responses API is parsed too", async () => {
  const answer = await client.responses.parse({
    model: asked.model,
    input: "Describe a farm.",
    text: { format: zodTextFormat(Farm, "farm") },
    temperature: 0,
  });
  Farm.parse(answer.output_parsed);
});
