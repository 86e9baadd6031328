// The request: fields and limits by what each model tells of itself, and what is wrong said beside the field.

import { ApiError, getJson, post } from "./api.js";
import { byId, element } from "./dom.js";
import { fieldOf, readNumber, valueOf } from "./fields.js";
import { pictureFile, pictureUrl, setUpPicture, setVideoSize } from "./picture.js";

const MAX_SEED = 2n ** 64n - 1n;
const MAX_DRAWN_SEED = 2 ** 31;
const FORBIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/;

let models = [];
let ownFields = new Map(); // name -> {node, schema}
let maxPromptCharacters = new Map(); // by model

/** Show the form for these models. `made` is called with the video object of each accepted request. */
export async function setUpForm(newModels, made) {
  models = newModels;
  const select = byId("model");
  select.replaceChildren(...models.map((model) => element("option", { value: model.id }, model.id)));
  field("model").hidden = models.length < 2;
  select.addEventListener("change", showModel);
  byId("size").addEventListener("input", showCrop);
  byId("dice").addEventListener("click", () => (byId("seed").value = String(Math.floor(Math.random() * MAX_DRAWN_SEED))));
  byId("form").addEventListener("input", (event) => complain(event.target.closest("[data-field]"), ""));
  setUpPicture(() => {
    complain(field("input_reference"), "");
    showCrop();
  });
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    make(made);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.repeat && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      byId("form").requestSubmit();
    }
  });
  showModel();
  maxPromptCharacters = await promptLimits();
}

/** The longest prompt that each model takes, as the server's OpenAPI document says. */
async function promptLimits() {
  const document = await getJson("openapi.json").catch(() => ({}));
  const body = document.paths?.["/v1/videos"]?.post?.requestBody?.content?.["application/json"]?.schema ?? {};
  const schemas = (body.anyOf ?? [body]).map((schema) => schema.properties ?? {});
  return new Map(schemas.map((fields) => [fields.model?.enum?.[0], fields.prompt?.maxLength]));
}

function chosen() {
  return models.find((model) => model.id === byId("model").value) ?? models[0];
}

function field(name) {
  return document.querySelector(`#form [data-field="${CSS.escape(name)}"]`);
}

/** Bring the form in line with the chosen model. What was typed stays where it still has a meaning. */
function showModel() {
  const model = chosen();
  byId("size").placeholder = model.needs_input_reference && model.sizes === null ? "of the picture" : model.default_size;
  byId("sizes").replaceChildren(...(model.sizes ?? []).map((size) => element("option", { value: size })));
  byId("seconds").placeholder = String(model.default_seconds);
  byId("seconds").max = model.max_seconds;
  byId("picture-need").textContent = model.needs_input_reference ? "(needed)" : "(optional: the video begins with it)";
  byId("examples").replaceChildren(
    ...(model.example_prompts ?? []).map((prompt) =>
      element("button", { type: "button", onclick: () => setPrompt(prompt) }, prompt),
    ),
  );
  const typed = new Map(inputsOf(byId("own-fields")).map((input) => [input.id, input]));
  ownFields = new Map();
  for (const [name, schema] of Object.entries(model.request_fields)) {
    const node = fieldOf(name, schema, model[name]);
    ownFields.set(name, { node, schema });
    for (const input of inputsOf(node)) keep(input, typed.get(input.id));
  }
  byId("own-fields").replaceChildren(...[...ownFields.values()].map(({ node }) => node));
  showCrop();
}

function inputsOf(node) {
  return [...node.querySelectorAll("input, select")];
}

/** Take over what was typed into the field of another model, where it is one of the same kind. */
function keep(input, typed) {
  if (typed?.type !== input.type) return;
  if (input.type === "checkbox") {
    input.checked = typed.checked;
    input.dispatchEvent(new Event("change"));
  } else if (input.tagName !== "SELECT" || [...input.options].some((option) => option.value === typed.value)) {
    input.value = typed.value;
  }
}

function setPrompt(prompt) {
  byId("prompt").value = prompt;
  complain(field("prompt"), "");
  byId("prompt").focus();
}

function showCrop() {
  const model = chosen();
  const typed = sizeOf(byId("size").value.trim());
  const ownShape = model.needs_input_reference && model.sizes === null;
  setVideoSize(typed ?? (ownShape ? null : sizeOf(model.default_size)));
}

