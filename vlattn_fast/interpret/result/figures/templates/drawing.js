/* Drawing that several pages share. `data` has their colours and the steps of stored values. */

function format(value) {
  if (value === null) return "not a number";
  const small = value !== 0 && Math.abs(value) < 1e-3;
  return (small ? value.toExponential(2) : String(Number(value.toPrecision(3)))).replaceAll("-", "\u2212");
}

function make(tag, parent, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

/* The ends of one scale for views: from 0, or as far below 0 as it ends above, to the largest value; or where it clips. */
function rangeOf(views, clips) {
  const low = Math.min(...views.map((view) => view.low)), high = Math.max(...views.map((view) => (clips ? view.clip : view.high)));
  return [low < 0 ? -high : low, high];
}

/* The range of a view's values, and where the scale clips them. */
function rangeText(view, low, high) {
  const [least, most] = view.range, cut = Math.max(most, -least) > high ? `, clipped at ${least < 0 ? "\u00b1" : ""}${format(high)}` : "";
  return spanText(least, most) + cut;
}

function spanText(least, most) {
  return least === most ? `${format(most)} everywhere` : `Values from ${format(least)} to ${format(most)}`;
}

/* A map's value at column u and row v, counted in cells from its corner. */
function valueAt(map, u, v, smooth, steps) {
  const [rows, columns] = map.size;
  const cell = (y, x) => map.cells[Math.min(Math.max(y, 0), rows - 1) * columns + Math.min(Math.max(x, 0), columns - 1)];
  let value = cell(Math.floor(v), Math.floor(u));
  if (smooth && value !== null) {
    const x = Math.floor(u - 0.5), y = Math.floor(v - 0.5), right = u - 0.5 - x, down = v - 0.5 - y;
    value = (1 - down) * ((1 - right) * cell(y, x) + right * cell(y, x + 1)) + down * ((1 - right) * cell(y + 1, x) + right * cell(y + 1, x + 1));
  }
  return value === null ? null : map.low + (value / steps) * (map.high - map.low);
}

/* Red, green, blue and alpha by share of a scale that begins at low. Over a photo, what is near 0 is transparent; opacity is in
   percent. */
function shadesOf(data, bare, low, opacity) {
  const palette = (low < 0 ? data.signed : data.colors).map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const most = bare ? 255 : 2.55 * opacity, last = palette.length - 1;
  const strength = (i) => (low < 0 ? Math.abs((2 * i) / last - 1) : i / last);
  return palette.map((color, i) => [...color, most * (bare ? 1 : Math.min(1, 1.5 * strength(i)) ** 1.5)]);
}

/* An opacity for figures on a scale from low to high: less if nine tenths of their maps are strong, so that the photo stays visible. */
function opacityFor(figures, data, low, high, opacity) {
  const values = figures.flatMap((figure) => figure.maps.flatMap((map) => map.cells.filter((cell) => cell !== null).map((cell) => map.low + (cell / data.steps) * (map.high - map.low))));
  const end = Math.max(high, -low), strengths = values.map((value) => Math.min(1, Math.abs(value) / end)).sort((one, other) => one - other);
  return end > 0 && strengths.length ? opacity * (1 - strengths[Math.floor(0.1 * (strengths.length - 1))] / 2) : opacity;
}

/* The seconds of a sound's strip at a share of its width. */
function timeAt(map, share) {
  return `${(share * map.seconds).toFixed(2)} s`;
}

/* A figure with its photo and its name, if it has them, and a canvas for its maps. */
function frame(holder, figure, data) {
  const image = data.images[figure.image], [rows, columns] = figure.maps[0].size, sound = figure.maps[0].seconds;
  const box = make("figure", holder, { className: image ? (image.width < 300 ? "tiny" : "") : sound ? "" : "bare" });
  if (image) make("img", box, { src: image.source, alt: "" });
  const canvas = make("canvas", box, { width: image ? Math.max(360, Math.min(720, image.width)) : sound ? 720 : 360 });
  canvas.height = Math.max(1, Math.round(canvas.width * (image ? image.height / image.width : sound ? 0.12 : rows / columns)));
  if (sound) make("figcaption", box, { className: "strip", textContent: `0 to ${timeAt(figure.maps[0], 1)}` });
  canvas.setAttribute("role", "img");
  if (figure.name) make("figcaption", box, { textContent: figure.name });
  return canvas;
}

/* Draws the maps of a figure on a scale from low to high; cells instead of a smooth map if there is no photo under it. */
function paint(canvas, figure, data, low, high, opacity, patches) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const { width, height } = canvas, bare = figure.image === null;
  const smooth = !bare && !patches, shades = shadesOf(data, bare, low, opacity);
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
        const value = valueAt(map, (((x + 0.5) / width - x1) / (x2 - x1)) * columns, v, smooth, data.steps);
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
    if (whole) continue;
    for (const [color, dashes] of [["#0008", []], ["#fffc", [6, 5]]].slice(0, rows * columns === 1 ? 1 : 2)) { /* shows on any photo */
      context.strokeStyle = color;
      context.setLineDash(dashes);
      context.strokeRect(left + 0.5, top + 0.5, right - left - 1, bottom - top - 1);
    }
  }
}
