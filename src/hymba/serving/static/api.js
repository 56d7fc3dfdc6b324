/** The server's OpenAI API, as far as a chat needs it. Addresses are relative: the page works under any prefix. */

import { read, write } from "./store.js";

/** The server refused or failed; `message` is meant to be read. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Keep the API key for as long as this tab lives. */
export const rememberKey = (key) => write("key", key, "sessionStorage");

/** The model that answers: its `id`, `max_length` and `cache`. */
export async function fetchModel() {
  const { data } = await (await call("v1/models")).json();
  if (!data?.length) throw new ApiError("The server has no model.");
  return data[0];
}

/**
 * Yield the parts of an answer as they come: `{ text, finish, usage }`, each of them or none.
 *
 * @param request body of a chat completion, but for the streaming.
 * @param signal aborts the answer, also on the server.
 */
export async function* streamAnswer(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const headers = { "Content-Type": "application/json" };
  const response = await call("v1/chat/completions", { method: "POST", headers, body, signal });
  for await (const line of readLines(response.body)) {
    if (!line.startsWith("data:")) continue; // blank lines between events, comments that keep the connection open
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = parseEvent(data);
    if (event.error) throw new ApiError(event.error.message);
    const choice = event.choices?.[0];
    yield { text: choice?.delta?.content ?? "", finish: choice?.finish_reason ?? null, usage: event.usage ?? null };
  }
  throw new ApiError("The connection broke off before the answer was complete.");
}

function parseEvent(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent a part of an answer that cannot be read.");
  }
}

async function call(path, options = {}) {
  const key = read("key", null, "sessionStorage");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`No answer from ${location.host}: is the server running?`);
  }
  if (!response.ok) throw await refusal(response, key);
  return response;
}

async function refusal(response, key) {
  if (response.status === 401) {
    return new ApiError(key ? "The server does not take this API key." : "The server asks for an API key.", 401);
  }
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(message, response.status);
}

async function* readLines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(brokenOff);
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

/**
 * A connection that breaks ends the lines like one that closes; only our own stop goes further up. A page that is being
 * left loses its connections first: the pause is there so that it does not take that for an error in its last moment.
 */
async function brokenOff(error) {
  if (error.name === "AbortError") throw error;
  await new Promise((resolve) => setTimeout(resolve, 300));
  return { done: true };
}
