// The server's API: JSON, files, and events that go on after a lost connection. A key is sent as a header, never in a URL.

import { byId, isOver } from "./dom.js";

const KEY = "pyramid-serve-key";
const GIVE_UP_MS = 30_000;
const RETRY_SECONDS = [0.5, 1, 2, 4, 8];

/** An answer that is not a success. `field` names the request field that is wrong, where one is. */
export class ApiError extends Error {
  constructor(status, body, retryAfter) {
    super(body?.error?.message ?? `the server answered with ${status}`);
    this.status = status;
    this.field = body?.error?.param ?? null;
    this.code = body?.error?.code ?? null;
    this.retryAfter = retryAfter;
  }
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

let asking = null;

/** Ask for a key. All requests that want one wait for the same dialog. */
function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-error").textContent = wasWrong ? "This key is not one of the server's." : "";
    byId("key").value = "";
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const key = byId("key").value.trim();
        if (dialog.returnValue === "use" && /^[\x21-\x7e]+$/.test(key)) sessionStorage.setItem(KEY, key);
        resolve(dialog.returnValue === "use");
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

/** `fetch` with the key; asks for one where the server wants it. Paths are relative to the page. */
export async function send(path, options = {}) {
  for (let wasRefused = false; ; ) {
    const key = sessionStorage.getItem(KEY);
    const headers = new Headers(options.headers);
    if (key !== null) headers.set("Authorization", `Bearer ${key}`);
    const answer = await fetch(path, { ...options, headers, credentials: "omit" });
    if (answer.ok || answer.status === 304) return answer;
    if (answer.status === 401 && !options.quiet) {
      if (sessionStorage.getItem(KEY) === key) sessionStorage.removeItem(KEY);
      const isTried = await askForKey(key !== null || wasRefused);
      wasRefused = true; // also a key that no header can hold
      if (isTried) continue;
    }
    const body = await answer.json().catch(() => null);
    throw new ApiError(answer.status, body, Number(answer.headers.get("Retry-After")) || null);
  }
}

export async function getJson(path, options) {
  return parse(await (await send(path, options)).text());
}

/** JSON in which a seed that JavaScript's numbers cannot hold is a text, as the server takes it too. */
function parse(text) {
  return JSON.parse(text.replace(/("seed":\s*)(\d{16,})/g, '$1"$2"'));
}

/** Send a request that makes a video. It is sent again after a lost connection, and makes one video all the same. */
export async function post(path, request) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": newKey() };
  const giveUp = AbortSignal.timeout(GIVE_UP_MS);
  const attempt = () => getJson(path, { method: "POST", headers, body: JSON.stringify(request) });
  return persist(attempt, giveUp, [502, 503, 504]);
}

function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The path of a video's file or of another of its routes. */
export function pathOf(id, route = "") {
  return `v1/videos/${encodeURIComponent(id)}${route}`;
}

/** A URL of a file for `src` or `href`: the file's own, or that of a blob where a key is needed. */
export async function urlOf(path) {
  if (!hasKey()) return path;
  return URL.createObjectURL(await (await send(path)).blob());
}

export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => (clearTimeout(timer), reject(signal.reason));
    const timer = setTimeout(() => (signal?.removeEventListener("abort", stop), resolve()), seconds * 1000);
    signal?.addEventListener("abort", stop, { once: true });
  });
}

/**
 * Run `attempt` until it returns; after a lost connection or a passing error again, a little later each time.
 * An attempt calls its argument once it gets on, so that the next loss is tried again at once. statuses: those of
 * answers that pass. Without a signal it never gives up.
 */
export async function persist(attempt, signal, statuses = [429, 500, 502, 503, 504]) {
  for (let losses = 0; ; losses++) {
    try {
      return await attempt(() => (losses = 0));
    } catch (error) {
      const passes = error instanceof ApiError ? statuses.includes(error.status) : error instanceof TypeError;
      if (signal?.aborted || !passes) throw error;
      const wait = error.retryAfter ?? RETRY_SECONDS[Math.min(losses, RETRY_SECONDS.length - 1)];
      await pause(wait, signal).catch(() => Promise.reject(error));
    }
  }
}

/** The video object with each change, until the video is over. `deleted` is called where it is gone. */
export async function follow(id, changed, deleted, signal) {
  let last = null;
  const hasEnded = () => last !== null && isOver(last.video);
  try {
    while (!hasEnded()) {
      await persist(async (getsOn) => {
        const headers = last === null ? {} : { "Last-Event-ID": last.id };
        const answer = await send(pathOf(id, "/events"), { headers, signal });
        if (answer.status === 204) return;
        for await (const event of eventsOf(answer.body)) {
          getsOn();
          if (event.name === "deleted") throw new ApiError(404, null, null);
          last = { id: event.id, video: parse(event.data) };
          changed(last.video);
        }
        if (!hasEnded()) throw new TypeError("the events ended early");
      }, signal);
    }
  } catch (error) {
    if (signal.aborted) return;
    if (error.status !== 404) throw error;
    deleted();
  }
}

/** Server-sent events of a body, without its comments. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r\n", "\n");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const event = { name: "message", id: "", data: "" };
      for (const line of text.slice(0, end).split("\n")) {
        const [field, ...rest] = line.split(":");
        const content = rest.join(":").replace(/^ /, "");
        if (field === "event") event.name = content;
        else if (field === "id") event.id = content;
        else if (field === "data") event.data += content;
      }
      if (event.data) yield event;
    }
  }
}
