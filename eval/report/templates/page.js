// What a page does by itself: tables sort and filter, pictures grow, plots follow the reader. Nothing is fetched.
"use strict";
const number = text => { const found = text.replace(/−/g, "-").match(/^[^\d-]*(-?\d+(\.\d+)?)/); return found ? +found[1] : null; };

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows];
  table.querySelectorAll("th").forEach((head, column) => {
    head.tabIndex = 0; head.title = "sort";
    const sort = () => {
      const down = head.ariaSort === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.ariaSort = down ? "descending" : "ascending";
      const of = row => row.cells[column].textContent.trim();
      const sorted = [...rows].sort((a, b) => {
        const [x, y] = [number(of(a)), number(of(b))];
        return (x !== null && y !== null ? x - y : of(a).localeCompare(of(b))) * (down ? -1 : 1);
      });
      body.append(...sorted); body.classList.add("sorted");
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
  if (rows.length > 7) {
    const field = Object.assign(document.createElement("input"), {type: "search", placeholder: "filter rows", className: "filter"});
    field.ariaLabel = "filter rows";
    field.addEventListener("input", () => {
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(field.value.toLowerCase());
    });
    table.parentElement.before(field);
  }
}

for (const image of document.querySelectorAll("img")) {
  image.addEventListener("click", () => image.classList.toggle("large"));
}
document.addEventListener("keydown", event => {
  if (event.key === "Escape") document.querySelectorAll(".large").forEach(image => image.classList.remove("large"));
});

function choice(names, label, changed) {
  const select = document.createElement("select");
  select.ariaLabel = label;
  names.forEach((name, i) => select.add(new Option(name, i)));
  select.addEventListener("change", changed);
  return select;
}

// Of values, those that have room beside each other on a logarithmic axis.
function apart(values) {
  const sorted = [...new Set(values.map(x => +x.toPrecision(3)))].sort((a, b) => a - b), ticks = [];
  const least = (sorted.at(-1) / sorted[0]) ** (1 / 12);
  for (const x of sorted) if (!ticks.length || x / ticks.at(-1) >= least) ticks.push(x);
  return ticks;
}

function plot(place) {
  const data = JSON.parse(place.querySelector("script").textContent);
  const canvas = document.createElement("div");
  const axis = choice(data.axes.map(one => one.title), "axis", draw);
  const panel = choice(data.panels.map(one => one.name), "task", draw);
  const bar = document.createElement("p");
  bar.className = "choices";
  bar.append("against ", axis);
  if (data.panels.length > 1) bar.append(" on ", panel);
  place.append(bar, canvas);

  function draw() {
    const css = getComputedStyle(document.documentElement), colour = name => css.getPropertyValue(name).trim();
    const word = data.axes[axis.value].name;
    const here = data.points.filter(p => p.panel === +panel.value && word in p.x);
    const narrow = place.clientWidth < 640;
    const traces = ["full model", ...Object.keys(data.looks)].map(label => {
      const mine = here.filter(p => p.label === label).sort((a, b) => a.x[word] - b.x[word]);
      const full = label === "full model", look = data.looks[label] || {symbol: "star", dash: "solid"};
      const paint = full ? colour("--fore") : look.color || colour("--soft");
      return {
        type: "scatter", mode: full || !look.dash ? "markers" : "lines+markers", name: label,
        x: mine.map(p => p.x[word]), y: mine.map(p => p.y), text: mine.map(p => p.name),
        hovertemplate: "%{text}<br>%{x:.4~g}, %{y:.4~g}<extra></extra>",
        error_y: {type: "data", symmetric: false, thickness: 1, width: 2, color: paint,
          array: mine.map(p => p.high === null ? 0 : p.high - p.y),
          arrayminus: mine.map(p => p.low === null ? 0 : p.y - p.low)},
        marker: {color: paint, symbol: look.symbol, size: full ? 14 : 9, line: {color: paint, width: 2}},
        line: {color: paint, dash: look.dash, width: 1.5},
      };
    }).filter(trace => trace.x.length);
    const xs = here.map(p => p.x[word]).filter(x => x > 0);
    const wide = xs.length === here.length && Math.max(...xs) > 4 * Math.min(...xs);
    const grid = {gridcolor: colour("--line"), zeroline: false, automargin: true};
    const whole = here.find(p => p.full);
    Plotly.react(canvas, traces, {
      height: narrow ? 560 : 460, margin: {l: 50, r: 10, t: 10, b: 50}, autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: colour("--fore"), size: 13},
      legend: narrow ? {orientation: "h", y: -0.2} : {},
      xaxis: {...grid, title: {text: data.axes[axis.value].title}, type: wide ? "log" : "linear",
        tickvals: wide ? apart(xs) : undefined},
      yaxis: {...grid, title: {text: data.panels[panel.value].title}},
      shapes: whole ? [{type: "line", xref: "paper", x0: 0, x1: 1, y0: whole.y, y1: whole.y,
        line: {color: colour("--soft"), width: 1}}] : [],
    }, {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]});
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
if (window.Plotly) document.querySelectorAll(".plot").forEach(plot);
