// Small helpers for the document. All text goes through textContent, so markup in a prompt stays text.

export const find = (id) => document.getElementById(id);

// Make an element: properties are set as properties, or as attributes where the name has a dash or is `role`.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Say something to those who use a screen reader. The same sentence twice in a row is said once.
export function announce(text) {
  const announcer = find("announcer");
  if (announcer.textContent !== text) announcer.textContent = text;
}

// Show an error of the API, or hide the box: a message, and what is wrong, one line each.
export function showError(box, error, hint = "") {
  box.hidden = !error;
  box.replaceChildren();
  if (!error) return;
  box.append(make("p", { textContent: sentence(error.message) }));
  if (error.problems?.length) {
    box.append(make("ul", {}, ...error.problems.map((problem) => make("li", { textContent: problem }))));
  }
  if (hint) box.append(make("p", { textContent: hint }));
}

// The API's messages are parts of sentences sometimes.
function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?:\])"']$/.test(begun) ? begun : `${begun}.`;
}

export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 360) / 10} h`;
}

const RELATIVE = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

export function ago(unixSeconds) {
  const seconds = Math.min(0, unixSeconds - Date.now() / 1000);
  if (seconds > -60) return "just now";
  if (seconds > -3600) return RELATIVE.format(Math.round(seconds / 60), "minute");
  if (seconds > -86400) return RELATIVE.format(Math.round(seconds / 3600), "hour");
  return RELATIVE.format(Math.round(seconds / 86400), "day");
}

export const isActive = (job) => job.status === "queued" || job.status === "running";

// "256x128" -> [256, 128]; null for anything else.
export function sizeOf(job) {
  const found = /^(\d+)x(\d+)$/.exec(job.request?.size ?? "");
  return found ? [Number(found[1]), Number(found[2])] : null;
}

// What was asked for, in a few words.
export function summary(job, rate) {
  const { frames, steps, seed } = job.request ?? {};
  const parts = [];
  const size = sizeOf(job);
  if (size) parts.push(size.join(" × "));
  if (frames) parts.push(lengthText(frames, rate));
  if (steps) parts.push(`${steps} steps`);
  if (seed !== undefined && seed !== null) parts.push(`seed ${seed}`);
  return parts;
}

export function lengthText(frames, rate) {
  const count = frames === 1 ? "1 frame" : `${frames} frames`;
  return rate && frames > 1 ? `${(frames / rate).toFixed(1)} s, ${count}` : count;
}
