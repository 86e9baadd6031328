// Plays a video while it is made: the fragments of `/stream` through Media Source Extensions.
//
// The stream has the same bytes for every viewer at any time. So after a lost connection it is asked for again, and as
// many bytes as were taken already are skipped. Where a browser cannot play fragments, the finished file is shown.

import { hasKey, pathOf, persist, send, urlOf } from "./api.js";

const Source = globalThis.MediaSource ?? globalThis.ManagedMediaSource;
const CODEC_BOX = [0x61, 0x76, 0x63, 0x43]; // "avcC"

/** Show a video in `node` (a video element) as it comes. Resolves at its end; rejects where it cannot be had. */
export async function playLive(node, id, signal) {
  if (!Source) return;
  const source = new Source();
  if (!globalThis.MediaSource) node.disableRemotePlayback = true; // ManagedMediaSource opens only so
  const url = URL.createObjectURL(source);
  node.src = url;
  await once(source, "sourceopen");
  URL.revokeObjectURL(url);
  let buffer = null;
  let waiting = new Uint8Array();
  let numTaken = 0;
  await persist(async (getsOn) => {
    const answer = await send(pathOf(id, "/stream"), { signal });
    let numSkipped = numTaken;
    for (const reader = answer.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      getsOn();
      const chunk = value.subarray(Math.min(numSkipped, value.length));
      numSkipped -= value.length - chunk.length;
      if (chunk.length === 0) continue;
      numTaken += chunk.length;
      waiting = joined(waiting, chunk);
      if (buffer === null) {
        const codec = codecOf(waiting);
        if (codec === null) continue;
        buffer = source.addSourceBuffer(`video/mp4; codecs="${codec}"`);
      }
      const taken = waiting;
      waiting = new Uint8Array();
      await append(buffer, taken);
      node.dispatchEvent(new Event("fragment"));
    }
  }, signal);
  if (source.readyState === "open") source.endOfStream();
}

/** Show the finished file. */
export async function showFile(node, id) {
  const url = await urlOf(pathOf(id, "/content"));
  node.src = url;
  if (!hasKey()) return;
  // Not at the first "emptied", which tells that whatever was shown before has gone.
  const forget = () => node.addEventListener("emptied", () => URL.revokeObjectURL(url), { once: true });
  node.addEventListener("loadedmetadata", forget, { once: true });
}

/** Let go of what a video element has, and of the memory that was fetched for it. */
export function release(node) {
  node.removeAttribute("src");
  node.load();
}

/** Whether nothing should move by itself. */
export function prefersStill() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

function append(buffer, bytes) {
  return new Promise((resolve, reject) => {
    const end = (settle) => () => {
      buffer.removeEventListener("updateend", ended);
      buffer.removeEventListener("error", failed);
      settle();
    };
    const ended = end(resolve);
    const failed = end(() => reject(new Error("the browser cannot play this stream")));
    buffer.addEventListener("updateend", ended);
    buffer.addEventListener("error", failed);
    buffer.appendBuffer(bytes);
  });
}

/** The codec that an MP4 names, as "avc1.64000A"; null until the box that names it is there. */
function codecOf(bytes) {
  for (let at = 0; at + 8 <= bytes.length; at++) {
    if (CODEC_BOX.every((byte, index) => bytes[at + index] === byte)) {
      const hex = [...bytes.subarray(at + 5, at + 8)].map((byte) => byte.toString(16).padStart(2, "0"));
      return `avc1.${hex.join("").toUpperCase()}`;
    }
  }
  return null;
}

function joined(first, second) {
  if (first.length === 0) return second;
  const all = new Uint8Array(first.length + second.length);
  all.set(first);
  all.set(second, first.length);
  return all;
}

function once(target, name) {
  return new Promise((resolve) => target.addEventListener(name, resolve, { once: true }));
}
