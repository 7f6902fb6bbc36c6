"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("[data-choice]")];
const state = { shown: 0, pinned: 0, method: 0, tower: data.towers[0] };
const palettes = [data.colors, data.signed].map((colors) => colors.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16))));

const choices = () => data.methods[state.method].choices;
const viewOf = (choice) => choice.views[state.tower] || choice.views[""];

function format(value) {
  if (value === null) return "not a number";
  const small = value !== 0 && Math.abs(value) < 1e-3;
  return (small ? value.toExponential(2) : String(Number(value.toPrecision(3)))).replaceAll("-", "\u2212");
}

function make(tag, parent, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

/* --- the picture --- */

/* The scale of colours: of the choice alone, or of all of them. It begins at 0, or as far below 0 as it ends above. */
function range(choice) {
  const views = (element("common").checked ? choices() : [choice]).map(viewOf).filter((view) => view.figures.length);
  const low = Math.min(...views.map((view) => view.low)), high = Math.max(...views.map((view) => view.high));
  return [low < 0 ? -high : low, high];
}

/* A map's value at column u and row v, counted in cells from its corner. */
function valueAt(map, u, v, smooth) {
  const [rows, columns] = map.size;
  const cell = (y, x) => map.cells[Math.min(Math.max(y, 0), rows - 1) * columns + Math.min(Math.max(x, 0), columns - 1)];
  let value = cell(Math.floor(v), Math.floor(u));
  if (smooth && value !== null) {
    const x = Math.floor(u - 0.5), y = Math.floor(v - 0.5), right = u - 0.5 - x, down = v - 0.5 - y;
    value = (1 - down) * ((1 - right) * cell(y, x) + right * cell(y, x + 1)) + down * ((1 - right) * cell(y + 1, x) + right * cell(y + 1, x + 1));
  }
  return value === null ? null : map.low + (value / data.steps) * (map.high - map.low);
}

/* Red, green, blue and alpha by share of a scale that begins at low. Over a photo, what is near 0 is transparent. */
function shadesOf(bare, low) {
  const opacity = bare ? 255 : 2.55 * element("opacity").value, palette = palettes[low < 0 ? 1 : 0], last = palette.length - 1;
  const strength = (i) => (low < 0 ? Math.abs((2 * i) / last - 1) : i / last);
  return palette.map((color, i) => [...color, opacity * (bare ? 1 : Math.min(1, 1.5 * strength(i)) ** 1.5)]);
}

function paint(canvas, figure, low, high) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const { width, height } = canvas, bare = figure.picture === null;
  const smooth = !bare && !element("patches").checked;
  const shades = shadesOf(bare, low);
  context.clearRect(0, 0, width, height);
  for (const map of figure.maps) {
    const [x1, y1, x2, y2] = map.box, [rows, columns] = map.size;
    const left = Math.max(0, Math.round(x1 * width)), right = Math.min(width, Math.round(x2 * width));
    const top = Math.max(0, Math.round(y1 * height)), bottom = Math.min(height, Math.round(y2 * height));
    if (right <= left || bottom <= top) continue;
    const pixels = context.createImageData(right - left, bottom - top);
    for (let y = top, at = 0; y < bottom; y++) {
      const v = (((y + 0.5) / height - y1) / (y2 - y1)) * rows;
      for (let x = left; x < right; x++, at += 4) {
        const value = valueAt(map, (((x + 0.5) / width - x1) / (x2 - x1)) * columns, v, smooth);
        if (value === null) continue; /* not a number: nothing is drawn */
        const share = high > low ? (value - low) / (high - low) : 0;
        const [red, green, blue, alpha] = shades[Math.round(255 * Math.max(0, Math.min(1, share)))];
        pixels.data[at] = red;
        pixels.data[at + 1] = green;
        pixels.data[at + 2] = blue;
        pixels.data[at + 3] = alpha;
      }
    }
    context.putImageData(pixels, left, top);
    const whole = right - left === width && bottom - top === height; /* else its frame is worth seeing */
    context.strokeStyle = rows * columns === 1 ? "#0008" : "#fffa";
    context.setLineDash(rows * columns === 1 ? [] : [6, 5]);
    if (!whole) context.strokeRect(left + 0.5, top + 0.5, right - left - 1, bottom - top - 1);
  }
}

