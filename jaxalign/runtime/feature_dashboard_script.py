"""What a feature dashboard does in the browser: search, sort, links, and the drawing of one feature."""

SCRIPT = r"""
'use strict';
const D = JSON.parse(document.getElementById('data').textContent);
const KINDS = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array};
for (const name of D.arrays) {
  const bytes = Uint8Array.from(atob(D[name].data), c => c.charCodeAt(0));
  D[name] = new KINDS[D[name].type](bytes.buffer);
}
const {vocabulary, length, before, width, examples, bins, effects, related} = D;
const SHOWN = D.shown.length, ROWS = 300;
const slot = new Map();  // feature -> its place among those with examples
D.shown.forEach((f, s) => slot.set(f, s));
const folded = vocabulary.map(t => t.trim().toLowerCase());
const byId = id => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k === 'text' ? e.textContent = v : e.setAttribute(k, v);
  e.append(...children);
  return e;
}
function drawn(tag, attributes, text) {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
}
const picture = (w, h, label) => drawn('svg', {viewBox: `0 0 ${w} ${h}`, role: 'img', 'aria-label': label});
const line = (x1, y1, x2, y2, kind = 'line') => drawn('line', {class: kind, x1, y1, x2, y2});
const words = (x, y, text, anchor = 'start') => drawn('text', {x, y, 'text-anchor': anchor}, text);
const visible = t => t.replace(/\n/g, '⏎').replace(/\t/g, '⇥').replace(/\r/g, '␍');
const chip = id => element('code', {class: 'chip', text: visible(vocabulary[id])});
const short = x => x === 0 ? '0' : Math.abs(x) >= 1000 ? x.toFixed(0) : x.toPrecision(3);
const often = x => x === 0 ? 'never' : x >= 0.001 ? (100 * x).toPrecision(2) + '%'
  : '1 in ' + Math.round(1 / x).toLocaleString();

function peakTokens(s) {  // what the strongest examples fire on, most frequent first
  const seen = new Map();
  for (let i = 0; i < D.groups[0].count; i++) {
    const at = D.places[s * examples + i];
    if (at >= 0) seen.set(D.tokens[at], (seen.get(D.tokens[at]) || 0) + 1);
  }
  return [...seen].sort((a, b) => b[1] - a[1]);
}
const peaks = Array.from({length: SHOWN}, (_, s) => peakTokens(s));

function contextText(at) {
  const first = at - at % length, end = Math.min(first + length, at - before + width);
  let text = '';
  for (let t = Math.max(first, at - before); t < end; t++) text += vocabulary[D.tokens[t]];
  return text.toLowerCase();
}
function score(s, q) {  // how often the query is found; a whole token counts more than a part of one
  const one = id => folded[id] === q ? 3 : folded[id].includes(q) ? 1 : 0;
  let found = 0;
  if (state.in === 'fires') for (const [id, n] of peaks[s]) found += n * one(id);
  if (state.in === 'writes') for (let i = 0; i < effects; i++) found += one(D.topTokens[s * effects + i]);
  if (state.in === 'context') for (let i = 0; i < examples; i++) {
    const at = D.places[s * examples + i];
    if (at >= 0 && contextText(at).includes(q)) found++;
  }
  return found;
}

const state = {feature: null, q: '', in: 'fires', sort: 'match', wide: false};
let order = null, listed = ROWS;

function search() {
  const q = state.q.trim().toLowerCase(), match = new Map();
  let found = Array.from(D.density.keys());
  if (q) {
    for (const f of found) {
      const value = (slot.has(f) ? score(slot.get(f), q) : 0) + (String(f) === q ? 1e6 : 0);
      if (value) match.set(f, value);
    }
    found = [...match.keys()];
  }
  const logit = f => effects && slot.has(f) ? D.topValues[slot.get(f) * effects] : -Infinity;
  const by = {
    match: (a, b) => q ? match.get(b) - match.get(a) || D.density[b] - D.density[a] : 0,
    number: () => 0,
    often: (a, b) => D.density[b] - D.density[a],
    rarely: (a, b) => (D.density[a] || 2) - (D.density[b] || 2),  // those that never fire last
    max: (a, b) => D.maximum[b] - D.maximum[a],
    logit: (a, b) => logit(b) - logit(a) || 0,
  }[state.sort];
  order = found.sort((a, b) => by(a, b) || a - b);
  listed = ROWS;
}

function link(f) {
  const parts = [];
  if (f !== null) parts.push('feature=' + f);
  if (state.q) parts.push('q=' + encodeURIComponent(state.q));
  if (state.in !== 'fires') parts.push('in=' + state.in);
  if (state.sort !== 'match') parts.push('sort=' + state.sort);
  return '#' + parts.join('&');
}
function label(f, most) {
  const s = slot.get(f), span = element('span', {class: 'words'});
  if (s === undefined || !peaks[s].length) {
    span.append(element('span', {class: 'quiet', text: D.density[f] ? 'not shown' : 'never fires'}));
  } else {
    for (const [id] of peaks[s].slice(0, most)) span.append(chip(id), ' ');
  }
  return span;
}
function list() {
  byId('list').replaceChildren(...order.slice(0, listed).map(f => {
    const a = element('a', {href: link(f)}, element('span', {class: 'number', text: f}), label(f, 3),
      element('span', {class: 'quiet', text: D.density[f] ? often(D.density[f]) : ''}));
    if (f === state.feature) a.setAttribute('aria-current', 'true');
    return element('li', {}, a);
  }));
  byId('more').hidden = order.length <= listed;
  const all = D.density.length.toLocaleString();
  byId('count').textContent = state.q ? `${order.length.toLocaleString()} of ${all} features match` : `${all} features`;
}

function bars(counts, names, ends, title, unit) {
  const w = 320, h = 110, base = 88, most = Math.max(...counts, 1), svg = picture(w, h, title);
  svg.append(line(0, base, w, base));
  counts.forEach((c, i) => {
    const height = c ? Math.max(1, Math.sqrt(c / most) * (base - 12)) : 0, step = w / counts.length;
    const bar = drawn('rect', {class: 'fill', x: i * step + 0.5, width: step - 1, y: base - height, height});
    bar.append(drawn('title', {}, `${names[i]}: ${c.toLocaleString()} ${unit}`));
    svg.append(bar);
  });
  svg.append(words(0, h - 6, ends[0]), words(w, h - 6, ends[1], 'end'));
  svg.append(words(w, 10, `most: ${most.toLocaleString()} (heights: square roots)`, 'end'));
  return svg;
}
function strengths(s, maximum) {
  const counts = Array.from(D.histogram.slice(s * bins, (s + 1) * bins));
  const names = counts.map((_, b) => `${short(b * maximum / bins)} to ${short((b + 1) * maximum / bins)}`);
  return bars(counts, names, ['0', short(maximum)], 'How strong its firings are', 'tokens');
}
function densities() {
  const logs = Array.from(D.density).filter(x => x > 0).map(Math.log10);
  const low = Math.floor(logs.reduce((a, b) => Math.min(a, b), -1)), counts = new Array(40).fill(0);
  for (const x of logs) counts[Math.min(39, Math.floor((1 - x / low) * 40))]++;
  const names = counts.map((_, b) => `from ${often(10 ** (low - b * low / 40))} of tokens`);
  return bars(counts, names, [`10^${low} of tokens`, 'every token'], 'How often features fire', 'features');
}
function frontier() {
  const w = 320, h = 150, left = 34, base = 124, points = [...D.frontier].sort((a, b) => a.l0 - b.l0);
  const most = points[points.length - 1].l0 * 1.15, ends = points.flatMap(p => p.explained_variance);
  const low = Math.max(Math.min(...ends) - 0.03, -1), high = Math.min(Math.max(...ends) + 0.03, 1);
  const x = p => left + p.l0 / most * (w - left - 24), y = v => base - (v - low) / (high - low) * (base - 10);
  const svg = picture(w, h, 'Explained variance against L0');
  svg.append(line(left, base, w, base), line(left, 8, left, base));
  const path = points.map(p => `${x(p)},${y(p.explained_variance[0])}`).join(' ');
  svg.append(drawn('polyline', {class: 'path', points: path}));
  for (const p of points) {
    const [value, from, to] = p.explained_variance, here = p.name === D.name;
    const dot = drawn('circle', {class: here ? 'dot here' : 'dot', cx: x(p), cy: y(value), r: here ? 5 : 3.5});
    const interval = `${value.toFixed(3)} [${from.toFixed(3)}, ${to.toFixed(3)}]`;
    dot.append(drawn('title', {}, `${p.name}: L0 ${short(p.l0)}, explained variance ${interval}`));
    svg.append(line(x(p), y(from), x(p), y(to), 'path'), dot, words(x(p) + 6, y(value) + 14, p.name));
  }
  svg.append(words(left - 4, base, low.toFixed(2), 'end'), words(left - 4, 16, high.toFixed(2), 'end'));
  svg.append(words(left, h - 8, '0'), words(w, h - 8, `L0 up to ${short(most)}`, 'end'));
  return svg;
}
const panel = (title, ...content) => element('div', {}, element('h3', {text: title}), ...content);

function logits(s, values, tokens, title, kind) {
  const rows = [];
  for (let i = s * effects; i < (s + 1) * effects; i++) {
    const value = (values[i] > 0 ? '+' : '') + short(values[i]);
    rows.push(element('tr', {}, element('td', {}, chip(tokens[i])), element('td', {class: kind, text: value})));
  }
  return panel(title, element('table', {}, element('tbody', {}, ...rows)));
}
function companions(s) {
  const rows = [];
  for (let i = s * related; i < (s + 1) * related; i++) {
    const f = D.relatedFeatures[i];
    if (D.relatedValues[i] > 0.005) rows.push(element('tr', {},
      element('td', {}, element('a', {href: link(f), text: f})), element('td', {}, label(f, 1)),
      element('td', {class: 'quiet', text: D.relatedValues[i].toFixed(2)})));
  }
  if (!rows.length) return [];
  return [element('h3', {text: 'Correlated with'}), element('table', {}, element('tbody', {}, ...rows))];
}

function context(s, i, maximum) {
  const at = D.places[i], place = at % length, reach = state.wide ? 40 : 0, text = element('div');
  const end = Math.min(length, place - before + width + reach);
  for (let t = Math.max(0, place - before - reach); t < end; t++) {
    const w = t - place + before, inside = w >= 0 && w < width;
    const level = inside ? D.activations[i * width + w] / 255 : 0;
    const kind = 'token' + (t === place ? ' peak' : '') + (inside ? '' : ' outside');
    const token = element('span', {class: kind, text: visible(vocabulary[D.tokens[at - place + t]])});
    if (level > 0) {
      token.style.background = `color-mix(in srgb, var(--heat) ${Math.round(10 + 70 * level)}%, transparent)`;
      token.title = short(level * maximum);
    }
    text.append(token);
  }
  return element('li', {}, element('span', {class: 'number', text: short(peak(i, maximum))}), text);
}
const peak = (i, maximum) => D.activations[i * width + before] / 255 * maximum;

function group(s, start, g, maximum) {
  const found = [];
  for (let i = s * examples + start; i < s * examples + start + g.count; i++) if (D.places[i] >= 0) found.push(i);
  if (!found.length) return [];
  const values = found.map(i => peak(i, maximum));
  const range = `${short(Math.min(...values))} to ${short(Math.max(...values))}`;
  return [element('h3', {}, g.label + ' ', element('span', {class: 'quiet', text: range})),
    element('ol', {class: 'examples'}, ...found.map(i => context(s, i, maximum)))];
}

function button(text, action, attributes = {}) {
  const b = element('button', {type: 'button', text, ...attributes});
  b.addEventListener('click', action);
  return b;
}
function step(by) {
  const next = order.indexOf(state.feature) + by;
  if (next >= 0 && next < order.length) location.hash = link(order[next]);
}
function widen() {
  state.wide = !state.wide;
  feature(state.feature);
}
function feature(f) {
  const s = slot.get(f), maximum = D.maximum[f], main = byId('main');
  const head = element('div', {class: 'bar'}, element('h2', {text: 'Feature ' + f}),
    button('←', () => step(-1), {'aria-label': 'Previous feature'}),
    button('→', () => step(1), {'aria-label': 'Next feature'}),
    button('Longer contexts', widen, {'aria-pressed': state.wide}));
  const facts = [['fires on', often(D.density[f]) + (D.density[f] ? ' of tokens' : '')],
    ['largest', short(maximum)], ['mean when firing', short(D.mean[f])]];
  const line = element('ul', {class: 'facts'}, ...facts.map(([what, value]) =>
    element('li', {}, element('span', {class: 'quiet', text: what + ' '}), element('b', {text: value}))));
  if (s === undefined || !peaks[s].length) {
    const why = D.density[f] ? 'Its examples are not on this page: write it again with a larger --features.'
      : 'It fired on none of the tokens looked at.';
    main.replaceChildren(head, line, element('p', {text: why}));
    return;
  }
  const panels = element('div', {class: 'panels'}, panel('How strongly', strengths(s, maximum), ...companions(s)));
  if (effects) {
    panels.append(logits(s, D.topValues, D.topTokens, 'Raises', 'up'));
    panels.append(logits(s, D.bottomValues, D.bottomTokens, 'Lowers', 'down'));
  }
  const groups = [];
  let start = 0;
  for (const g of D.groups) {
    groups.push(...group(s, start, g, maximum));
    start += g.count;
  }
  main.replaceChildren(head, line, panels, ...groups);
  main.scrollTop = 0;
}

const READING = `Each feature shows where it fires most, then firings drawn at random and sorted into quarters by
strength: what the strongest have in common is often not what the others mean. The stronger a token activates the
feature, the stronger its colour; the underlined one is what the example is for. Raises and lowers are what the feature
writes straight to the logits, whatever later layers make of it. The address keeps feature and search.`;
const KEYS = [['/', 'search'], ['j', 'next feature'], ['k', 'previous feature'], ['w', 'longer contexts'],
  ['o', 'this overview']];
function overview() {
  const panels = element('div', {class: 'panels'}, panel('How often features fire', densities()));
  if (D.frontier.length) panels.append(panel('Explained variance against L0', frontier()));
  const keys = KEYS.flatMap(([key, what]) => [element('kbd', {text: key}), ` ${what}   `]);
  byId('main').replaceChildren(element('h2', {text: D.title}),
    element('ul', {}, ...D.facts.map(text => element('li', {text}))), panels,
    element('h3', {text: 'Reading this page'}), element('p', {text: READING}), element('p', {}, ...keys));
}

function read() {  // the address says what is shown
  const given = new URLSearchParams(location.hash.slice(1)), old = {...state}, number = given.get('feature');
  state.feature = number !== null && /^\d+$/.test(number) && +number < D.density.length ? +number : null;
  state.q = given.get('q') || '';
  for (const name of ['in', 'sort']) {
    const options = [...byId(name).options].map(o => o.value);
    state[name] = options.includes(given.get(name)) ? given.get(name) : options[0];
    byId(name).value = state[name];
  }
  if (document.activeElement !== byId('q')) byId('q').value = state.q;
  if (order === null || ['q', 'in', 'sort'].some(name => old[name] !== state[name])) search();
  listed = Math.max(listed, order.indexOf(state.feature) + ROWS / 2);
  list();
  state.feature === null ? overview() : feature(state.feature);
  document.title = (state.feature === null ? '' : `Feature ${state.feature} · `) + D.title;
  const here = document.querySelector('nav a[aria-current]');
  if (here) here.scrollIntoView({block: 'nearest'});
}
function edit(change) {
  Object.assign(state, change);
  history.replaceState(null, '', link(state.feature) === '#' ? location.pathname : link(state.feature));
  search();
  list();
}
for (const name of ['q', 'in', 'sort']) byId(name).addEventListener('input', e => edit({[name]: e.target.value}));
byId('more').addEventListener('click', () => { listed += ROWS; list(); });
byId('skip').addEventListener('click', e => { e.preventDefault(); byId('main').focus(); });
byId('theme').addEventListener('click', () => {
  const root = document.documentElement.dataset;
  const dark = root.theme ? root.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.theme = dark ? 'light' : 'dark';
});
document.addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.target.matches('input, select')) {
    if (e.key === 'Escape') e.target.blur();
    if (e.key === 'Enter' && e.target.id === 'q' && order.length) {
      e.target.blur();
      location.hash = link(order[0]);
    }
    return;
  }
  if (e.key === '/') { e.preventDefault(); byId('q').focus(); byId('q').select(); }
  if (e.key === 'j' || e.key === 'ArrowRight') step(1);
  if (e.key === 'k' || e.key === 'ArrowLeft') step(-1);
  if (e.key === 'o') location.hash = link(null);
  if (e.key === 'w' && state.feature !== null) widen();
});
addEventListener('hashchange', read);
read();
"""
