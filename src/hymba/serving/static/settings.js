/** The settings: a form whose defaults stand in index.html, kept from visit to visit. */

import { byId } from "./dom.js";
import { read, write } from "./store.js";

const form = byId("settings");
const fields = [...form.elements].filter((field) => field.name);
const sampling = fields.filter((field) => field.name !== "system");

/** Bring back what was set last time and keep what is set from now on. */
export function startSettings() {
  const kept = read("settings", {});
  for (const field of fields) if (typeof kept?.[field.name] === "string") field.value = kept[field.name];
  form.addEventListener("input", keep);
  byId("defaults").addEventListener("click", () => {
    for (const field of sampling) field.value = field.defaultValue;
    keep();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  showValues();
}

/** Whether every field holds what it may hold. */
export const settingsAreValid = () => form.checkValidity();

/** Point the first field out that does not. */
export const reportSettings = () => form.reportValidity();

/** The system prompt, or an empty text. */
export const systemPrompt = () => byId("system").value.trim();

/** The sampling parameters of a request; those left empty are the server's to choose. */
export function samplingParameters() {
  const given = sampling.filter((field) => field.value !== "");
  return Object.fromEntries(given.map((field) => [field.name, Number(field.value)]));
}

function keep() {
  showValues();
  write("settings", Object.fromEntries(fields.map((field) => [field.name, field.value])));
}

function showValues() {
  for (const output of form.querySelectorAll("output")) {
    const { step, valueAsNumber } = byId(output.htmlFor.value);
    output.value = valueAsNumber.toFixed(step.split(".")[1]?.length ?? 0);
  }
}
