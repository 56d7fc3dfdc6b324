/**
 * A small part of Markdown as elements: paragraphs, headings, rules, lists, fenced code; bold, italic, code and links in them.
 * Everything else, HTML above all, stays the text that it is.
 */

import { copyAction, element } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^([ \t]*)(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])([ \t]*\1){2,}[ \t]*$/;
const ITEM = /^([ \t]*)([-*+]|(\d{1,9})[.)])[ \t]+(.*)$/;
// The last line of a text that still grows, as long as it may yet become the beginning of something.
const UNDECIDED = /(^|\n)[ \t]*([-*+]{1,2}|\d{1,9}[.)]?|#{1,6}|`{1,3}|~{1,3})[ \t]*$/;

/** Shows a text that may grow: only blocks that changed are drawn again. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.shown = []; // { key, kind, node } of each block
  }

  /** Draw `text`; `growing` reads marks that are still open as if they were about to be closed. */
  update(text, growing = false) {
    const blocks = parse(growing ? text.replace(UNDECIDED, "$1") : text);
    blocks.forEach((block, index) => this.draw(block, index, growing && index === blocks.length - 1));
    for (const { node } of this.shown.splice(blocks.length)) node.remove();
  }

  draw(block, index, growing) {
    const key = `${growing} ${JSON.stringify(block)}`;
    const shown = this.shown[index];
    if (shown?.key === key) return;
    const kept = shown?.kind === block.kind ? shown.node : null;
    const node = DRAW[block.kind](block, growing, kept);
    if (shown && node !== shown.node) shown.node.replaceWith(node);
    if (!shown) this.root.append(node);
    this.shown[index] = { key, kind: block.kind, node };
  }
}

// Each takes the node that showed the block's beginning, if there is one, and returns it or another.
const DRAW = {
  paragraph(block, growing, kept) {
    const node = kept ?? element("p");
    node.replaceChildren(...inline(block.text, growing));
    return node;
  },
  heading(block, growing) {
    // The page has a first and a second level of its own.
    const node = element(`h${Math.min(block.level + 2, 6)}`);
    node.append(...inline(block.text, growing));
    return node;
  },
  rule: () => element("hr"),
  list: (block, growing) => drawList(block, growing),
  code(block, growing, kept) {
    const node = kept ?? drawFrame();
    node.querySelector(".language").textContent = block.language || "text";
    node.querySelector("code").textContent = block.text;
    return node;
  },
};

function drawFrame() {
  const code = element("code");
  const frame = element("div", { className: "code" });
  const head = element("div", { className: "code-head" }, element("span", { className: "language" }));
  head.append(copyAction("Copy the code", () => code.textContent));
  frame.append(head, element("pre", { tabIndex: 0, role: "region", "aria-label": "Code" }, code));
  return frame;
}

function drawList({ ordered, start, items }, growing) {
  const list = element(ordered ? "ol" : "ul");
  if (ordered && start !== 1) list.start = start;
  items.forEach((item, index) => {
    const open = growing && index === items.length - 1;
    const node = element("li", {}, ...inline(item.text, open));
    node.append(...item.lists.map((inner) => drawList(inner, open)));
    list.append(node);
  });
  return list;
}

/** Cut a text into blocks: `{ kind, … }` of the kinds that `DRAW` knows. */
export function parse(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  for (let at = nextFilled(lines, 0); at < lines.length; at = nextFilled(lines, at)) at = readBlock(lines, at, blocks);
  return blocks;
}

/** Add the block that begins at line `at`; return the line behind it. */
function readBlock(lines, at, blocks) {
  if (FENCE.test(lines[at])) return readCode(lines, at, blocks);
  const heading = HEADING.exec(lines[at]);
  if (heading) {
    blocks.push({ kind: "heading", level: heading[1].length, text: heading[2].trim() });
    return at + 1;
  }
  if (RULE.test(lines[at])) {
    blocks.push({ kind: "rule" });
    return at + 1;
  }
  if (ITEM.test(lines[at])) return readList(lines, at, blocks);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !opensBlock(lines[end])) end += 1;
  blocks.push({ kind: "paragraph", text: lines.slice(at, end).join("\n").trim() });
  return end;
}

const opensBlock = (line) => [FENCE, HEADING, RULE, ITEM].some((pattern) => pattern.test(line));

function readCode(lines, at, blocks) {
  const [, indent, fence, language] = FENCE.exec(lines[at]);
  const closes = (line) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line));
  blocks.push({ kind: "code", language, text: code.join("\n") });
  return end + 1;
}

function readList(lines, at, blocks) {
  const first = ITEM.exec(lines[at]);
  const top = newList(first);
  const open = [{ indent: width(first[1]), list: top }]; // the lists that an item may join, outermost first
  let end = at;
  for (; end < lines.length; end += 1) {
    const item = ITEM.exec(lines[end]);
    if (FENCE.test(lines[end]) || RULE.test(lines[end])) break;
    if (item) {
      if (width(item[1]) < open[0].indent + 2 && isOrdered(item) !== top.ordered) break;
      addItem(open, item);
    } else if (/^\s+\S/.test(lines[end])) {
      open.at(-1).list.items.at(-1).text += `\n${lines[end].trim()}`;
    } else {
      const next = nextFilled(lines, end);
      if (next === end || !goesOn(lines[next])) break;
      end = next - 1;
    }
  }
  blocks.push({ kind: "list", ...top });
  return end;
}

function addItem(open, item) {
  const indent = width(item[1]);
  while (open.length > 1 && indent < open.at(-1).indent) open.pop();
  if (indent >= open.at(-1).indent + 2) {
    const list = newList(item);
    open.at(-1).list.items.at(-1).lists.push(list);
    open.push({ indent, list });
  }
  open.at(-1).list.items.push({ text: item[4], lists: [] });
}

/** The first line from `at` on that is not blank, or the number of lines. */
function nextFilled(lines, at) {
  while (at < lines.length && !lines[at].trim()) at += 1;
  return at;
}

/** Whether a list goes on with this line, behind a blank one. */
const goesOn = (line) => line !== undefined && (ITEM.test(line) || /^\s/.test(line)) && !FENCE.test(line);

const isOrdered = (item) => item[3] !== undefined;
const newList = (item) => ({ ordered: isOrdered(item), start: Number(item[3] ?? 1), items: [] });
const width = (indent) => indent.replaceAll("\t", "    ").length;
