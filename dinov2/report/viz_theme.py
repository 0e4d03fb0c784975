"""Look and behaviour of the page of patch features: its script, and what it adds to the frame and style sheet of all.

The script gets everything as one JSON text inside the page. Features are int8, so a cosine is the product of two short
vectors over their lengths; a click compares one patch with all patches of all images, within a few milliseconds.
"""

from string import Template

__all__ = ["VIZ_LEAD", "VIZ_MAIN", "VIZ_SCRIPT", "VIZ_STYLE", "VIZ_TOOLS"]

VIZ_STYLE = """
header.top { padding-bottom: .5rem; }
header.top p.lead { margin: .9rem 0 .4rem; font-size: 1.06rem; }
main, header.top > div, footer, .tools > div { max-width: 84rem; margin: 0 auto; padding: 0 1.25rem; }
.tools { position: sticky; top: 0; z-index: 5; margin: 1rem 0 1.5rem; padding: .7rem 0;
  background: color-mix(in srgb, var(--page) 90%, transparent); backdrop-filter: blur(10px);
  border-block: 1px solid var(--line); }
.tools > div { display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; align-items: center; }
.tools fieldset { display: flex; margin: 0; padding: 3px; border: 0; border-radius: 10px; background: var(--line); }
.tools legend, .unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.tools fieldset label { position: relative; cursor: pointer; }
.tools fieldset input { position: absolute; inset: 0; margin: 0; opacity: 0; cursor: pointer; }
.tools fieldset span { display: block; padding: .3rem .85rem; border-radius: 8px; color: var(--muted);
  font-size: .9rem; font-weight: 550; }
.tools fieldset input:checked + span { background: var(--card); color: var(--ink);
  box-shadow: 0 1px 3px rgb(0 0 0 / .16); }
.tools fieldset input:focus-visible + span { outline: 2px solid var(--c1); outline-offset: 1px; }
.tools .small { display: flex; gap: .45rem; align-items: center; color: var(--muted); font-size: .85rem; }
.tools input[type=range] { width: 6.5rem; accent-color: var(--c1); }
.tools input[type=checkbox] { accent-color: var(--c1); width: 1rem; height: 1rem; margin: 0; }
.tools select { padding: .2rem .4rem; border: 1px solid var(--line); border-radius: 7px; background: var(--card);
  color: var(--ink); font: inherit; }
.tools .scale { display: flex; gap: .5rem; align-items: center; margin-left: auto; color: var(--muted);
  font-size: .8rem; font-variant-numeric: tabular-nums; }
.scale i { display: block; width: 8rem; height: .6rem; border-radius: 3px;
  box-shadow: inset 0 0 0 1px rgb(128 128 128 / .25); }
[hidden] { display: none !important; }
.shots { display: flex; flex-wrap: wrap; gap: 1.1rem; align-items: flex-start; }
.shots figure { flex: var(--wide) 1 calc(var(--wide) * var(--tall)); min-width: 0;
  max-width: min(100%, calc(var(--wide) * 1.3 * var(--tall))); }
.shots figure { padding: 0; overflow: hidden; }
.shots .stage { border-radius: 0; }
.panes { display: grid; gap: 3px; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); }
.pane p { display: flex; gap: .6rem; justify-content: space-between; max-width: none; margin: 0;
  padding: .45rem .8rem; color: var(--muted); font-size: .78rem; white-space: nowrap; }
.pane p span { overflow: hidden; text-overflow: ellipsis; color: var(--ink); font-weight: 600; }
.stage { position: relative; overflow: hidden; border-radius: 9px; background: var(--grid); cursor: crosshair;
  touch-action: manipulation; user-select: none; -webkit-user-select: none; }
.stage:focus-visible { outline: 3px solid var(--c1); outline-offset: -3px; z-index: 1; }
.stage img, .stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
.stage canvas { image-rendering: pixelated; }
.smooth .stage canvas { image-rendering: auto; }
.stage b { position: absolute; pointer-events: none; display: none; }
.stage .over { border: 1px solid rgb(255 255 255 / .9); box-shadow: 0 0 0 1px rgb(0 0 0 / .55); }
.stage .mark { border: 2px solid #fff; border-radius: 3px; box-shadow: 0 0 0 1.5px #000, 0 0 14px rgb(0 0 0 / .5);
  min-width: 9px; min-height: 9px; }
.stage .near { width: 18px; height: 18px; margin: -9px 0 0 -9px; border: 2.5px solid #fff; border-radius: 50%;
  box-shadow: 0 0 0 1.5px #000, inset 0 0 0 1.5px rgb(0 0 0 / .6); }
.shots figcaption { display: flex; gap: .75rem; justify-content: space-between; padding: .55rem .8rem .6rem;
  font-size: .86rem; }
.shots figcaption span { min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  font-weight: 600; }
.shots figcaption output { color: var(--muted); white-space: nowrap; font-variant-numeric: tabular-nums; }
.heads { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
.heads h3 { grid-column: 1 / -1; }
.heads .stage { cursor: default; border-radius: 7px; }
.heads figcaption { padding-top: .2rem; color: var(--muted); font-size: .75rem; text-align: center; }
.stack { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); }
.pair { position: relative; display: grid; gap: 2%; align-items: center; }
.pair svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.pair svg g { stroke-linecap: round; }
.pair img { display: block; width: 100%; border-radius: 9px; }
noscript p { padding: .8rem 1rem; border: 1px solid var(--bad); border-radius: 10px; }
@media (max-width: 40rem) {
  .shots figure { flex-basis: 100%; max-width: 100%; }
  .tools { position: static; }
  .tools fieldset { width: 100%; }
  .tools fieldset label { flex: 1; text-align: center; }
  .tools fieldset span { padding: .4rem .1rem; font-size: .8rem; }
  .tools .scale { margin-left: 0; width: 100%; } .scale i { flex: 1; }
}
@media print { .tools { display: none; } }
"""