function showPicture(choice) {
  const view = viewOf(choice), [low, high] = range(choice), any = view.figures.length > 0;
  const holder = element("figures"), layout = JSON.stringify(view.figures.map((f) => [f.picture, f.maps.map((m) => m.size)]));
  if (holder.dataset.layout !== layout) {
    holder.replaceChildren();
    holder.dataset.layout = layout;
    view.figures.forEach((figure, i) => {
      const picture = data.pictures[figure.picture], [rows, columns] = figure.maps[0].size;
      const box = make("figure", holder, { className: picture ? (picture.width < 300 ? "tiny" : "") : "bare" });
      if (picture) make("img", box, { src: picture.source, alt: "" });
      const canvas = make("canvas", box, { width: picture ? Math.max(360, Math.min(720, picture.width)) : 360 });
      canvas.height = Math.max(1, Math.round((canvas.width * (picture ? picture.height / picture.width : rows / columns))));
      canvas.setAttribute("role", "img");
      canvas.addEventListener("pointermove", (event) => tell(canvas, event));
      canvas.addEventListener("pointerleave", () => { element("under").textContent = ""; });
      if (view.figures.length > 1) make("figcaption", box, { textContent: `map ${i + 1} of ${view.figures.length}` });
    });
  }
  [...holder.querySelectorAll("canvas")].forEach((canvas, i) => {
    canvas.setAttribute("aria-label", `Relevancy of the picture to ${choice.label}, strongest at the ${strongest([view.figures[i]]).place}`);
    paint(canvas, view.figures[i], low, high);
  });
  const patches = view.figures.some((figure) => figure.maps.some((map) => map.cells.length > 1));
  element("stage").hidden = !any;
  element("opaque").hidden = !any || data.pictures.length === 0;
  element("grid").hidden = !patches || data.pictures.length === 0;
  document.querySelector("main").classList.toggle("wordsonly", !any);
  const shades = shadesOf(data.pictures.length === 0, low).map(([r, g, b, alpha]) => `rgb(${r} ${g} ${b} / ${alpha / 255})`);
  element("bar").style.background = `linear-gradient(to right, ${shades.join(", ")})`;
  element("low").textContent = any ? format(low) : "";
  element("high").textContent = any ? format(high) : "";
  element("range").textContent = any ? `Values from ${format(view.range[0])} to ${format(view.range[1])}.` : "";
}

/* The value of the patch under the pointer. */
function tell(canvas, event) {
  const frame = canvas.getBoundingClientRect(), x = (event.clientX - frame.left) / frame.width, y = (event.clientY - frame.top) / frame.height;
  const figure = viewOf(choices()[state.shown]).figures[[...element("figures").querySelectorAll("canvas")].indexOf(canvas)];
  const map = figure.maps.findLast(({ box: [x1, y1, x2, y2] }) => x >= x1 && x < x2 && y >= y1 && y < y2);
  if (!map) return;
  const [x1, y1, x2, y2] = map.box, u = ((x - x1) / (x2 - x1)) * map.size[1], v = ((y - y1) / (y2 - y1)) * map.size[0];
  element("under").textContent = `patch in row ${Math.floor(v) + 1}, column ${Math.floor(u) + 1}: ${format(valueAt(map, u, v, false))}`;
}

function strongest(figures) {
  let best = { value: -Infinity, place: "" };
  for (const [number, map] of figures.flatMap((figure, i) => figure.maps.map((map) => [i + 1, map]))) {
    const [x1, y1, x2, y2] = map.box, index = map.cells.indexOf(Math.max(...map.cells));
    const value = index < 0 ? -Infinity : map.low + (map.cells[index] / data.steps) * (map.high - map.low);
    if (value <= best.value) continue;
    const x = x1 + (x2 - x1) * ((index % map.size[1]) + 0.5) / map.size[1], y = y1 + (y2 - y1) * (Math.floor(index / map.size[1]) + 0.5) / map.size[0];
    const third = (share, names) => names[Math.max(0, Math.min(2, Math.floor(3 * share)))];
    const place = `${third(y, ["top", "", "bottom"])} ${third(x, ["left", "", "right"])}`.trim();
    best = { value, place: (place || "centre") + (figures.length > 1 ? ` of map ${number}` : "") };
  }
  return best;
}

/* --- words --- */

