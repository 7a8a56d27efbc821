// The page: reads an image, lets the worker run the network, and shows the classes or the mask.
//
// The files come from the folder of the page, or from the page itself if they are embedded in it. A link such as
// index.html?image=cat.jpg shows an image of the same server.

const MOST_CLASSES = 5;
const MOST_PIXELS = 2 ** 26; // of an image: 64 megapixels take 256 MiB as RGBA
const find = (id) => document.getElementById(id);

let about, worker;
let nextId = 0;
let shown = null; // the last result, with the decoded image
const waiting = new Map(); // by id of a run

/** The bytes of a file of this page. */
async function asset(name) {
  const embedded = document.querySelector(`script[data-asset="${name}"]`);
  if (embedded) {
    const text = atob(embedded.textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes.buffer;
  }
  if (location.protocol === "file:") {
    throw new Error("a browser does not read the files of this folder without a server: run python -m http.server in it, "
      + "or export with --single-file");
  }
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} cannot be read (status ${response.status})`);
  return response.arrayBuffer();
}

function showError(what) {
  const text = String(what?.message ?? what).replace(/^Error: /, "").replace(/\.?$/, ".");
  find("error").textContent = text[0].toUpperCase() + text.slice(1);
  find("error").hidden = false;
  find("status").textContent = "";
  document.body.dataset.state = about && worker ? "failed" : "broken";
}

async function start() {
  about = JSON.parse(new TextDecoder().decode(await asset("repvgg-page.json")));
  describe();
  const names = [about.runtime.script, about.runtime.wasm, "model.onnx", "worker.js", "preprocessing.mjs"];
  const [runtime, wasm, model, script, preprocessing] = await Promise.all(names.map(asset));
  // From a blob, so that the worker inherits the content security policy of the page. It is no module, because Chromium
  // starts no module worker of a page without a server.
  const started = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
  await new Promise((resolve, reject) => {
    started.onerror = (event) => reject(new Error(event.message || "the worker cannot be started"));
    started.onmessage = ({ data }) => (data.type === "ready" ? resolve() : reject(new Error(data.text)));
    started.postMessage({ type: "load", runtime, preprocessing, wasm, model, about }, [wasm, model]);
  });
  worker = started;
  worker.onerror = (event) => showError(event.message || "the worker stopped");
  worker.onmessage = ({ data }) => {
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    data.type === "result" ? resolve(data) : reject(new Error(data.text));
  };
  find("file").disabled = false;
  find("status").textContent = "Ready.";
  document.body.dataset.state = "ready";
  const linked = new URLSearchParams(location.search).get("image");
  if (linked) await open(await linkedImage(linked));
}

function describe() {
  const [channels, height, width] = about.inputShape;
  const kind = about.kind === "segmentation" ? "segmentation" : "classification";
  document.title = find("title").textContent = `${about.name}: image ${kind}`;
  const grey = channels === 1 ? ", greyscale" : "";
  const weights = about.weights ? `; weights: ${about.weights}` : "";
  find("about").textContent =
    `${about.numClasses.toLocaleString("en")} classes, input ${width} x ${height} pixels${grey}${weights}.`;
  find("runtime").textContent = `The network runs in ONNX Runtime Web ${about.runtime.version} (MIT licence).`;
}

async function linkedImage(address) {
  const url = new URL(address, location.href);
  if (url.origin !== location.origin) throw new Error("?image= names an image on this server only");
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${address} cannot be read (status ${response.status})`);
  return response.blob();
}

/** Decode an image as repvgg does: upright, without colour management, transparent pixels on white. */
async function decode(blob) {
  let bitmap;
  try {
    const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
    bitmap = await createImageBitmap(blob, options);
  } catch {
    throw new Error("this file is not an image that the browser can read: choose a JPEG, PNG or WebP file");
  }
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) throw new Error(`an image of ${width} x ${height} pixels is too large: make it smaller`);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true, alpha: false });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { canvas, width, height, rgba: context.getImageData(0, 0, width, height).data };
}

async function open(blob) {
  const id = nextId++;
  try {
    find("error").hidden = true;
    document.body.dataset.state = "running";
    find("status").textContent = "Running the network …";
    const image = await decode(blob);
    const { rgba, width, height } = image;
    const result = await new Promise((resolve, reject) => {
      waiting.set(id, { resolve, reject });
      worker.postMessage({ type: "run", id, rgba, width, height }, [rgba.buffer]);
    });
    if (id !== nextId - 1) return; // another image was opened meanwhile
    shown = { ...result, image };
    show();
  } catch (error) {
    if (id === nextId - 1) showError(error);
  }
}

