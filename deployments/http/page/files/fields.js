// Inputs made from the JSON schema of a request field, and what is wrong with what was typed into them.

import { element } from "./dom.js";

/** "num_inference_steps" for people. */
export function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** Whether the field's value is a list, or may be one. */
function listSchema(schema) {
  return [schema, ...(schema.oneOf ?? []), ...(schema.anyOf ?? [])].find((choice) => choice.type === "array") ?? null;
}

function numberSchema(schema) {
  const isNumber = (choice) => choice.type === "integer" || choice.type === "number";
  return [schema, ...(schema.oneOf ?? []), ...(schema.anyOf ?? [])].find(isNumber) ?? null;
}

/** An input with its label for a field. `value` is what the model takes where the field is left out. */
export function fieldOf(name, schema, value, prefix = "") {
  const id = `field-${prefix}${name}`;
  if (schema.type === "object") return group(name, schema);
  let input;
  if (schema.enum) {
    const choices = schema.enum.map((choice) => element("option", { value: choice }, choice));
    const standard = value === undefined || value === null ? "default" : `${value} (default)`;
    input = element("select", { id, name }, element("option", { value: "" }, standard), ...choices);
  } else if (schema.type === "boolean") {
    input = element("input", { id, name, type: "checkbox" });
    input.checked = value === true;
  } else {
    const placeholder = value === undefined || value === null ? "" : String(value);
    input = element("input", { id, name, placeholder, autocomplete: "off", inputmode: numberSchema(schema) ? "decimal" : null });
  }
  if (schema.description) input.setAttribute("aria-describedby", `${id}-hint`);
  const hint = schema.description && element("p", { class: "hint", id: `${id}-hint` }, schema.description);
  return element("div", { class: "field", "data-field": prefix ? prefix.slice(0, -1) : name }, element("label", { for: id }, labelOf(name)), input, hint);
}

/** The fields of an object, off until it is switched on. */
function group(name, schema) {
  const inner = element("div", { class: "grid", hidden: true });
  for (const [key, part] of Object.entries(schema.properties ?? {})) {
    inner.append(fieldOf(key, part, part.default, `${name}.`));
  }
  const toggle = element("input", { type: "checkbox", id: `field-${name}`, onchange: () => (inner.hidden = !toggle.checked) });
  const legend = element("legend", {}, element("label", { class: "inline", for: `field-${name}` }, toggle, labelOf(name)));
  const hint = schema.description && element("p", { class: "hint" }, schema.description);
  return element("fieldset", { class: "field", "data-field": name }, legend, hint, inner);
}

/** The value in a field that `fieldOf` made: undefined where it is left out. Throws an Error with what is wrong. */
export function valueOf(node, name, schema) {
  if (schema.type === "object") {
    if (!node.querySelector(`[id="field-${name}"]`).checked) return undefined;
    const value = {};
    for (const [key, part] of Object.entries(schema.properties ?? {})) {
      const input = node.querySelector(`[id="field-${name}.${key}"]`);
      const given = readInput(input, part);
      if (given !== undefined) value[key] = given;
    }
    return value;
  }
  return readInput(node.querySelector("input, select"), schema);
}

function readInput(input, schema) {
  if (input.type === "checkbox") return input.checked;
  const text = input.value.trim();
  if (text === "") return undefined;
  if (schema.enum) return schema.enum.find((choice) => String(choice) === text);
  const list = listSchema(schema);
  if (list !== null && /[,\s]/.test(text)) {
    const items = text.split(/[,\s]+/).filter(Boolean).map((item) => readNumber(item, numberSchema(list.items) ?? {}));
    if (items.length < (list.minItems ?? 0) || items.length > (list.maxItems ?? Infinity)) {
      throw new Error(`must be one number, or ${list.minItems} separated by commas`);
    }
    return items;
  }
  const number = numberSchema(schema);
  return number ? readNumber(text, number) : text;
}

/** A number within the bounds of its schema. */
export function readNumber(text, schema) {
  const value = Number(text);
  if (text === "" || !Number.isFinite(value)) throw new Error("must be a number");
  if (schema.type === "integer" && !Number.isInteger(value)) throw new Error("must be a whole number");
  if (schema.minimum !== undefined && value < schema.minimum) throw new Error(`must be at least ${schema.minimum}`);
  if (schema.exclusiveMinimum !== undefined && value <= schema.exclusiveMinimum) {
    throw new Error(`must be more than ${schema.exclusiveMinimum}`);
  }
  if (schema.maximum !== undefined && value > schema.maximum) throw new Error(`must be at most ${schema.maximum}`);
  return value;
}
