/** The conversation: what was said, what is being answered, and the buttons around it. */

import { fetchModel, rememberKey, streamAnswer } from "./api.js";
import { announce, byId, element, isTouched } from "./dom.js";
import { showMemory } from "./figures.js";
import { isCovered, openPanel, startPanel } from "./panel.js";
import { startScroller, stay, toEnd } from "./scroller.js";
import { reportSettings, samplingParameters, settingsAreValid, startSettings, systemPrompt } from "./settings.js";
import { read, write } from "./store.js";
import { AnswerView, QuestionView, fitHeight, sendOnEnter } from "./turns.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer grows
const BEGINNINGS = [ // for a model that knows old novels
  "It was a cold morning, and the road to the village",
  '"You must allow me to tell you," said Emma,',
  "The prince rose from the table, and",
];
const box = byId("box");

let turns = []; // { role, content } oldest first; answers have { state, error, status, stats } besides
let views = []; // one a turn
let shelved = []; // the conversation before this one
let running = null; // the AbortController of the answer that is being written
let model = null; // as the server describes it
let savedAt = 0;

start();

function start() {
  startSettings();
  startPanel();
  startScroller();
  startTheme();
  startComposer();
  startKey();
  for (const button of byId("examples").querySelectorAll("button")) {
    button.addEventListener("click", () => ask(button.textContent));
  }
  byId("new-conversation").addEventListener("click", startAnew);
  byId("bring-back").addEventListener("click", () => replaceTurns(shelved));
  addEventListener("pagehide", save);
  visualViewport?.addEventListener("resize", fitViewport);
  visualViewport?.addEventListener("scroll", fitViewport);
  restore();
  findModel().catch(showDisconnected);
}

// What was said

