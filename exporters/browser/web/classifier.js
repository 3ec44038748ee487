// Runs the exported graph with onnxruntime-web, one image or text at a time.

import { json } from "./files.js";
import { pixelValues } from "./images.js";
import { loadTokens } from "./texts.js";

/**
 * Load what `settings.json` names.
 *
 * Returns an object with `modality`, `provider`, `logits(input)`, which resolves to a Float32Array
 * per task, and `classify(input)`, which resolves to a list of {task, label, probability}. Inputs
 * are Blobs of images, or strings.
 */
export async function loadClassifier(url) {
  const settings = await json(url);
  if (settings.provider === "webgpu" && !(await navigator.gpu?.requestAdapter())) {
    throw new Error("this browser offers no WebGPU; use another, or export with --target wasm");
  }
  const ort = await import(new URL(settings.library, url));
  ort.env.wasm.wasmPaths = new URL("vendor/", url).href;
  // More need shared memory, which pages get only with headers that isolate them.
  if (!self.crossOriginIsolated) ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(new URL(settings.graph, url).href, {
    executionProviders: [settings.provider],
    extra: settings.session_config,
    externalData: settings.external_data.map((path) => ({
      path,
      data: new URL(path, new URL(settings.graph, url)).href,
    })),
  });
  const prepare =
    settings.modality === "image"
      ? async (image) => ({ pixel_values: await pixelValues(image, settings.image) })
      : await loadTokens(settings.text, url);

  async function logits(input) {
    const prepared = await prepare(input);
    const feeds = Object.fromEntries(
      settings.inputs.map((name) => {
        const { type, data, dims } = prepared[name];
        return [name, new ort.Tensor(type, data, dims)];
      }),
    );
    if (settings.tasks.some(({ number }) => number !== undefined)) {
      // The model has corrections for every task, so each task is a run of its own.
      const found = {};
      for (const { name, output, number } of settings.tasks) {
        feeds.task = new ort.Tensor("int64", BigInt64Array.of(BigInt(number)), [1]);
        found[name] = (await session.run(feeds, [output]))[output].data;
      }
      return found;
    }
    const outputs = await session.run(feeds, settings.tasks.map((task) => task.output));
    return Object.fromEntries(
      settings.tasks.map(({ name, output }) => [name, outputs[output].data]),
    );
  }

  async function classify(input) {
    const found = await logits(input);
    return settings.tasks.map(({ name, classes }) => {
      const probabilities = softmax(found[name]);
      const best = probabilities.indexOf(Math.max(...probabilities));
      const label = classes ? classes[best] : `class ${best}`;
      return { task: name, label, probability: probabilities[best] };
    });
  }

  return { modality: settings.modality, provider: settings.provider, logits, classify };
}

function softmax(values) {
  const highest = Math.max(...values);
  const powers = Array.from(values, (value) => Math.exp(value - highest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}
