"use strict";

const HINTS = {
  classes: "Names of things, with periods or commas between them; all of each are found.",
  caption: "A sentence; the things that its noun phrases mean are found.",
  expression: "Words that mean one object, such as “the cup left of the plate”.",
};
const $ = (id) => document.getElementById(id);

let about = null; // what the server says of itself
let picture = null; // File or Blob
let example = null; // the example that the picture is, for its texts
let answer = null; // of the last question
let asking = null; // AbortController of the question on its way
let loads = 0; // only the picture chosen last is shown
let loading = Promise.resolve(); // until it is

const kind = () => document.querySelector("input[name=kind]:checked").value;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function megabytes(bytes) {
  return `${+(bytes / 2 ** 20).toFixed(1)} MB`;
}

function forget() {
  asking?.abort();
  asking = answer = null;
  $("answer").hidden = $("reading").hidden = true;
  $("boxes").replaceChildren();
  $("status").textContent = "";
  $("find").disabled = false;
}

function show(blob, of = null) {
  return (loading = load(blob, of));
}

async function load(blob, of) {
  const mine = ++loads;
  forget();
  fail("");
  if (about && blob.size > about.limits.upload_bytes) {
    fail(`The file has ${megabytes(blob.size)}, and ${megabytes(about.limits.upload_bytes)} are the limit.`);
    return false;
  }
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(image.src);
    if (mine === loads) fail("The browser cannot show this file: is it a picture?");
    return false;
  }
  if (mine !== loads) return false;
  URL.revokeObjectURL($("image").src);
  const ratio = image.naturalWidth / image.naturalHeight;
  $("image").src = image.src;
  $("image").alt = blob.name || of?.name || "the picture";
  $("stage").style.aspectRatio = ratio;
  $("stage").style.width = `min(100%, ${60 * ratio}vh)`;
  $("stage").hidden = false;
  $("invitation").hidden = true;
  $("drop").classList.remove("empty");
  picture = blob;
  example = of;
  return true;
}

async function showExample(index) {
  const chosen = about.examples[index];
  const response = await fetch(`api/examples/${index}`);
  if (!response.ok || !(await show(await response.blob(), chosen))) return;
  const text = chosen.texts[kind()];
  if (text) $("text").value = text;
  if ($("text").value.trim()) await ask();
}

async function ask() {
  forget();
  fail("");
  const mine = (asking = new AbortController());
  $("find").disabled = true;
  $("status").textContent = "Looking …";
  const problem = await question(mine.signal);
  if (mine !== asking) return; // another question, or another picture
  asking = null;
  $("find").disabled = false;
  $("status").textContent = "";
  fail(problem);
}

// Returns what went wrong, or nothing.
async function question(signal) {
  await loading;
  if (!picture) return "Choose a picture first.";
  if (!$("text").value.trim()) return "Write what to look for.";
  const form = new FormData();
  form.append("image", picture, "picture");
  form.append("text", $("text").value);
  form.append("kind", kind());
  const begin = performance.now();
  let response;
  try {
    response = await fetch("api/predict", { method: "POST", body: form, signal });
  } catch {
    return "The server does not answer: does the program still run?";
  }
  const said = await response.json().catch(() => ({}));
  if (signal.aborted) return "";
  if (!response.ok) return said.error || `The server answered ${response.status} ${response.statusText}.`;
  receive(said, (performance.now() - begin) / 1000);
  return "";
}

function receive(said, seconds) {
  answer = said;
  const { waited, decoded, predicted } = said.seconds;
  $("timing").textContent =
    `${said.width} × ${said.height} pixels, ${seconds.toFixed(2)} s in all: model ` +
    `${predicted.toFixed(2)} s, reading the picture ${decoded.toFixed(2)} s, waiting ${waited.toFixed(2)} s`;
  $("answer").hidden = $("reading").hidden = false;
  draw();
}