function showWords(choice) {
  const words = data.texts[choice.row], all = element("common").checked ? choices() : [choice];
  const largest = Math.max(...all.flatMap((one) => one.words.map(Math.abs)), 0) || 1;
  const shade = (node, value) => {
    node.style.setProperty("--share", Math.abs(value) / largest);
    node.classList.toggle("minus", value < 0);
    node.title = format(value);
  };
  element("prompt").hidden = words.length === 0;
  element("text").replaceChildren();
  words.forEach((word, i) => {
    if (word.space) element("text").append(" ");
    shade(make("span", element("text"), { className: "word", textContent: word.text }), choice.words[i]);
  });
  /* Behind the prompt's values stand those of the answer's words, which are buttons. */
  const answer = document.querySelector(".answer") ? buttons.filter((_, i) => choices()[i].row === choice.row) : [];
  answer.forEach((button, i) => shade(button, choice.words[words.length + i] || 0));
  const names = [...words.map((word) => word.text), ...answer.map((button) => button.textContent)].slice(0, choice.words.length);
  const numbers = choice.words.filter((value) => value !== null);
  element("spread").textContent = numbers.length ? `Values from ${format(Math.min(...numbers))} to ${format(Math.max(...numbers))}, in colours from ${format(Math.min(...numbers) < 0 ? -largest : 0)} to ${format(largest)}.` : "";
  element("values").hidden = names.length === 0;
  element("table").replaceChildren();
  names.forEach((name, i) => {
    const line = make("tr", element("table"));
    make("th", line, { scope: "row", textContent: name });
    make("td", line, { textContent: format(choice.words[i]) });
  });
  return names.map((name, i) => ({ name, value: choice.words[i] })).sort((a, b) => b.value - a.value);
}

function showTokens(choice) {
  const row = choice.rows[state.tower], atPosition = choice.at_position[state.tower], canvas = element("row"), context = canvas.getContext("2d");
  const top = Math.max(0, row.high), bottom = Math.min(0, row.low), step = canvas.width / row.cells.length;
  const heightOf = (value) => (canvas.height * (top - value)) / (top - bottom || 1), base = heightOf(0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
  row.cells.forEach((cell, i) => {
    const y = heightOf(row.low + (cell / data.steps) * (row.high - row.low));
    if (cell !== null) context.fillRect(i * step, Math.min(y, base), Math.max(step * 0.85, 0.5), Math.abs(base - y));
  });
  const text = `${row.cells.length} tokens of "${state.tower}", special ones included: ${format(row.low)} to ${format(row.high)}`;
  const kept = !atPosition ? "" : `. What is read keeps ${format(atPosition)} for itself, left out here`;
  element("counted").textContent = text + kept + ".";
  canvas.setAttribute("aria-label", text);
  const reads = Object.values(choice.at_position)[0];
  element("at-position").textContent = document.querySelector(".answer") && reads ? `Left out: ${format(reads)}, which the position that predicts the word gives itself.` : "";
}

/* --- choosing --- */

function show(index) {
  const choice = choices()[index];
  if (!choice) return;
  state.shown = index;
  buttons.forEach((button, i) => {
    button.classList.toggle("shown", i === index);
    button.setAttribute("aria-checked", i === index);
    button.tabIndex = i === state.pinned ? 0 : -1;
  });
  showPicture(choice);
  const words = showWords(choice).slice(0, 3).filter((word) => word.value > 0);
  showTokens(choice);
  const figures = viewOf(choice).figures, best = strongest(figures);
  /* Words may run from right to left; isolated, they leave each number beside its word. */
  const isolated = (text) => Object.assign(document.createElement("bdi"), { textContent: text });
  const parts = ["\u201c", isolated(choice.label), "\u201d"];
  if (choice.score !== null) parts.push(`, ${choice.scored}`);
  const [least, most] = viewOf(choice).range;
  if (figures.length) parts.push(least === most ? `. Picture: ${format(most)} everywhere` : `. Picture: strongest at the ${best.place} (${format(best.value)})`);
  words.forEach((word, i) => parts.push(i ? ", " : ". Words: ", isolated(word.name), ` ${format(word.value)}`));
  element("summary").replaceChildren(...parts, ".");
}

function pin(index) {
  state.pinned = index;
  show(index);
}

buttons.forEach((button, i) => {
  button.addEventListener("mouseenter", () => show(i));
  button.addEventListener("focus", () => pin(i));
  button.addEventListener("click", () => pin(i));
  button.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    buttons[(i + step + buttons.length) % buttons.length].focus();
  });
});
document.querySelectorAll("[role=radiogroup]").forEach((group) => group.addEventListener("mouseleave", () => show(state.pinned)));
for (const id of ["opacity", "common", "patches"]) element(id).addEventListener("input", () => show(state.shown));
for (const [id, names] of [["method", data.methods.map((method) => method.name)], ["tower", data.towers]]) {
  names.forEach((name, i) => make("option", element(id), { textContent: name, value: id === "method" ? i : name }));
  element(id).parentElement.hidden = names.length < 2;
  element(id).addEventListener("input", () => {
    state[id] = id === "method" ? Number(element(id).value) : element(id).value;
    show(state.shown);
  });
}
if (Object.keys((choices()[0] || { views: {} }).views).length < 2) element("counted").before(element("tower").parentElement);
element("tokens").open = choices().length > 0 && !viewOf(choices()[0]).figures.length && !choices()[0].words.length;
show(0);
