"""The page's style sheet and skeleton: one file, no request to anywhere, light and dark."""

STYLE = """
:root {
  --paper: #f7f6f2; --card: #ffffff; --ink: #22252b; --soft: #646b76; --line: #dfdcd3;
  --good: #1d7a46; --good-bg: #dcf2e3; --bad: #a8322b; --bad-bg: #f9e1de; --accent: #2b5fa8; --bar: #7d9cc9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --card: #1d2026; --ink: #e4e6ea; --soft: #9aa2ae; --line: #32363e;
    --good: #74d49c; --good-bg: #173626; --bad: #f09a90; --bad-bg: #43201d; --accent: #86b1f0; --bar: #54729f;
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 .5rem; letter-spacing: -.02em }
h2 { font-size: 1.35rem; margin: 3rem 0 .35rem; letter-spacing: -.01em }
h3 { font-size: 1.1rem; margin: 0 }
p { margin: .4rem 0; max-width: 72ch }
.soft { color: var(--soft) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px;
  margin: 16px 0 }
.head { display: flex; align-items: baseline; justify-content: space-between; gap: 16px; flex-wrap: wrap }
.score { font-size: 1.7rem; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap }
.score small { font-size: .8rem; font-weight: 400; color: var(--soft); margin-left: .35em }
.state { font-size: .8rem; font-weight: 650; border-radius: 99px; padding: 3px 12px; vertical-align: 4px;
  margin-right: 10px }
.leaks .state { color: var(--bad); background: var(--bad-bg) }
.holds .state { color: var(--good); background: var(--good-bg) }
.both { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 18px; margin-top: 12px }
@media (max-width: 760px) { .both { grid-template-columns: minmax(0, 1fr) } }
.label { font-size: .75rem; text-transform: uppercase; letter-spacing: .07em; color: var(--soft); margin-bottom: 4px }
.text { font: 14.5px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere }
.t { border-radius: 3px; padding: 1px 0 }
.t.right { background: var(--good-bg); color: var(--good) }
.t.wrong { background: var(--bad-bg); color: var(--bad); text-decoration: underline dotted 1px;
  text-underline-offset: 3px }
.t.none { color: var(--soft); background: var(--line) }
.chart { margin-top: 14px } .chart svg { display: block; width: 100%; height: 84px }
.chart rect { fill: var(--bar) }
.axis { display: flex; justify-content: space-between; font-size: .78rem; color: var(--soft);
  font-variant-numeric: tabular-nums; border-top: 1px solid var(--line); padding-top: 3px }
.tag { font-size: .75rem; border: 1px solid var(--line); border-radius: 99px; padding: 1px 9px; color: var(--soft);
  margin-left: 8px; vertical-align: 2px; white-space: nowrap }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem }
th, td { padding: 8px 12px 8px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums }
tr.group td { padding-top: 20px; font-weight: 650; border-bottom: 2px solid var(--line) }
.ok { color: var(--good); white-space: nowrap } .wrongly { color: var(--bad); font-weight: 700; white-space: nowrap }
.note { color: var(--soft); font-size: .85rem }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; overflow-x: auto;
  font: 14px/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.legend { display: flex; gap: 18px; flex-wrap: wrap; font-size: .88rem; color: var(--soft); margin-top: 10px }
"""

SKELETON = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>What the worker could read</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
