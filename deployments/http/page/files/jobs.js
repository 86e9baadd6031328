// The videos being made: one card each, with its place, its progress and, for the one that is watched, its picture.
//
// A browser opens six connections to a server of HTTP/1.1, in all of its tabs together. So only one video is watched at a
// time, by its events and its stream, and none while the tab is hidden; the others are asked for every two seconds.

import { follow, getJson, pathOf, pause } from "./api.js";
import { actionsOf } from "./actions.js";
import { announce, byId, duration, element, isOver, statusOf, toast } from "./dom.js";
import { playLive, prefersStill, release, showFile } from "./player.js";

const POLL_SECONDS = 2;
const MAX_OVER = 4;
const MAX_POLLED = 4; // cards of the gallery that are looked after at once
const STRIP_HEIGHT = 64; // pixels of the small pictures, twice what they are shown at

const jobs = new Map(); // by id, in the order of their cards
let page;
let watched = null;

/** page: see `actionsOf`; also `over(video)`, called when a video is over, and `unfinished()`: ids in the gallery. */
export function setUpJobs(newPage) {
  page = newPage;
  document.addEventListener("visibilitychange", () => (document.hidden ? watched?.unwatch() : watched?.watch()));
  pollOthers();
}

/** Show a video that is not over, and watch it. */
export function addJob(video, { watch = true } = {}) {
  if (!jobs.has(video.id)) {
    const job = new Job(video);
    jobs.set(video.id, job);
    byId("jobs").prepend(job.card);
    byId("no-jobs").hidden = true;
  }
  if (watch) choose(jobs.get(video.id));
}

export function removeJob(id) {
  const job = jobs.get(id);
  if (!job) return;
  job.unwatch();
  job.clear();
  job.card.remove();
  jobs.delete(id);
  byId("no-jobs").hidden = jobs.size > 0;
  if (watched === job) chooseNext();
}

/** Watch the newest of those that are not over. */
function chooseNext() {
  choose([...jobs.values()].findLast((job) => !job.isOver) ?? null);
}

function choose(job) {
  if (watched !== job) watched?.unwatch();
  watched = job;
  if (!document.hidden) job?.watch();
}

async function pollOthers() {
  for (;;) {
    await pause(POLL_SECONDS);
    for (const job of jobs.values()) {
      if (job === watched || job.isOver || document.hidden) continue;
      try {
        job.show(await getJson(pathOf(job.id), { quiet: true }));
      } catch (error) {
        if (error.status === 404) removeJob(job.id);
      }
    }
    const others = page.unfinished().filter((id) => !jobs.has(id) && !document.hidden);
    for (const id of others.slice(0, MAX_POLLED)) {
      const video = await getJson(pathOf(id), { quiet: true }).catch(() => null);
      if (video && isOver(video)) page.over(video);
    }
  }
}

class Job {
  constructor(video) {
    this.id = video.id;
    this.video = video;
    this.stopper = null;
    this.time = 0; // of the picture, when it was last watched
    this.player = element("video", { controls: true, playsinline: true, muted: true, hidden: true, "aria-label": `Video: ${video.prompt}` });
    this.player.muted = true;
    this.player.autoplay = !prefersStill();
    this.player.addEventListener("loadeddata", () => (this.player.hidden = false));
    this.keepPictures();
    this.badge = element("span", { class: "badge" });
    this.line = element("span", { class: "hint" });
    this.bar = element("progress", { max: "100", "aria-label": "Progress" });
    this.units = element("ol", { class: "units", "aria-label": "Units of the video" });
    this.problem = element("p", { class: "error" });
    this.buttons = element("div", { class: "actions" });
    this.card = element(
      "article",
      { class: "card", "data-id": video.id, "aria-label": video.prompt },
      element("h3", { dir: "auto" }, video.prompt),
      this.player,
      element("div", { class: "row" }, this.badge, this.line),
      this.bar,
      this.units,
      this.problem,
      this.buttons,
    );
    this.show(video);
  }

  /** Put the first picture that is seen of each unit at its mark. */
  keepPictures() {
    if (!this.player.requestVideoFrameCallback) return;
    this.player.requestVideoFrameCallback((_, { mediaTime }) => {
      const mark = this.units.children[unitAt(mediaTime, this.video)];
      if (mark && mark.firstChild === null) {
        const { videoWidth: width, videoHeight: height } = this.player;
        const picture = element("canvas", { width: Math.round((STRIP_HEIGHT * width) / height), height: STRIP_HEIGHT });
        picture.getContext("2d").drawImage(this.player, 0, 0, picture.width, picture.height);
        mark.append(picture);
      }
      this.keepPictures();
    });
  }

  get isOver() {
    return isOver(this.video);
  }

