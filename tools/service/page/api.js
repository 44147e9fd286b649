// The HTTP API: requests, its errors, and its stream of events. Knows nothing of the document.

const STORED_KEY = "reelforge.key"; // in sessionStorage: gone with the tab, and never in a URL
const SILENCE_MS = 50_000; // the service sends a comment every 15 s; a connection that is silent for longer is dead
const LONGEST_PAUSE_MS = 20_000;
export const FINAL = new Set(["completed", "failed", "cancelled"]);

export class ApiError extends Error {
  constructor(status, code, message, problems = [], retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, problems, retryAfter });
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED_KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED_KEY, value) : sessionStorage.removeItem(STORED_KEY)),
};

// Addresses are relative to the page, so that it also works below a path of a proxy.
const address = (id, rest = "") => `v1/videos/${encodeURIComponent(id)}${rest}`;
export const contentAddress = (id) => address(id, "/content");

async function call(method, url, { body, headers = {}, signal } = {}) {
  const sent = { Accept: "application/json", ...headers };
  if (key.get()) sent.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(url, { method, headers: sent, signal, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The service cannot be reached.", []);
  }
  if (response.ok) return response;
  throw await errorFrom(response);
}

async function errorFrom(response) {
  const after = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const retryAfter = Number.isFinite(after) ? after : null;
  try {
    const { code, message, problems } = (await response.json()).error;
    return new ApiError(response.status, code, message, Array.isArray(problems) ? problems : [], retryAfter);
  } catch {
    // A proxy in between answered, in a language of its own.
    return new ApiError(response.status, "http", `The service answered ${response.status}.`, [], retryAfter);
  }
}

const read = async (...request) => (await call(...request)).json();

export const limits = () => read("GET", "v1/limits");
export const list = (after = "") =>
  read("GET", `v1/videos?limit=24${after ? `&after=${encodeURIComponent(after)}` : ""}`);
export const job = (id) => read("GET", address(id));
export const create = (body, idempotencyKey) =>
  read("POST", "v1/videos", { body, headers: { "Idempotency-Key": idempotencyKey } });
export const remove = (id) => read("DELETE", address(id));
export const content = async (id, signal) =>
  (await call("GET", contentAddress(id), { headers: { Accept: "video/mp4" }, signal })).blob();

// Ask for the first byte only: throws what the API says about a video that does not play.
export async function probe(id) {
  const response = await call("GET", contentAddress(id), { headers: { Accept: "video/mp4", Range: "bytes=0-0" } });
  await response.body?.cancel();
}

// crypto.randomUUID exists on https only, and this page is also used on http in a local network.
export function randomName() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Split a stream of bytes into server-sent events: {type, data, id}, as the HTML standard says (9.2.6).
export async function* eventsOf(stream, onBytes = () => {}) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { type: "message", data: [] };
  let id;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event without its empty line is incomplete and is dropped
      onBytes();
      rest += value;
      for (;;) {
        const end = /\r\n|\n|\r(?!$)/.exec(rest); // a \r at the very end may be half of \r\n
        if (!end) break;
        const line = rest.slice(0, end.index);
        rest = rest.slice(end.index + end[0].length);
        if (line === "") {
          if (event.data.length) yield { type: event.type, data: event.data.join("\n"), id };
          event = { type: "message", data: [] };
          continue;
        }
        const [, name, text] = /^([^:]*):? ?([^]*)$/.exec(line);
        if (name === "event") event.type = text;
        else if (name === "data") event.data.push(text);
        else if (name === "id" && !text.includes("\0")) id = text;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      window.removeEventListener("online", end);
      signal.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    window.addEventListener("online", end);
    signal.addEventListener("abort", end);
  });
}

// Follow a job until it ends: onEvent(type, data) for each event, onLost() when the connection breaks and is tried
// again, onRefused(error) when there is no use in trying. Returns a function that stops.
export function follow(id, { onEvent, onLost, onRefused }) {
  const stop = new AbortController();
  run().catch((error) => onRefused(error));
  return () => stop.abort();

  async function run() {
    let last = "";
    for (let attempt = 0; !stop.signal.aborted; attempt += 1) {
      const connection = new AbortController();
      const hangUp = () => connection.abort();
      stop.signal.addEventListener("abort", hangUp);
      let watchdog = setTimeout(hangUp, SILENCE_MS);
      try {
        const headers = { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) };
        const response = await call("GET", address(id, "/events"), { headers, signal: connection.signal });
        const awake = () => {
          clearTimeout(watchdog);
          watchdog = setTimeout(hangUp, SILENCE_MS);
        };
        for await (const event of eventsOf(response.body, awake)) {
          if (stop.signal.aborted) return;
          attempt = 0;
          last = event.id ?? last;
          onEvent(event.type, JSON.parse(event.data));
          if (FINAL.has(event.type)) return;
        }
      } catch (error) {
        if (stop.signal.aborted) return;
        if (error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429) {
          onRefused(error);
          return;
        }
      } finally {
        clearTimeout(watchdog);
        stop.signal.removeEventListener("abort", hangUp);
      }
      if (stop.signal.aborted) return;
      onLost();
      const longest = Math.min(LONGEST_PAUSE_MS, 500 * 2 ** attempt);
      await pause(longest * (0.5 + Math.random() / 2), stop.signal); // not all pages at the same moment
    }
  }
}
