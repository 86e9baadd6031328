// All videos of the server, newest first, a page at a time.

import { getJson, pathOf, urlOf } from "./api.js";
import { actionsOf, isLeaving, showVideo } from "./actions.js";
import { byId, element, isOver, statusOf, toast } from "./dom.js";

const PAGE = 12;

let page;
let last = null;
let loading = 0; // grows with each new list, so that a late answer for an older one is dropped

/** page: see `actionsOf`. */
export async function setUpGallery(newPage) {
  page = newPage;
  byId("filter").addEventListener("change", reload);
  byId("gallery-more").addEventListener("click", more);
  await reload();
}

/** The list anew. */
export async function reload() {
  loading += 1;
  last = null;
  byId("gallery").replaceChildren();
  await more();
}

async function more() {
  const mine = loading;
  const query = new URLSearchParams({ limit: PAGE });
  if (last !== null) query.set("after", last);
  if (byId("filter").value) query.set("status", byId("filter").value);
  byId("gallery-more").disabled = true;
  try {
    const answer = await getJson(`v1/videos?${query}`);
    if (mine !== loading) return;
    last = answer.last_id;
    const added = answer.data.filter((video) => !cardWith(video.id) && !isLeaving(video.id));
    byId("gallery").append(...added.map(cardOf));
    byId("gallery-more").hidden = !answer.has_more;
  } catch (error) {
    toast(error.message);
  } finally {
    byId("gallery-more").disabled = false;
    byId("gallery-empty").hidden = byId("gallery").childElementCount > 0;
  }
}

/** Put a video that is over at the top, or in the place of its card. */
export function refresh(video) {
  const filter = byId("filter").value;
  const old = cardWith(video.id);
  if (filter && filter !== video.status) return old?.remove();
  if (old) old.replaceWith(cardOf(video));
  else byId("gallery").prepend(cardOf(video));
  byId("gallery-empty").hidden = true;
}

/** Hide the card of a video, or show it again. */
export function hideCard(id, isHidden) {
  const card = cardWith(id);
  if (card) card.hidden = isHidden;
  byId("gallery-empty").hidden = byId("gallery").querySelector(":scope > :not([hidden])") !== null;
}

/** The ids of shown videos that were not over when they were read. */
export function unfinishedCards() {
  return [...byId("gallery").querySelectorAll(".card:has(.badge.queued, .badge.in_progress)")].map((card) => card.dataset.id);
}

function cardWith(id) {
  return byId("gallery").querySelector(`[data-id="${CSS.escape(id)}"]`);
}

function cardOf(video) {
  const details = `${video.size}, ${video.seconds} s, ${new Date(video.created_at * 1000).toLocaleString()}`;
  const error = video.error ? element("p", { class: "error" }, video.error.message) : null;
  const actions = isOver(video)
    ? actionsOf(video, page)
    : element("div", { class: "actions" }, element("button", { type: "button", class: "quiet", onclick: () => page.made(video) }, "Watch"));
  return element(
    "li",
    { class: "card", "data-id": video.id },
    video.status === "completed" ? stillOf(video) : null,
    element("h3", { dir: "auto" }, video.prompt),
    element("p", { class: "hint" }, element("span", { class: `badge ${video.status}` }, statusOf(video)), ` ${details}`),
    error,
    actions,
  );
}

/** The thumbnail, asked for when it comes into view. It plays the video. */
function stillOf(video) {
  const image = element("img", { alt: "", loading: "lazy" });
  const still = element("button", { type: "button", class: "still", "aria-label": `Play: ${video.prompt}`, onclick: () => showVideo(video) }, image);
  new IntersectionObserver(async (entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    image.src = await urlOf(pathOf(video.id, "/content?variant=thumbnail")).catch(() => "");
    image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true }); // no harm where it is no blob
  }).observe(still);
  return still;
}
