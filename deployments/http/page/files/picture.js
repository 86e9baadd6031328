// The picture of a request: chosen, dropped or pasted, and shown with the crop that the server will make.

import { byId } from "./dom.js";

let file = null;
let bitmap = null;
let size = null; // [width, height] of the video, or null: the picture's own shape
let changed = () => {};

/** `whenChanged` is called with the picture's file, or null. */
export function setUpPicture(whenChanged) {
  changed = whenChanged;
  const drop = byId("drop");
  byId("picture").addEventListener("change", (event) => take(event.target.files[0]));
  byId("picture-remove").addEventListener("click", () => {
    take(null);
    byId("picture").focus();
  });
  // Anywhere in the window: a browser would leave the page for a file that is dropped beside the box.
  for (const name of ["dragenter", "dragover"]) {
    addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  addEventListener("dragleave", (event) => event.relatedTarget === null && drop.classList.remove("over"));
  addEventListener("drop", (event) => {
    drop.classList.remove("over");
    if (event.dataTransfer.files.length === 0) return; // text, for the field it is dropped on
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (pasted) take(pasted);
  });
}

export function pictureFile() {
  return file;
}

/** The size of the video, to which the picture is brought; null where the picture tells it. */
export function setVideoSize(newSize) {
  size = newSize;
  draw();
}

/** The picture as a data URL. */
export function pictureUrl() {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Use a picture, or none. */
export async function take(newFile) {
  file = newFile ?? null;
  bitmap?.close();
  bitmap = null;
  if (file === null) byId("picture").value = "";
  else {
    const made = await createImageBitmap(newFile).catch(() => null); // HEIC and others are read by the server alone
    if (file !== newFile) return made?.close(); // another was chosen meanwhile
    bitmap = made;
  }
  byId("picture-remove").hidden = file === null;
  draw();
  changed(file);
}

/** As the server does it: scaled until it covers the video's frame, and cut evenly at both sides. */
function draw() {
  const canvas = byId("preview");
  canvas.hidden = bitmap === null;
  if (bitmap === null) return;
  const [width, height] = size ?? [bitmap.width, bitmap.height];
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  canvas.width = width;
  canvas.height = height;
  const [drawnWidth, drawnHeight] = [bitmap.width * scale, bitmap.height * scale];
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // what is transparent becomes white, as on the server
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, (width - drawnWidth) / 2, (height - drawnHeight) / 2, drawnWidth, drawnHeight);
}
