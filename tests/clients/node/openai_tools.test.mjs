// Tools through the official Node client. The embedded model calls none by itself: the choice forces it to.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodFunction } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.SERVER_URL}/v1`, apiKey: "sk-open", maxRetries: 0 });
const Weather = z.object({ city: z.enum(["Oslo", "Paris", "Rome"]), days: z.number().int().min(1).max(9) });
const tool = zodFunction({ name: "weather", parameters: Weather });
const named = { type: "function", function: { name: "weather" } };
const asked = {
  model: "buddy-7m",
  messages: [{ role: "user", content: "What is the weather in Paris?" }],
  tools: [tool],
  temperature: 0,
};

for (const tool_choice of [named, "required"]) {
  for (const budget of [1.0, 0.5, 0.125]) {
    test(`parse gives arguments of their type: ${JSON.stringify(tool_choice)} at budget ${budget}`, async () => {
      const answer = await client.chat.completions.parse({ ...asked, tool_choice, budget, parallel_tool_calls: false });
      const [choice] = answer.choices;
      assert.equal(choice.finish_reason, "tool_calls");
      assert.equal(choice.message.tool_calls.length, 1);
      const [call] = choice.message.tool_calls;
      assert.equal(call.function.name, "weather");
      Weather.parse(call.function.parsed_arguments);
    });
  }
}

test("a loop of two turns ends in text", async () => {
  const first = await client.chat.completions.create({ ...asked, tool_choice: named });
  const { message } = first.choices[0];
  const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "sunny" };
  const messages = [...asked.messages, message, result];
  const second = await client.chat.completions.create({ ...asked, messages, max_tokens: 20 });
  assert.ok(second.choices[0].message.content);
});

test("runTools calls the function", async () => {
  const seen = [];
  const callback = (parameters) => seen.push(parameters) && "sunny";
  const runnable = zodFunction({ name: "weather", parameters: Weather, function: callback });
  for (const stream of [false, true]) {
    const runner = client.chat.completions.runTools({ ...asked, tools: [runnable], tool_choice: named, stream });
    assert.equal(await runner.finalFunctionToolCallResult(), "sunny");
  }
  assert.equal(seen.length, 2);
  seen.forEach((parameters) => Weather.parse(parameters));
});

test("the stream helper puts the pieces of a call together", async () => {
  const whole = await client.chat.completions.create({ ...asked, tool_choice: named });
  const stream = client.chat.completions.stream({ ...asked, tool_choice: named });
  let pieces = "";
  stream.on("tool_calls.function.arguments.delta", (event) => (pieces += event.arguments_delta));
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, "tool_calls");
  assert.equal(pieces, whole.choices[0].message.tool_calls[0].function.arguments);
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, pieces);
});

test("the Responses API gives the call, whole and streamed", async () => {
  const responseAsked = {
    model: "buddy-7m",
    input: "What is the weather in Paris?",
    tools: [{ type: "function", ...tool.function }],
    tool_choice: { type: "function", name: "weather" },
    temperature: 0,
  };
  const whole = await client.responses.create(responseAsked);
  const [call] = whole.output;
  assert.equal(call.type, "function_call");
  Weather.parse(JSON.parse(call.arguments));
  const final = await client.responses.stream(responseAsked).finalResponse();
  assert.equal(final.output[0].arguments, call.arguments);
  const turns = [{ role: "user", content: responseAsked.input }, ...whole.output];
  turns.push({ type: "function_call_output", call_id: call.call_id, output: "sunny" });
  const second = await client.responses.create({ ...responseAsked, input: turns, tool_choice: "auto", max_output_tokens: 20 });
  assert.ok(second.output_text);
});
