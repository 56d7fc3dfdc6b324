/** The marks inside a line of Markdown: bold, italic, code, links. Read in one pass, in time linear in the text. */

import { element } from "./dom.js";

const DEEPEST = 4; // of bold in italic in bold; deeper marks stay text
const SPECIAL = /[`*_[\\]|https?:\/\//g;
const ESCAPED = /^\\[\\`*_[\]]/;
const LABEL = /^\[([^[\]\n]{1,500})\]\(/;
const ADDRESS = /https?:\/\/[^\s<>"`]{1,2000}/y;
const WORD = /[\p{L}\p{N}_]/u;

/** Text → nodes and strings. `growing`: a mark that is not closed yet reaches to the end. */
export function inline(text, growing = false, depth = 0) {
  return new Reader(text, growing, depth).read();
}

class Reader {
  constructor(text, growing, depth) {
    Object.assign(this, { text, growing, depth, nodes: [], plain: "" });
    this.missing = new Set(); // marks that close nowhere in the rest, so that it is searched once
  }

  read() {
    let at = 0;
    for (;;) {
      SPECIAL.lastIndex = at;
      const next = SPECIAL.exec(this.text)?.index ?? this.text.length;
      this.plain += this.text.slice(at, next);
      if (next === this.text.length) break;
      at = this.special(next);
    }
    this.flush();
    return this.nodes;
  }

  /** Read the mark at `at`; return where to go on. */
  special(at) {
    const end = this.mark(at);
    if (end !== null) return end;
    const run = /^(`+|\*+|_+)/.exec(this.text.slice(at, at + 64))?.[0].length ?? 1;
    this.plain += this.text.slice(at, at + run);
    return at + run;
  }

  mark(at) {
    const char = this.text[at];
    if (char === "`") return this.code(at);
    if (char === "[") return this.link(at);
    if (char === "h") return this.address(at);
    if (char === "\\") return this.escape(at);
    return this.emphasis(at);
  }

  add(node) {
    this.flush();
    this.nodes.push(node);
  }

  flush() {
    if (this.plain) this.nodes.push(this.plain);
    this.plain = "";
  }

  escape(at) {
    if (!ESCAPED.test(this.text.slice(at, at + 2))) return null;
    this.plain += this.text[at + 1];
    return at + 2;
  }

  code(at) {
    const { text } = this;
    const fence = /^`+/.exec(text.slice(at, at + 64))[0];
    const start = at + fence.length;
    const closed = this.find(fence, start, (found) => text[found - 1] !== "`" && text[found + fence.length] !== "`");
    if (closed < 0 && !this.growing) return null;
    const end = closed < 0 ? text.length : closed;
    const inner = unpad(text.slice(start, end));
    if (inner) this.add(element("code", { textContent: inner }));
    return Math.min(end + fence.length, text.length);
  }

  emphasis(at) {
    const { text, depth } = this;
    const mark = new RegExp(`^\\${text[at]}{1,3}`).exec(text.slice(at, at + 3))[0];
    const start = at + mark.length;
    const inWord = WORD.test(text[at - 1] ?? " ");
    if (depth >= DEEPEST || /\s/.test(text[start] ?? "") || (mark[0] === "_" && inWord)) return null;
    let end = this.find(mark, start + 1, (found) => this.closes(mark, found));
    if (end < 0 && (!this.growing || inWord)) return null;
    const open = end < 0;
    if (open) end = text.length;
    const inner = open ? text.slice(start).replace(/[*_]+$/, "") : text.slice(start, end);
    if (inner) this.add(emphasise(mark.length, inline(inner, open, depth + 1)));
    return Math.min(end + mark.length, text.length);
  }

  closes(mark, at) {
    const { text } = this;
    const behind = text[at + mark.length] ?? " ";
    if (/\s/.test(text[at - 1])) return false;
    if (mark[0] === "_" && WORD.test(behind)) return false;
    return mark.length > 1 || (behind !== mark && text[at - 1] !== mark);
  }

  /** Where `mark` stands next at or behind `from` and `valid` allows it, or -1. */
  find(mark, from, valid) {
    if (this.missing.has(mark)) return -1;
    for (let at = from; (at = this.text.indexOf(mark, at)) >= 0; at += 1) if (valid(at)) return at;
    this.missing.add(mark);
    return -1;
  }

  link(at) {
    const label = LABEL.exec(this.text.slice(at, at + 504));
    if (!label) return null;
    const start = at + label[0].length;
    const end = endOfAddress(this.text, start);
    const url = this.text.slice(start, end);
    if (this.growing && end === this.text.length) this.plain += label[1];
    else if (this.text[end] !== ")" || !isSafe(url)) return null;
    else this.add(anchor(url, inline(label[1], false, DEEPEST)));
    return Math.min(end + 1, this.text.length);
  }

  address(at) {
    if (WORD.test(this.text[at - 1] ?? " ")) return null;
    ADDRESS.lastIndex = at;
    const url = ADDRESS.exec(this.text)?.[0].replace(/[.,;:!?'*_)\]]+$/, "");
    if (!url || !isSafe(url)) return null;
    this.add(anchor(url, [url]));
    return at + url.length;
  }
}

/** Code is written with a space at either end where a backtick stands there. */
function unpad(code) {
  return code.startsWith(" ") && code.endsWith(" ") && code.trim() ? code.slice(1, -1) : code;
}

function emphasise(strength, nodes) {
  if (strength === 1) return element("em", {}, ...nodes);
  const strong = element("strong", {}, ...nodes);
  return strength === 2 ? strong : element("em", {}, strong);
}

/** Where the address that begins at `start` ends: at a space, or at a bracket that it did not open. */
function endOfAddress(text, start) {
  let [at, depth] = [start, 0];
  for (; at < text.length && at < start + 2000 && text[at] > " "; at += 1) {
    if (text[at] === "(") depth += 1;
    if (text[at] === ")" && depth-- === 0) break;
  }
  return at;
}

const anchor = (url, nodes) => element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, ...nodes);

/** Whether a link may lead there: the web or a mailbox, never a script, and never this server unawares. */
function isSafe(url) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(url).protocol);
  } catch {
    return false;
  }
}
