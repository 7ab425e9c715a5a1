// Tools and structured output through the AI SDK.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "buddy",
  baseURL: `${process.env.SERVER_URL}/v1`,
  apiKey: "sk-open",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const Weather = z.object({ city: z.enum(["Oslo", "Paris", "Rome"]), days: z.number().int().min(1).max(9) });
const asked = {
  model: provider("buddy-7m"),
  prompt: "What is the weather in Paris?",
  temperature: 0,
  maxRetries: 0,
};
const named = { type: "tool", toolName: "weather" };

/** The tool, and what it is called with. */
function weather() {
  const seen = [];
  const execute = async (input) => {
    seen.push(input);
    return { forecast: "sunny" };
  };
  return [{ weather: tool({ description: "The weather", inputSchema: Weather, execute }) }, seen];
}

// The model would call it for ever: the first step alone is forced to.
const forcedOnce = { stopWhen: stepCountIs(2), prepareStep: ({ stepNumber }) => (stepNumber ? { toolChoice: "auto" } : {}) };

for (const toolChoice of [named, "required"]) {
  test(`generateText runs a tool and goes on to text: ${JSON.stringify(toolChoice)}`, async () => {
    const [tools, seen] = weather();
    const { steps, text } = await generateText({ ...asked, tools, toolChoice, ...forcedOnce });
    assert.equal(steps.length, 2);
    assert.equal(steps[0].finishReason, "tool-calls");
    assert.ok(seen.length);
    seen.forEach((input) => Weather.parse(input));
    assert.ok(text);
  });
}

test("streamText runs a tool and goes on to text", async () => {
  const [tools, seen] = weather();
  const streamed = streamText({ ...asked, tools, toolChoice: named, ...forcedOnce });
  const kinds = [];
  for await (const part of streamed.fullStream) {
    assert.notEqual(part.type, "error", String(part.error));
    kinds.push(part.type);
  }
  for (const kind of ["tool-input-start", "tool-input-delta", "tool-call", "tool-result", "text-delta"]) {
    assert.ok(kinds.includes(kind), kind);
  }
  assert.equal(seen.length, 1);
  assert.ok(await streamed.text);
});

test("generateText gives an object of its schema", async () => {
  const { output } = await generateText({ ...asked, output: Output.object({ schema: Weather }) });
  Weather.parse(output);
});

test("streamText gives an object of its schema", async () => {
  const { output } = streamText({ ...asked, output: Output.object({ schema: Weather }) });
  Weather.parse(await output);
});