function show() {
  find("result").hidden = false;
  const items = about.kind === "segmentation" ? showMask() : showClasses();
  find("classes").replaceChildren(...items.map(asItem));
  const { prepare, run } = shown.milliseconds;
  find("time").textContent = `Prepared in ${prepare.toFixed(0)} ms, run in ${run.toFixed(0)} ms on one thread.`;
  find("status").textContent = `Done: ${items[0].name}, ${percent(items[0].share)}.`;
  document.body.dataset.state = "done";
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const nameOf = (index) => about.classes[index] ?? `class ${index}`;

function asItem({ name, share, colour }) {
  const item = document.createElement("li");
  const part = (className, text = "") => Object.assign(document.createElement("span"), { className, textContent: text });
  if (colour) {
    const swatch = part("swatch");
    swatch.style.background = `rgb(${colour.join(" ")})`;
    item.append(swatch);
  } else {
    const bar = part("bar");
    bar.style.width = `${100 * share}%`;
    item.append(bar);
  }
  item.append(part("name", name), part("share", percent(share)));
  return item;
}

function showClasses() {
  const { logits, image, resized, crop } = shown;
  const largest = Math.max(...logits);
  const exponentials = logits.map((logit) => Math.exp(logit - largest));
  const sum = exponentials.reduce((total, value) => total + value, 0);
  const order = logits.map((_, index) => index).sort((a, b) => logits[b] - logits[a] || a - b);
  drawImage(image, image.width, image.height);
  // Dim what the network does not see.
  const [scaleX, scaleY] = [image.width / resized[0], image.height / resized[1]];
  const context = pictureContext();
  const seen = [crop.left * scaleX, crop.top * scaleY, crop.width * scaleX, crop.height * scaleY];
  const outside = new Path2D();
  outside.rect(0, 0, image.width, image.height);
  outside.rect(...seen);
  context.fillStyle = "rgb(255 255 255 / 60%)";
  context.fill(outside, "evenodd");
  find("heading").textContent = "Most probable classes";
  find("caption").textContent = `${image.width} x ${image.height} pixels; the network sees the part that is not dimmed.`;
  const top = order.slice(0, MOST_CLASSES).map((index) => ({ name: nameOf(index), share: exponentials[index] / sum }));
  find("picture").ariaLabel = `The image; most probable: ${top[0].name}`;
  return top;
}

function showMask() {
  const { image, counts, crop } = shown;
  drawMask();
  find("opacity-label").hidden = false;
  const order = counts.map((_, index) => index).filter((index) => counts[index]);
  order.sort((a, b) => counts[b] - counts[a] || a - b);
  const total = crop.width * crop.height;
  const items = order.map((index) => ({ name: nameOf(index), share: counts[index] / total, colour: about.palette[index] }));
  find("heading").textContent = "Share of the pixels";
  const scaled = image.width === crop.width ? "" : `, resized to ${crop.width} x ${crop.height}`;
  find("caption").textContent = `${image.width} x ${image.height} pixels${scaled}, with the class of each pixel as its colour.`;
  find("picture").ariaLabel = `The image with its classes; most frequent: ${items[0].name}`;
  return items;
}

const pictureContext = () => find("picture").getContext("2d", { willReadFrequently: true });

function drawImage(image, width, height) {
  Object.assign(find("picture"), { width, height });
  pictureContext().drawImage(image.canvas, 0, 0, width, height);
}

function drawMask() {
  const { image, mask, crop } = shown;
  drawImage(image, crop.width, crop.height);
  const context = pictureContext();
  const picture = context.getImageData(0, 0, crop.width, crop.height);
  const opacity = find("opacity").value / 100;
  for (let i = 0; i < mask.length; i++) {
    const colour = about.palette[mask[i]];
    for (let c = 0; c < 3; c++) picture.data[4 * i + c] += opacity * (colour[c] - picture.data[4 * i + c]);
  }
  context.putImageData(picture, 0, 0);
}

function openFirst(files) {
  const file = Array.from(files ?? [])[0];
  if (file && worker) open(file);
}

addEventListener("error", (event) => showError(event.message));
addEventListener("unhandledrejection", (event) => showError(event.reason));
find("file").addEventListener("change", (event) => {
  openFirst(event.target.files);
  event.target.value = ""; // the same file may be chosen again
});
find("opacity").addEventListener("input", () => shown && drawMask());
addEventListener("paste", (event) => openFirst(event.clipboardData?.files));
for (const type of ["dragenter", "dragover"]) {
  addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
}
for (const type of ["dragleave", "drop"]) addEventListener(type, () => document.body.classList.remove("dragging"));
addEventListener("drop", (event) => {
  event.preventDefault();
  openFirst(event.dataTransfer?.files);
});

// For tests: what the network returned for the last image.
globalThis.repvgg = { result: () => shown && { ...shown, image: undefined } };

start().catch(showError);
