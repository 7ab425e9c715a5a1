// The official Node client, unmodified.

import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI from "openai";

const MODEL = "buddy-7m";
const LONG_ANSWERS = 8;
const client = clientOf("open", { maxRetries: 0 });
const asked = {
  model: MODEL,
  messages: [{ role: "user", content: "Tell me a short story about a dog named Max." }],
  stop: "\n",
  temperature: 0,
};
// Takes seconds: no answer may end before its last token.
const long = {
  model: MODEL,
  messages: asked.messages,
  max_tokens: 900,
  n: LONG_ANSWERS,
  budget: 1.0,
  logit_bias: { 0: -100, 1: -100 },
};

function clientOf(tenant, options = {}) {
  return new OpenAI({ baseURL: `${process.env.SERVER_URL}/v1`, apiKey: `sk-${tenant}`, ...options });
}

/** A client of `tenant` with its usual retries, and the statuses and arrival times of what it receives. */
function recordingClientOf(tenant) {
  const received = [];
  const recordingFetch = async (...request) => {
    const response = await fetch(...request);
    received.push({ status: response.status, at: Date.now(), retryAfterMs: Number(response.headers.get("retry-after-ms")) });
    return response;
  };
  return [clientOf(tenant, { fetch: recordingFetch }), received];
}

async function numRunning() {
  const metrics = await (await fetch(`${process.env.SERVER_URL}/metrics`)).text();
  return Number(/^buddy_num_requests_running (.*)$/m.exec(metrics)[1]);
}

async function until(condition, withinMs) {
  const deadline = Date.now() + withinMs;
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, "the condition did not come true in time");
    await sleep(5);
  }
}

const slotsAreFree = () => until(async () => (await numRunning()) === 0, 500);

test("models are listed and retrieved", async () => {
  const listed = await client.models.list();
  assert.deepEqual(listed.data.map((model) => model.id), [MODEL]);
  assert.deepEqual(await client.models.retrieve(MODEL), listed.data[0]);
});

test("a chat completion has every field of its type", async () => {
  const answer = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 2, n: 2 });
  assert.equal(answer.object, "chat.completion");
  assert.match(answer._request_id, /^req_/);
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
  for (const choice of answer.choices) {
    assert.ok(choice.message.content);
    assert.equal(choice.message.refusal, null);
    assert.equal(choice.finish_reason, "stop");
    assert.ok(choice.logprobs.content.every((entry) => entry.top_logprobs.length === 2));
  }
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

test("a stream adds up to the whole answer", async () => {
  const whole = await client.chat.completions.create(asked);
  const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  const texts = [];
  let usage;
  for await (const chunk of stream) {
    if (chunk.choices.length) texts.push(chunk.choices[0].delta.content ?? "");
    usage = chunk.usage;
  }
  assert.equal(texts.join(""), whole.choices[0].message.content);
  assert.ok(texts.filter(Boolean).length > 1);
  assert.deepEqual(usage, whole.usage);
});

test("the stream helper accumulates the whole answer", async () => {
  const whole = await client.chat.completions.create(asked);
  const stream = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  assert.equal(await stream.finalContent(), whole.choices[0].message.content);
  assert.equal(text, whole.choices[0].message.content);
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, "stop");
  assert.equal((await stream.totalUsage()).total_tokens, whole.usage.total_tokens);
});

test("a plain completion is typed, whole and streamed", async () => {
  const fields = { model: MODEL, prompt: "Once upon a time", max_tokens: 12, temperature: 0 };
  const whole = await client.completions.create({ ...fields, logprobs: 2 });
  assert.equal(whole.object, "text_completion");
  assert.equal(whole.choices[0].logprobs.tokens.join(""), whole.choices[0].text);
  let text = "";
  for await (const chunk of await client.completions.create({ ...fields, stream: true })) text += chunk.choices[0].text;
  assert.equal(text, whole.choices[0].text);
});

test("a timeout raises and frees the slots", async () => {
  await assert.rejects(client.chat.completions.create(long, { timeout: 300 }), OpenAI.APIConnectionTimeoutError);
  await slotsAreFree();
});

test("a stream aborted in the middle frees its slots", async () => {
  const stream = await client.chat.completions.create({ ...long, stream: true });
  let seen = 0;
  for await (const _ of stream) {
    if (++seen < 20) continue;
    assert.equal(await numRunning(), LONG_ANSWERS);
    stream.controller.abort();
    break;
  }
  await slotsAreFree();
});

test("a request aborted while it waits frees its slots", async () => {
  const abort = new AbortController();
  const waiting = client.chat.completions.create(long, { signal: abort.signal });
  await until(async () => (await numRunning()) === LONG_ANSWERS, 5000);
  abort.abort();
  await assert.rejects(waiting, OpenAI.APIUserAbortError);
  await slotsAreFree();
});

test("a limited tenant is retried after the time that the server tells", async () => {
  const held = await clientOf("single").chat.completions.create({ ...long, stream: true });
  const [single, received] = recordingClientOf("single");
  const answering = single.chat.completions.create(asked);
  await until(() => received.length, 5000);
  held.controller.abort();
  assert.ok((await answering).choices[0].message.content);
  assert.deepEqual(received.map((response) => response.status), [429, 200]);
  assert.ok(received[0].retryAfterMs > 0);
  assert.ok(received[1].at - received[0].at >= received[0].retryAfterMs - 1);
});

test("a spent quota is not retried", async () => {
  const [spent, received] = recordingClientOf("spent");
  await assert.rejects(spent.chat.completions.create(asked), (error) => {
    assert.ok(error instanceof OpenAI.RateLimitError);
    assert.equal(error.code, "insufficient_quota");
    return true;
  });
  assert.equal(received.length, 1);
});
