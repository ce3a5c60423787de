"""The page of a feature dashboard: its style and markup, into which `feature_dashboard` puts script and data."""

DARK = """color-scheme: dark; --ink: #e6e8ec; --paper: #15171b; --quiet: #a0a9b5; --line: #343a43; --raised: #1f2329;
  --accent: #7cc0ff; --heat: #c96c12; --up: #56b4e9; --down: #ff9466;"""

STYLE = """
:root { color-scheme: light; --ink: #1c1e21; --paper: #fdfdfc; --quiet: #5a626d; --line: #d9dce1; --raised: #f2f3f5;
  --accent: #0059a8; --heat: #e8740c; --up: #0072b2; --down: #c2410c; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { __DARK__ } }
:root[data-theme=dark] { __DARK__ }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); height: 100vh; display: grid;
  grid-template: auto 1fr / 21rem 1fr; font: 0.95rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: center;
  padding: 0.6rem 1rem; border-bottom: 1px solid var(--line); background: var(--raised); }
header h1 { font-size: 1.05rem; margin: 0 auto 0 0; letter-spacing: -0.01em; }
header h1 a { color: inherit; text-decoration: none; }
label { color: var(--quiet); font-size: 0.85rem; }
input, select, button { font: inherit; font-size: 0.9rem; color: var(--ink); background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; padding: 0.3rem 0.55rem; }
input[type=search] { width: 14rem; }
button { cursor: pointer; }
button:hover { border-color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
nav { overflow-y: auto; border-right: 1px solid var(--line); padding: 0.5rem; }
nav p { margin: 0.25rem 0.5rem 0.5rem; color: var(--quiet); font-size: 0.85rem; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav li a { display: grid; grid-template-columns: 3.1rem 1fr auto; gap: 0.5rem; padding: 0.22rem 0.5rem;
  border-radius: 6px; color: inherit; text-decoration: none; align-items: baseline; }
nav li a:hover { background: var(--raised); }
nav li a[aria-current] { background: color-mix(in srgb, var(--accent) 18%, var(--paper)); }
nav .words { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
nav button { width: 100%; margin: 0.5rem 0; }
.number, .quiet { font-variant-numeric: tabular-nums; color: var(--quiet); font-size: 0.85rem; }
main { overflow-y: auto; padding: 1.2rem 1.6rem 4rem; }
main:focus { outline: none; }
main > * { max-width: 64rem; }
h2 { font-size: 1.45rem; margin: 0 0 0.3rem; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
.bar { display: flex; gap: 0.5rem; align-items: baseline; flex-wrap: wrap; }
.facts { display: flex; flex-wrap: wrap; gap: 0.2rem 1.6rem; margin: 0.2rem 0 0; padding: 0; list-style: none; }
.facts b { font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 2.2rem; }
.panels h3 { margin-top: 1rem; }
code, .token { font: 0.86rem/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
ol.examples { list-style: none; margin: 0; padding: 0; }
ol.examples li { display: grid; grid-template-columns: 3rem 1fr; gap: 0.8rem; padding: 0.15rem 0;
  border-bottom: 1px solid var(--line); }
ol.examples .number { text-align: right; padding-top: 0.15rem; }
.token { white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 2px; padding: 0.12em 0; }
.token.peak { font-weight: 700; text-decoration: underline; text-underline-offset: 3px; }
.token.outside { color: var(--quiet); }
.chip { background: var(--raised); border-radius: 4px; padding: 0 0.25rem; white-space: pre; }
a[aria-current] .chip { background: color-mix(in srgb, var(--accent) 14%, var(--paper)); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td { padding: 0.05rem 0.4rem 0.05rem 0; text-align: left; vertical-align: baseline; }
td:last-child { text-align: right; padding-right: 0; }
.up { color: var(--up); }
.down { color: var(--down); }
a { color: var(--accent); }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
svg .line { stroke: var(--line); }
svg .fill, svg .dot { fill: var(--up); }
svg .dot.here { fill: var(--heat); }
svg .path { stroke: var(--up); fill: none; }
kbd { border: 1px solid var(--line); border-bottom-width: 2px; border-radius: 4px; padding: 0 0.3rem; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 0.5rem; background: var(--paper); z-index: 2; }
@media (max-width: 56rem) {
  body { display: block; height: auto; }
  nav { max-height: 14rem; border-right: 0; border-bottom: 1px solid var(--line); }
  main { padding: 1rem; }
  input[type=search] { width: 9rem; }
}
""".replace("__DARK__", DARK)

BODY = """
<a class="skip" href="#main" id="skip">To the feature</a>
<header>
  <h1><a href="#" title="Overview">__TITLE__</a></h1>
  <label>Search
    <input type="search" id="q" placeholder="token or number" autocomplete="off" spellcheck="false"></label>
  <label>in <select id="in">
    <option value="fires">tokens it fires on</option>
    <option value="writes">tokens it raises</option>
    <option value="context">contexts</option></select></label>
  <label>Sort <select id="sort">
    <option value="match">best match</option>
    <option value="number">number</option>
    <option value="often">fires most</option>
    <option value="rarely">fires least</option>
    <option value="max">largest activation</option>
    <option value="logit">largest logit</option></select></label>
  <button id="theme" type="button" aria-label="Switch between dark and light">◐</button>
</header>
<nav aria-label="Features"><p id="count" aria-live="polite"></p><ul id="list"></ul>
  <button id="more" type="button" hidden>Show more</button></nav>
<main id="main" tabindex="-1"></main>
<script type="application/json" id="data">__DATA__</script>
<script>__SCRIPT__</script>
"""
