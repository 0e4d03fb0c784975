"""What all pages have in common: one style sheet, one frame and one small script, all inlined into the page.

The frame forbids the browser to load anything, so that a page that is not complete in itself is seen to be broken.

Text beside curves is HTML and not SVG, so that it keeps its size on a phone while the curves shrink. Colours are
variables, which the dark scheme replaces.
"""

from collections.abc import Iterable
from html import escape
from string import Template

from dinov2.eval.result import now

__all__ = ["SCRIPT", "framed", "written"]


def framed(
    title: str,
    *,
    eyebrow: str,
    heading: str,
    facts: Iterable[tuple[str, str]],
    main: str,
    footer: str,
    lead: str = "",
    bar: str = "",
    style: str = "",
    end: str = "",
) -> str:
    """A whole page.

    Title, eyebrow, heading and facts (name, value) are text of any origin. All else is HTML: `lead` stands below the
    facts, `bar` between the head and `main`, `end` holds the scripts. `style` is added to the common style sheet.
    """
    return _FRAME.substitute(
        title=escape(title),
        eyebrow=escape(eyebrow),
        heading=escape(heading),
        chips="".join(f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in facts),
        lead=lead,
        bar=bar,
        main=main,
        footer=footer,
        style=_STYLE + style,
        end=end,
    )


def written() -> str:
    """The sentence that says when."""
    return f"Written {now().replace('T', ' ').replace('+00:00', ' UTC')}."


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #171a20; --muted: #5d6673; --line: #e2e5ea; --grid: #eceef2;
  --c1: #2f58d8; --c2: #d4622a; --c3: #0f8f7c; --c4: #8f49bd; --c5: #a87908; --c0: #8a93a0;
  --good: #178a55; --bad: #cc4040; --shadow: 0 1px 2px rgb(20 25 35 / .05), 0 4px 16px rgb(20 25 35 / .04);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --card: #171b21; --ink: #e9ebef; --muted: #98a2af; --line: #2a3039; --grid: #222830;
    --c1: #7f9dff; --c2: #ff9b66; --c3: #42c8b1; --c4: #c990ea; --c5: #ddb04a; --c0: #7b8593;
    --good: #3fbf83; --bad: #f07070; --shadow: none;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, header.top > div, nav > div, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header.top { padding: 2.75rem 0 1.5rem; }
