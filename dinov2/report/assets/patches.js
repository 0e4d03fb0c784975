const page = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const raw = text => {
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = packed.charCodeAt(i);
  return bytes;
};
const clamp = (value, high) => Math.max(0, Math.min(high, value));
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

const state = { image: page.start[0], x: page.start[1], y: page.start[2] };
const paneOf = (i, m) => panes.find(pane => pane.i === i && pane.m === m);
const cellAt = (pane, x, y) => [clamp(Math.floor(y * pane.rows), pane.rows - 1),
  clamp(Math.floor(x * pane.cols), pane.cols - 1)];

function cosines(pane, other, index) {
  const { features, inverse, dims } = pane, n = inverse.length, values = new Float32Array(n);
  const query = Float32Array.from(other.features.subarray(index * dims, (index + 1) * dims));
  for (let p = 0, at = 0; p < n; p++) {
    let sum = 0;
    for (let d = 0; d < dims; d++) sum += query[d] * features[at++];
    values[p] = sum * inverse[p] * other.inverse[index];
  }
  return values;
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
  return page.palette[Math.round(255 * clamp((value - low) / Math.max(high - low, 1e-9), 1))];
}
function headValues(pane) {  // of the chosen head, or the mean of all heads without the registers
  const heads = state.head < 0 ? pane.heads.filter(head => head.label >= 0) : [pane.heads[state.head]];
  return Float32Array.from(pane.norms, (_, p) =>
    heads.reduce((sum, head) => sum + head.values[p] * head.high / 255, 0) / heads.length);
}
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
  const all = Float32Array.from(panes.filter(pane => pane.m === m).flatMap(pane => Array.from(pane.similar))).sort();
  return [all[Math.floor(all.length * 0.02)], 1];
}
function draw() {
  const { view } = state, spans = {};
  for (const m of page.models.keys()) spans[m] = view === "similarity" ? limits(m) : page.models[m].norms;
  for (const pane of panes) {
    const { data } = pane, near = pane.stage.querySelector(".near");
    let note = "", values, span = spans[pane.m];
    if (view === "similarity") {
      values = pane.similar;
      note = near.style.display === "none" ? "chosen patch" : "most similar " + shown(values[pane.best]);
    } else if (view === "norm") {
      values = Float32Array.from(pane.norms, byte => data.norm_low + (data.norm_high - data.norm_low) * byte / 255);
      note = "high norm " + (100 * data.high_share).toFixed(1) + " %";
    } else if (view === "attention" && pane.heads.length) {
      values = headValues(pane);
      span = [0, values.reduce((a, b) => Math.max(a, b), 1e-9)];
      note = "up to " + shown(100 * span[1]) + " %";
    }
    pane.canvas.style.display = values || view === "pca" ? "block" : "none";
    if (values) paint(pane.canvas, pane.rows, pane.cols, state.opacity, p => ofPalette(values[p], ...span));
    if (view === "pca") paint(pane.canvas, pane.rows, pane.cols, state.opacity,
      p => pane.pca[4 * p + 3] ? pane.pca.subarray(4 * p) : null);
    for (const sign of [near, pane.stage.querySelector(".mark")]) sign.style.opacity = view === "similarity" ? 1 : 0;
    $("note-" + pane.i + "-" + pane.m).textContent = note;
  }
  const attention = view === "attention", one = !attention && page.models.length === 1 && spans[0];
  $("low").textContent = one ? shown(one[0]) : attention ? "0" : "low";
  $("high").textContent = one ? shown(one[1]) : attention ? "most" : "high";
  $("scale").hidden = view === "pca" || view === "image";
  $("head-tool").hidden = !attention;
  $("stretch-tool").hidden = view !== "similarity";
  $("opacity-tool").hidden = $("smooth-tool").hidden = view === "image";
}
function read() {
  state.view = document.querySelector("input[name=view]:checked")?.value || "similarity";
  state.opacity = $("opacity").value / 100; state.stretch = $("stretch").checked; state.head = +$("head").value;
  document.body.classList.toggle("smooth", $("smooth").checked);
  draw();
}
function choose(pane, x, y) {
  state.image = pane.i; state.x = x; state.y = y;
  $("view-similarity").checked = true;
  compare(); read();
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
    return [clamp((event.clientX - box.left) / box.width, 0.9999), clamp((event.clientY - box.top) / box.height, 0.9999)];
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
    const here = state.image === pane.i, [down, right] = here && step || [0, 0];
    const [row, col] = here ? cellAt(pane, state.x, state.y) : [pane.rows >> 1, pane.cols >> 1];
    choose(pane, (clamp(col + right, pane.cols - 1) + 0.5) / pane.cols, (clamp(row + down, pane.rows - 1) + 0.5) / pane.rows);
  });
}
document.querySelector(".tools").addEventListener("input", read);
for (const canvas of document.querySelectorAll("canvas[data-head]")) {
  const [i, m, h] = canvas.dataset.head.split(" ").map(Number), pane = paneOf(i, m), head = pane.heads[h];
  paint(canvas, pane.rows, pane.cols, 0.85, p => ofPalette(head.values[p], 0, 255));
}
$("scale-bar").style.background = "linear-gradient(90deg," + page.palette.filter((_, i) => i % 15 === 0)
  .map(rgb => "rgb(" + rgb + ")").join(",") + ")";
compare(); read();
