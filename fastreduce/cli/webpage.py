"""A run of ``compare`` as one page: every method's pictures with sliders for stage and keep rate, no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["picture_data", "webpage"]

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title><style>
:root { color-scheme: light dark; --line: #8884; --accent: #0072b2; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; } p { margin: .3rem 0 1rem; } .small { opacity: .75; font-size: .87rem; }
.row { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; } .row > div { flex: 1 1 22rem; }
figure { margin: 0; } figure img { width: 24rem; max-width: 100%; display: block; border-radius: 4px; }
figcaption { min-height: 3.2em; padding-top: .4rem; }
button { font: inherit; margin: 0 .3rem .4rem 0; padding: .15rem .6rem; border: 1px solid var(--line);
  border-radius: 4px; background: none; color: inherit; cursor: pointer; }
button[aria-pressed=true] { background: var(--accent); color: #fff; }
label { display: block; margin: .6rem 0; } input[type=range] { width: 16rem; vertical-align: middle; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 1rem; }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; } tr.on { background: #0072b222; } tbody tr { cursor: pointer; }
svg text { font-size: 11px; fill: currentColor; } svg .axis { stroke: currentColor; opacity: .5; }
svg circle { cursor: pointer; }
</style></head><body>
<h1>@TITLE@</h1><p class="small" id="about"></p>
<div id="methods" role="group" aria-label="method"></div>
<div class="row"><figure><img id="picture" alt=""><figcaption id="caption"></figcaption></figure>
<div><label>keep rate <input type="range" id="rate" min="0" step="1"> <output id="rate-shown"></output></label>
<label>stage <input type="range" id="stage" min="0" step="1"> <output id="stage-shown"></output></label>
<p id="figures"></p><svg id="plot" width="380" height="260" role="img" aria-label="speed-up against fidelity"></svg>
</div></div>
<table><thead></thead><tbody></tbody></table><p class="small" id="notes"></p>
<script>
const run = @DATA@;
const at = id => document.getElementById(id);
let method = 0, rate = 0, stage = 1;
const colours = ["#0072B2","#D55E00","#009E73","#CC79A7","#E69F00","#56B4E9","#888888"];
const number = (value, digits) => value === null || value === undefined ? "" : value.toFixed(digits);
const current = () => run.methods[method].settings[rate];
at("about").textContent = run.about; at("notes").textContent = run.notes;
run.methods.forEach((one, index) => {
  const button = document.createElement("button");
  button.textContent = one.label;
  button.onclick = () => { method = index; show(); };
  at("methods").append(button);
});
at("rate").oninput = event => { rate = +event.target.value; show(); };
at("stage").oninput = event => { stage = +event.target.value; show(); };
const head = ["setting", "times as fast", ...run.measures.map(one => one.name)];
document.querySelector("thead").innerHTML = "<tr>" + head.map(word => `<th>${word}</th>`).join("") + "</tr>";
const lines = [];
run.methods.forEach((one, m) => one.settings.forEach((setting, r) => {
  const line = document.createElement("tr");
  const cells = [`${one.label} ${setting.keep_rate}`, number(setting.speedup, 2),
    ...run.measures.map(measure => number(setting.measures[measure.key], 3))];
  cells.forEach(words => { const cell = document.createElement("td"); cell.textContent = words; line.append(cell); });
  line.onclick = () => { method = m; rate = r; show(); };
  line.dataset.of = `${m} ${r}`;
  document.querySelector("tbody").append(line); lines.push(line);
}));
function plot() {
  const svg = at("plot"), key = run.headline;
  const points = run.methods.flatMap((one, m) => one.settings.map((setting, r) => ({
    m, r, x: setting.speedup, y: setting.measures[key], name: `${one.label} ${setting.keep_rate}` })));
  if (!points.length || points.some(point => point.y === undefined || point.y === null)) { svg.remove(); return; }
  const xs = [1, ...points.map(point => point.x)], ys = [1, ...points.map(point => point.y)];
  const low = [Math.min(...xs), Math.min(...ys)], high = [Math.max(...xs), Math.max(...ys)];
  const X = x => 42 + 326 * (x - low[0]) / (high[0] - low[0] || 1);
  const Y = y => 222 - 206 * (y - low[1]) / (high[1] - low[1] || 1);
  let drawn = `<line class="axis" x1="42" y1="226" x2="372" y2="226"/>`;
  drawn += `<line class="axis" x1="38" y1="12" x2="38" y2="222"/>`;
  for (const part of [0, .5, 1]) {
    const x = low[0] + part * (high[0] - low[0]), y = low[1] + part * (high[1] - low[1]);
    drawn += `<text x="${X(x)}" y="240" text-anchor="middle">${x.toFixed(2)}</text>`;
    drawn += `<text x="34" y="${Y(y) + 4}" text-anchor="end">${y.toFixed(2)}</text>`;
  }
  drawn += `<text x="205" y="256" text-anchor="middle">times as fast</text>`;
  drawn += `<text x="46" y="10">${run.measures[0].name}</text>`;
  run.methods.forEach((one, m) => {
    const mine = points.filter(point => point.m === m), colour = colours[m % colours.length];
    const path = mine.map(point => `${X(point.x)},${Y(point.y)}`).join(" ");
    drawn += `<polyline points="${path}" fill="none" stroke="${colour}" opacity="${m === method ? 1 : .35}"/>`;
    mine.forEach(point => {
      const on = m === method && point.r === rate;
      drawn += `<circle cx="${X(point.x)}" cy="${Y(point.y)}" r="${on ? 7 : 4}" fill="${colour}"
        opacity="${m === method ? 1 : .45}" data-of="${m} ${point.r}"><title>${point.name}</title></circle>`;
    });
  });
  svg.innerHTML = drawn;
  svg.querySelectorAll("circle").forEach(dot => dot.onclick = () => {
    [method, rate] = dot.dataset.of.split(" ").map(Number); show(); });
}
function show() {
  const settings = run.methods[method].settings;
  rate = Math.min(rate, settings.length - 1);
  const setting = current();
  stage = Math.min(stage, setting.stages.length - 1);
  [...at("methods").children].forEach((button, index) => button.setAttribute("aria-pressed", index === method));
  at("rate").max = settings.length - 1; at("rate").value = rate; at("rate-shown").textContent = setting.keep_rate;
  at("stage").max = setting.stages.length - 1; at("stage").value = stage;
  at("stage-shown").textContent = setting.stages[stage].name;
  at("picture").src = setting.stages[stage].picture;
  at("picture").alt = `${run.methods[method].label}, keep rate ${setting.keep_rate}, ${setting.stages[stage].name}`;
  at("caption").textContent = `${setting.stages[stage].name}: ${setting.stages[stage].words}`;
  at("figures").textContent = `${number(setting.speedup, 2)} times as fast as the unreduced model`
    + run.measures.map(measure => `; ${measure.name} ${number(setting.measures[measure.key], 3)}`).join("");
  lines.forEach(line => line.classList.toggle("on", line.dataset.of === `${method} ${rate}`));
  plot();
}
if (run.chosen) { [method, rate] = run.chosen; }
show();
</script></body></html>
"""


def picture_data(pixels: NDArray[np.uint8]) -> str:
    """Return a picture (height, width, 3) as a ``data:`` address."""
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


def webpage(
    title: str,
    about: str,
    notes: str,
    measures: Sequence[Mapping[str, str]],
    methods: Sequence[Mapping[str, Any]],
    chosen: tuple[int, int] | None = None,
) -> str:
    """Return the page.

    Args:
        title: of the page.
        about: a line below it.
        notes: small print at its foot.
        measures: ``key`` and ``name`` of each measure of fidelity; the first is drawn against the speed-up.
        methods: ``label`` and ``settings``; a setting has ``keep_rate``, ``speedup``, ``measures`` by key, and
            ``stages`` with ``name``, ``words`` and ``picture``.
        chosen: indices of the method and the setting that are shown first.
    """
    data = {
        "about": about,
        "notes": notes,
        "measures": list(measures),
        "headline": measures[0]["key"] if measures else None,
        "methods": list(methods),
        "chosen": chosen,
    }
    # In a script, the end tag of a script ends it, whatever it stands in.
    script = json.dumps(data, allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    words = title.replace("&", "&amp;").replace("<", "&lt;")
    return _TEMPLATE.replace("@TITLE@", words).replace("@DATA@", script)
