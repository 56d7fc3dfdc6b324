/** What is seen of a conversation: one list item a turn. */

import { action, copyAction, element, isTouched } from "./dom.js";
import { describeAnswer } from "./figures.js";
import { MarkdownView } from "./markdown.js";

const NOTES = {
  stopped: "Stopped.",
  length: "Cut off: it reached the longest that the settings or the model allow.",
  done: "",
  running: "",
};
const FIGURES_EVERY = 300; // milliseconds; faster than that nobody reads them

/** Make a text box as tall as its text; the style sheet sets the limit. */
export function fitHeight(box) {
  box.style.blockSize = "auto";
  box.style.blockSize = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`; // and its border
}

/** A question, which can be edited while it is the last: `resend(text)` is told the new wording. */
export class QuestionView {
  constructor(turn, resend) {
    Object.assign(this, { turn, resend });
    this.edit = action("edit", "Edit and send again", () => this.startEditing());
    this.edit.classList.add("last-only");
    this.bubble = element("div", { className: "bubble", textContent: turn.content });
    this.actions = element("div", { className: "actions" }, this.edit);
    const title = element("h2", { className: "unseen", textContent: "You" });
    this.node = element("li", { className: "turn question" }, title, this.bubble, this.actions);
  }

  startEditing() {
    const box = element("textarea", { value: this.turn.content, "aria-label": "Edit your message" });
    const cancel = element("button", { type: "button", className: "quiet", textContent: "Cancel" });
    const send = element("button", { type: "submit", className: "solid", textContent: "Send" });
    const form = element("form", { className: "editor" }, box, element("div", { className: "row" }, cancel, send));
    const close = () => {
      form.replaceWith(this.bubble);
      this.actions.hidden = false;
      this.edit.focus();
    };
    cancel.addEventListener("click", close);
    box.addEventListener("input", () => fitHeight(box));
    form.addEventListener("keydown", (event) => event.key === "Escape" && close());
    sendOnEnter(box, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (box.value.trim()) this.resend(box.value.trim());
    });
    this.bubble.replaceWith(form);
    this.actions.hidden = true;
    fitHeight(box);
    box.focus();
  }
}

/** Enter sends what is in the box; with Shift, on a touch screen or amid a composed character it does not. */
export function sendOnEnter(box, form) {
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouched()) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

/** An answer, drawn anew at most once a frame while it grows; `again()` is asked for another. */
export class AnswerView {
  constructor(turn, again) {
    Object.assign(this, { turn, frame: 0, figuresAt: 0 });
    const prose = element("div", { className: "prose" });
    this.markdown = new MarkdownView(prose);
    this.waiting = element("p", { className: "waiting", textContent: "Reading" });
    this.note = element("p", { className: "note" });
    this.problem = element("p", { className: "problem" });
    this.figures = element("span", { className: "figures" });
    const retry = action("again", "Answer again", again);
    retry.classList.add("last-only");
    this.copy = copyAction("Copy the answer", () => turn.content);
    const actions = element("div", { className: "actions" }, this.copy, retry, this.figures);
    const title = element("h2", { className: "unseen", textContent: "Hymba" });
    this.node = element("li", { className: "turn answer" }, title, this.waiting, prose, this.problem, this.note, actions);
    this.draw();
  }

  /** Draw soon; `then` is called when it is done. */
  drawSoon(then) {
    this.frame ||= requestAnimationFrame(() => {
      this.draw();
      then();
    });
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { content, state, error } = this.turn;
    const running = state === "running";
    this.markdown.update(content, running);
    this.node.classList.toggle("running", running);
    this.node.classList.toggle("failed", state === "failed");
    this.node.setAttribute("aria-busy", running);
    this.waiting.hidden = !running || content !== "";
    this.problem.hidden = state !== "failed";
    this.problem.textContent = error ?? "";
    this.note.textContent = state === "done" && !content ? "The model had nothing to say." : (NOTES[state] ?? "");
    this.note.hidden = !this.note.textContent;
    this.copy.hidden = !content;
    this.drawFigures(running);
  }

  drawFigures(running) {
    const now = performance.now();
    if (running && now - this.figuresAt < FIGURES_EVERY) return;
    this.figuresAt = now;
    this.figures.textContent = describeAnswer(this.turn.stats);
  }

  /** The answer as it reads, without its marks. */
  get spoken() {
    const notes = [this.problem, this.note].filter((node) => !node.hidden).map((node) => node.textContent);
    return [this.markdown.root.textContent, ...notes].join(" ");
  }
}