function tie(node, target, box = null) {
  node.dataset.target = target;
  if (box !== null) node.dataset.box = box;
  node.style.setProperty("--color", answer.colors[target]);
  node.addEventListener("pointerenter", () => light(target, box));
  node.addEventListener("pointerleave", () => light(null));
  node.addEventListener("focus", () => light(target, box));
  node.addEventListener("blur", () => light(null));
  return node;
}

// Lights up a word with all of its boxes, or one box with its word.
function light(target, box = null) {
  for (const node of document.querySelectorAll("[data-target]")) {
    const same = target !== null && node.dataset.target === String(target);
    const lit = same && (box === null || !("box" in node.dataset) || node.dataset.box === String(box));
    node.classList.toggle("lit", lit);
    node.classList.toggle("dim", target !== null && !lit && node.classList.contains("box"));
  }
}

function draw() {
  const lowest = Number($("threshold").value);
  $("shown-threshold").textContent = lowest.toFixed(2);
  if (!answer) return;
  const { width, height, targets, detections, pieces } = answer;
  // The best box of an expression is its answer, whatever its score.
  const shown = detections
    .map((found, index) => ({ ...found, index }))
    .filter(({ score, index }) => score >= lowest || (answer.kind === "expression" && index === 0));
  const percent = (value, of) => `${(100 * value) / of}%`;
  $("boxes").replaceChildren(
    // The best come last, above the others.
    ...shown.toReversed().map(({ box: [x1, y1, x2, y2], score, target, index }) => {
      const label = element("span", { textContent: `${targets[target]} ${score.toFixed(2)}` });
      const node = element("div", { className: "box" }, label);
      node.setAttribute("role", "listitem");
      node.style.left = percent(x1, width);
      node.style.top = percent(y1, height);
      node.style.width = percent(x2 - x1, width);
      node.style.height = percent(y2 - y1, height);
      node.classList.toggle("high", y1 < 0.07 * height);
      // A label goes where there is more room for it.
      node.classList.toggle("right", x2 > width - x1);
      return tie(node, target, index);
    }),
  );
  const there = new Set(shown.map(({ target }) => target));
  $("sentence").replaceChildren(
    ...pieces.map(({ text, target }) => {
      if (target === null) return text;
      const word = tie(element("mark", { textContent: text, tabIndex: 0 }), target);
      word.classList.toggle("missing", !there.has(target));
      return word;
    }),
  );
  $("list").replaceChildren(
    ...shown.map(({ score, target, index }) =>
      tie(
        element("li", { tabIndex: 0 }, element("i"), element("span", { textContent: targets[target] }),
          element("b", { textContent: score.toFixed(2) })),
        target, index,
      ),
    ),
  );
  const weaker = detections.length - shown.length;
  $("count").textContent =
    `${shown.length} ${shown.length === 1 ? "box" : "boxes"}` + (weaker ? `, ${weaker} weaker` : "");
}

function hint() {
  $("hint").textContent = HINTS[kind()];
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey || kind() !== "classes")) {
      event.preventDefault();
      ask();
    }
  });
  for (const button of document.querySelectorAll("input[name=kind]")) {
    button.addEventListener("change", () => {
      hint();
      const text = example?.texts[kind()];
      if (text) $("text").value = text;
    });
  }
  $("threshold").addEventListener("input", draw);
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    $("file").value = ""; // so that the same file can be chosen again
    if (file) show(file);
  });
  const drop = $("drop");
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) show(file);
    else fail("What was dropped is no file: save the picture first.");
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) show(file);
  });
}

async function start() {
  $("drop").classList.add("empty");
  hint();
  listen();
  try {
    about = await (await fetch("api/about")).json();
  } catch {
    return fail("The server does not answer: does the program still run?");
  }
  $("model").textContent = about.model;
  $("text").maxLength = about.limits.characters;
  $("threshold").value = about.threshold;
  draw();
  if (about.examples.length) $("examples").append("or try");
  $("examples").append(
    ...about.examples.map(({ name }, index) => {
      const image = element("img", { src: `api/examples/${index}`, alt: `Example: ${name}` });
      const button = element("button", { type: "button" }, image);
      button.addEventListener("click", () => showExample(index));
      return button;
    }),
  );
}

start();
