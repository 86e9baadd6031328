// The page: what the server has, the form, the videos being made, and the gallery.

import { getJson, persist } from "./api.js";
import { byId } from "./dom.js";
import { setUpForm } from "./form.js";
import { hideCard, refresh, setUpGallery, unfinishedCards } from "./gallery.js";
import { addJob, removeJob, setUpJobs } from "./jobs.js";
import { showStatus } from "./status.js";

const MAX_SHOWN = 8;

const page = {
  models: [],
  made: (video) => addJob(video),
  over: (video) => refresh(video),
  unfinished: unfinishedCards,
  gone: (id, isGone) => {
    if (isGone) removeJob(id);
    hideCard(id, isGone);
  },
};

async function start() {
  // A server that starts answers late; the page waits for it.
  page.models = (await persist(() => getJson("v1/models"))).data;
  await Promise.all([setUpForm(page.models, page.made), setUpGallery(page)]);
  setUpJobs(page);
  showStatus();
  await showUnfinished();
}

/** What was being made when the page was loaded, the newest watched. */
async function showUnfinished() {
  for (const status of ["queued", "in_progress"]) {
    const { data } = await getJson(`v1/videos?limit=${MAX_SHOWN}&status=${status}`);
    for (const video of data.reverse()) addJob(video, { watch: video === data.at(-1) });
  }
}

start().catch((error) => (byId("form-error").textContent = `The page cannot be used: ${error.message}`));
