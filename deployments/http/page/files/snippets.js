// The request that a video was made by, as `curl` and as Python, to be copied.

import { element, toast } from "./dom.js";

/** The fields of the request, those that are the model's own choice left out. Picture: by name only. */
export function requestOf(video, model) {
  const request = { prompt: video.prompt, model: video.model, size: video.size, seconds: video.seconds, seed: video.seed };
  for (const name of ["negative_prompt", "prompt_suffix"]) request[name] = video[name];
  for (const name of Object.keys(model?.request_fields ?? {})) {
    const value = video[name];
    if (value !== null && value !== undefined && JSON.stringify(value) !== JSON.stringify(model[name])) request[name] = value;
  }
  return request;
}

/** The part of a page that shows both, with buttons that copy them. */
export function snippetsOf(video, model, needsKey) {
  const request = requestOf(video, model);
  const url = new URL("v1/videos", document.baseURI).href;
  return element(
    "div",
    {},
    snippet("curl", curl(request, url, video.has_input_reference, needsKey)),
    snippet("Python", python(request, url.replace(/\/videos$/, ""), video.has_input_reference, needsKey)),
  );
}

function snippet(title, text) {
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text); // not there over plain HTTP from another machine
      toast("Copied.", { seconds: 2 });
    } catch {
      getSelection().selectAllChildren(shown);
      toast("It is selected now: copy it with the keyboard.");
    }
  };
  const shown = element("pre", { tabindex: "0" }, text);
  const button = element("button", { type: "button", class: "quiet", onclick: copy, "aria-label": `Copy the ${title} text` }, "Copy");
  return element("section", {}, element("div", { class: "row" }, element("h3", {}, title), button), shown);
}

function curl(request, url, hasPicture, needsKey) {
  const key = needsKey ? ` \\\n  -H "Authorization: Bearer $PYRAMID_SERVE_KEY"` : "";
  if (!hasPicture) {
    return `curl ${url}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(request))}`;
  }
  const fields = Object.entries(request).flatMap(([name, value]) => {
    if (Array.isArray(value)) return value.map((item) => [`${name}[]`, item]);
    return [[name, isObject(value) ? JSON.stringify(value) : value]];
  });
  const forms = fields.map(([name, value]) => ` \\\n  --form-string ${quoted(`${name}=${value}`)}`).join("");
  return `curl ${url}${key}${forms} \\\n  -F input_reference=@picture.png`;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Text that a shell takes as one word. */
function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function python(request, base, hasPicture, needsKey) {
  const { prompt, model, size, seconds, ...rest } = request;
  // The SDK sends forms, in which an object is a text.
  const extra = Object.fromEntries(Object.entries(rest).map(([name, value]) => [name, isObject(value) ? JSON.stringify(value) : value]));
  const literal = (value) => pythonOf(value);
  const lines = [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(base)}, api_key=${needsKey ? 'os.environ["PYRAMID_SERVE_KEY"]' : '"none"'})`,
    "video = client.videos.create_and_poll(",
    `    prompt=${literal(prompt)},`,
    `    model=${literal(model)},`,
    `    size=${literal(size)},`,
    `    seconds=${literal(seconds)},`,
    ...(hasPicture ? ['    input_reference=open("picture.png", "rb"),'] : []),
    `    extra_body=${literal(extra)},`,
    ")",
    'client.videos.download_content(video.id).write_to_file("video.mp4")',
  ];
  return (needsKey ? ["import os", "", ...lines] : lines).join("\n");
}

/** A JSON value as Python writes it. */
function pythonOf(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonOf).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, part]) => `${JSON.stringify(name)}: ${pythonOf(part)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
