"use strict";
// A picture is sent again whenever it is asked about: the server keeps nothing of it.

const WAIT = 400; // ms after the last key before names are checked
const SCORE = 0, EXPLAIN = 1; // all pictures are scored before one is explained
const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis at five points
const at = id => document.getElementById(id);
const queue = [];
let about, runs = [], pictures = [], working = false;

function make(tag, more, ...inside) {
  const element = Object.assign(document.createElement(tag), more);
  element.append(...inside);
  return element;
}

async function ask(what, question) {
  const told = question && {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(question),
  };
  const response = await fetch(what, told).catch(() => {
    throw new Error("no answer: is vlprompt app still running?");
  });
  if (response.status === 413) throw new Error("that is too large");
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error), {status: response.status});
  return answer;
}

// One question at a time; what an edit or another click has overtaken is left out.
async function later(rank, still, work) {
  queue.push({rank, still, work});
  if (working) return;
  working = true;
  while (queue.length) {
    queue.sort((a, b) => a.rank - b.rank);
    const next = queue.shift();
    if (next.still()) await next.work();
  }
  working = false;
}

// --- class names ---

const lines = names => names.join("\n");

function edit(run, names) {
  const before = lines(run.names), others = runs.filter(other => other.takes_new_classes && lines(other.names) === before);
  for (const each of new Set([run, ...others])) {
    each.names = names;
    if (document.activeElement !== each.text) each.text.value = lines(names);
    check(each);
  }
}

async function check(run) {
  const edition = ++run.edition, current = () => edition === run.edition;
  run.count.textContent = `${run.names.length} class names`;
  run.error.textContent = run.note.textContent = "";
  for (const picture of pictures) picture.panels[run.index].box.classList.add("waiting");
  await later(SCORE, current, async () => {
    try {
      const answer = await ask("names", {run: run.index, class_names: run.names});
      if (!current()) return;
      const none = run.tells_none && !answer.own ? "Of other classes than its own it does not tell “none of these”. " : "";
      run.note.textContent = none + (answer.note || "");
      for (const picture of pictures) score(picture, run);
    } catch (error) {
      if (current()) run.error.textContent = error.message;
    }
  });
}

function head(run) {
  const calibrated = run.calibrated ? "calibrated" : "not calibrated: vlprompt calibrate RUN DATA does it";
  const none = run.calibrated && !run.tells_none ? ", without a threshold for “none of these”" : "";
  const others = runs.length > 1 ? "; runs with the same names change together" : "";
  const names = run.takes_new_classes ? `one a line${others}` : `one a line; ${run.method} knows its own classes alone`;
  let timer;
  Object.assign(run, {
    names: run.class_names, edition: 0, count: make("span"), error: make("p", {role: "alert"}),
    note: make("p", {className: "note"}), text: make("textarea", {value: lines(run.class_names), spellcheck: false}),
  });
  run.count.textContent = `${run.names.length} class names`;
  run.text.setAttribute("aria-label", `Class names of ${run.name}`);
  run.text.oninput = () => {
    clearTimeout(timer);
    timer = setTimeout(() => edit(run, run.text.value.trimEnd().split("\n")), WAIT);
  };
  const reset = make("button", {className: "reset", textContent: "back to those it was tuned on"});
  reset.onclick = () => edit(run, run.class_names);
  return make("div", {}, make("h2", {textContent: run.name}),
    make("p", {className: "note", textContent: `${run.method} on ${run.backbone}; ${calibrated}${none}`}),
    make("details", {}, make("summary", {}, run.count), make("small", {textContent: names}), run.text, reset),
    run.note, run.error);
}

// --- pictures ---

async function add(files) {
  at("error").textContent = files.length ? "" : "that was no file";
  for (const file of files) {
    if (file.size > about.most_bytes) {
      at("error").textContent = `${file.name}: ${(file.size / 2 ** 20).toFixed(1)} MB (allowed: ${about.most_bytes >> 20} MB)`;
      continue;
    }
    const image = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result.split(",")[1] || "");
      reader.onerror = failed;
      reader.readAsDataURL(file);
    }).catch(() => null);
    if (image === null) at("error").textContent = `${file.name} cannot be read`; // a folder
    else show({file: file.name, image});
  }
}

function show(picture) {
  const close = make("button", {className: "close", textContent: "✕", title: "Remove"});
  close.onclick = () => remove(picture);
  picture.panels = runs.map(panel);
  picture.box = make("article", {className: "picture"}, make("h2", {}, picture.file, close),
    make("div", {className: "panels"}, ...picture.panels.map(each => each.box)));
  pictures.unshift(picture);
  at("pictures").prepend(picture.box);
  for (const run of runs) score(picture, run);
}

function remove(picture) {
  pictures = pictures.filter(other => other !== picture);
  picture.box.remove();
}

function panel(run) {
  const made = {
    image: make("img", {alt: "what the model sees"}), heat: make("canvas"), caption: make("figcaption", {className: "note"}),
    said: make("div", {className: "said"}), error: make("p", {role: "alert"}), asked: 0,
  };
  const figure = make("figure", {}, make("div", {className: "view"}, made.image, made.heat), made.caption);
  const name = runs.length > 1 ? [make("div", {className: "note"}, run.name)] : [];
  made.box = make("section", {className: "panel waiting"}, ...name, figure, made.said);
  return made;
}

