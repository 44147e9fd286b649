// The page's state, and what ties form, stage, history and API together.

import * as api from "./api.js";
import { createForm } from "./form.js";
import { createHistory } from "./history.js";
import { createStage } from "./stage.js";
import { announce, find, isActive, showError } from "./dom.js";

const ID = /^video_[0-9a-f]{32}$/;
const POLL_MS = { begin: 2_000, busy: 4_000, idle: 20_000 };
const KEPT_VIDEOS = 4; // in memory, where a key keeps the browser from fetching them itself

const jobs = new Map();
const sources = new Map(); // job id -> blob address, newest last
let limits = null;
let hasMore = false;
let selected = null;
let following = { id: null, stop: () => {} };
let sending = { body: "", key: "" };
let polling = null;

const form = createForm({ send });
const stage = createStage({
  onCancel: cancel,
  onDelete: remove,
  onReuse: (job) => {
    form.fill({ seed: null, ...job.request });
    form.show(null);
    form.focus();
  },
  loadVideo,
  explain: async (job) => {
    try {
      await api.probe(job.id);
      return new Error("This browser cannot play the video. It can be downloaded.");
    } catch (error) {
      return error;
    }
  },
});
const past = createHistory({
  onSelect: (id) => select(id, { push: true, show: true }),
  onMore: more,
  previews: stage.previews,
  mayLoad: () => limits !== null && !api.key.get(),
});

const newestFirst = () => [...jobs.values()].sort((a, b) => b.created_at - a.created_at || (a.id < b.id ? 1 : -1));
const render = () => past.render(newestFirst(), selected, hasMore);

function put(job) {
  const known = jobs.get(job.id);
  if (known && !isActive(known) && isActive(job)) return; // a list that was under way when the job ended
  jobs.set(job.id, job);
  if (job.id === selected) {
    stage.show(job, limits?.frames_per_second);
    watch();
  }
}

function select(id, { push = false, show = false } = {}) {
  selected = id;
  const address = id ? `#${id}` : location.pathname + location.search;
  if (push && location.hash !== `#${id}`) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
  stage.show(jobs.get(id) ?? null, limits?.frames_per_second);
  watch();
  render();
  if (show) bringIntoView(find("stage"));
}

function bringIntoView(element) {
  const { top } = element.getBoundingClientRect();
  if (top >= 0 && top < window.innerHeight / 2) return;
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
}

// Follow the chosen job while it is active, and no other: each stream takes one of a browser's six connections.
function watch() {
  const job = jobs.get(selected);
  const id = job && isActive(job) ? job.id : null;
  if (following.id === id) return;
  following.stop();
  following = { id, stop: () => {} };
  if (!id) return;
  following.stop = api.follow(id, {
    onEvent(type, data) {
      if (type === "progress") {
        const status = data.phase === "queued" ? "queued" : "running";
        jobs.set(id, { ...jobs.get(id), status, progress: data });
        stage.progress(data);
      } else if (type === "preview") stage.newPreview(data.image);
      else if (api.FINAL.has(type)) put(data);
      render();
    },
    onLost: () => stage.setLost(true),
    onRefused(error) {
      if (error.status === 401) askForKey(error);
      else stage.showFailure(error);
    },
  });
}

async function send(body) {
  // The same request sent again after a lost answer is the same job; a new request, or one after success, is not.
  const text = JSON.stringify(body);
  if (sending.body !== text) sending = { body: text, key: api.randomName() };
  let job;
  try {
    job = await api.create(body, sending.key);
  } catch (error) {
    if (error.status === 401) askForKey(error);
    throw error;
  }
  sending = { body: "", key: "" };
  jobs.set(job.id, job);
  select(job.id, { push: true, show: true });
  announce("Accepted. Waiting in the queue.");
  schedule();
}

async function cancel(job) {
  put(await api.remove(job.id));
  render();
}

async function remove(job) {
  if (!(await confirmed())) return;
  try {
    await api.remove(job.id);
  } catch (error) {
    if (error.status !== 404) throw error; // gone already, which is what was wanted
  }
  jobs.delete(job.id);
  select(newestFirst()[0]?.id ?? null);
  announce("Deleted");
  past.focus();
}

// Answers the question that was asked last. The browser fires "close" some time after a dialog was closed, and the next
// question may be open by then: that event is not its answer.
let settle = () => {};

