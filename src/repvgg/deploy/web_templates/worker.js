// Runs the network, so that the page stays responsive meanwhile.
//
// Messages in:  {type: "load", runtime, preprocessing, wasm, model, about}, {type: "run", id, rgba, width, height}
// Messages out: {type: "ready"}, {type: "result", id, …}, {type: "error", id, text}

let ort, session, about, prepare;

self.onmessage = async ({ data }) => {
  try {
    if (data.type === "load") {
      await load(data);
      self.postMessage({ type: "ready" });
    } else {
      const result = await run(data);
      self.postMessage({ type: "result", id: data.id, ...result });
    }
  } catch (error) {
    // Emscripten throws numbers where memory runs out.
    const text = typeof error === "number" ? "the memory of WebAssembly ran out" : error?.message || String(error);
    self.postMessage({ type: "error", id: data.id, text });
  }
};

/** Import a module from its bytes. Without a server, a worker cannot read the blobs of its page, so it makes its own. */
function imported(bytes) {
  return import(URL.createObjectURL(new Blob([bytes], { type: "text/javascript" })));
}

async function load(data) {
  about = data.about;
  ({ prepare } = await imported(data.preprocessing));
  ort = await imported(data.runtime);
  ort.env.wasm.numThreads = 1; // more need response headers that plain servers do not send
  ort.env.wasm.wasmBinary = data.wasm; // otherwise the runtime looks for the file by itself
  ort.env.logLevel = "error";
  session = await ort.InferenceSession.create(new Uint8Array(data.model), { executionProviders: ["wasm"] });
}

async function run({ rgba, width, height }) {
  const start = performance.now();
  const { input, pixels, resized, crop } = prepare(rgba, width, height, about);
  const prepared = performance.now();
  const tensor = new ort.Tensor("float32", input, [1, ...about.inputShape]);
  const outputs = await session.run({ [session.inputNames[0]]: tensor });
  const logits = outputs[session.outputNames[0]].data;
  const milliseconds = { prepare: prepared - start, run: performance.now() - prepared };
  if (!logits.every(Number.isFinite)) throw new Error("the network returns NaN or infinity");
  const found = about.kind === "segmentation" ? maskOf(logits, crop) : { logits: Array.from(logits) };
  return { ...found, pixels, resized, crop, milliseconds };
}

/** The class of each pixel of the image, without the padding, and the number of pixels of each class. */
function maskOf(logits, crop) {
  const [, height, width] = about.inputShape;
  const mask = new Uint8Array(crop.width * crop.height);
  const counts = new Array(about.numClasses).fill(0);
  for (let y = 0; y < crop.height; y++) {
    for (let x = 0; x < crop.width; x++) {
      let best = 0;
      for (let k = 1; k < about.numClasses; k++) {
        if (logits[(k * height + y) * width + x] > logits[(best * height + y) * width + x]) best = k;
      }
      mask[y * crop.width + x] = best;
      counts[best]++;
    }
  }
  return { mask, counts };
}