VIZ_SCRIPT = """
const page = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const raw = text => {
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = packed.charCodeAt(i);
  return bytes;
};
const panes = [];
page.images.forEach((image, i) => image.panes.forEach((data, m) => {
  const stage = $("stage-" + i + "-" + m);
  panes.push({ i, m, stage, data, rows: data.rows, cols: data.cols, canvas: stage.querySelector("canvas"),
    features: new Int8Array(raw(data.features).buffer), pca: raw(data.pca), norms: raw(data.norms),
    heads: data.heads.map(head => ({ values: raw(head.values), high: head.high, label: head.label })) });
}));
for (const pane of panes) {
  const n = pane.rows * pane.cols, dims = pane.features.length / n;
  pane.dims = dims;
  pane.inverse = new Float32Array(n);
  for (let p = 0; p < n; p++) {
    let sum = 0;
    for (let d = p * dims; d < (p + 1) * dims; d++) sum += pane.features[d] * pane.features[d];
    pane.inverse[p] = sum ? 1 / Math.sqrt(sum) : 0;
  }
}
for (const img of document.querySelectorAll("img[data-of]")) img.src = $("image-" + img.dataset.of).src;

const state = { view: "similarity", head: -1, opacity: 0.7, stretch: true, image: page.start[0],
  x: page.start[1], y: page.start[2] };
const paneOf = (i, m) => panes.find(pane => pane.i === i && pane.m === m);
const cellAt = (pane, x, y) => [Math.min(pane.rows - 1, Math.floor(y * pane.rows)),
  Math.min(pane.cols - 1, Math.floor(x * pane.cols))];

function cosines(pane, other, index) {
  const { features, inverse, dims } = pane, n = inverse.length, found = new Float32Array(n);
  const query = Float32Array.from(other.features.subarray(index * dims, (index + 1) * dims));
  for (let p = 0, at = 0; p < n; p++) {
    let sum = 0;
    for (let d = 0; d < dims; d++) sum += query[d] * features[at++];
    found[p] = sum * inverse[p] * other.inverse[index];
  }
  return found;
}
function paint(canvas, rows, cols, alpha, colour) {  // colour(patch) gives [red, green, blue], or null for none
  canvas.width = cols; canvas.height = rows;
  const context = canvas.getContext("2d"), picture = context.createImageData(cols, rows), to = picture.data;
  for (let p = 0; p < rows * cols; p++) {
    const rgb = colour(p);
    if (!rgb) continue;
    to[4 * p] = rgb[0]; to[4 * p + 1] = rgb[1]; to[4 * p + 2] = rgb[2]; to[4 * p + 3] = 255 * alpha;
  }
  context.putImageData(picture, 0, 0);
}
function ofPalette(value, low, high) {
  const share = (value - low) / Math.max(high - low, 1e-9);
  return page.palette[Math.round(255 * Math.max(0, Math.min(1, share)))];
}
const headValue = (pane, p) => state.head >= 0 ? pane.heads[state.head].values[p] * pane.heads[state.head].high / 255
  : pane.heads.reduce((sum, head) => head.label < 0 ? sum : sum + head.values[p] * head.high / 255, 0)
    / pane.heads.filter(head => head.label >= 0).length;
const shown = value => Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 0.095 || value === 0
  ? value.toFixed(2) : value.toPrecision(2);

function place(element, pane, row, col) {
  element.style.display = "block";
  element.style.left = 100 * col / pane.cols + "%"; element.style.top = 100 * row / pane.rows + "%";
  element.style.width = 100 / pane.cols + "%"; element.style.height = 100 / pane.rows + "%";
}
function compare() {
  for (const pane of panes) {
    const from = paneOf(state.image, pane.m);
    const [row, col] = cellAt(from, state.x, state.y), index = row * from.cols + col;
    pane.similar = cosines(pane, from, index);
    pane.best = pane.similar.reduce((best, value, p, all) => pane === from && p === index ? best
      : best < 0 || value > all[best] ? p : best, -1);
    const mark = pane.stage.querySelector(".mark"), near = pane.stage.querySelector(".near");
    mark.style.display = near.style.display = "none";
    if (pane === from) place(mark, pane, row, col);
    else {
      near.style.display = "block";
      near.style.left = 100 * (pane.best % pane.cols + 0.5) / pane.cols + "%";
      near.style.top = 100 * (Math.floor(pane.best / pane.cols) + 0.5) / pane.rows + "%";
    }
  }
}
function limits(m) {
  if (!state.stretch) return [0, 1];
  const parts = panes.filter(pane => pane.m === m).map(pane => pane.similar);
  const all = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => { all.set(part, at); return at + part.length; }, 0);
  return [all.sort()[Math.floor(all.length * 0.02)], 1];
}
function draw() {
  const spans = {};
  for (const m of page.models.keys()) {
    if (state.view === "similarity") spans[m] = limits(m);
    if (state.view === "norm") spans[m] = page.models[m].norms;
  }
  for (const pane of panes) {
    const alpha = state.opacity, data = pane.data, span = spans[pane.m];
    let note = "";
    pane.canvas.style.display = "block";
    if (state.view === "similarity") {
      paint(pane.canvas, pane.rows, pane.cols, alpha, p => ofPalette(pane.similar[p], span[0], span[1]));
      note = pane.stage.querySelector(".near").style.display === "none" ? "chosen patch"
        : "most similar " + shown(pane.similar[pane.best]);
    } else if (state.view === "pca") {
      paint(pane.canvas, pane.rows, pane.cols, alpha, p => pane.pca[4 * p + 3] ? pane.pca.subarray(4 * p) : null);
    } else if (state.view === "norm") {
      const value = p => data.norm_low + (data.norm_high - data.norm_low) * pane.norms[p] / 255;
      paint(pane.canvas, pane.rows, pane.cols, alpha, p => ofPalette(value(p), span[0], span[1]));
      note = "high norm " + (100 * data.high_share).toFixed(1) + " %";
    } else if (state.view === "attention" && pane.heads.length) {
      let high = 1e-9;
      const values = Float32Array.from({ length: pane.rows * pane.cols }, (_, p) => headValue(pane, p));
      for (const value of values) high = Math.max(high, value);
      paint(pane.canvas, pane.rows, pane.cols, alpha, p => ofPalette(values[p], 0, high));
      note = "up to " + shown(100 * high) + " %";
    } else pane.canvas.style.display = "none";
    for (const sign of pane.stage.querySelectorAll(".mark, .near"))
      sign.style.opacity = state.view === "similarity" ? 1 : 0;
    $("note-" + pane.i + "-" + pane.m).textContent = note;
  }
  const one = page.models.length === 1, span = spans[0];
  $("scale").hidden = state.view === "pca" || state.view === "image";
  $("low").textContent = span && one ? shown(span[0]) : state.view === "attention" ? "0" : "low";
  $("high").textContent = span && one ? shown(span[1]) : state.view === "attention" ? "most" : "high";
  $("head-tool").hidden = state.view !== "attention";
  $("stretch-tool").hidden = state.view !== "similarity";
  for (const id of ["opacity-tool", "smooth-tool"]) $(id).hidden = state.view === "image";
}
function choose(pane, x, y) {
  state.image = pane.i; state.x = x; state.y = y;
  if (state.view !== "similarity") { state.view = "similarity"; $("view-similarity").checked = true; }
  compare(); draw();
  const [row, col] = cellAt(pane, x, y);
  const others = panes.filter(other => other.m === pane.m && other !== pane)
    .map(other => page.images[other.i].name + " " + shown(other.similar[other.best]));
  $("said").textContent = "Patch in row " + (row + 1) + ", column " + (col + 1) + " of " + page.images[pane.i].name
    + (others.length ? ". Most similar elsewhere: " + others.join(", ") : "");
}
for (const pane of panes) {
  const { stage } = pane, over = stage.querySelector(".over");
  const fraction = event => {
    const box = stage.getBoundingClientRect();
    return [Math.max(0, Math.min(0.9999, (event.clientX - box.left) / box.width)),
      Math.max(0, Math.min(0.9999, (event.clientY - box.top) / box.height))];
  };
  let dragging = false;
  stage.addEventListener("click", event => choose(pane, ...fraction(event)));
  stage.addEventListener("pointerdown", event => { dragging = event.pointerType !== "touch" && event.button === 0; });
  stage.addEventListener("pointermove", event => {
    const at = fraction(event);
    place(over, pane, ...cellAt(pane, ...at));
    if (dragging && event.buttons & 1) choose(pane, ...at);
  });
  stage.addEventListener("pointerleave", () => { over.style.display = "none"; dragging = false; });
  stage.addEventListener("keydown", event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    let [row, col] = state.image === pane.i ? cellAt(pane, state.x, state.y)
      : [pane.rows >> 1, pane.cols >> 1];
    if (step && state.image === pane.i) {
      row = Math.max(0, Math.min(pane.rows - 1, row + step[0]));
      col = Math.max(0, Math.min(pane.cols - 1, col + step[1]));
    }
    choose(pane, (col + 0.5) / pane.cols, (row + 0.5) / pane.rows);
  });
}
for (const input of document.querySelectorAll("input[name=view]")) input.addEventListener("change", () => {
  state.view = input.value; draw();
});
$("opacity").addEventListener("input", event => { state.opacity = event.target.value / 100; draw(); });
$("smooth").addEventListener("change", event => document.body.classList.toggle("smooth", event.target.checked));
$("stretch").addEventListener("change", event => { state.stretch = event.target.checked; draw(); });
$("head").addEventListener("change", event => { state.head = +event.target.value; draw(); });
for (const canvas of document.querySelectorAll("canvas[data-head]")) {
  const [i, m, h] = canvas.dataset.head.split(" ").map(Number), pane = paneOf(i, m), head = pane.heads[h];
  paint(canvas, pane.rows, pane.cols, 0.85, p => ofPalette(head.values[p], 0, 255));
}
$("scale-bar").style.background = "linear-gradient(90deg," + page.palette.filter((_, i) => i % 15 === 0)
  .map(rgb => "rgb(" + rgb + ")").join(",") + ")";
document.body.classList.toggle("smooth", $("smooth").checked);
state.opacity = $("opacity").value / 100; state.stretch = $("stretch").checked; state.head = +$("head").value;
state.view = (document.querySelector("input[name=view]:checked") || { value: "similarity" }).value;
compare(); draw();
"""

VIZ_LEAD = """<p class="lead">Click any patch: all patches of all images take the colour of their similarity to it.
Drag to sweep, or move the chosen patch with the arrow keys. A ring marks the most similar patch of every other
image.</p>
<noscript><p>This page computes its maps with JavaScript, which is switched off: only the images are shown.</p>
</noscript>"""

VIZ_TOOLS = Template("""<div class="tools" role="region" aria-label="Display"><div>
<fieldset><legend>What is shown</legend>$views</fieldset>
<label class="small" id="head-tool" hidden>Head <select id="head">$heads</select></label>
<label class="small" id="opacity-tool">Opacity <input id="opacity" type="range" min="10" max="100" value="70"></label>
<label class="small" id="smooth-tool"><input id="smooth" type="checkbox" checked> Smooth</label>
<label class="small" id="stretch-tool"><input id="stretch" type="checkbox" checked> Stretch contrast</label>
<div class="scale" id="scale"><span id="low">0</span><i id="scale-bar"></i><span id="high">1</span></div>
</div></div>""")

VIZ_MAIN = Template("""<div class="unseen" id="said" role="status" aria-live="polite"></div>
<div class="shots" style="--tall: $tall">$shots</div>
$sections""")
