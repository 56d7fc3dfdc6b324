/** Elements, never built from HTML text: what a model writes cannot become markup. */

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id, which index.html is known to have. */
export const byId = (id) => document.getElementById(id);

/** Make an element; properties with a dash in their name are attributes, strings among the children are text. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** Draw one of the symbols that stand at the head of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Whether the first way of pointing here is a finger: then a keyboard covers half of the page. */
export const isTouched = () => matchMedia("(pointer: coarse)").matches;

/** A small button of an icon and its label, which narrow places hide from the eye only. */
export function action(name, label, run) {
  const button = element("button", { type: "button", className: "action", title: label }, icon(name));
  button.append(element("span", { className: "unseen", textContent: label }));
  button.addEventListener("click", run);
  return button;
}

/** A button that copies what `text()` returns and shows for a moment that it did. */
export function copyAction(label, text) {
  const button = action("copy", label, async () => {
    const copied = await copy(text());
    announce(copied ? "Copied" : "The browser refuses to copy");
    button.replaceChild(icon(copied ? "tick" : "cross"), button.firstChild);
    setTimeout(() => button.replaceChild(icon("copy"), button.firstChild), 1500);
  });
  return button;
}

/** Have a screen reader say something once it is done with what it reads. */
export function announce(text) {
  const announcer = byId("announcer");
  announcer.textContent = "";
  setTimeout(() => (announcer.textContent = text), 50); // the same text twice is news only after a pause
}

/** Put text on the clipboard; says whether that worked. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

/** The old way: over plain HTTP to another machine, browsers offer no `navigator.clipboard`. */
function copyBySelection(text) {
  const before = document.activeElement;
  const box = element("textarea", { value: text, className: "unseen" });
  document.body.append(box);
  box.select();
  const copied = document.execCommand("copy");
  box.remove();
  before?.focus();
  return copied;
}
