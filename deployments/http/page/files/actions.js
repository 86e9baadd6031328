// What can be done with a video that is over: download it, see its request, make it again, delete it.

import { ApiError, hasKey, pathOf, post, send, urlOf } from "./api.js";
import { byId, element, toast } from "./dom.js";
import { release, showFile } from "./player.js";
import { snippetsOf } from "./snippets.js";

const UNDO_SECONDS = 8;

const leaving = new Set(); // ids of what is being deleted, which can still be taken back for a while

/** Whether a video is being deleted in this tab, and is not to be shown. */
export function isLeaving(id) {
  return leaving.has(id);
}

// Whoever leaves the page meant it.
addEventListener("pagehide", () => {
  for (const id of leaving) send(pathOf(id), { method: "DELETE", keepalive: true, quiet: true }).catch(() => {});
});

/**
 * Buttons for a video. `page` has `models`, `made(video)` and `gone(id, isGone)`: hide a video, or show it again.
 */
export function actionsOf(video, page) {
  const model = page.models.find((each) => each.id === video.model);
  const buttons = [];
  if (video.status === "completed") {
    buttons.push(download(video, "MP4", "", "mp4"), download(video, "GIF", "?variant=gif", "gif"));
  }
  buttons.push(button("Request", () => showRequest(video, model)));
  if (model) {
    buttons.push(button("Again, other seed", () => remix(video, page, video.prompt, -1)));
    buttons.push(button("Remix", () => askForPrompt(video, page)));
  }
  buttons.push(button("Delete", () => remove(video, page), "danger"));
  return element("div", { class: "actions" }, ...buttons);
}

function button(label, run, kind = "quiet") {
  const act = async (event) => {
    event.target.disabled = true;
    try {
      await run();
    } catch (error) {
      toast(error.message);
    } finally {
      event.target.disabled = false;
    }
  };
  return element("button", { type: "button", class: kind, onclick: act }, label);
}

function download(video, label, query, ending) {
  const path = pathOf(video.id, `/content${query}`);
  const name = `${video.id}.${ending}`;
  if (!hasKey()) return element("a", { class: "button quiet", href: path, download: name }, label);
  return button(label, async () => {
    const url = await urlOf(path);
    element("a", { href: url, download: name }).click();
    URL.revokeObjectURL(url);
  });
}

/** Play a finished video in a dialog. */
export async function showVideo(video) {
  const node = element("video", { controls: true, loop: true, playsinline: true, muted: true, "aria-label": `Video: ${video.prompt}` });
  const problem = element("p", { class: "error", role: "alert" });
  node.muted = true;
  node.addEventListener("error", () => (problem.textContent = "This video cannot be had any more, or not be played here."));
  open(video.prompt, element("div", {}, node, problem));
  await showFile(node, video.id).catch((error) => (problem.textContent = error.message));
  await node.play().catch(() => {}); // a browser may refuse, and there are controls
}

function showRequest(video, model) {
  open("The request", snippetsOf(video, model, hasKey()));
}

function askForPrompt(video, page) {
  const prompt = element("textarea", { id: "remix-prompt", rows: "3" });
  prompt.value = video.prompt;
  const problem = element("p", { class: "error", role: "alert" });
  const run = async () => {
    try {
      await remix(video, page, prompt.value, null);
      byId("viewer").close();
    } catch (error) {
      problem.textContent = error.message;
    }
  };
  const note = element("p", { class: "hint" }, "The same settings and the same seed, with another prompt.");
  open("Remix", element("div", { class: "field" }, element("label", { for: "remix-prompt" }, "Prompt"), prompt, note, problem, button("Make", run, "")));
  prompt.focus();
}

async function remix(video, page, prompt, seed) {
  page.made(await post(pathOf(video.id, "/remix"), seed === null ? { prompt } : { prompt, seed }));
}

function open(title, content) {
  const dialog = byId("viewer");
  byId("viewer-title").textContent = title;
  byId("viewer-body").replaceChildren(content);
  dialog.addEventListener("close", empty, { once: true });
  dialog.showModal();
}

function empty() {
  document.body.append(byId("toasts"));
  byId("viewer-body").querySelectorAll("video").forEach(release);
  byId("viewer-body").replaceChildren();
}

/** Hide a video at once, and delete it when nobody has taken that back. */
async function remove(video, page) {
  leaving.add(video.id);
  page.gone(video.id, true);
  const isMeant = await toast("Deleted.", { seconds: UNDO_SECONDS, action: { label: "Undo" } });
  byId("gallery-title").focus(); // its own button is gone, and the toast's too
  if (!isMeant) {
    leaving.delete(video.id);
    return page.gone(video.id, false);
  }
  try {
    await send(pathOf(video.id), { method: "DELETE", keepalive: true });
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return;
    page.gone(video.id, false);
    throw error;
  } finally {
    leaving.delete(video.id);
  }
}
