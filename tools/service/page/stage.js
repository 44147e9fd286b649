// The stage: the chosen job, its progress and preview, and its video when there is one.

import { announce, duration, find, isActive, make, showError, sizeOf, summary } from "./dom.js";

const PHASES = {
  text: "Reading the prompt",
  conditioning: "Preparing the steps",
  sampling: "Sampling",
  decoding: "Decoding",
};
const TITLES = { queued: "Waiting in the queue", completed: "Ready", failed: "Failed", cancelled: "Cancelled" };
const STORED_PREVIEW = "reelforge.preview"; // the newest picture, so that a reload need not wait for the next step
const CALM = window.matchMedia("(prefers-reduced-motion: reduce)");

export function createStage({ onCancel, onDelete, onReuse, loadVideo, explain }) {
  const section = find("stage");
  const previews = storedPreview(); // job id -> data URL of its last preview
  let job = null;
  let rate = null;
  let parts = {};
  let lost = false;
  let busy = false;

  function show(shown, framesPerSecond = rate) {
    const same = shown && job && shown.id === job.id && shown.status === job.status;
    rate = framesPerSecond;
    if (same) {
      job = { ...shown, progress: job.progress ?? shown.progress }; // events are newer than lists
      return;
    }
    const changed = shown && job && shown.id === job.id;
    job = shown;
    busy = false;
    lost = false;
    build();
    if (changed) announce(statusText());
  }

  function build() {
    const hadFocus = section.contains(document.activeElement);
    parts = {
      screen: make("div", { className: "screen" }),
      title: make("h2", { id: "stage-title", tabIndex: -1, textContent: job ? statusText() : "No video yet" }),
      bar: make("progress", { max: 1, "aria-labelledby": "stage-title", hidden: !job || !isActive(job) }),
      detail: make("p", { className: "detail" }),
      error: make("div", { className: "error", hidden: true }),
      actions: make("div", { className: "row wrap actions" }),
    };
    section.replaceChildren(parts.screen, parts.title, parts.bar, parts.detail, parts.error);
    if (!job) {
      parts.screen.append(make("p", { className: "placeholder", textContent: "Your video appears here" }));
      parts.title.classList.add("unseen");
      return;
    }
    const [width, height] = sizeOf(job) ?? [16, 9];
    parts.screen.style.setProperty("--shape", `${width} / ${height}`);
    parts.screen.style.setProperty("--ratio", width / height);
    section.append(
      make("p", { className: "prompt", textContent: job.request?.prompt ?? "" }),
      make("ul", { className: "facts" }, ...summary(job, rate).map((text) => make("li", { textContent: text }))),
      parts.actions,
    );
    if (isActive(job)) addActive();
    else if (job.status === "completed") addVideo();
    else addEnded();
    refresh();
    if (hadFocus && !section.contains(document.activeElement)) parts.title.focus();
  }

  const button = (text, action, className = "") =>
    make("button", { type: "button", textContent: text, className, onclick: action });

  function addActive() {
    const text = job.status === "queued" ? "It starts when those before it are done" : "The first picture comes soon";
    parts.screen.append(make("p", { className: "placeholder", textContent: text }));
    if (previews.has(job.id)) preview(previews.get(job.id));
    parts.actions.append(button("Cancel", () => act(onCancel)));
  }

  function addEnded() {
    if (previews.has(job.id)) preview(previews.get(job.id));
    else parts.screen.append(make("p", { className: "placeholder", textContent: "No video" }));
    if (job.error) showError(parts.error, job.error);
    parts.actions.append(button("Use again", () => onReuse(job)), button("Delete", () => attempt(onDelete), "danger"));
  }

  function addVideo() {
    const shown = job;
    const name = `${shown.id}.mp4`;
    const download = make("a", { className: "button", textContent: "Download", download: name, hidden: true });
    parts.actions.append(
      download,
      button("Use again", () => onReuse(shown)),
      button("Delete", () => attempt(onDelete), "danger"),
    );
    const note = make("p", { className: "placeholder", textContent: "Loading the video" });
    const { screen, error: box } = parts;
    screen.append(note);
    const fail = async (error) => {
      screen.replaceChildren(note);
      note.textContent = "No video";
      download.hidden = true;
      showError(box, error ?? (await explain(shown)));
    };
    loadVideo(shown).then((source) => {
      if (!screen.isConnected) return;
      const video = make("video", {
        src: source, controls: true, loop: true, muted: true, playsInline: true, autoplay: !CALM.matches,
        preload: "auto", "aria-label": `Video: ${shown.request?.prompt ?? shown.id}`,
      });
      if (previews.has(shown.id)) video.poster = previews.get(shown.id);
      video.addEventListener("error", () => fail(null), { once: true });
      screen.replaceChildren(video);
      download.href = source;
      download.hidden = false;
    }, fail);
  }

  async function act(action) {
    if (busy) return; // the second click of a double click on Cancel would delete what the first one cancelled
    busy = true;
    await attempt(action);
    busy = false;
  }

  async function attempt(action) {
    const acted = job;
    try {
      await action(acted);
    } catch (error) {
      if (job?.id === acted.id) showError(parts.error, error);
    }
  }

  function statusText() {
    if (job.status === "running") return PHASES[job.progress?.phase] ?? "Starting";
    return TITLES[job.status] ?? job.status;
  }

  // What changes without a new status: title, bar and the line below.
  function refresh() {
    const title = statusText();
    if (parts.title.textContent !== title) {
      parts.title.textContent = title;
      announce(title);
    }
    const { step, steps, eta_s: eta } = job.progress ?? {};
    const counted = job.status === "running" && steps > 0;
    if (counted) parts.bar.value = step / steps;
    else parts.bar.removeAttribute("value");
    const words = [];
    if (counted) words.push(`${job.progress.phase === "sampling" ? "step " : ""}${step} of ${steps}`);
    if (counted && eta !== null && eta !== undefined && step < steps) words.push(`${duration(eta)} left`);
    if (lost && isActive(job)) words.push("connection lost, trying again");
    if (job.status === "completed" && job.started_at) words.push(`made in ${duration(job.finished_at - job.started_at)}`);
    if (job.attempts > 1 && isActive(job)) words.push(`attempt ${job.attempts}`);
    parts.detail.textContent = words.join(" · ");
    document.title = counted ? `${Math.floor((100 * step) / steps)} % ${title} · reelforge` : `${title} · reelforge`;
  }

  function progress(given) {
    lost = false;
    job = { ...job, progress: given };
    if (job.status === "queued" && given.phase && given.phase !== "queued") {
      job.status = "running";
      build();
    } else {
      refresh();
    }
  }

  function preview(address) {
    if (!address.startsWith("data:image/png;base64,")) return; // nothing but a picture
    previews.set(job.id, address);
    let image = parts.screen.querySelector("img");
    if (!image) {
      image = make("img", { alt: "Preview: what the latents look like so far", className: "preview" });
      parts.screen.replaceChildren(image);
    }
    image.src = address;
  }

  function newPreview(address) {
    preview(address);
    try {
      sessionStorage.setItem(STORED_PREVIEW, JSON.stringify([[job.id, address]]));
    } catch {
      sessionStorage.removeItem(STORED_PREVIEW); // larger than what a browser keeps
    }
  }

  function setLost(value) {
    lost = value;
    if (job) refresh();
  }

  function showFailure(error) {
    if (!parts.error) return;
    showError(parts.error, error);
  }

  show(null);
  build();
  return { show, progress, newPreview, setLost, showFailure, previews, focus: () => parts.title.focus() };
}


function storedPreview() {
  try {
    return new Map(JSON.parse(sessionStorage.getItem(STORED_PREVIEW) ?? "[]"));
  } catch {
    return new Map();
  }
}