function sizeOf(text) {
  const found = /^(\d{1,5})\s*[xX*×]\s*(\d{1,5})$/.exec(text);
  return found && Number(found[1]) > 0 && Number(found[2]) > 0 ? [Number(found[1]), Number(found[2])] : null;
}

/** Say beside a field what is wrong with it; nothing where the text is empty. */
function complain(node, text) {
  if (!node) return;
  const input = node.querySelector("input, textarea, select");
  let message = node.querySelector(":scope > .error");
  if (!text) {
    message?.remove();
    input?.removeAttribute("aria-invalid");
    input?.removeAttribute("aria-errormessage");
    return;
  }
  if (!message) {
    message = element("p", { class: "error", id: `error-${node.dataset.field}` });
    node.append(message);
  }
  message.textContent = text;
  input?.setAttribute("aria-invalid", "true");
  input?.setAttribute("aria-errormessage", message.id);
}

/** The request as the form has it, and whether it can be sent. What is wrong is said beside the fields. */
function read() {
  const model = chosen();
  const request = {};
  const wrong = [];
  const take = (name, get) => {
    try {
      const value = get();
      if (value !== undefined) request[name] = value;
      complain(field(name), "");
    } catch (error) {
      complain(field(name), error.message);
      wrong.push(field(name));
    }
  };
  if (models.length > 1) request.model = model.id;
  take("prompt", () => text(byId("prompt").value, "say what the video shows"));
  take("input_reference", () => {
    if (model.needs_input_reference && !pictureFile()) throw new Error("this model brings a picture to life: choose one");
    return undefined;
  });
  take("size", () => size(byId("size").value.trim(), model));
  take("seconds", () => {
    const typed = byId("seconds").value.trim();
    if (byId("seconds").validity.badInput) throw new Error("must be a number");
    return typed === "" ? undefined : String(readNumber(typed, { exclusiveMinimum: 0, maximum: model.max_seconds }));
  });
  take("seed", () => seed(byId("seed").value.trim()));
  take("negative_prompt", () => text(byId("negative_prompt").value, null));
  for (const [name, { node, schema }] of ownFields) take(name, () => valueOf(node, name, schema));
  return { request, wrong };
}

function text(value, whenEmpty) {
  const found = FORBIDDEN.exec(value);
  if (found) throw new Error(`has a character that is not allowed: U+${found[0].charCodeAt(0).toString(16).padStart(4, "0")}`);
  const longest = maxPromptCharacters.get(chosen().id) ?? Infinity;
  if ([...value].length > longest) throw new Error(`may have ${longest} characters, and has ${[...value].length}`);
  if (value.trim() !== "") return value;
  if (whenEmpty) throw new Error(whenEmpty);
  return undefined;
}

function size(typed, model) {
  if (typed === "") return undefined;
  const parsed = sizeOf(typed);
  if (parsed === null) throw new Error(`must be like ${model.default_size}`);
  const name = parsed.join("x");
  if (model.sizes && !model.sizes.includes(name)) throw new Error(`this model makes ${model.sizes.join(", ")}`);
  if (parsed.some((side) => side % model.size_multiple)) {
    throw new Error(`width and height must be multiples of ${model.size_multiple}`);
  }
  return name;
}

/** As text where a number would lose digits: the server takes both. */
function seed(typed) {
  if (typed === "" || typed === "-1") return undefined;
  if (!/^\d{1,20}$/.test(typed) || BigInt(typed) > MAX_SEED) throw new Error(`must be a whole number from 0 to ${MAX_SEED}`);
  return typed;
}

async function make(made) {
  if (byId("make").disabled) return; // the one before is on its way
  const { request, wrong } = read();
  byId("form-error").textContent = "";
  if (wrong.length) {
    wrong[0].closest("details")?.setAttribute("open", "");
    wrong[0].querySelector("input, textarea, select")?.focus();
    return;
  }
  byId("make").disabled = true;
  try {
    if (pictureFile()) request.input_reference = { image_url: await pictureUrl() };
    made(await post("v1/videos", request));
  } catch (error) {
    refuse(error);
  } finally {
    byId("make").disabled = false;
  }
}

function refuse(error) {
  const node = error instanceof ApiError && error.field ? field(error.field.split(".")[0]) : null;
  if (node) {
    complain(node, error.message);
    node.closest("details")?.setAttribute("open", "");
    node.querySelector("input, textarea, select")?.focus();
  } else {
    byId("form-error").textContent = error.message;
  }
}
