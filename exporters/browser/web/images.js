// Images to pixel_values as the Python side makes them: Pillow's resampling, then crop, scale and
// normalise. Canvases resample otherwise in every browser.

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight: (x) => {
      const a = -0.5;
      const d = Math.abs(x);
      if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    },
  },
  lanczos: { support: 3, weight: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
};
// Bits behind the point of Pillow's weights for 8-bit channels.
const PRECISION = 2 ** 22;
const CHANNELS = 3;

/** An image Blob to {type, data, dims} of shape [1, 3, H, W]; `options` as in settings.json. */
export async function pixelValues(image, options) {
  let pixels = await decode(image);
  if (options.resize) pixels = resize(pixels, options.resize, FILTERS[options.resample]);
  if (options.crop) pixels = crop(pixels, options.crop);
  const { data, width, height } = pixels;
  const values = new Float32Array(CHANNELS * height * width);
  for (let channel = 0; channel < CHANNELS; channel++) {
    for (let index = 0; index < height * width; index++) {
      const value = data[CHANNELS * index + channel] * options.scale;
      values[channel * height * width + index] =
        (value - options.mean[channel]) / options.std[channel];
    }
  }
  return { type: "float32", data: values, dims: [1, CHANNELS, height, width] };
}

/** Pixels as stored, without colour management or alpha: {data, width, height}, RGB. */
async function decode(image) {
  const bitmap = await createImageBitmap(image, {
    premultiplyAlpha: "none",
    colorSpaceConversion: "none",
  });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8ClampedArray(CHANNELS * width * height);
  for (let index = 0; index < width * height; index++) {
    for (let channel = 0; channel < CHANNELS; channel++) {
      data[CHANNELS * index + channel] = rgba[4 * index + channel];
    }
  }
  return { data, width, height };
}

function resize(pixels, size, filter) {
  const { width, height } = pixels;
  const shorter = Math.min(width, height);
  const side = (length) =>
    length === shorter ? size.shortest_edge : Math.trunc((size.shortest_edge * length) / shorter);
  const target = size.shortest_edge
    ? { width: side(width), height: side(height) }
    : { width: size.width, height: size.height };
  // Each pass rounds to 8 bits, as Pillow's do. Since version 13 Pillow starts with the rows of some
  // images, the high ones mostly; there, values may differ by one level.
  const rows =
    target.width === width
      ? pixels
      : transpose(resizeRows(transpose(pixels), target.width, filter));
  return target.height === height ? rows : resizeRows(rows, target.height, filter);
}

/** Resample the vertical axis. */
function resizeRows({ data, width, height }, target, filter) {
  const result = new Uint8ClampedArray(CHANNELS * width * target);
  const stride = CHANNELS * width;
  const ratio = height / target;
  const stretch = Math.max(ratio, 1);
  const support = filter.support * stretch;
  for (let row = 0; row < target; row++) {
    const center = (row + 0.5) * ratio;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const last = Math.min(Math.trunc(center + support + 0.5), height);
    const exact = [];
    for (let y = first; y < last; y++) exact.push(filter.weight((y - center + 0.5) / stretch));
    const total = exact.reduce((sum, weight) => sum + weight, 0);
    const weights = exact.map((weight) => roundAway((weight / total) * PRECISION));
    for (let column = 0; column < stride; column++) {
      let sum = PRECISION / 2;
      for (let index = 0; index < weights.length; index++) {
        sum += weights[index] * data[(first + index) * stride + column];
      }
      result[row * stride + column] = Math.floor(sum / PRECISION);
    }
  }
  return { data: result, width, height: target };
}

function transpose({ data, width, height }) {
  const result = new Uint8ClampedArray(data.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < CHANNELS; channel++) {
        result[CHANNELS * (x * height + y) + channel] = data[CHANNELS * (y * width + x) + channel];
      }
    }
  }
  return { data: result, width: height, height: width };
}

function crop({ data, width, height }, size) {
  const top = Math.floor((height - size.height) / 2);
  const left = Math.floor((width - size.width) / 2);
  const result = new Uint8ClampedArray(CHANNELS * size.width * size.height);
  for (let y = 0; y < size.height; y++) {
    const start = CHANNELS * ((top + y) * width + left);
    result.set(data.subarray(start, start + CHANNELS * size.width), CHANNELS * size.width * y);
  }
  return { data: result, width: size.width, height: size.height };
}

function roundAway(value) {
  return value < 0 ? Math.ceil(value - 0.5) : Math.floor(value + 0.5);
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}