function score(picture, run) {
  const shown = picture.panels[run.index], edition = run.edition;
  const current = () => edition === run.edition && pictures.includes(picture);
  later(SCORE, current, async () => {
    try {
      const answer = await ask("predict", {
        run: run.index, class_names: run.names, file: picture.file, image: picture.image,
      });
      if (!current()) return;
      shown.image.src = answer.view;
      bars(picture, run, answer);
      explain(picture, run, answer.top[0].index);
    } catch (error) {
      if (!current()) return;
      if (error.status === 415) { // no picture, whatever the run
        remove(picture);
        at("error").textContent = error.message;
        return;
      }
      shown.error.textContent = error.message;
      shown.said.replaceChildren(shown.error);
    }
    shown.box.classList.remove("waiting");
  });
}

function bars(picture, run, answer) {
  const shown = picture.panels[run.index], typing = shown.said.contains(document.activeElement) && document.activeElement;
  const rows = answer.top.map(of => {
    const name = make("input", {value: of.class, title: "Another name is scored at once", spellcheck: false});
    name.dataset.index = of.index;
    name.setAttribute("aria-label", "Class name");
    name.onchange = () => edit(run, run.names.with(of.index, name.value.trim()));
    name.onkeydown = event => event.key === "Enter" && name.blur();
    if (typing && typing.dataset.index === name.dataset.index) name.value = typing.value;
    const spread = of.spread === undefined ? "" : ` ± ${(100 * of.spread).toFixed(1)}`;
    const why = make("button", {
      className: "why", textContent: `${(100 * of.probability).toFixed(1)}${spread} %`, title: `What speaks for ${of.class}`,
    });
    why.dataset.index = of.index;
    why.onclick = () => explain(picture, run, of.index);
    const fill = make("div");
    fill.style.width = `${100 * of.probability}%`;
    return make("div", {className: "bar"}, name, why, make("div", {className: "track"}, fill));
  });
  const none = answer.none_of_these ? [make("p", {}, make("span", {className: "none", textContent: "none of these"}))] : [];
  shown.said.className = answer.none_of_these ? "said unsure" : "said";
  shown.error.textContent = "";
  shown.said.replaceChildren(...none, ...rows, shown.error);
  if (typing) shown.said.querySelector(`input[data-index="${typing.dataset.index}"]`)?.focus();
}

// --- explanations ---

function explain(picture, run, index) {
  const shown = picture.panels[run.index], edition = run.edition, asked = ++shown.asked;
  const current = () => edition === run.edition && asked === shown.asked && pictures.includes(picture);
  for (const why of shown.said.querySelectorAll(".why")) why.ariaPressed = why.dataset.index === String(index);
  shown.caption.textContent = "…";
  later(EXPLAIN, current, async () => {
    try {
      const answer = await ask("explain", {
        run: run.index, class_names: run.names, file: picture.file, image: picture.image, class_index: index,
      });
      if (!current()) return;
      paint(shown.heat, answer.map);
      shown.caption.textContent = `what speaks for ${answer.class}`;
    } catch (error) {
      if (!current()) return;
      shown.heat.width = 0;
      shown.caption.textContent = error.message;
    }
  });
}

// One pixel a patch, from 0 to 1; the browser makes it as large as the picture.
function paint(canvas, map) {
  canvas.width = map[0].length;
  canvas.height = map.length;
  const pen = canvas.getContext("2d"), image = pen.createImageData(canvas.width, canvas.height);
  map.flat().forEach((value, i) => {
    const place = value * (COLOURS.length - 1), low = Math.min(Math.floor(place), COLOURS.length - 2);
    COLOURS[low].forEach((c, channel) => {
      image.data[4 * i + channel] = c + (place - low) * (COLOURS[low + 1][channel] - c);
    });
    image.data[4 * i + 3] = 80 + 175 * value; // where little speaks for the class, the picture shows
  });
  pen.putImageData(image, 0, 0);
}

// --- start ---

function strength() {
  document.body.style.setProperty("--overlay", at("overlay").value / 100);
}

async function start() {
  at("overlay").oninput = strength;
  strength();
  try {
    about = await ask("runs");
  } catch (error) {
    at("error").textContent = error.message;
    return;
  }
  runs = about.runs.map((run, index) => ({...run, index}));
  document.title = `${runs.map(run => run.name).join(", ")} – vlprompt`;
  at("most").textContent = about.most_bytes >> 20;
  at("runs").append(...runs.map(head));
  at("files").onchange = event => {
    add([...event.target.files]);
    event.target.value = ""; // so that the same file can be chosen again
  };
  document.onpaste = event => event.clipboardData.files.length && add([...event.clipboardData.files]);
  document.ondragover = event => {
    event.preventDefault();
    document.body.classList.add("over");
  };
  document.ondragleave = () => document.body.classList.remove("over");
  document.ondrop = event => {
    event.preventDefault();
    document.body.classList.remove("over");
    add([...event.dataTransfer.files]);
  };
}

start();
