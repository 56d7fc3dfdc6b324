/** Keeps the end of the conversation in sight, but only for a reader who is there. */

import { byId } from "./dom.js";

const NEAR = 48; // pixels from the end that still count as there

const scroller = byId("scroller");
const button = byId("to-end");
let following = true;
let before = 0;

/** Watch the reader, and the places that change height. */
export function startScroller() {
  scroller.addEventListener("scroll", watch, { passive: true });
  button.addEventListener("click", () => {
    toEnd();
    scroller.focus({ preventScroll: true }); // the button is gone
  });
  new ResizeObserver(stay).observe(scroller);
}

/** The conversation grew: stay at its end, if that is where the reader is. */
export function stay() {
  if (following) toEnd();
  else watch();
}

/** Go to the end and stay there. */
export function toEnd() {
  following = true;
  scroller.scrollTop = scroller.scrollHeight;
  watch();
}

function watch() {
  const { scrollTop, scrollHeight, clientHeight } = scroller;
  if (scrollHeight - scrollTop - clientHeight < NEAR) following = true;
  else if (scrollTop < before) following = false; // only going up leaves: growing text moves the end away, too
  before = scrollTop;
  button.hidden = following || scrollHeight - scrollTop - clientHeight < NEAR;
}
