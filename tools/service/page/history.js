// The history: a card for each job, newest first, with a picture of its video where one can be had cheaply.

import { ago, find, isActive, make, sizeOf } from "./dom.js";
import { contentAddress } from "./api.js";

const WORDS = { queued: "waiting", running: "in progress", completed: "", failed: "failed", cancelled: "cancelled" };
const PATIENCE_MS = 10_000;
const PICTURE_WIDTH = 320;

// Take one frame of a video as a picture. The connection is given back at once: a browser has six per host, and video
// elements that stay around keep theirs.
function pictureOf(source) {
  return new Promise((resolve) => {
    const video = make("video", { muted: true, playsInline: true, preload: "auto" });
    const end = (picture) => {
      clearTimeout(timer);
      video.removeAttribute("src");
      video.load();
      resolve(picture);
    };
    const timer = setTimeout(end, PATIENCE_MS, null);
    video.addEventListener("error", () => end(null), { once: true });
    video.addEventListener("loadedmetadata", () => (video.currentTime = video.duration / 2), { once: true });
    video.addEventListener("seeked", () => {
      const width = Math.min(PICTURE_WIDTH, video.videoWidth);
      const canvas = make("canvas", { width, height: Math.round((width * video.videoHeight) / video.videoWidth) });
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
      end(canvas.toDataURL("image/jpeg", 0.8));
    }, { once: true });
    video.src = source;
  });
}

export function createHistory({ onSelect, onMore, previews, mayLoad }) {
  const list = find("cards");
  const pictures = new Map(); // job id -> data URL
  const waiting = [];
  const cards = new Map(); // job id -> its elements
  let taking = false;

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      seen.unobserve(entry.target);
      want(entry.target.dataset.id, contentAddress(entry.target.dataset.id));
    }
  }, { rootMargin: "200px" });

  // Pictures are taken one after the other.
  async function want(id, source) {
    if (pictures.has(id) || waiting.some((one) => one.id === id)) return;
    waiting.push({ id, source });
    if (taking) return;
    taking = true;
    while (waiting.length) {
      const next = waiting[0];
      pictures.set(next.id, await pictureOf(next.source));
      waiting.shift();
      paint(next.id);
    }
    taking = false;
  }

  function paint(id) {
    const card = cards.get(id);
    const source = pictures.get(id) ?? previews.get(id);
    if (card && source && card.image.src !== source) {
      card.image.src = source;
      card.image.hidden = false;
    }
  }

  function newCard(job) {
    const card = {
      image: make("img", { alt: "", hidden: true }),
      prompt: make("span", { className: "card-prompt" }),
      status: make("span", { className: "status" }),
      meta: make("span", { className: "meta" }),
    };
    const frame = make("span", { className: "thumb" }, card.image, card.status);
    card.button = make("button", { type: "button", className: "card", onclick: () => onSelect(job.id) },
      frame, card.prompt, card.meta);
    card.button.dataset.id = job.id;
    card.item = make("li", {}, card.button);
    cards.set(job.id, card);
    return card;
  }

  function update(card, job, selected) {
    card.prompt.textContent = job.request?.prompt ?? job.id;
    card.status.textContent = WORDS[job.status] ?? job.status;
    card.status.className = `status ${job.status}`;
    card.status.hidden = job.status === "completed";
    const size = sizeOf(job);
    card.meta.textContent = [ago(job.created_at), size?.join("\u00a0×\u00a0")].filter(Boolean).join(" · ");
    card.meta.title = new Date(job.created_at * 1000).toLocaleString();
    if (job.id === selected) card.button.setAttribute("aria-current", "true");
    else card.button.removeAttribute("aria-current");
    if (job.status === "completed" && !card.wanted && mayLoad()) {
      card.wanted = true;
      seen.observe(card.button);
    }
    paint(job.id);
  }

  function render(jobs, selected, hasMore) {
    const ids = new Set(jobs.map((job) => job.id));
    for (const [id, card] of cards) {
      if (ids.has(id)) continue;
      card.item.remove();
      cards.delete(id);
    }
    jobs.forEach((job, index) => {
      const card = cards.get(job.id) ?? newCard(job);
      update(card, job, selected);
      if (list.children[index] !== card.item) list.insertBefore(card.item, list.children[index] ?? null);
    });
    find("history-empty").hidden = jobs.length > 0;
    find("more").hidden = !hasMore;
  }

  find("more").addEventListener("click", onMore);
  return { render, want, focus: () => find("history-title").focus() };
}
