"""The style of the evaluation's page: light and dark, for phones and large screens."""

# Colours are those of Okabe & Ito (Color Universal Design, 2008), told apart by all kinds of sight.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --dim: #5c5f66; --paper: #fff; --line: #d4d7dd;
  --mark: #eef5fb; --heat: #c8402a; --m0: #8a8f98; --m1: #0072b2; --m2: #d55e00; --m3: #009e73;
  --m4: #b8578f; --m5: #9a7d00; --m6: #3a9fd4; --m7: #6a4c93; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --dim: #a5a9b3; --paper: #16171b; --line: #3a3d45; --mark: #1e2a36;
    --heat: #e0573f; --m0: #9aa0aa; --m1: #4ea8de; --m2: #f08a3c; --m3: #2cc295; --m4: #dd8dbc;
    --m5: #d8bd3d; --m6: #8fd0f2; --m7: #ad90d6; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
.verdict { background: var(--mark); border-left: 4px solid var(--m1); padding: .75rem 1rem;
  margin: 0 0 1rem; font-weight: 600; }
.note, footer, caption { color: var(--dim); font-size: .875rem; }
.missed { color: var(--heat); }
footer { margin-top: 3rem; }
ul { padding-left: 1.25rem; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem;
  font-size: .875rem; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px;
  background: var(--c); }
svg { display: block; width: 100%; height: auto; max-width: 34rem; margin: .5rem 0 1rem; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
svg text.strong { font-weight: 600; }
svg text.small { font-size: 9px; }
svg text.end { text-anchor: end; }
svg text.middle { text-anchor: middle; }
.m0 { --c: var(--m0); } .m1 { --c: var(--m1); } .m2 { --c: var(--m2); } .m3 { --c: var(--m3); }
.m4 { --c: var(--m4); } .m5 { --c: var(--m5); } .m6 { --c: var(--m6); } .m7 { --c: var(--m7); }
.bar { fill: var(--c); }
.dot { fill: var(--c); fill-opacity: .55; stroke: var(--c); }
.whisker { fill: none; stroke: var(--ink); stroke-width: 1; }
.leader { fill: none; stroke: var(--c); stroke-width: .75; }
.dashed { stroke-dasharray: 4 3; }
.grid { stroke: var(--line); stroke-width: .75; }
.cell { fill: var(--heat); stroke: var(--line); stroke-width: .5; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child { text-align: left; }
thead th { vertical-align: bottom; }
"""
