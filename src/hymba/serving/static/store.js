/** What the browser keeps for us. Storage may be full, closed or tampered with: then we go on without. */

const PREFIX = "hymba.";

/** Read a value back, or `fallback` if there is none that can be read. */
export function read(name, fallback, storage = "localStorage") {
  try {
    const text = window[storage].getItem(PREFIX + name);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

/** Keep a value; says whether that worked. */
export function write(name, value, storage = "localStorage") {
  try {
    window[storage].setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