function confirmed() {
  const dialog = find("confirm");
  settle();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      if (!dialog.open) settle();
    };
    settle = () => {
      dialog.removeEventListener("close", closed);
      resolve(dialog.returnValue === "delete");
    };
    dialog.addEventListener("close", closed);
  });
}

// The address of a video: the API's own, which a player reads in pieces; with a key, a copy in memory.
async function loadVideo(job) {
  if (!api.key.get()) return api.contentAddress(job.id);
  if (!sources.has(job.id)) {
    sources.set(job.id, URL.createObjectURL(await api.content(job.id)));
    for (const [id, source] of sources) {
      if (sources.size <= KEPT_VIDEOS) break;
      URL.revokeObjectURL(source);
      sources.delete(id);
    }
  }
  past.want(job.id, sources.get(job.id));
  return sources.get(job.id);
}

// Read the newest jobs. What the service no longer lists among them is gone.
async function refresh() {
  const page = await api.list();
  const oldest = page.data.at(-1)?.created_at ?? -Infinity;
  const listed = new Set(page.data.map((job) => job.id));
  const begun = Date.now() / 1000 - 60; // a job sent while the list was under way is not in it
  for (const job of jobs.values()) {
    const inRange = !page.has_more || job.created_at > oldest;
    if (inRange && !listed.has(job.id) && job.created_at < begun) jobs.delete(job.id);
  }
  if (jobs.size <= page.data.length) hasMore = page.has_more;
  page.data.forEach(put);
  showError(find("history-error"), null);
  render();
}

async function more() {
  const button = find("more");
  button.disabled = true;
  try {
    const page = await api.list(newestFirst().at(-1)?.id);
    hasMore = page.has_more;
    page.data.forEach(put);
    render();
  } catch (error) {
    showError(find("history-error"), error);
  } finally {
    button.disabled = false;
  }
}

function askForKey(error) {
  const field = find("key");
  find("key-field").hidden = false;
  field.setAttribute("aria-invalid", "true");
  form.show(error);
  field.focus();
}

async function useKey() {
  const field = find("key");
  api.key.set(field.value.trim());
  field.removeAttribute("aria-invalid");
  form.show(null);
  jobs.clear();
  hasMore = false;
  select(null);
  await poll();
}

function schedule() {
  clearTimeout(polling);
  const busy = [...jobs.values()].some(isActive);
  polling = setTimeout(poll, POLL_MS[limits === null ? "begin" : busy ? "busy" : "idle"]);
}

// Ask for what is new, now and then: jobs that are not followed, and those of other windows.
async function poll() {
  clearTimeout(polling);
  const notice = find("connection");
  try {
    if (limits === null) await begin();
    else if (!document.hidden && (api.key.get() || !limits.needs_key)) await refresh();
    notice.hidden = true;
  } catch (error) {
    if (error.status === 401) {
      askForKey(error);
      notice.hidden = true;
    } else if (error.status === 0 || error.status >= 500) {
      notice.textContent = `${error.message} Trying again.`;
      notice.hidden = false;
    } else {
      showError(find("history-error"), error);
    }
  } finally {
    schedule();
  }
}

async function begin() {
  const given = await api.limits();
  form.setLimits(given);
  find("model").textContent = given.model.replace(/\.bundle$/, "");
  find("key-field").hidden = !given.needs_key;
  find("key").value = api.key.get();
  limits = given;
  if (given.needs_key && !api.key.get()) {
    find("history-empty").textContent = "Your videos appear here, once the API key is entered.";
    return;
  }
  await refresh();
  await selectFromAddress();
}

// The chosen job is part of the page's address, so a reload or a bookmark goes on with it.
async function selectFromAddress() {
  const id = location.hash.slice(1);
  if (ID.test(id) && !jobs.has(id)) {
    try {
      jobs.set(id, await api.job(id));
    } catch (error) {
      if (error.status !== 404) throw error;
      showError(find("history-error"), error);
    }
  }
  const active = newestFirst().find(isActive) ?? newestFirst()[0];
  select(jobs.has(id) ? id : (active?.id ?? null));
}

find("key-use").addEventListener("click", useKey);
find("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // would send the form
  useKey();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is the chosen job's
  form.focus();
});
window.addEventListener("popstate", () => {
  const id = location.hash.slice(1);
  if (jobs.has(id)) select(id);
});
document.addEventListener("visibilitychange", () => document.hidden || poll());
window.addEventListener("online", poll);
poll();
