// The form: what is asked for. Draws its choices from the service's limits; the service judges what was entered.

import { duration, find, lengthText, make, showError } from "./dom.js";

const STORED_DRAFT = "reelforge.draft"; // so that a reload does not lose a long prompt
const CUSTOM = "custom";
const FIELDS = ["prompt", "size", "width", "height", "frames", "seed", "steps"];
const RATIOS = [[16, 9], [9, 16], [4, 3], [3, 4], [1, 1]];

// A request that cannot be sent because the form is not filled in right.
export class FormError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

// Sizes to choose from: the bundle's own, or the default and other shapes with about as many pixels.
export function sizesOf(limits) {
  if (limits.sizes?.length) return limits.sizes;
  const { width, height } = limits.defaults;
  const step = limits.size_multiple ?? 16;
  const least = leastSide(limits);
  const sizes = [[width, height]];
  for (const [across, down] of RATIOS) {
    const unit = Math.sqrt((width * height) / (across * down));
    const size = [across, down].map((part) => Math.max(least, Math.round((part * unit) / step) * step));
    const fits = size[0] * size[1] <= (limits.max_pixels ?? Infinity);
    const given = sizes.some(([w, h]) => w === size[0] && h === size[1]);
    if (fits && !given) sizes.push(size);
  }
  return sizes;
}

const leastSide = (limits) => Math.max(...[limits.min_size ?? limits.size_multiple ?? 16].flat());

function sizeName([width, height]) {
  const shape = width > height ? "landscape" : width < height ? "portrait" : "square";
  return `${width} × ${height}, ${shape}`;
}

export function createForm({ send }) {
  const form = find("form");
  const fields = Object.fromEntries(FIELDS.map((name) => [name, find(name)]));
  const errorBox = find("form-error");
  const submit = find("submit");
  let limits = null;

  function count() {
    const length = Array.from(fields.prompt.value).length; // characters, as the service counts them
    const most = limits?.max_prompt_characters;
    const text = find("prompt-count");
    text.textContent = most ? `${length} of ${most} characters` : "";
    text.classList.toggle("over", Boolean(most) && length > most);
  }

  function showLength() {
    const text = lengthText(Number(fields.frames.value), limits?.frames_per_second);
    find("frames-text").textContent = text;
    fields.frames.setAttribute("aria-valuetext", text);
  }

  function showCustom() {
    find("custom-size").hidden = fields.size.value !== CUSTOM;
  }

  function chooseSize(width, height) {
    const value = `${width}x${height}`;
    const listed = [...fields.size.options].some((option) => option.value === value);
    fields.size.value = listed ? value : CUSTOM;
    if (!listed && limits.sizes?.length) fields.size.selectedIndex = 0;
    fields.width.value = width;
    fields.height.value = height;
    showCustom();
  }

  // Put a request's values, or a draft's, into the form; what it does not say stays.
  function fill({ prompt, size, frames, seed, steps }) {
    if (prompt !== undefined) fields.prompt.value = prompt;
    const sides = /^(\d+)x(\d+)$/.exec(size ?? "");
    if (sides && limits) chooseSize(Number(sides[1]), Number(sides[2]));
    if (frames) fields.frames.value = frames;
    if (seed !== undefined) fields.seed.value = seed ?? "";
    if (steps) fields.steps.value = steps;
    count();
    showLength();
  }

  function setLimits(given) {
    limits = given;
    const options = sizesOf(limits).map((size) => make("option", { value: size.join("x"), textContent: sizeName(size) }));
    if (!limits.sizes?.length) options.push(make("option", { value: CUSTOM, textContent: "Other" }));
    fields.size.replaceChildren(...options);
    for (const side of [fields.width, fields.height]) {
      side.min = leastSide(limits);
      side.step = limits.size_multiple ?? 16;
    }
    if (limits.max_steps) fields.steps.max = limits.max_steps;
    const { min, max, multiple, offset } = limits.frames;
    const first = Math.ceil((min - offset) / multiple) * multiple + offset;
    Object.assign(fields.frames, { min: first, max: max ?? limits.defaults.frames, step: multiple });
    const { width, height, frames, steps } = limits.defaults;
    fill({ size: `${width}x${height}`, frames, steps });
    try {
      fill(JSON.parse(sessionStorage.getItem(STORED_DRAFT) ?? "{}"));
    } catch {
      sessionStorage.removeItem(STORED_DRAFT);
    }
  }

  function number(name, required) {
    const field = fields[name];
    if (field.value === "" && !field.validity.badInput && !required) return undefined;
    const value = Number(field.value);
    if (field.value === "" || field.validity.badInput || !Number.isSafeInteger(value)) {
      throw new FormError(name, `The ${name} is not a whole number.`);
    }
    return value;
  }

  // What is in the form, as the API wants it.
  function body() {
    const prompt = fields.prompt.value.trim();
    if (!prompt) throw new FormError("prompt", "Describe the video first.");
    const custom = fields.size.value === CUSTOM;
    return {
      prompt,
      size: custom ? `${number("width", true)}x${number("height", true)}` : fields.size.value,
      frames: Number(fields.frames.value),
      steps: number("steps", false),
      seed: number("seed", false), // undefined is left out of JSON: the service draws one
    };
  }

  // Show what went wrong, and go to the field that it is about.
  function show(error) {
    for (const field of Object.values(fields)) field.removeAttribute("aria-invalid");
    const wait = error?.retryAfter ? `Try again in ${duration(error.retryAfter)}.` : "";
    showError(errorBox, error, wait);
    if (!error) return;
    const texts = [...(error.problems ?? []), error.message];
    const named = error.field ?? texts.map((text) => /^\W*(\w+)/.exec(text)?.[1]).find((name) => name in fields);
    const field = fields[named];
    if (!field) return;
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", `${field === fields.prompt ? "prompt-count " : ""}form-error`);
    if (field.checkVisibility()) field.focus();
  }

  async function submitted(event) {
    event.preventDefault();
    if (submit.getAttribute("aria-disabled") === "true") return; // stays focusable, so `disabled` is not used
    submit.setAttribute("aria-disabled", "true");
    submit.textContent = "Sending …";
    show(null);
    try {
      await send(body());
    } catch (error) {
      show(error);
    } finally {
      submit.removeAttribute("aria-disabled");
      submit.textContent = "Generate";
    }
  }

  form.addEventListener("submit", submitted);
  form.addEventListener("input", () => {
    count();
    showLength();
    showCustom();
    const { prompt, size, frames, seed, steps } = fields;
    const chosen = size.value === CUSTOM ? `${fields.width.value}x${fields.height.value}` : size.value;
    const draft = { prompt: prompt.value, size: chosen, frames: frames.value, seed: seed.value, steps: steps.value };
    sessionStorage.setItem(STORED_DRAFT, JSON.stringify(draft));
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  return { setLimits, fill, show, focus: () => fields.prompt.focus() };
}
