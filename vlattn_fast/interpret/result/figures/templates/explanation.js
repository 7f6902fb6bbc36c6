"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("[data-choice]")];
const state = { shown: 0, pinned: 0, method: 0, tower: data.towers[0] };

const choices = () => data.methods[state.method].choices;
const viewOf = (choice) => choice.views[state.tower] || choice.views[""];

/* --- the figure --- */

/* The scale of colours: only of the choice, or of all of them. */
function range(choice) {
  return rangeOf((element("common").checked ? choices() : [choice]).map(viewOf).filter((view) => view.figures.length), element("clip").checked);
}

function showFigure(choice) {
  const view = viewOf(choice), [low, high] = range(choice), any = view.figures.length > 0;
  const opacity = opacityFor(view.figures, data, low, high, element("opacity").value);
  const holder = element("figures"), layout = JSON.stringify(view.figures.map((f) => [f.image, f.maps.map((m) => m.size)]));
  if (holder.dataset.layout !== layout) {
    holder.replaceChildren();
    holder.dataset.layout = layout;
    view.figures.forEach((figure) => {
      const canvas = frame(holder, figure, data);
      canvas.addEventListener("pointermove", (event) => tell(canvas, event));
      canvas.addEventListener("pointerleave", () => { element("under").textContent = ""; });
    });
  }
  [...holder.querySelectorAll("canvas")].forEach((canvas, i) => {
    const peak = view.range[0] === view.range[1] ? "the same everywhere" : `strongest at ${strongest([view.figures[i]]).place}`;
    canvas.setAttribute("aria-label", `Relevancy of the ${kindOf(view.figures[i])} to ${choice.label}, ${peak}`);
    paint(canvas, view.figures[i], data, low, high, opacity, element("patches").checked);
  });
  const patches = view.figures.some((figure) => figure.maps.some((map) => map.cells.length > 1));
  element("stage").hidden = !any;
  element("clips").hidden = !patches;
  element("opaque").hidden = !any || data.images.length === 0;
  element("grid").hidden = !patches || data.images.length === 0;
  document.querySelector("main").classList.toggle("wordsonly", !any);
  const shades = shadesOf(data, data.images.length === 0, low, opacity).map(([r, g, b, alpha]) => `rgb(${r} ${g} ${b} / ${alpha / 255})`);
  element("bar").style.background = `linear-gradient(to right, ${shades.join(", ")})`;
  element("low").textContent = any ? format(low) : "";
  element("high").textContent = any ? format(high) : "";
  element("range").textContent = any ? `${rangeText(view, low, high)}.` : "";
}

/* The value of the patch under the pointer. */
function tell(canvas, event) {
  const frame = canvas.getBoundingClientRect(), x = (event.clientX - frame.left) / frame.width, y = (event.clientY - frame.top) / frame.height;
  const figure = viewOf(choices()[state.shown]).figures[[...element("figures").querySelectorAll("canvas")].indexOf(canvas)];
  const map = figure.maps.findLast(({ box: [x1, y1, x2, y2] }) => x >= x1 && x < x2 && y >= y1 && y < y2);
  if (!map) return;
  const [x1, y1, x2, y2] = map.box, u = ((x - x1) / (x2 - x1)) * map.size[1], v = ((y - y1) / (y2 - y1)) * map.size[0];
  const place = map.seconds ? timeAt(map, x) : `patch in row ${Math.floor(v) + 1}, column ${Math.floor(u) + 1}`;
  element("under").textContent = `${place}: ${format(valueAt(map, u, v, false, data.steps))}`;
}

function kindOf(figure) {
  return figure.maps[0].seconds ? "sound" : "image";
}

function strongest(figures) {
  let best = { value: -Infinity, place: "" };
  for (const [name, map] of figures.flatMap((figure) => figure.maps.map((map) => [figure.name, map]))) {
    const [x1, y1, x2, y2] = map.box, index = map.cells.indexOf(Math.max(...map.cells));
    const value = index < 0 ? -Infinity : map.low + (map.cells[index] / data.steps) * (map.high - map.low);
    if (value <= best.value) continue;
    const x = x1 + (x2 - x1) * ((index % map.size[1]) + 0.5) / map.size[1], y = y1 + (y2 - y1) * (Math.floor(index / map.size[1]) + 0.5) / map.size[0];
    if (map.seconds) {
      best = { value, place: timeAt(map, x) };
      continue;
    }
    const third = (share, names) => names[Math.max(0, Math.min(2, Math.floor(3 * share)))];
    const place = `${third(y, ["top", "", "bottom"])} ${third(x, ["left", "", "right"])}`.trim();
    best = { value, place: `the ${place || "centre"}` + (figures.length > 1 ? ` of ${/^t/.test(name) ? "the " : ""}${name}` : "") }; /* the tiles, the thumbnail */
  }
  return best;
}

/* --- words --- */

function showWords(choice) {
  const words = data.texts[choice.sample], all = element("common").checked ? choices() : [choice];
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
  /* After the prompt's values come those of the answer's words, which are buttons. */
  const answer = document.querySelector(".answer") ? buttons.filter((_, i) => choices()[i].sample === choice.sample) : [];
  answer.forEach((button, i) => shade(button, choice.words[words.length + i] || 0));
  const names = [...words.map((word) => word.text), ...answer.map((button) => button.textContent)].slice(0, choice.words.length);
  const numbers = choice.words.filter((value) => value !== null);
  const least = Math.min(...numbers), most = Math.max(...numbers), colours = `, in colours from ${format(least < 0 ? -largest : 0)} to ${format(largest)}`;
  element("spread").textContent = numbers.length ? least || most ? `${spanText(least, most)}${colours}.` : "It rests on no other word." : "";
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
  const left = !atPosition ? "" : `. Left out: ${format(atPosition)}, which the explained position gives itself`;
  element("counted").textContent = text + left + ".";
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
  showFigure(choice);
  const words = showWords(choice).slice(0, 3).filter((word) => word.value > 0);
  showTokens(choice);
  const figures = viewOf(choice).figures, best = strongest(figures);
  /* Words may run from right to left; isolated, they leave each number next to its word. */
  const isolated = (text) => Object.assign(document.createElement("bdi"), { textContent: text });
  const parts = ["\u201c", isolated(choice.label), "\u201d"];
  if (choice.score !== null) parts.push(`, ${choice.scored}`);
  const [least, most] = viewOf(choice).range;
  if (figures.length) {
    const kind = kindOf(figures[0]).replace(/^./, (letter) => letter.toUpperCase());
    parts.push(`. ${kind}: `, least === most ? `${format(most)} everywhere` : `strongest at ${best.place} (${format(best.value)})`);
  }
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
for (const id of ["opacity", "common", "clip", "patches"]) element(id).addEventListener("input", () => show(state.shown));
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
