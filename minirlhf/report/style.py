"""The page's style sheet: light and dark, for phones, desktops and print."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #20242c; --quiet: #5a626e; --grid: #dfe2e7; --line: #e2dfd9;
  --healthy: #24763f; --link: #0a5c97; --bad: #b3341f; --good: #24763f; --warn: #fff3d6; --warn-line: #d9a520;
  --c-base: #767b84; --c-sft: #0072b2; --c-reward-model: #b0568c; --c-ppo: #d55e00; --c-ppo-ptx: #008a63;
  --c-rloo: #1f9dc4; --c-grpo: #332288; --c-dpo: #882255; --c-truth: #8a6600;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", "Source Serif Pro", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --card: #1d2026; --ink: #e7e5e0; --quiet: #a3a9b3; --grid: #31363f; --line: #33373f;
    --healthy: #5cc681; --link: #7cbcf0; --bad: #ff8f78; --good: #6fcf8f; --warn: #3a3018; --warn-line: #d9a520;
    --c-base: #a7adb7; --c-sft: #58b0ea; --c-reward-model: #dd8fbd; --c-ppo: #ff8b45; --c-ppo-ptx: #3ec79b;
    --c-rloo: #5fcbea; --c-grpo: #a59bff; --c-dpo: #e8688c; --c-truth: #e0b644;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 var(--serif); }
main { max-width: 1120px; margin: 0 auto; padding: 56px 28px 72px; }
p, ul, .lead { max-width: 44em; }
h1, h2, h3, h4 { line-height: 1.25; text-wrap: balance; }
h1 { margin: 0; font: 600 15px/1.4 var(--sans); letter-spacing: .04em; color: var(--quiet); }
h2 { margin: 72px 0 8px; font-size: 28px; font-weight: 600; }
h3 { margin: 40px 0 4px; font-size: 20px; font-weight: 600; }
a { color: var(--link); }
code, pre { font: 14px/1.5 var(--mono); }
pre { padding: 14px 16px; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.headline { margin: 12px 0 20px; max-width: 26em; font-size: clamp(25px, 4vw, 38px); line-height: 1.25;
  font-weight: 500; text-wrap: pretty; }
.whole { white-space: nowrap; }
.findings { padding-left: 1.1em; }
.findings li { margin: 6px 0; }
.caveat { padding: 12px 18px; background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 4px; }
nav { margin: 28px 0 0; font: 14px/2 var(--sans); }
nav a { margin-right: 1.3em; white-space: nowrap; text-decoration: none; }
nav a:hover { text-decoration: underline; }

.ladder { display: grid; grid-template-columns: repeat(var(--steps), 1fr); gap: 14px; align-items: end;
  margin: 28px 0 8px; padding: 0; list-style: none; max-width: none; }
.ladder li { position: relative; font: 14px/1.45 var(--sans); }
.ladder .rung { padding: 12px 14px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px 10px 0 0; border-top: 4px solid var(--colour); }
.ladder .stair { height: var(--rise); background: var(--colour); opacity: .85; border-radius: 0 0 4px 4px; }
.ladder .judge .rung { border: 1.5px dashed var(--colour); border-radius: 10px; margin-bottom: 34px; }
@media (min-width: 901px) { /* equal, so that only the stairs differ */
  .ladder .rung { min-height: 158px; }
  .ladder.many .rung { min-height: 210px; }
}
.ladder b { display: block; font-size: 16px; }
.ladder .value { display: block; margin-top: 6px; font-weight: 600; font-variant-numeric: tabular-nums; }
.ladder li + li::before { content: "→"; position: absolute; left: -15px; top: 34px; width: 16px; text-align: center;
  color: var(--quiet); font-size: 15px; }
.ladder li.other::before { content: "or"; font-size: 12px; }
.base { --colour: var(--c-base); } .sft { --colour: var(--c-sft); } .reward-model { --colour: var(--c-reward-model); }
.ppo { --colour: var(--c-ppo); } .ppo-ptx { --colour: var(--c-ppo-ptx); }
.rloo { --colour: var(--c-rloo); } .grpo { --colour: var(--c-grpo); } .dpo { --colour: var(--c-dpo); }

.wide { overflow-x: auto; margin: 20px 0 8px; }
table { border-collapse: collapse; font: 15px/1.4 var(--sans); font-variant-numeric: tabular-nums; }
th, td { padding: 9px 13px; text-align: right; vertical-align: baseline; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--quiet); font-weight: 500; font-size: 13px;
  border-bottom-color: var(--quiet); white-space: normal; min-width: 5.4em; }
tbody th, th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--paper); }
td small { display: block; color: var(--quiet); font-size: 12.5px; }
th .dot { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 50%;
  background: var(--colour); }
abbr { text-decoration: underline dotted var(--quiet); text-underline-offset: 3px; cursor: help; }
.notes { columns: 2; column-gap: 40px; margin: 18px 0 0; font: 14px/1.5 var(--sans); color: var(--quiet); }
.notes div { break-inside: avoid; margin-bottom: 8px; }
.notes dt { display: inline; font-weight: 600; color: var(--ink); }
.notes dd { display: inline; margin: 0; }

.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 30px 36px;
  margin: 22px 0 0; }
figure { margin: 0; break-inside: avoid; max-width: 560px; }
figure h4 { margin: 0 0 2px; font: 600 15px/1.35 var(--sans); }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: var(--sans) !important; }
figcaption { margin-top: 4px; font: 14px/1.5 var(--sans); color: var(--quiet); }

.example { margin: 34px 0 0; }
.example h3 { display: flex; flex-wrap: wrap; gap: 2px 18px; align-items: baseline; margin: 0 0 10px;
  white-space: pre-line; break-after: avoid; }
.best { font: 13px/1.4 var(--sans); color: var(--quiet); }
.answers { display: grid; grid-template-columns: repeat(var(--shown), minmax(0, 1fr)); gap: 12px; }
.answer { display: flex; flex-direction: column; padding: 12px 14px; background: var(--card);
  border: 1px solid var(--line); border-top: 3px solid var(--colour); border-radius: 8px; break-inside: avoid; }
.answer h4 { display: flex; justify-content: space-between; margin: 0; font: 600 13px/1.4 var(--sans); }
.won { font-weight: 500; color: var(--good); }
.won::before { content: "★ "; }
blockquote { flex: 1; margin: 8px 0 12px; font-size: 16px; line-height: 1.45; white-space: pre-line;
  overflow-wrap: anywhere; }
.cut { font: 600 13px/1.4 var(--sans); color: var(--bad); white-space: nowrap; }
.none { color: var(--quiet); font-style: italic; }
.total { display: flex; justify-content: space-between; gap: 8px; margin: 0; padding-top: 8px;
  font: 13px/1.4 var(--sans); border-top: 1px solid var(--line); }
.total b, .parts { font-variant-numeric: tabular-nums; }
.parts { margin: 4px 0 0; font: 12.5px/1.6 var(--sans); color: var(--quiet); }
.parts div { display: flex; justify-content: space-between; gap: 6px; }
.parts dt { white-space: nowrap; }
.parts dd { display: flex; align-items: center; gap: 6px; margin: 0; }
.parts b { min-width: 3em; font-weight: 400; text-align: right; }
.bar { position: relative; width: 60px; height: 7px; border-radius: 2px; background:
  linear-gradient(90deg, transparent calc(50% - .5px), var(--quiet) 0, var(--quiet) calc(50% + .5px), transparent 0),
  var(--grid); }
.bar i { position: absolute; top: 0; bottom: 0; }
.plus { background: var(--good); } .minus { background: var(--bad); }

details { margin: 18px 0; font: 14px/1.5 var(--sans); }
summary { cursor: pointer; font-weight: 600; }
td.told, thead .told { text-align: left; white-space: normal; }
.facts th { font-weight: 500; color: var(--quiet); } .facts td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line); font: 14px/1.5 var(--sans);
  color: var(--quiet); }

@media (max-width: 900px) {
  .answers { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .ladder { grid-template-columns: 1fr; gap: 24px; }
  .ladder .rung, .ladder .judge .rung { margin: 0; border-radius: 10px 10px 0 0; }
  .ladder .judge .rung { border-radius: 10px; }
  .ladder .stair { height: 8px; width: var(--share); }
  .ladder li + li::before { content: "↓"; left: 22px; top: -23px; }
  .ladder li.other::before { content: "or"; }
}
@media (max-width: 640px) {
  main { padding: 32px 18px 48px; }
  h2 { margin-top: 52px; font-size: 24px; }
  .notes { columns: 1; }
  .answers { grid-template-columns: 1fr; }
  th, td { padding: 8px 9px; }
}
@media print {
  :root { --paper: #ffffff; --card: #ffffff; --ink: #000000; --quiet: #444444; --grid: #dddddd; --line: #bbbbbb; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .plots { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; }
  th, td { padding: 4px 6px; font-size: 9pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""".strip()
