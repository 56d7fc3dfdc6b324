/** Where the settings stand: beside the conversation where there is room, else in a sheet over it. */

import { byId } from "./dom.js";
import { read, write } from "./store.js";

const wide = matchMedia("(min-width: 62rem)"); // as in chat.css
const side = byId("side");
const sheet = byId("sheet");
const toggle = byId("panel-toggle");

/** Put the settings in their place and let them be opened and closed. */
export function startPanel() {
  wide.addEventListener("change", place);
  toggle.addEventListener("click", () => {
    if (!wide.matches) return openPanel();
    write("panel", side.hidden);
    place();
  });
  byId("sheet-close").addEventListener("click", () => sheet.close());
  sheet.addEventListener("close", () => toggle.setAttribute("aria-expanded", "false"));
  sheet.addEventListener("click", (event) => event.target === sheet && sheet.close()); // beside its content
  place();
}

/** Have the settings in sight. */
export function openPanel() {
  if (wide.matches) {
    write("panel", true);
    return place();
  }
  toggle.setAttribute("aria-expanded", "true");
  if (!sheet.open) sheet.showModal();
}

/** Whether the settings cover the conversation. */
export const isCovered = () => sheet.open;

function place() {
  (wide.matches ? side : sheet).append(byId("settings"));
  side.hidden = !(wide.matches && read("panel", true));
  if (wide.matches && sheet.open) sheet.close();
  toggle.setAttribute("aria-expanded", String(!side.hidden || sheet.open));
}
