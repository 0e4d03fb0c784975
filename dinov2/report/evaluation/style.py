"""Style of the evaluation page beyond the theme of all reports."""

__all__ = ["EVALUATION_STYLE"]

EVALUATION_STYLE = """
.apart { margin-top: 1.5rem; }
h3.apart { margin-bottom: .5rem; }
.dots { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr max-content; gap: .35rem 1rem;
  align-items: center; }
.dots h3 { grid-column: 1 / -1; margin-top: .9rem; }
.dots h3:first-child { margin-top: 0; }
.dots h3 span { color: var(--muted); font-weight: 400; font-size: .82rem; }
.dots .who { color: var(--muted); font-size: .88rem; overflow-wrap: anywhere; max-width: 18rem; }
.dots .value { font-weight: 600; font-variant-numeric: tabular-nums; text-align: right; }
.dots small, .figures small { color: var(--muted); font-weight: 400; font-size: .8em; }
.scale { position: relative; height: 1.4rem; border-radius: 6px; background: var(--grid); }
.scale .range { position: absolute; top: 50%; height: 6px; margin-top: -3px; border-radius: 3px; opacity: .4; }
.scale .point { position: absolute; top: 50%; width: 12px; height: 12px; margin: -6px 0 0 -6px; border-radius: 50%;
  box-shadow: 0 0 0 2px var(--card); }
.ends { display: flex; justify-content: space-between; margin-top: .2rem; color: var(--muted); font-size: .75rem; }
.dots .ends { grid-column: 2; }
@media (max-width: 40rem) {
  .dots { grid-template-columns: 1fr max-content; } .dots .who { grid-column: 1 / -1; margin-top: .3rem; }
  .dots .ends { grid-column: 1; }
}
.figures th[rowspan] { vertical-align: top; color: var(--ink); }
.figures td { white-space: nowrap; }
.figures .settingrow td { white-space: normal; border-bottom-width: 2px; padding-bottom: .6rem; }
.pairs td, .pairs th { white-space: nowrap; padding-right: 1.1rem; }
.notes { margin: .8rem 0 0; padding-left: 1.1rem; color: var(--muted); }
td.better { color: var(--good); font-weight: 600; }
td.worse { color: var(--bad); font-weight: 600; }
thead th { vertical-align: bottom; }
.folds > details { border: 0; margin-top: .6rem; }
.folds > details > summary { font-size: 1rem; }
.folds > details > :not(summary) { margin-top: .4rem; }
section > .legend { margin-bottom: .4rem; }
.classbars { display: grid; grid-template-columns: minmax(4rem, max-content) 1fr minmax(4rem, max-content) 1fr;
  gap: .55rem 1rem; align-items: center; }
@media (max-width: 44rem) { .classbars { grid-template-columns: minmax(4rem, max-content) 1fr; } }
.classbars .label { max-width: 11rem; font-size: .85rem; line-height: 1.25; overflow-wrap: anywhere; }
.bar { display: flex; align-items: center; gap: .5rem; height: .85rem; margin: 2px 0; }
.bar i { display: block; height: 100%; border-radius: 3px; min-width: 2px; max-width: calc(100% - 2rem); }
.bar span { color: var(--muted); font-size: .72rem; line-height: 1; font-variant-numeric: tabular-nums; }
.twos { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.confusion table { width: auto; border-collapse: separate; border-spacing: 2px; font-size: .72rem; }
.confusion th, .confusion td { padding: 0; border: 0; }
.confusion tbody th { vertical-align: middle; padding-right: .4rem; text-align: right; font-weight: 400; }
.confusion thead th { height: 5.5rem; font-weight: 400; }
.confusion thead span { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg); }
.confusion td { min-width: 1.75rem; height: 1.75rem; text-align: center; vertical-align: middle; border-radius: 4px;
  font-variant-numeric: tabular-nums; }
.confusion td.right { background: color-mix(in srgb, var(--good) calc(100% * var(--s)), var(--grid)); }
.confusion td.wrong { background: color-mix(in srgb, var(--bad) min(100%, calc(300% * var(--s))), var(--grid)); }
.confusion td.dark { color: #fff; }
.reliability figcaption { display: flex; flex-direction: column; gap: .4rem; }
.reliability .chips li { padding: .05rem .5rem; font-size: .78rem; }
.square { position: relative; max-width: 20rem; margin: .8rem auto 1.2rem; padding-left: 1.2rem; }
.square svg { display: block; width: 100%; aspect-ratio: 1; }
.square span { position: absolute; color: var(--muted); font-size: .72rem; line-height: 1; }
.square .y { left: 0; top: 50%; writing-mode: vertical-rl; transform: rotate(180deg) translateY(50%); }
.square .x { left: 50%; bottom: -.9rem; }
.square .o { left: 1.2rem; bottom: -.9rem; }
.square .e { right: 0; bottom: -.9rem; }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .9rem .8rem;
  align-items: start; margin: .4rem 0 1.2rem; }
.shots img, .shots .gone { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 8px;
  background: var(--grid); }
.shots .gone { display: grid; place-items: center; color: var(--muted); font-size: .75rem; }
.shots figcaption { display: flex; flex-direction: column; margin-top: .3rem; font-size: .78rem; line-height: 1.35;
  overflow-wrap: anywhere; }
.shots .said { color: var(--bad); }
.shots i { display: inline-block; width: .55rem; height: .55rem; margin-right: .35rem; border-radius: 50%; }
.shots span:not(.said) { color: var(--muted); font-size: .72rem; }
"""
