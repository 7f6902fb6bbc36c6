/* Models whose heads and edges are edited by clicks. `model` is what anywidget gives: get, set, on and send. A stored page has get
   alone: it shows everything, and computes nothing. "page" stays unchanged; "edited" holds the edits and what they changed;
   "shown" is the number of the answer that is shown. */
function explore(model, el) {
  const page = model.get("page"), live = typeof model.send === "function";
  const root = make("div", el, { className: "vlattn-explorer" });
  const chosen = { choice: 0, kind: "edge", from: page.groups[0], to: page.groups[page.groups.length - 1], after: true };
  const parts = {};
  let waits = ""; /* for an answer to "edits" or "parts" */

  const edited = () => model.get("edited");
  const shows = () => chosen.after && edited().panes.length > 0; /* the edited models */
  const choiceOf = (pane, after) => (after && edited().panes.length ? edited().panes : page.panes)[pane].choices[chosen.choice];
  const choice = () => page.panes[0].choices[chosen.choice];
  const same = (one, other) => ["layer", "head", "from", "to"].every((key) => one[key] === other[key]);
  const heads = new Map(page.heads);

  function select(parent, label, values, key) {
    const holder = make("label", parent, { textContent: `${label} ` }), list = make("select", holder);
    list.dataset.key = key;
    values.forEach(([value, name]) => make("option", list, { value, textContent: name }));
    list.value = chosen[key];
    list.addEventListener("input", () => { chosen[key] = list.value; show(); });
    return holder;
  }

  function check(parent, label, part) {
    const holder = make("label", parent);
    parts[part] = make("input", holder, { type: "checkbox" });
    holder.append(` ${label}`);
    parts[part].addEventListener("input", show);
    return holder;
  }

  /* --- asking the kernel --- */

  function send(message) {
    if (!live) {
      parts.status.textContent = "This page is stored. Computing an answer again needs a kernel: run va.widget in a notebook.";
      return;
    }
    [waits] = Object.keys(message);
    parts.status.textContent = waits === "edits" ? "Computing the answer again \u2026" : "Computing the parts \u2026";
    model.send(message);
  }

  const ask = (edits) => send({ edits });

  /* Adds the edit, or removes it if it is there. */
  function toggle(edit) {
    if (waits) return;
    const edits = edited().edits;
    ask(edits.some((one) => same(one, edit)) ? edits.filter((one) => !same(one, edit)) : [...edits, edit]);
  }

  function edge(layer, head) {
    return { layer, head, from: chosen.from, to: chosen.to };
  }

  function click(layer, head) {
    const factor = Number(parts.factor.value);
    if (chosen.kind === "parts") waits || send({ parts: edge(layer, head) });
    else if (chosen.kind === "edge") toggle(edge(layer, head));
    else if (head !== null) toggle({ layer, head, factor });
    else toggleAll(layer, factor);
  }

  /* All heads of a layer are scaled, or none of them if all are. */
  function toggleAll(layer, factor) {
    if (waits) return;
    const every = Array.from({ length: heads.get(layer) }, (_, head) => ({ layer, head, factor }));
    const others = edited().edits.filter((one) => !every.some((head) => same(one, head)));
    ask(edited().edits.length - others.length === every.length ? others : [...others, ...every]);
  }

  const named = (edit) => `layer ${edit.layer}, ${edit.head === null ? "all heads" : `head ${edit.head}`}${edit.from === undefined ? ` \u00d7 ${edit.factor}` : `: ${edit.from} \u2192 ${edit.to} cut`}`;

  /* --- panes --- */

  /* A pane's views and words before and after the edits have one scale; with the box, those of all panes. */
  function compared(pane, of) {
    const panes = parts.common.checked ? page.panes.map((_, i) => i) : [pane];
    return panes.flatMap((i) => [of(choiceOf(i, false)), of(choiceOf(i, true))]);
  }

  function showPane(pane, i) {
    const one = choiceOf(i, shows()), view = one.views[""], before = choiceOf(i, false);
    const layout = JSON.stringify(view.figures.map((figure) => [figure.image, figure.maps.map((map) => map.size)]));
    if (pane.layout !== layout) {
      pane.layout = layout;
      pane.figures.replaceChildren();
      pane.canvases = view.figures.map((figure) => frame(pane.figures, figure, page));
    }
    const views = compared(i, (each) => each.views[""]).filter((each) => each.figures.length);
    const [low, high] = rangeOf(views, parts.clip.checked);
    const opacity = opacityFor(view.figures, page, low, high, parts.opacity.value);
    view.figures.forEach((figure, number) => {
      paint(pane.canvases[number], figure, page, low, high, opacity, parts.patches.checked);
      pane.canvases[number].setAttribute("aria-label", `Map of ${page.panes[i].name} for ${one.label}`);
    });
    pane.range.textContent = view.figures.length ? `${rangeText(view, low, high)}, in colours from ${format(low)} to ${format(high)}.` : "";
    pane.score.textContent = shows() ? `${before.scored} \u2192 ${one.scored}` : one.scored;
    const answers = [page.models[page.panes[i].model].answers, shows() ? edited().answers[page.panes[i].model] : []].map((all) => all[one.sample]);
    pane.answer.textContent = answers[0] === undefined ? "" : answers[1] === undefined ? `answer: ${answers[0]}` : `answer: ${answers[0]} \u2192 ${answers[1]}`;
    showWords(pane, i, one);
  }

  function showWords(pane, i, one) {
    const largest = Math.max(...compared(i, (each) => each.words).flat().map(Math.abs), 0) || 1;
    pane.words.replaceChildren();
    /* After the prompt's words come those of the answer, which are choices. */
    const answer = page.panes[i].choices.filter((each) => each.sample === one.sample).map((each) => ({ text: each.label, space: true }));
    [...page.texts[one.sample], ...answer].slice(0, one.words.length).forEach((word, number) => {
      if (word.space) pane.words.append(" ");
      const node = make("span", pane.words, { textContent: word.text, title: format(one.words[number]) });
      node.style.setProperty("--share", Math.abs(one.words[number]) / largest);
      node.classList.toggle("minus", one.words[number] < 0);
    });
  }

  /* --- layers and heads --- */

  function color(value, largest) {
    const share = value === null || !largest ? 0 : Math.abs(value) / largest;
    return `color-mix(in srgb, var(${value < 0 ? "--down" : "--up"}) ${(100 * share).toFixed(1)}%, var(--back))`;
  }

  function showHeads(part, each) {
    const effects = each.effects[page.groups.indexOf(chosen.from)][page.groups.indexOf(chosen.to)];
    const asks = chosen.kind === "parts", cuts = chosen.kind === "edge";
    const numbers = effects.flat().filter((value) => value !== null), largest = Math.max(...numbers.map(Math.abs), 0);
    const none = numbers.length ? "" : `No attention goes from ${chosen.from} to ${chosen.to}. `;
    part.note.textContent = `${none}Colours: first-order effect of the edge ${chosen.from} \u2192 ${chosen.to}${largest ? ` on the score, up to ${format(largest)}` : ""}; red adds to it, blue takes away.`;
    part.cells.forEach((cell) => {
      const { layer, head } = cell, value = head === null ? null : effects[layer][head];
      const edit = cuts || asks ? edge(layer, head) : { layer, head };
      const done = asks ? Boolean(edited().parts) && same(edited().parts, edit) : edited().edits.some((one) => same(one, edit));
      if (head !== null) cell.button.style.background = color(value, largest);
      cell.button.disabled = ((cuts || asks) && !numbers.length) || (asks && head === null);
      cell.button.classList.toggle("edited", done && !asks);
      const what = `layer ${layer}, ${head === null ? "all heads" : `head ${head}`}`;
      cell.button.title = value === null ? what : `${what}: ${format(value)}`;
      cell.button.setAttribute("aria-label", `${asks ? "show parts" : cuts ? "cut the edge" : "scale"}: ${cell.button.title}`);
      cell.button.setAttribute("aria-pressed", done);
    });
  }

  function addHeads(holder) {
    const most = Math.max(...heads.values()), cells = [], table = make("table", make("div", holder, { className: "scroll" }));
    const first = make("tr", make("thead", table)), body = make("tbody", table);
    make("th", first, { textContent: "layer" });
    make("th", first, { textContent: "all" });
    for (let head = 0; head < most; head++) make("th", first, { scope: "col", textContent: head });
    for (const [layer, count] of heads) {
      const line = make("tr", body);
      make("th", line, { scope: "row", textContent: layer });
      for (let head = -1; head < count; head++) {
        const cell = { layer, head: head < 0 ? null : head, button: make("button", make("td", line), { type: "button" }) };
        cell.button.addEventListener("click", () => click(cell.layer, cell.head));
        cells.push(cell);
      }
    }
    return { cells, note: make("p", holder, { className: "note" }) };
  }

  /* --- why a head looks there --- */

  function showParts(holder, number) {
    holder.replaceChildren();
    const asked = edited().parts;
    if (!asked) return;
    make("h4", holder, { textContent: "Why it looks there" });
    make("p", holder, { className: "note", textContent: `What makes layer ${asked.layer}, head ${asked.head} attend from ${asked.to} to ${asked.from}: the strongest parts of its stream, of the unedited model. A positive push adds attention.` });
    const table = make("table", make("div", holder, { className: "scroll" }), { className: "parts" });
    const first = make("tr", make("thead", table)), body = make("tbody", table);
    for (const name of ["part", "push in the keys", "in the queries"]) make("th", first, { scope: "col", textContent: name });
    for (const [name, ...pushes] of asked.models[number][choice().sample]) {
      const line = make("tr", body);
      make("th", line, { scope: "row", textContent: name });
      for (const push of pushes) make("td", line, { textContent: format(push) });
    }
  }

  /* --- the flow from group to group, layer after layer --- */

  function drawn(tag, parent, attributes, text) {
    const node = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag));
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function addFlow(holder, each) {
    const layers = page.heads.map(([layer]) => layer), lane = 46, left = 90, width = Math.max(30, Math.min(90, 600 / layers.length));
    const largest = Math.max(...each.flow.flat(2).map((value) => Math.abs(value || 0)), 0);
    const height = lane * page.groups.length, ribbons = [];
    const svg = drawn("svg", make("div", holder, { className: "scroll" }), { viewBox: `0 0 ${left + width * layers.length + 10} ${height + 26}`, role: "group", "aria-label": "Flow between groups by layer" });
    svg.style.minWidth = `${0.85 * (left + width * layers.length)}px`; /* else the letters are too small */
    page.groups.forEach((group, i) => {
      drawn("line", svg, { x1: left, x2: left + width * layers.length, y1: lane * (i + 0.5), y2: lane * (i + 0.5) });
      drawn("text", svg, { x: left - 8, y: lane * (i + 0.5) + 4, "text-anchor": "end" }, group);
    });
    layers.forEach((layer, column) => {
      drawn("text", svg, { x: left + width * (column + 0.5), y: height + 16, "text-anchor": "middle" }, layer);
      page.groups.forEach((from, a) => page.groups.forEach((to, b) => {
        const value = each.flow[layer][a][b];
        if (!value) return;
        const half = (0.32 * lane * Math.abs(value)) / largest, x = left + width * column, y = [lane * (a + 0.5), lane * (b + 0.5)];
        const side = (sign) => `${x + width / 2},${y[0] + sign * half} ${x + width / 2},${y[1] + sign * half}`;
        const path = drawn("path", svg, {
          d: `M ${x},${y[0] - half} C ${side(-1)} ${x + width},${y[1] - half} L ${x + width},${y[1] + half} C ${x + width / 2},${y[1] + half} ${x + width / 2},${y[0] + half} ${x},${y[0] + half} Z`,
          fill: value < 0 ? "var(--down)" : "var(--up)", tabindex: 0, role: "button",
        });
        const what = `layer ${layer}, ${from} \u2192 ${to}: ${format(value)}`;
        drawn("title", path, {}, what);
        path.setAttribute("aria-label", `cut the edge in all heads: ${what}`);
        const cut = () => toggle({ layer, head: null, from, to });
        path.addEventListener("click", cut);
        path.addEventListener("keydown", (event) => { if (event.key === "Enter") cut(); });
        ribbons.push({ path, edit: { layer, head: null, from, to } });
      }));
    });
    make("p", holder, { className: "note", textContent: `Layer by layer, the sum of the heads' first-order effects; the widest ribbon is ${format(largest)}. A click cuts the edge in all heads of the layer.` });
    return ribbons;
  }

  /* --- the whole --- */

  function show() {
    parts.panes.forEach(showPane);
    parts.models.forEach((part, i) => {
      showHeads(part, page.models[i]);
      showParts(part.why, i);
      for (const { path, edit } of part.ribbons) {
        path.classList.toggle("cut", edited().edits.some((one) => same(one, edit)));
        path.classList.toggle("chosen", edit.from === chosen.from && edit.to === chosen.to);
      }
    });
    parts.factorLabel.hidden = chosen.kind !== "head";
    parts.choices.forEach((button, i) => button.setAttribute("aria-pressed", i === chosen.choice));
    parts.after.forEach((button, i) => button.setAttribute("aria-pressed", Boolean(i) === chosen.after));
    parts.afterBar.hidden = edited().panes.length === 0;
    parts.edits.replaceChildren();
    for (const edit of edited().edits) {
      make("button", parts.edits, { type: "button", textContent: `${named(edit)} \u00d7`, title: "remove this edit" }).addEventListener("click", () => toggle(edit));
    }
    if (edited().edits.length) make("button", parts.edits, { type: "button", textContent: "remove all" }).addEventListener("click", () => waits || ask([]));
  }

  function build() {
    const bar = make("div", root, { className: "bar" });
    const choices = page.panes[0].choices;
    parts.choices = choices.length < 2 ? [] : choices.map((one, i) => {
      const button = make("button", bar, { type: "button", textContent: one.label });
      button.addEventListener("click", () => { chosen.choice = i; show(); });
      return button;
    });
    const look = make("div", root, { className: "bar" }), spatial = page.panes.some((pane) => pane.choices.some((one) => one.views[""].figures.length));
    const opaque = make("label", look, { textContent: "Opacity ", hidden: !spatial || !page.images.length });
    parts.opacity = make("input", opaque, { type: "range", min: 0, max: 100, value: 85 });
    parts.opacity.addEventListener("input", show);
    check(look, "Show patches", "patches").hidden = !spatial || !page.images.length;
    check(look, "Clip the largest 1 %", "clip").hidden = !spatial;
    check(look, "One scale for all maps", "common").hidden = page.panes.length < 2;
    parts.afterBar = make("span", look, { className: "bar" });
    parts.after = ["unedited", "edited"].map((name, i) => {
      const button = make("button", parts.afterBar, { type: "button", textContent: name });
      button.addEventListener("click", () => { chosen.after = Boolean(i); show(); });
      return button;
    });
    const side = make("div", root, { className: "side" });
    parts.panes = page.panes.map((pane) => {
      const holder = make("section", side, { className: "pane" });
      make("h3", holder, { textContent: pane.name });
      const names = { figures: "div", range: "p", score: "p", answer: "p", words: "p" }, classes = { figures: "figures", range: "note", score: "note score", answer: "answer", words: "words" };
      return Object.fromEntries(Object.entries(names).map(([name, tag]) => [name, make(tag, holder, { className: classes[name] })]));
    });
    make("h4", root, { textContent: "Layers and heads" });
    const how = make("div", root, { className: "bar" });
    select(how, "A click", [["edge", "cuts the edge"], ["head", "scales the head"], ["parts", "shows why it looks there"]], "kind");
    for (const key of ["from", "to"]) select(how, key, page.groups.map((group) => [group, group]), key);
    parts.factorLabel = make("label", how, { textContent: "factor " });
    parts.factor = make("input", parts.factorLabel, { type: "number", value: 0, step: 0.5 });
    parts.edits = make("div", root, { className: "edits" });
    parts.status = make("p", root, { className: "status" });
    parts.status.setAttribute("role", "status");
    const below = make("div", root, { className: "side" });
    parts.models = page.models.map((each) => {
      const holder = make("section", below, { className: "pane" });
      if (page.models.length > 1) make("h3", holder, { textContent: each.name });
      const part = { ...addHeads(holder), why: make("div", holder) };
      make("h4", holder, { textContent: "Flow" });
      return { ...part, ribbons: addFlow(holder, each) };
    });
  }

  build();
  show();
  if (!live) return undefined;
  const answered = () => {
    if (waits === "edits") chosen.after = true;
    waits = "";
    parts.status.textContent = edited().problem;
    show();
    model.set("shown", edited().number);
    model.save_changes();
  };
  model.on("change:edited", answered);
  return () => model.off("change:edited", answered);
}