function readTurns() {
  const kept = read("turns", []);
  const sound = (turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string";
  return Array.isArray(kept) && kept.every(sound) ? kept.map((turn) => ({ stats: noStats(), ...turn })) : [];
}

function restore() {
  try {
    replaceTurns(readTurns());
  } catch {
    replaceTurns([]); // kept by another version, or by someone else
  }
}

/** Keep the conversation; an answer that is being written counts as stopped there. */
function save() {
  savedAt = performance.now();
  write("turns", turns.map((turn) => (turn.state === "running" ? { ...turn, state: "stopped" } : turn)));
}

function replaceTurns(kept) {
  [turns, views] = [[], []];
  byId("turns").replaceChildren();
  for (const turn of kept) add(turn);
  changed();
  toEnd();
}

function startAnew() {
  running?.abort();
  if (turns.length) shelved = turns;
  replaceTurns([]);
  box.focus();
}

function add(turn) {
  const view =
    turn.role === "user"
      ? new QuestionView(turn, (text) => {
          cut(turns.indexOf(turn));
          ask(text);
        })
      : new AnswerView(turn, answerAgain);
  turns.push(turn);
  views.push(view);
  byId("turns").append(view.node);
  return view;
}

/** Forget the turns from `index` on. */
function cut(index) {
  turns.length = index;
  for (const view of views.splice(index)) view.node.remove();
}

/** The conversation is another: keep it, and show what follows from it. */
function changed() {
  save();
  byId("empty").hidden = turns.length > 0;
  byId("bring-back").hidden = shelved.length === 0;
  showSize();
}

/** Tokens so far: as the server counted them last, and as counted here since then. */
function showSize() {
  const counted = turns.findLastIndex((turn) => turn.stats?.usage);
  const usage = turns[counted]?.stats.usage;
  const since = turns.slice(counted + 1).reduce((sum, turn) => sum + (turn.stats?.tokens ?? 0), 0);
  showMemory((usage ? usage.prompt + usage.completion : 0) + since, counted === turns.length - 1, model);
}

// Questions and answers

function ask(text) {
  if (running || !text) return false;
  if (!settingsAreValid()) {
    openPanel();
    reportSettings();
    return false;
  }
  add({ role: "user", content: text });
  answer();
  return true;
}

function answerAgain() {
  if (running) return;
  if (turns.at(-1)?.role === "assistant") cut(turns.length - 1);
  answer();
}

async function answer() {
  const request = { messages: messagesSoFar(), ...samplingParameters() };
  const turn = { role: "assistant", content: "", state: "running", error: null, stats: noStats() };
  const view = add(turn);
  setRunning(new AbortController());
  changed();
  toEnd();
  try {
    await receive(turn, view, request, running.signal);
  } catch (error) {
    turn.state = error.name === "AbortError" ? "stopped" : "failed";
    turn.error = turn.state === "failed" ? error.message : null;
    turn.status = error.status;
  }
  setRunning(null);
  view.draw();
  if (!turns.includes(turn)) return; // a new conversation was begun meanwhile
  changed();
  stay();
  announce(view.spoken);
  if (turn.status === 401) askForKey();
}

/** Let the answer grow as it comes. */
async function receive(turn, view, request, signal) {
  const { id } = model ?? (await findModel());
  signal.throwIfAborted();
  const asked = performance.now();
  for await (const { text, finish, usage } of streamAnswer({ model: id, ...request }, signal)) {
    if (text) note(turn.stats, asked);
    if (usage) turn.stats = { ...turn.stats, ...counted(usage) };
    turn.content += text;
    if (finish) turn.finish = finish;
    view.drawSoon(stay);
    if (performance.now() - savedAt > SAVE_EVERY) changed();
  }
  turn.state = turn.finish === "length" ? "length" : "done";
}

function noStats() {
  return { usage: null, tokens: 0, firstSeconds: null, seconds: 0 };
}

/** Count a piece of text that came just now, `asked` being when it was asked for. */
function note(stats, asked) {
  const seconds = (performance.now() - asked) / 1000;
  stats.firstSeconds ??= seconds;
  stats.seconds = seconds - stats.firstSeconds;
  stats.tokens += 1;
}

/** The server's own count, in place of ours. */
function counted({ prompt_tokens: prompt, completion_tokens: completion, prompt_tokens_details: details }) {
  return { tokens: completion, usage: { prompt, completion, cached: details?.cached_tokens ?? 0 } };
}

/** What the server is told: the system prompt, and every turn that says something. */
function messagesSoFar() {
  const system = systemPrompt();
  const said = turns.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

function setRunning(abort) {
  const focused = document.activeElement;
  running = abort;
  document.body.classList.toggle("is-running", Boolean(abort));
  byId("send").hidden = Boolean(abort);
  byId("stop").hidden = !abort;
  if (abort && focused === document.body) byId("stop").focus(); // the button that asked is gone
  else if (!focused.checkVisibility()) byId(abort ? "stop" : isTouched() ? "send" : "box").focus();
}

// Around the conversation

async function findModel() {
  model = await fetchModel();
  byId("model-name").textContent = model.id;
  byId("model-line").replaceChildren("Running ", element("strong", { textContent: model.id }), " on this server.");
  if (model.id === "tiny") offerProse();
  showSize();
  return model;
}

/** The bundled model, which has no name but "tiny", is no partner for a conversation. */
function offerProse() {
  byId("empty-title").textContent = "How does the story begin?";
  byId("model-line").append(" It only continues prose: it was never taught to converse.");
  byId("examples").querySelectorAll("button").forEach((button, index) => (button.textContent = BEGINNINGS[index]));
}

function showDisconnected(error) {
  byId("model-name").textContent = "not connected";
  byId("model-line").textContent = error.message;
  if (error.status === 401) askForKey();
}

function startComposer() {
  const composer = byId("composer");
  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    if (ask(box.value.trim())) box.value = "";
    fitHeight(box);
  });
  sendOnEnter(box, composer);
  box.addEventListener("input", () => fitHeight(box));
  byId("stop").addEventListener("click", () => running?.abort());
  addEventListener("keydown", (event) => event.key === "Escape" && !event.isComposing && !isCovered() && running?.abort());
  if (!isTouched()) box.focus();
}

function startKey() {
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    rememberKey(byId("key").value.trim());
    byId("key-form").hidden = true;
    box.focus();
    if (turns.at(-1)?.status === 401) answerAgain();
    else await findModel().catch(showDisconnected);
  });
}

function askForKey() {
  byId("key-form").hidden = false;
  byId("key").value = "";
  byId("key").focus();
}

function startTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => byId("theme").setAttribute("aria-pressed", String(isDark()));
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    write("theme", root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}

/** Keep the page as high as what is seen of it, where a phone's keyboard covers it rather than make it smaller. */
function fitViewport() {
  if (visualViewport.scale > 1.01) return; // magnified by the reader, not covered
  document.documentElement.style.setProperty("--height", `${visualViewport.height}px`);
  document.documentElement.style.setProperty("--top", `${visualViewport.offsetTop}px`);
}