.eyebrow { margin: 0; color: var(--c1); font-size: .8rem; font-weight: 650; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: .15rem 0 .5rem; font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .35rem; font-size: 1.35rem; letter-spacing: -.01em; }
h3 { margin: 0; font-size: .95rem; font-weight: 600; }
p { margin: .35rem 0 1rem; max-width: 44rem; }
.lead, .absent, .note, figcaption p { color: var(--muted); }
.absent { font-style: italic; }
.note { font-size: .875rem; }
code, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0; padding: 0; list-style: none; }
.chips li { padding: .15rem .65rem; border: 1px solid var(--line); border-radius: 99px; background: var(--card);
  color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
.chips b { color: var(--ink); font-weight: 600; }
nav { position: sticky; top: 0; z-index: 5; background: color-mix(in srgb, var(--page) 88%, transparent);
  backdrop-filter: blur(8px); border-bottom: 1px solid var(--line); }
nav > div { display: flex; gap: 1.25rem; overflow-x: auto; scrollbar-width: none; }
nav a { padding: .65rem 0; color: var(--muted); font-size: .9rem; text-decoration: none; white-space: nowrap; }
nav a:hover, nav a:focus-visible { color: var(--ink); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; box-shadow: var(--shadow);
  padding: 1.1rem 1.25rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.wide { grid-column: 1 / -1; }

.headline { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: minmax(13rem, 1fr) 2fr; align-items: center; }
@media (max-width: 44rem) { .headline { grid-template-columns: 1fr; } }
.big { margin: 0; font-size: clamp(2.8rem, 9vw, 4rem); font-weight: 700; line-height: 1; letter-spacing: -.03em; }
.big small { font-size: .45em; font-weight: 600; color: var(--muted); letter-spacing: 0; margin-left: .15em; }
.gains { margin: .6rem 0 0; padding: 0; list-style: none; color: var(--muted); font-size: .92rem; }
.gains b { color: var(--good); font-variant-numeric: tabular-nums; }
.gains b.loss { color: var(--bad); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .7rem .9rem; align-items: center; }
.bars .track { height: 1.35rem; border-radius: 6px; background: var(--grid); overflow: hidden; }
.bars .fill { height: 100%; border-radius: 6px; }
.bars .value { font-variant-numeric: tabular-nums; font-weight: 600; text-align: right; }

figure { margin: 0; min-width: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem .9rem; margin: .15rem 0 0; padding: 0; list-style: none;
  color: var(--muted); font-size: .8rem; }
.legend i { display: inline-block; width: .9rem; height: 3px; margin-right: .35rem; border-radius: 2px;
  vertical-align: middle; }
.legend .faint { opacity: .35; }
.legend .dashed { background: none !important; border-top: 2px dashed; height: 0; }
.frame { display: grid; grid-template-columns: 3rem 1fr; margin-top: .6rem; }
.plot { position: relative; height: 190px; touch-action: pan-y; }
.wide .plot { height: 250px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.ys { position: relative; }
.ys span, .xs span { position: absolute; color: var(--muted); font-size: .72rem; line-height: 1; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.ys span { right: .5rem; transform: translateY(-50%); }
.xs { grid-column: 2; position: relative; height: 1.3rem; }
.xs span { top: .45rem; transform: translateX(-50%); }
.xs span.last { transform: translateX(-100%); }
.xs span.first { transform: none; }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--muted); opacity: .5; display: none;
  pointer-events: none; }
.tip { position: absolute; top: 0; z-index: 2; display: none; pointer-events: none; min-width: max-content;
  padding: .4rem .6rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  box-shadow: 0 4px 16px rgb(0 0 0 / .18); font-size: .78rem; line-height: 1.45; font-variant-numeric: tabular-nums; }
.tip b { display: block; }
.tip i { display: inline-block; width: .55rem; height: .55rem; border-radius: 50%; margin-right: .4rem; }

.strips { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .5rem 1rem; align-items: center; }
.strips span { color: var(--muted); font-size: .82rem; text-align: right; font-variant-numeric: tabular-nums; }
.strips img { display: block; width: 100%; max-width: 54rem; border-radius: 6px; }
@media (max-width: 34rem) { .strips { grid-template-columns: 1fr; gap: .2rem; } .strips span { text-align: left; } }
.gallery { display: grid; gap: .9rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 29rem), 1fr)); }
.row { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .45rem; align-items: start; }
.row figure:first-child { padding-right: .45rem; border-right: 1px solid var(--line); }
.row img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 8px;
  border: 3px solid var(--line); }
.row .right img { border-color: var(--good); }
.row .wrong img { border-color: var(--bad); }
.row figcaption { margin-top: .2rem; color: var(--muted); font-size: .72rem; line-height: 1.3; text-align: center;
  overflow: hidden; text-overflow: ellipsis; }
.row .wrong figcaption { color: var(--bad); }
.row figure:first-child figcaption { color: var(--ink); font-weight: 600; }

.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; }
th, td { padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
td { overflow-wrap: anywhere; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
details { border-bottom: 1px solid var(--line); }
details:last-child { border-bottom: 0; }
summary { padding: .55rem 0; cursor: pointer; font-weight: 600; font-size: .95rem; }
summary span { color: var(--muted); font-weight: 400; font-size: .85rem; }
details table { margin: 0 0 .8rem; }
.settings td:first-child { width: 45%; color: var(--muted); }
footer { margin-top: 3rem; padding: 1.25rem; color: var(--muted); font-size: .85rem; }
@media print { nav { display: none; } .card { break-inside: avoid; box-shadow: none; } }
"""

SCRIPT = """
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
"""

_FRAME = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="dinov2-anywhere">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header class="top"><div>
<p class="eyebrow">$eyebrow</p>
<h1>$heading</h1>
<ul class="chips">$chips</ul>
$lead
</div></header>
$bar
<main>
$main
</main>
<footer>$footer</footer>
$end
</body>
</html>
""")
