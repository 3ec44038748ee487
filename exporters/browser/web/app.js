// The page: takes an image or a text, shows what every task answers.

import { loadClassifier } from "./classifier.js";

const status = document.getElementById("status");
const table = document.querySelector("table");

function say(text, kind = "info") {
  status.textContent = text;
  status.dataset.kind = kind;
}

function show(answers) {
  table.tBodies[0].replaceChildren(
    ...answers.map(({ task, label, probability }) => {
      const row = document.createElement("tr");
      for (const text of [task, label, `${(100 * probability).toFixed(1)} %`]) {
        row.insertCell().textContent = text;
      }
      return row;
    }),
  );
  table.hidden = false;
}

async function answer(classifier, input) {
  try {
    const started = performance.now();
    show(await classifier.classify(input));
    say(`${(performance.now() - started).toFixed(0)} ms`);
  } catch (error) {
    say(String(error), "error");
  }
}

try {
  const classifier = await loadClassifier(new URL("settings.json", import.meta.url));
  const form = document.getElementById(classifier.modality);
  form.hidden = false;
  if (classifier.modality === "image") {
    const picture = form.querySelector("img");
    form.querySelector("input").addEventListener("change", async ({ target: { files } }) => {
      if (!files.length) return;
      URL.revokeObjectURL(picture.src);
      picture.src = URL.createObjectURL(files[0]);
      picture.hidden = false;
      await answer(classifier, files[0]);
    });
  } else {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      await answer(classifier, form.querySelector("textarea").value);
    });
  }
  say(`ready, on ${classifier.provider}`);
} catch (error) {
  say(String(error), "error");
}
