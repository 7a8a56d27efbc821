// From decoded pixels to the tensor of the network: the same bytes as repvgg's evaluation in Python.
//
// Resizing computes what Pillow's 8-bit resampling with antialiasing does: one pass along the rows, one along the columns,
// weights in fixed point with 22 fractional bits, and a result rounded to 8 bits after each pass. A canvas would resize
// with a filter of the browser's choice.

const PRECISION_BITS = 22;
const HALF = 2 ** (PRECISION_BITS - 1);
const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: bicubic },
};

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** The sources and fixed-point weights of the outputs first … first + count - 1 of an axis. */
function weightsOf(inSize, outSize, first, count, filter) {
  const scale = inSize / outSize;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  const rows = [];
  for (let index = first; index < first + count; index++) {
    const center = (index + 0.5) * scale;
    const begin = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(inSize, Math.trunc(center + support + 0.5));
    const weights = [];
    let sum = 0;
    for (let x = begin; x < end; x++) {
      // The reciprocal and the order of the additions are Pillow's: another order rounds differently.
      const weight = filter.weight((x - center + 0.5) * (1 / stretch));
      weights.push(weight);
      sum += weight;
    }
    const fixed = weights.map((weight) => {
      const scaled = (sum === 0 ? weight : weight / sum) * 2 ** PRECISION_BITS;
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    rows.push({ begin, weights: Int32Array.from(fixed) });
  }
  return rows;
}

const toByte = (sum) => Math.min(255, Math.max(0, sum >> PRECISION_BITS));

/** The first source that any output of an axis reads, and the number of sources from there to the last one. */
function rangeOf(outputs) {
  const first = outputs[0].begin;
  const last = outputs[outputs.length - 1];
  return { first, count: last.begin + last.weights.length - first };
}

/** Resize the rows of an image: (rows, width, channels) to (rows, columns.length, channels), from a row on. */
function alongRows({ pixels, width, channels }, columns, firstRow, numRows, offset) {
  const result = new Uint8Array(numRows * columns.length * channels);
  let to = 0;
  for (let y = firstRow; y < firstRow + numRows; y++) {
    for (const { begin, weights } of columns) {
      for (let c = 0; c < channels; c++) {
        let sum = HALF;
        let at = (y * width + begin - offset) * channels + c;
        for (let k = 0; k < weights.length; k++, at += channels) sum += pixels[at] * weights[k];
        result[to++] = toByte(sum);
      }
    }
  }
  return { pixels: result, width: columns.length, channels };
}

/** Resize the columns of an image: (height, width, channels) to (rows.length, numColumns, channels). */
function alongColumns({ pixels, width, channels }, rows, firstColumn, numColumns, offset) {
  const stride = width * channels;
  const result = new Uint8Array(rows.length * numColumns * channels);
  let to = 0;
  for (const { begin, weights } of rows) {
    const start = (begin - offset) * stride + firstColumn * channels;
    for (let x = 0; x < numColumns * channels; x++) {
      let sum = HALF;
      let at = start + x;
      for (let k = 0; k < weights.length; k++, at += stride) sum += pixels[at] * weights[k];
      result[to++] = toByte(sum);
    }
  }
  return { pixels: result, width: numColumns, channels };
}

/**
 * Resize an image and cut a window out of the result.
 *
 * @param {Uint8Array} pixels (height, width, channels)
 * @param {{left: number, top: number, width: number, height: number}} crop the window, in pixels of the resized image
 * @returns {Uint8Array} (crop.height, crop.width, channels)
 */
export function resize(pixels, width, height, channels, newWidth, newHeight, interpolation, crop) {
  const filter = FILTERS[interpolation];
  const columns = weightsOf(width, newWidth, crop.left, crop.width, filter);
  const rows = weightsOf(height, newHeight, crop.top, crop.height, filter);
  const image = { pixels, width, channels };
  // The first pass makes only what the second one reads. Pillow's order since version 13:
  if (height - newHeight > Math.max(0, 2 * (width - newWidth))) {
    const { first, count } = rangeOf(columns);
    const low = alongColumns(image, rows, first, count, 0);
    return alongRows(low, columns, 0, rows.length, first).pixels;
  }
  const { first, count } = rangeOf(rows);
  const narrow = alongRows(image, columns, first, count, 0);
  return alongColumns(narrow, rows, 0, columns.length, first).pixels;
}

/** RGBA of an opaque image as RGB, or as grey by ITU-R 601 luma in Pillow's fixed point. */
export function toChannels(rgba, channels) {
  const count = rgba.length / 4;
  const pixels = new Uint8Array(count * channels);
  for (let i = 0; i < count; i++) {
    const [r, g, b] = [rgba[4 * i], rgba[4 * i + 1], rgba[4 * i + 2]];
    if (channels === 1) {
      pixels[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    } else {
      pixels[3 * i] = r;
      pixels[3 * i + 1] = g;
      pixels[3 * i + 2] = b;
    }
  }
  return pixels;
}

/** As Python's round(): halves to the even neighbour. */
function roundHalfToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

/** The size of the resized image, and the window of it that the network sees. */
export function geometryOf(width, height, about) {
  const [, inputHeight, inputWidth] = about.inputShape;
  if (about.kind === "segmentation") {
    // As large as fits, never enlarged; the rest of the input is padded with the mean pixel.
    const scale = Math.min(1, inputWidth / width, inputHeight / height);
    const fitted = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
    return { resized: fitted, crop: { left: 0, top: 0, width: fitted[0], height: fitted[1] } };
  }
  const size = inputHeight;
  let resized = [width, height];
  if (width !== size || height !== size) {
    // 1e-6: a quotient one rounding error below an integer counts as that integer.
    const short = Math.floor(size / about.cropFraction + 1e-6);
    const long = Math.trunc((short * Math.max(width, height)) / Math.min(width, height));
    resized = width <= height ? [short, long] : [long, short];
  }
  const left = roundHalfToEven((resized[0] - size) / 2);
  const top = roundHalfToEven((resized[1] - size) / 2);
  return { resized, crop: { left, top, width: size, height: size } };
}

/** For each channel, the normalized value of each byte, rounded to float32 after each step as PyTorch does. */
function normalizedBytes(mean, std) {
  const f32 = Math.fround;
  return mean.map((value, channel) =>
    Float32Array.from({ length: 256 }, (_, byte) => f32(f32(f32(byte / 255) - f32(value)) / f32(std[channel]))),
  );
}

/**
 * Prepare an image.
 *
 * @param {Uint8ClampedArray} rgba (height, width, 4), opaque
 * @param {object} about the content of repvgg-page.json
 * @returns {{input: Float32Array, pixels: Uint8Array, resized: number[], crop: object}} the input (C, H, W), and the
 *     bytes (height, width, C) of the window that it was made of
 */
export function prepare(rgba, width, height, about) {
  const [channels, inputHeight, inputWidth] = about.inputShape;
  const { resized, crop } = geometryOf(width, height, about);
  const source = toChannels(rgba, channels);
  const pixels = resize(source, width, height, channels, ...resized, about.interpolation, crop);
  const tables = normalizedBytes(about.mean, about.std);
  const input = new Float32Array(channels * inputHeight * inputWidth); // 0 is the mean pixel
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < crop.height; y++) {
      for (let x = 0; x < crop.width; x++) {
        const byte = pixels[(y * crop.width + x) * channels + c];
        input[(c * inputHeight + y) * inputWidth + x] = tables[c][byte];
      }
    }
  }
  return { input, pixels, resized, crop };
}
