"""What the page of ``tsqp bench`` adds to the audit's style sheet, and its skeleton: one file without scripts."""

STYLE = """
:root {
  --c0: #3b6ea8; --c1: #d28a1e; --c2: #8b929c; --c3: #3f9a6b; --c4: #b5527a; --c5: #7a61b8; --c6: #5aa7b8;
  --c7: #a3764a; --c8: #58733a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --c0: #6f9fda; --c1: #e0a548; --c2: #79808b; --c3: #66c194; --c4: #d884a8; --c5: #a48fdc; --c6: #7fc6d6;
    --c7: #c79a6d; --c8: #9cb878;
  }
}
.plot { display: block; width: 100%; height: auto; margin: 8px 0 2px }
.plot text { font-size: 12.5px; fill: var(--ink); font-variant-numeric: tabular-nums }
.plot .tick, .plot .axis-title { fill: var(--soft); font-size: 12px }
.plot .val { fill: var(--soft); paint-order: stroke; stroke: var(--card); stroke-width: 5px }
.plot .grid { stroke: var(--line); stroke-width: 1; fill: none }
.plot .mark { stroke: var(--ink); stroke-width: 2; fill: none }
.plot .line { fill: none; stroke-width: 2 }
.c0 { fill: var(--c0); background: var(--c0) } .c1 { fill: var(--c1); background: var(--c1) }
.c2 { fill: var(--c2); background: var(--c2) } .c3 { fill: var(--c3); background: var(--c3) }
.c4 { fill: var(--c4); background: var(--c4) } .c5 { fill: var(--c5); background: var(--c5) }
.c6 { fill: var(--c6); background: var(--c6) } .c7 { fill: var(--c7); background: var(--c7) }
.c8 { fill: var(--c8); background: var(--c8) }
.l0 { stroke: var(--c0) } .l1 { stroke: var(--c1) } .l2 { stroke: var(--c2) } .l3 { stroke: var(--c3) }
.l4 { stroke: var(--c4) } .l5 { stroke: var(--c5) } .l6 { stroke: var(--c6) } .l7 { stroke: var(--c7) }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .45em; vertical-align: -1px }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 18px; margin: 0; font-size: .95rem }
.facts dt { color: var(--soft) } .facts dd { margin: 0; overflow-wrap: anywhere }
th.n { text-align: right } td.n { text-align: right }
td code { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
"""

SKELETON = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
