"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");

  // ---- Building. Strings only ever become text nodes, so what a policy wrote can not become markup.

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  }
  const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const picture = (index, alt) => h("img", { src: data.images[index], alt, loading: "lazy" });

  // ---- Figures

  function percent(share) {
    const value = 100 * share;
    const whole = (value >= 5 && value <= 95) || value === 0 || value === 100;
    return `${value.toFixed(whole ? 0 : 1)}\u2009%`;
  }
  function plain(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    if (size < 0.001) return value.toExponential(1).replace(".0e", "e").replace("e", "\u2009e").replace("-", "\u2212");
    return String(Number(value.toPrecision(3))).replace("-", "\u2212");
  }
  const figure = (value, share) => (value === null || value === undefined ? "\u2013" : share ? percent(value) : plain(value));

  // Where a share stood (ring) and stands (dot), between 0 and 100 %.
  function dumbbell(before, after, tone) {
    const at = (share) => `${1 + 98 * Math.min(1, Math.max(0, share))}%`;
    return s("svg", { height: 14, class: `tone-${tone}`, "aria-hidden": "true" },
      s("line", { x1: "0%", x2: "100%", y1: 7, y2: 7, class: "grid" }),
      s("line", { x1: at(before), x2: at(after), y1: 7, y2: 7, "stroke-width": 2 }),
      s("circle", { cx: at(before), cy: 7, r: 4, class: "hollow" }),
      s("circle", { cx: at(after), cy: 7, r: 5, class: "filled" }));
  }

  // ---- Headline

  function headline() {
    const tiles = data.tiles.map((tile) =>
      h("div", { class: "tile" },
        h("h3", {}, tile.label),
        tile.note ? h("p", { class: "note" }, tile.note) : null,
        h("div", { class: "values" },
          h("span", { class: "before" }, figure(tile.before, tile.share)),
          h("span", { class: "arrow" }, "\u2192"),
          h("span", { class: "after" }, figure(tile.after, tile.share))),
        tile.share ? dumbbell(tile.before, tile.after, tile.tone) : null));
    return [
      h("h1", {}, data.title),
      data.lede ? h("p", { class: "lede" }, data.lede) : null,
      tiles.length ? h("div", { class: "tiles" }, tiles) : null,
      tiles.length ? h("p", { class: "sides" }, `${data.sides[0]} \u2192 ${data.sides[1]}`) : null,
      data.facts.length
        ? h("dl", { class: "facts" }, data.facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))))
        : null,
    ];
  }

  // ---- Evaluation tables

  function evaluation() {
    if (!data.table.length) return [];
    const [before, after] = data.sides;
    const cell = ({ value, bounds }, share) =>
      h("td", {}, figure(value, share), bounds ? h("small", {}, `${(100 * bounds[0]).toFixed(0)}\u2013${(100 * bounds[1]).toFixed(0)}`) : null);
    const rows = data.table.map((row) =>
      h("tr", {},
        h("th", { scope: "row", class: row.indent ? "indent" : null }, row.name),
        row.cells.map((each) => cell(each, row.share)),
        h("td", { class: "mark" }, row.share ? dumbbell(row.cells[0].value, row.cells[1].value, row.tone) : null)));
    const counts = data.table[0].cells.map((each) => each.count);
    const main = h("table", {},
      h("caption", {}, `${counts[1] ? `${counts[1].toLocaleString("en")} rollouts` : "Rollouts"} on held-out prompts. Small: the 95 % interval of a share.`),
      h("thead", {}, h("tr", {}, ["", before, after, "from 0 to 100 %"].map((name, i) =>
        h("th", { scope: "col", class: i === 3 ? "mark" : null }, name)))),
      h("tbody", {}, rows));
    const paths = data.paths.map((row) =>
      h("tr", {},
        h("th", { scope: "row" }, `${row.kind}, ${row.called ? "called" : "direct"}`),
        row.cells.map(({ count, right }) =>
          h("td", {}, count ? percent(right / count) : "\u2013", h("small", {}, `of ${count}`)))));
    const side = h("table", {},
      h("caption", {}, "Right answers by how they were reached."),
      h("thead", {}, h("tr", {}, ["", before, after].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, paths));
    return [h("h2", {}, "Before and after, held out"), h("div", { class: "tables" }, main, paths.length ? side : null)];
  }

  // ---- Charts

  let areas = 0;

  function niceTicks(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
    return ticks;
  }

  // 1, 2 and 5 of every power of ten between 10^low and 10^high; 1 alone where those are many.
  function decades(low, high) {
    const ticks = [];
    for (let power = Math.floor(low); power <= high; power++) {
      for (const factor of high - low > 2 ? [1] : [1, 2, 5]) ticks.push(Number(`${factor}e${power}`));
    }
    return ticks.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
  }

  // Shifts labels apart, as little as it takes; gives their heights in the order of `heights`.
  function spread(heights, gap, low, high) {
    const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b]);
    const placed = order.map((i) => heights[i]);
    for (let round = 0; round < 50; round++) {
      for (let i = 1; i < placed.length; i++) {
        const overlap = gap - (placed[i] - placed[i - 1]);
        if (overlap > 0) {
          placed[i - 1] -= overlap / 2;
          placed[i] += overlap / 2;
        }
      }
      placed.forEach((y, i) => { placed[i] = Math.min(high, Math.max(low, y)); });
    }
    const result = [];
    order.forEach((i, rank) => { result[i] = placed[rank]; });
    return result;
  }

  // The values without the lowest and the highest share of them.
  function within(values, share) {
    const sorted = [...values].sort((a, b) => a - b);
    const cut = Math.floor(share * sorted.length);
    return sorted.slice(cut, sorted.length - cut);
  }

  const words = (line, i, share) => `${line.label ? `${line.label} ` : ""}${figure(line.smooth[i], share)}`;

  // Charts of a section reserve the same room for the labels at their lines' ends, so that their axes align.
  function charts(specs, height) {
    const ends = specs.flatMap((spec) => spec.lines.map((line) => words(line, line.smooth.length - 1, spec.share).length));
    return specs.map((spec) => chart(spec, height, 14 + 6.8 * Math.max(...ends)));
  }

  function chart(spec, height, room) {
    const plot = h("div", { class: "plot" });
    plot.style.height = `${height}px`;
    let drawn = 0;
    new ResizeObserver(() => {
      if (plot.clientWidth === drawn) return;
      drawn = plot.clientWidth;
      plot.replaceChildren(drawing(spec, drawn, height, Math.min(room, 0.4 * drawn), plot));
    }).observe(plot);
    return h("figure", {},
      h("figcaption", {}, h("h3", {}, spec.title), spec.note ? h("p", {}, spec.note) : null), plot);
  }

  function drawing(spec, width, height, room, plot) {
    // The axis fits the smooth lines and nearly all raw values: one odd step, such as the one that compiles, is cut off.
    const middle = spec.lines.flatMap((line) => [...line.smooth, ...within(line.raw, 0.02)]);
    const steps = spec.lines.flatMap((line) => line.steps);
    const [least, most] = [Math.min(...middle), Math.max(...middle)];
    const logarithmic = !spec.share && least > 0 && most > 30 * least;
    const scale = logarithmic ? (value) => Math.log10(Math.max(value, least)) : (value) => value;
    let [low, high] = spec.share ? [0, 1] : [scale(least), scale(most)];
    if (!spec.share && !logarithmic && low > 0 && low < 0.6 * high) low = 0;
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.5, high + (Math.abs(high) || 1) * 0.5];
    const [first, last] = [Math.min(...steps), Math.max(...steps)];

    const box = { left: spec.share ? 46 : 40, right: room, top: 8, bottom: 24 };
    const x = (step) => box.left + ((step - first) / (last - first || 1)) * (width - box.left - box.right);
    const y = (value) => height - box.bottom - ((scale(value) - low) / (high - low)) * (height - box.top - box.bottom);
    const right = width - box.right;

    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${spec.title}: ${spec.lines.map((line) => words(line, line.smooth.length - 1, spec.share)).join(", ")}` });
    const rows = logarithmic ? decades(low, high) : niceTicks(low, high, height > 150 ? 4 : 2);
    for (const tick of rows) {
      svg.append(
        s("line", { x1: box.left, x2: right, y1: y(tick), y2: y(tick), class: "grid" }),
        s("text", { x: box.left - (spec.share ? 18 : 8), y: y(tick) + 4, "text-anchor": "end" }, plain(spec.share ? 100 * tick : tick)));
    }
    if (spec.share) svg.append(s("text", { x: box.left - 16, y: y(1) + 4 }, "%"));
    const columns = niceTicks(first, last, width > 380 ? 5 : 3).filter(Number.isInteger);
    for (const tick of columns) {
      svg.append(s("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, plain(tick)));
    }
    const reach = columns.length ? x(columns.at(-1)) + 4 * plain(columns.at(-1)).length : 0;
    const stepLabel = s("text", { x: Math.max(right + 8, reach + 6), y: height - 6 }, "step");
    svg.append(stepLabel);

    const area = `area-${areas++}`;
    svg.append(s("clipPath", { id: area }, s("rect", { x: box.left, y: 0, width: right - box.left, height: height - box.bottom })));
    const path = (line, which) =>
      line.steps.map((step, i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(line[which][i]).toFixed(1)}`).join("");
    for (const line of spec.lines) svg.append(s("path", { d: path(line, "raw"), class: `raw tone-${line.tone}`, "clip-path": `url(#${area})` }));
    for (const line of spec.lines) svg.append(s("path", { d: path(line, "smooth"), class: `smooth tone-${line.tone}` }));

    const rule = s("line", { y1: box.top, y2: height - box.bottom, class: "rule", visibility: "hidden" });
    svg.append(rule);
    const labels = spec.lines.map((line) => s("text", { x: right + 8, class: `label filled tone-${line.tone}` }));
    const dots = spec.lines.map((line) => s("circle", { r: 3, class: `filled tone-${line.tone}` }));
    svg.append(...labels, ...dots);

    // The labels show the values at the last step, or under the pointer.
    function point(step) {
      const at = spec.lines.map((line) => {
        let nearest = line.steps.length - 1;
        if (step !== null) {
          line.steps.forEach((each, i) => { if (Math.abs(each - step) < Math.abs(line.steps[nearest] - step)) nearest = i; });
        }
        return nearest;
      });
      const heights = spec.lines.map((line, k) => y(line.smooth[at[k]]));
      spread(heights, 15, box.top + 4, height - box.bottom).forEach((place, k) => {
        labels[k].setAttribute("y", place + 4);
        labels[k].textContent = words(spec.lines[k], at[k], spec.share);
        dots[k].setAttribute("cx", x(spec.lines[k].steps[at[k]]));
        dots[k].setAttribute("cy", heights[k]);
      });
      const where = spec.lines[0].steps[at[0]];
      rule.setAttribute("visibility", step === null ? "hidden" : "visible");
      rule.setAttribute("x1", x(where));
      rule.setAttribute("x2", x(where));
      stepLabel.textContent = step === null ? "step" : `step ${where}`;
    }
    point(null);
    plot.onpointermove = (event) => {
      const place = event.clientX - svg.getBoundingClientRect().left;
      point(first + ((place - box.left) / (right - box.left || 1)) * (last - first));
    };
    plot.onpointerleave = () => point(null);
    return svg;
  }

  function curves() {
    return data.sections.map((section) => [
      h("h2", {}, section.title),
      h("div", { class: "charts" }, charts(section.charts, 210)),
    ]);
  }
  function leftovers() {
    if (!data.more.length) return [];
    return [h("details", {}, h("summary", {}, "Every other metric"),
      h("div", { class: "charts small" }, charts(data.more, 110)))];
  }

  // ---- Trajectory browser

  // Right: a filled dot. Wrong: a cross. Not judged: a dash. A call: a ring around it.
  const verdict = (column) => (column.correct === null ? "not judged" : column.correct ? "right" : "wrong");
  function mark(column) {
    const sign = column.correct
      ? s("circle", { cx: 6.5, cy: 6.5, r: 2.8, class: "filled" })
      : s("path", { d: column.correct === null ? "M4 6.5 9 6.5" : "M4.3 4.3 8.7 8.7M8.7 4.3 4.3 8.7", "stroke-width": 1.6 });
    const title = `${column.label}: ${verdict(column)}, ${calls(column)}`;
    const ring = column.calls ? s("circle", { cx: 6.5, cy: 6.5, r: 5.5, fill: "none", "stroke-width": 1.2, class: "tone-tool" }) : null;
    return s("svg", { viewBox: "0 0 13 13", class: "tone-ink", role: "img", "aria-label": title }, s("title", {}, title), sign, ring);
  }
  const calls = (column) => (column.calls === 1 ? "1 call" : `${column.calls || "no"} calls`);

  // A turn's parts in the agent's protocol; whatever is not of it stays as it was written.
  function parts(text) {
    const found = [];
    let rest = 0;
    for (const match of text.matchAll(/<(reason|tool_call|answer)>([\s\S]*?)<\/\1>/g)) {
      found.push(["text", text.slice(rest, match.index)], [match[1], match[2]]);
      rest = match.index + match[0].length;
    }
    const tail = text.slice(rest);
    const open = tail.match(/^([\s\S]*?)<tool_call>([\s\S]*)$/);
    if (open) found.push(["text", open[1]], ["tool_call", open[2]]);
    else found.push(["text", tail]);
    return found.filter(([kind, words]) => kind !== "text" || words.trim());
  }
  function request(words) {
    try {
      const call = JSON.parse(words);
      const given = call.arguments;
      const code = given && typeof given.code === "string" ? given.code : JSON.stringify(given, null, 1);
      return [String(call.name), code || ""];
    } catch {
      return ["malformed call", words];
    }
  }
  function spoken(turn, raw) {
    if (raw) return [h("pre", {}, turn.text)];
    return parts(turn.text).map(([kind, words]) => {
      if (kind === "answer") return h("p", { class: "answer" }, h("span", {}, "answer"), words.trim());
      if (kind !== "tool_call") return h("p", { class: "prose" }, words.trim());
      const [name, code] = request(words);
      return h("div", {}, h("div", { class: "who" }, `calls ${name}`), h("pre", {}, code));
    });
  }
  function turnOf(turn, raw) {
    const images = turn.images.map((index) => picture(index, "image that the tool returned"));
    if (turn.role !== "tool") return h("div", { class: "turn" }, spoken(turn, raw), images);
    const words = turn.text.trim() ? h("pre", {}, turn.text) : null;
    return h("div", { class: "turn tool" }, h("div", { class: "who" }, "tool returns"), words, images);
  }
  function columnOf(column, raw) {
    const rewards = Object.entries(column.rewards).filter(([, value]) => value !== null);
    const named = { accuracy: "accuracy", tool: "efficiency" };
    return h("section", { class: "column" },
      h("header", {},
        h("h3", {}, column.label),
        h("span", { class: column.correct ? "verdict-right" : "verdict-wrong" }, verdict(column)),
        h("small", {}, [calls(column), `${column.tokens} tokens`, ...rewards.map(([name, value]) => `${named[name]} ${plain(value)}`),
          column.stop === "end_of_turn" ? "" : column.stop.replaceAll("_", " ")].filter(Boolean).join(" \u00b7 "))),
      column.turns.map((turn) => turnOf(turn, raw)));
  }

  function browser() {
    const items = data.browser.items;
    if (!items.length) return [];
    const chosen = {};
    let shown = items;
    let current = items.find((item) => item.facets.difference === "changed") || items[0];
    let raw = false;

    const list = h("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": "Trajectories" });
    const detail = h("div", { class: "detail" });
    const count = h("span", { class: "facet" });
    const rows = new Map(items.map((item) => [item, h("button", {
      class: "row", role: "option", tabindex: -1, click: () => select(item),
    },
      item.images.length ? picture(item.images[0], "") : h("span", { class: "blank" }),
      h("span", { class: "name" }, item.truth || item.id, h("small", {}, item.facets.step ? `step ${item.facets.step}` : item.facets.prompt)),
      h("span", { class: "marks" }, item.columns.map(mark)))]));

    function select(item) {
      rows.get(current).setAttribute("aria-selected", "false");
      current = item;
      const row = rows.get(item);
      row.setAttribute("aria-selected", "true");
      if (row.offsetTop < list.scrollTop) list.scrollTop = row.offsetTop - 4;
      if (row.offsetTop + row.offsetHeight > list.scrollTop + list.clientHeight) {
        list.scrollTop = row.offsetTop + row.offsetHeight - list.clientHeight + 4;
      }
      show();
    }
    function show() {
      const item = current;
      const about = [["Right answer", item.truth], ["Prompt", item.id], ...Object.entries(item.facets).filter(([name]) => name === "step" || name === "prompt")];
      detail.replaceChildren(
        h("div", { class: "question" },
          item.images.length ? h("div", { class: "shown" }, item.images.map((index) => picture(index, "image of the prompt"))) : null,
          h("div", { class: "words" },
            h("p", { class: "ask" }, item.question.replaceAll("<image>", "").trim()),
            h("dl", {}, about.map(([name, value]) => h("div", {}, h("dt", {}, name === "prompt" ? "Kind" : name === "step" ? "Step" : name), h("dd", {}, value)))))),
        h("div", { class: "columns" }, item.columns.map((column) => columnOf(column, raw))));
    }
    function filter() {
      shown = items.filter((item) => Object.entries(chosen).every(([name, value]) => item.facets[name] === value));
      count.textContent = `${shown.length} of ${items.length}`;
      list.replaceChildren(...(shown.length ? shown.map((item) => rows.get(item)) : [h("p", { class: "empty" }, "Nothing fits all of these.")]));
      if (shown.length && !shown.includes(current)) select(shown[0]);
    }
    function move(by) {
      const next = shown[Math.min(shown.length - 1, Math.max(0, shown.indexOf(current) + by))];
      if (next) select(next);
    }

    const facets = [...new Set(items.flatMap((item) => Object.keys(item.facets)))]
      .map((name) => [name, [...new Set(items.map((item) => item.facets[name]))].filter((value) => value !== undefined)])
      .filter(([, values]) => values.length > 1)
      .map(([name, values]) => {
        const buttons = ["all", ...values].map((value) => h("button", { "aria-pressed": value === "all", click: () => {
          if (value === "all") delete chosen[name];
          else chosen[name] = value;
          buttons.forEach((button) => button.setAttribute("aria-pressed", button.textContent === value));
          filter();
        } }, value));
        return h("div", { class: "facet", role: "group", "aria-label": name }, `${name}:`, buttons);
      });

    const keys = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 };
    list.addEventListener("keydown", (event) => {
      if (!event.key.startsWith("Arrow") || !(event.key in keys)) return;
      event.preventDefault();
      move(keys[event.key]);
    });
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "j" || event.key === "k") move(keys[event.key]);
      if (event.key === "r") {
        raw = !raw;
        show();
      }
    });

    filter();
    select(current);
    return [
      h("h2", {}, "Trajectories"),
      h("div", { class: "filters" }, facets, count),
      h("div", { class: "browser" }, list, detail),
      h("p", { class: "keys" }, h("kbd", {}, "j"), " ", h("kbd", {}, "k"), " next and previous, ", h("kbd", {}, "r"),
        " the text as it was written. A dot is a right answer, a cross a wrong one, a ring around it means that a tool was called. ", data.browser.note),
    ];
  }

  page.append(...[headline(), evaluation(), curves(), browser(), leftovers()].flat(2).filter(Boolean));
})();
