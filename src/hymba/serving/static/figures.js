/** Numbers for readers: rates, tokens, and the memory of a conversation beside that of a Llama. */

import { byId } from "./dom.js";

const WHOLE = new Intl.NumberFormat("en");

/** Bytes in two or three figures: 86 MB, 1.07 GB. */
export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 999.5 && unit < units.length - 1) [count, unit] = [count / 1000, unit + 1];
  return `${unit ? count.toPrecision(3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "") : count} ${units[unit]}`;
}

/** One line about an answer: how fast, how long, how much was known from earlier turns. */
export function describeAnswer({ usage, tokens, firstSeconds, seconds }) {
  const parts = [];
  if (tokens > 1 && seconds > 0) parts.push(`${usage ? "" : "≈ "}${figure((tokens - 1) / seconds)} tokens/s`);
  if (usage) parts.push(`${WHOLE.format(tokens)} token${tokens === 1 ? "" : "s"}`);
  if (firstSeconds !== null) parts.push(`first after ${figure(firstSeconds)} s`);
  if (usage) parts.push(`${WHOLE.format(usage.cached)} of ${WHOLE.format(usage.prompt)} prompt tokens cached`);
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · "); // lines break between figures, not in them
}

const figure = (value) => (value < 10 ? value.toFixed(value < 1 ? 2 : 1) : WHOLE.format(Math.round(value)));

/**
 * Show how long the conversation is and what the server keeps of it.
 *
 * @param tokens of the prompt and the last answer together; `exact` unless they were counted here.
 * @param model as the server describes it, or null while it is unknown.
 */
export function showMemory(tokens, exact, model) {
  const about = exact ? "" : "≈ ";
  byId("count").textContent = `${about}${WHOLE.format(tokens)}${model ? ` of ${WHOLE.format(model.max_length)}` : ""} tokens`;
  const cache = model?.cache;
  byId("memory").hidden = !cache;
  if (!cache) return;
  const hymba = (length) => cache.fixed_bytes + cache.bytes_per_token * length;
  const llama = (length) => cache.llama_bytes_per_token * length;
  const scale = Math.max(hymba(tokens), llama(tokens));
  showBar("hymba", hymba(tokens), scale);
  showBar("llama", llama(tokens), scale);
  byId("memory-note").textContent = noteOn(hymba, llama, tokens, model.max_length);
  byId("brief").textContent = tokens
    ? `${about}${WHOLE.format(tokens)} tokens in ${bytes(hymba(tokens))} · a Llama: ${bytes(llama(tokens))}`
    : "";
}

function showBar(name, count, scale) {
  byId(`${name}-bytes`).textContent = bytes(count);
  byId(`${name}-bar`).style.inlineSize = `${(100 * count) / scale}%`;
}

/** What the bars will come to, and from where on they turn in Hymba's favour. */
function noteOn(hymba, llama, tokens, longest) {
  const atLongest = `At ${WHOLE.format(longest)} tokens: ${bytes(hymba(longest))} against ${bytes(llama(longest))}.`;
  if (hymba(tokens) <= llama(tokens)) return atLongest;
  const saved = llama(1) - (hymba(1) - hymba(0));
  const turn = Math.ceil(hymba(0) / saved);
  if (saved <= 0 || turn > longest) return atLongest;
  return `${atLongest} Hymba's begins with a fixed part, and is the smaller from ${WHOLE.format(turn)} tokens on.`;
}
