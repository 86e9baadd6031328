// The corner that tells what the server does.

import { getJson, pause } from "./api.js";
import { byId, element } from "./dom.js";

const EVERY_SECONDS = 5;

/** Keep the corner up to date. */
export async function showStatus() {
  for (;;) {
    if (!document.hidden) {
      try {
        show(await getJson("v1/status", { quiet: true }));
      } catch (error) {
        byId("status").className = "bad";
        const reason = error.status === 401 ? "A key is needed" : "The server is not ready";
        byId("status-line").textContent = error.status ? reason : "No connection";
      }
    }
    await pause(EVERY_SECONDS);
  }
}

function show(status) {
  const { num_queued: queued, num_in_progress: running } = status.queue;
  byId("status").className = "good";
  byId("status-line").textContent = `${running} in progress, ${queued} waiting`;
  const rows = status.models.flatMap((model) =>
    model.pools.map((pool) =>
      element(
        "tr",
        {},
        element("td", {}, model.id),
        element("td", {}, pool.part.replace("_", " ")),
        element("td", {}, String(pool.num_replicas)),
        element("td", {}, pool.busy === null ? "–" : `${Math.round(100 * pool.busy)} %`),
        element("td", {}, String(pool.num_ongoing)),
      ),
    ),
  );
  byId("pools").tBodies[0].replaceChildren(...rows);
}