  /** Follow its events and show its picture, until it is over or `unwatch` is called. */
  watch() {
    if (this.stopper !== null || this.isOver) return;
    this.stopper = new AbortController();
    const { signal } = this.stopper;
    this.showButtons();
    follow(this.id, (video) => this.show(video), () => removeJob(this.id), signal).catch((error) => this.say(error.message));
    this.player.addEventListener("loadeddata", () => (this.player.currentTime = this.time), { once: true, signal });
    playLive(this.player, this.id, signal).catch((error) => {
      if (signal.aborted || this.video.status === "failed" || error.status === 409) return;
      this.clear();
      if (this.video.status === "completed") this.showFile();
      else this.say(`${error.message}; it is shown when it is finished`);
    });
  }

  unwatch() {
    if (this.stopper === null || this.isOver) return; // what is over keeps its picture
    this.time = this.player.currentTime;
    this.stopper.abort(new DOMException("not watched any more", "AbortError"));
    this.stopper = null;
    this.clear();
    this.showButtons();
  }

  /** Let go of what the player has. */
  clear() {
    this.player.hidden = true;
    release(this.player);
  }

  showFile() {
    showFile(this.player, this.id).catch((error) => this.say(error.message));
  }

  say(text) {
    this.problem.textContent = text;
  }

  show(video) {
    const before = this.video.status;
    this.video = video;
    this.badge.className = `badge ${video.status}`;
    this.badge.textContent = statusOf(video);
    this.bar.value = video.progress;
    this.line.textContent = lineOf(video);
    showUnits(this.units, video);
    if (video.status !== before) {
      announce(`${video.prompt}: ${statusOf(video)}`);
      if (this.isOver) this.end();
    }
    if (this.buttons.childElementCount === 0) this.showButtons();
  }

  end() {
    this.say(this.video.error ? this.video.error.message : "");
    this.showButtons();
    this.bar.hidden = this.video.status === "completed";
    this.player.loop = !prefersStill();
    if (this.video.status === "completed") {
      if (!this.player.hasAttribute("src")) this.showFile(); // it was not watched, or cannot be while it is made
      if (this.player.autoplay) this.player.play().catch(() => {});
    } else {
      this.stopper?.abort(new DOMException("the video failed", "AbortError"));
    }
    if (watched === this) chooseNext();
    const over = [...jobs.values()].filter((job) => job.isOver);
    if (over.length > MAX_OVER) removeJob(over[0].id);
    page.over(this.video);
  }

  showButtons() {
    if (this.isOver) {
      const close = element("button", { type: "button", class: "quiet", onclick: () => this.close() }, "Close");
      this.buttons.replaceChildren(actionsOf(this.video, page), close);
      return;
    }
    const cancel = element("button", { type: "button", class: "danger", onclick: () => this.cancel(cancel) }, "Cancel");
    const watch = element("button", { type: "button", class: "quiet", onclick: () => choose(this) }, "Watch");
    this.buttons.replaceChildren(...(this.stopper === null ? [watch, cancel] : [cancel]));
  }

  close() {
    removeJob(this.id);
    byId("jobs-title").focus();
  }

  async cancel(button) {
    button.disabled = true;
    try {
      this.show(await getJson(pathOf(this.id, "/cancel"), { method: "POST" }));
      this.buttons.querySelector("button, a")?.focus();
    } catch (error) {
      button.disabled = false;
      toast(error.message);
    }
  }
}

/** The unit that is seen at a time in seconds: the first has one frame, and the others share the rest evenly. */
function unitAt(time, video) {
  const frame = Math.round(time * video.fps);
  const perUnit = (video.num_frames - 1) / Math.max(video.num_units - 1, 1);
  return video.num_units === 1 ? 0 : Math.ceil(frame / perUnit);
}

function lineOf(video) {
  if (video.status === "queued") {
    const ahead = video.queue_position;
    const place = ahead === null ? "" : ahead === 0 ? "next in the queue" : `${ahead} ahead of it`;
    return [place, video.eta_seconds === null ? "" : `done in about ${duration(video.eta_seconds)}`].filter(Boolean).join(", ");
  }
  if (video.status !== "in_progress") return `${video.size}, ${video.seconds} s, seed ${video.seed}`;
  const rest = video.eta_seconds === null ? "" : `, about ${duration(video.eta_seconds)} left`;
  return `${video.progress} %, ${video.num_units_done} of ${video.num_units} units${rest}`;
}

/** One mark for each unit: made, decoded, redone; and where. */
function showUnits(list, video) {
  const entries = Array.from({ length: video.num_units }, () => []);
  for (const entry of video.timeline) entries[entry.unit]?.push(entry);
  while (list.childElementCount < video.num_units) list.append(element("li"));
  [...list.children].forEach((mark, unit) => {
    const made = entries[unit].filter((entry) => entry.stage === "denoise");
    const isDecoded = unit < video.num_units_done;
    mark.className = [made.length ? "made" : "", isDecoded ? "decoded" : "", made.length > 1 ? "redone" : ""].join(" ").trim();
    const state = isDecoded ? "decoded" : made.length ? "made" : "to do";
    const where = made.length ? `, by ${made.at(-1).replica}` : "";
    mark.title = `Unit ${unit}: ${state}${made.length > 1 ? ", redone" : ""}${where}`;
  });
}
