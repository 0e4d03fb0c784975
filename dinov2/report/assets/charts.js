const shown = v => {
  const a = Math.abs(v);
  if (a >= 1000) return Math.round(v).toLocaleString("en");
  return a && a < 0.01 ? v.toExponential(2) : String(+v.toPrecision(4));
};
for (const plot of document.querySelectorAll(".plot[data-plot]")) {
  const data = JSON.parse(plot.dataset.plot);
  const [first, last] = data.x;
  const cursor = plot.querySelector(".cursor"), tip = plot.querySelector(".tip");
  const hide = () => { cursor.style.display = tip.style.display = "none"; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const wanted = first + (last - first) * (event.clientX - box.left) / box.width;
    const rows = data.series.map(([name, color, points]) => {
      const point = points.reduce((a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a);
      return [name, color, point];
    });
    if (!rows.length) return;
    const at = rows[0][2][0];
    const share = last > first ? (at - first) / (last - first) : 0.5;
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = data.label + " " + at.toLocaleString("en");
    tip.append(head);
    for (const [name, color, point] of rows) {
      const line = document.createElement("div"), dot = document.createElement("i");
      dot.style.background = "var(--c" + color + ")";
      line.append(dot, name + "  " + shown(point[1]) + data.unit);
      tip.append(line);
    }
    cursor.style.display = tip.style.display = "block";
    cursor.style.left = 100 * share + "%";
    tip.style.left = share < 0.5 ? "calc(" + 100 * share + "% + 10px)" : "auto";
    tip.style.right = share < 0.5 ? "auto" : "calc(" + 100 * (1 - share) + "% + 10px)";
  });
}
