// Elements and short messages. Whatever a user or a server wrote is put in as text, never as HTML.

/** The element with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * A new element. attributes: `class`, `hidden` and the like as attributes, `on...` as listeners; children: nodes or text.
 */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Tell screen readers what has happened. */
export function announce(text) {
  byId("live").textContent = text;
}

/**
 * A message at the bottom for some seconds, with a button where `action` ({label, run}) is given.
 * Returns a promise: true where it ended by itself, false where the button was pressed.
 */
export function toast(text, { action = null, seconds = 6 } = {}) {
  return new Promise((resolve) => {
    const end = (byItself) => {
      clearTimeout(timer);
      node.remove();
      resolve(byItself);
    };
    const timer = setTimeout(() => end(true), seconds * 1000);
    const button = action && element("button", { type: "button", onclick: () => (action.run?.(), end(false)) }, action.label);
    const node = element("div", { class: "toast" }, element("span", {}, text), button);
    const holder = byId("toasts");
    (document.querySelector("dialog[open]") ?? document.body).append(holder); // what is beside an open dialog is inert
    holder.append(node);
    button?.focus();
  });
}

/** Whether a video is over, well or badly. */
export function isOver(video) {
  return video.status === "completed" || video.status === "failed";
}

/** The status of a video for people: "in progress". */
export function statusOf(video) {
  return video.status.replace("_", " ");
}

/** A duration for people: "40 s", "3 min 20 s". */
export function duration(seconds) {
  const whole = Math.max(Math.round(seconds), 0);
  if (whole < 60) return `${whole} s`;
  const rest = whole % 60;
  return rest && whole < 600 ? `${Math.floor(whole / 60)} min ${rest} s` : `${Math.round(whole / 60)} min`;
}
