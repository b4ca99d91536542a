"use strict";
/* Unpacks the index, then a row when it is opened. Data enters the page only as text nodes and
   attribute values set from here, never as markup. */

const SHOWN = 2000; // rows of the index drawn before someone asks for all
const ID = 0, PROMPT = 1, RESPONSE = 2, SCORE = 3, METHOD = 4, SIZE = 5; // fields of an entry
const PARENT = 0, TEXT = 1, VALUE = 2, PLACE = 3, FINISHED = 4, OBJECTIVES = 5; // of a candidate
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// ---- numbers and texts

const count = (number) => number.toLocaleString("en");
const plural = (number, one, many) => `${count(number)} ${number === 1 ? one : many}`;

function fixed(value, digits = 2) {
  const number = Number(value);
  if (Number.isNaN(number)) return "n/a";
  if (!Number.isFinite(number)) return number < 0 ? "−∞" : "∞";
  if (Math.abs(number) >= 1e6) return number.toExponential(1).replace("-", "−").replace("e+", "e");
  return number.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");
}

function signed(value, digits = 2) {
  const text = fixed(value, digits);
  return Number(value) > 0 && /[1-9∞]/.test(text) ? `+${text}` : text;
}

const exact = (value) => (Number.isFinite(Number(value)) ? String(value).replace("-", "−") : fixed(value));

/* Control characters as pictures of themselves, so that nothing in a text is invisible. */
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, "\u2421");
}

const oneLine = (text) => visible(text).replace(/\n/g, "↵").replace(/\t/g, "⇥");
const excerpt = (text) => (text.length > 240 ? `${text.slice(0, 240).replace(/[\ud800-\udbff]$/, "")}…` : text);

// ---- the index

const state = { index: null, order: [], matching: [], rows: [], sort: null, scroll: 0, opened: null, turn: 0 };

/* Places after the point that tell the shades of tokens apart. */
const ratioDigits = () => Math.max(2, 2 - Math.floor(Math.log10(state.index.scale)) - 1);

function summary(entries) {
  const scores = entries.map((entry) => Number(entry[SCORE])).filter(Number.isFinite);
  const parts = [[plural(entries.length, "prompt", "prompts")]];
  const methods = [...new Set(entries.map((entry) => entry[METHOD]))].filter(Boolean);
  if (methods.length) parts.push([el("bdi", {}, methods.map(visible).join(", "))]);
  if (scores.length) {
    const mean = scores.reduce((sum, score) => sum + score, 0) / scores.length;
    const squares = scores.reduce((sum, score) => sum + (score - mean) ** 2, 0);
    const error = scores.length > 1 ? Math.sqrt(squares / (scores.length - 1) / scores.length) : NaN;
    parts.push([`mean score ${fixed(mean)}${Number.isFinite(error) ? ` ± ${fixed(error)} (standard error)` : ""}`]);
    const low = scores.reduce((a, b) => Math.min(a, b)), high = scores.reduce((a, b) => Math.max(a, b));
    parts.push([`from ${fixed(low)} to ${fixed(high)}`]);
  }
  return parts.flatMap((part, i) => (i ? [" · ", ...part] : part));
}

function indexRow(entry) {
  const clamp = (text) => el("span", { class: "clamp", dir: "auto" }, oneLine(excerpt(text)));
  const row = el("tr", { role: "row" },
    el("td", { role: "cell", class: "row number" }, el("a", { href: `#row-${entry[ID]}` }, String(entry[ID]))),
    el("td", { role: "cell", class: "prompt" }, clamp(entry[PROMPT])),
    el("td", { role: "cell", class: "response" }, clamp(entry[RESPONSE])),
    el("td", { role: "cell", class: "size number" }, count(entry[SIZE])),
    el("td", { role: "cell", class: "score", title: exact(entry[SCORE]) }, fixed(entry[SCORE])));
  row.addEventListener("click", (event) => {
    if (!event.target.closest("a") && !String(getSelection())) location.hash = `row-${entry[ID]}`;
  });
  return row;
}

function drawIndex(all = false) {
  const entries = state.index.rows;
  const filter = byId("filter").value.trim().toLowerCase();
  const number = /^#-?\d+$/.test(filter) ? Number(filter.slice(1)) : null;
  const words = filter.split(/\s+/).filter(Boolean);
  state.texts ??= entries.map((entry) => `${entry[PROMPT]}\n${entry[RESPONSE]}`.toLowerCase());
  state.matching = state.order.filter((i) => number === null
    ? words.every((word) => state.texts[i].includes(word)) : entries[i][ID] === number);
  const shown = all ? state.matching : state.matching.slice(0, SHOWN);
  byId("rows").replaceChildren(...shown.map((i) => (state.rows[i] ??= indexRow(entries[i]))));
  const total = entries.length, found = state.matching.length;
  byId("count").value = filter ? `${count(found)} of ${count(total)}` : "";
  byId("more").hidden = shown.length === found;
  byId("more").firstChild.textContent = `Show all ${count(found)}`;
}

function sortBy(header) {
  const field = Number(header.firstChild.dataset.sort);
  const numeric = field === ID || field === SCORE || field === SIZE;
  const first = field === SCORE || field === SIZE ? "descending" : "ascending";
  const now = header.getAttribute("aria-sort");
  const way = now === null ? first : now === "ascending" ? "descending" : "ascending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", way);
  const entries = state.index.rows, sign = way === "ascending" ? 1 : -1;
  const words = new Intl.Collator();
  const key = (i) => { const value = Number(entries[i][field]); return Number.isNaN(value) ? -Infinity : value; };
  const compare = numeric
    ? (a, b) => (key(a) === key(b) ? 0 : key(a) < key(b) ? -1 : 1)
    : (a, b) => words.compare(entries[a][field].slice(0, 240), entries[b][field].slice(0, 240));
  state.order = entries.map((_, i) => i).sort((a, b) => sign * compare(a, b) || a - b);
  drawIndex();
}

// ---- the winner's tokens

function shade(token, ratio) {
  const size = Math.min(1, Math.abs(Number(ratio)) / state.index.scale);
  token.style.setProperty("--t", Number.isFinite(size) ? size.toFixed(3) : 0);
  token.classList.toggle("less", Number(ratio) < 0);
  return token;
}

function tokenSpan([text, ratio], sum) {
  const pieces = visible(text).split(/([\n\t])/).flatMap((piece) => piece === "\n"
    ? [el("span", { class: "mark", "aria-hidden": "true" }, "↵"), "\n"] : piece);
  const token = el("span", { class: "token", title: `${exact(ratio)}  (sum so far ${fixed(sum)})` }, ...pieces);
  const value = el("i", { dir: "ltr" }, signed(ratio, ratioDigits()));
  if (pieces.at(-1) === "\n") token.lastChild.before(value); else token.append(value);
  return shade(token, ratio);
}

function tokensSection(tokens) {
  const box = el("div", { class: "prose tokens", dir: "auto", tabindex: "0", role: "group", "aria-describedby": "readout",
    "aria-label": "The winner's tokens; arrow keys read their log-ratios" });
  let sum = 0;
  const sums = tokens.map(([, ratio]) => (sum += Number(ratio)));
  const spans = tokens.map((token, i) => tokenSpan(token, sums[i]));
  box.append(...spans);
  const readout = el("p", { class: "readout muted", id: "readout", "aria-live": "polite" });
  const idle = `${plural(tokens.length, "token", "tokens")}, log-ratios summing to ${fixed(sum)}`;
  let here = null;
  const read = (i) => {
    here?.classList.remove("here");
    here = i === null ? null : spans[i];
    here?.classList.add("here");
    readout.textContent = i === null ? idle
      : `Token ${count(i + 1)} “${oneLine(tokens[i][0])}”: log-ratio ${exact(tokens[i][1])}, sum so far ${fixed(sums[i])}`;
  };
  box.addEventListener("mouseover", (event) => {
    const token = event.target.closest(".token");
    if (token) read(spans.indexOf(token));
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const to = step ? Math.max(0, Math.min(tokens.length - 1, spans.indexOf(here) + step))
      : event.key === "Home" ? 0 : event.key === "End" ? tokens.length - 1 : null;
    if (to === null) return;
    event.preventDefault();
    read(to);
    here.scrollIntoView({ block: "nearest" });
  });
  read(null);
  const valued = el("input", { type: "checkbox", id: "valued" });
  valued.addEventListener("change", () => box.classList.toggle("valued", valued.checked));
  const scale = state.index.scale, steps = [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1];
  const swatches = steps.map((step) => shade(el("span", { class: "token" },
    `${step === -1 ? "≤ " : step === 1 ? "≥ " : ""}${signed(step * scale, ratioDigits())}`), step * scale));
  return el("section", {},
    el("div", { class: "bar" }, el("h3", {}, "Response"),
      el("label", { class: "switch" }, valued, "Numbers beside the tokens")),
    box, readout,
    el("div", { class: "legend" }, el("span", { class: "muted" }, "log p tuned − log p untuned"),
      el("span", { class: "swatches" }, ...swatches),
      el("span", { class: "muted" }, "dotted underline: below zero")));
}

// ---- a row

const fact = (name, value, title) => el("div", {}, el("dt", {}, name), el("dd", { title }, value));

function crumbs(i) {
  const at = state.matching.indexOf(i);
  const link = (to, text, key) => (to === undefined
    ? el("a", { "aria-disabled": "true" }, text)
    : el("a", { href: `#row-${state.index.rows[to][ID]}`, "data-key": key }, text));
  return el("nav", { class: "crumbs", "aria-label": "Rows" },
    el("a", { href: "#", "data-key": "Escape" }, "All prompts"),
    el("span", { class: "push" }, link(at > 0 ? state.matching[at - 1] : undefined, "‹ Previous", "p")),
    link(at >= 0 ? state.matching[at + 1] : state.matching[0], "Next ›", "n"));
}

function drawRow(i, detail) {
  const entry = state.index.rows[i];
  const prose = (name, text, kind) => el("section", {}, el("div", { class: "bar" }, el("h3", {}, name)),
    el("div", { class: `prose ${kind}`, dir: "auto", tabindex: "0", role: "group", "aria-label": name }, visible(text)));
  const heading = el("h2", { tabindex: "-1" }, `Row ${entry[ID]}`);
  const facts = el("dl", { class: "facts" }, fact("Score", fixed(entry[SCORE]), exact(entry[SCORE])));
  if (entry[METHOD]) facts.append(fact("Method", visible(entry[METHOD])));
  if (detail.chunks.length) facts.append(fact("Chunks", count(detail.chunks.length)));
  if (entry[SIZE]) facts.append(fact("Tokens", count(entry[SIZE])));
  byId("view").replaceChildren(crumbs(i), el("div", { class: "headline" }, heading, facts),
    el("div", { class: "texts" }, prose("Prompt", entry[PROMPT], "prompt"),
      detail.tokens.length ? tokensSection(detail.tokens) : prose("Response", entry[RESPONSE], "response")));
  byId("view").append(searchSection(detail.chunks, Number(entry[SCORE])));
  byId("view").dataset.row = entry[ID];
  heading.focus({ preventScroll: true });
}

function say(text) {
  byId("notice").hidden = !text;
  byId("notice").textContent = text;
}

async function route() {
  const turn = (state.turn += 1);
  const wanted = /^#row-(-?\d+)$/.exec(location.hash);
  const i = wanted ? state.index.rows.findIndex((entry) => entry[ID] === Number(wanted[1])) : -1;
  say(wanted && i < 0 ? `There is no row ${wanted[1]} on this page.` : "");
  if (i < 0) {
    byId("index").hidden = false;
    byId("view").hidden = true;
    byId("view").replaceChildren();
    document.title = byId("title").textContent;
    scrollTo(0, state.scroll);
    state.rows[state.opened]?.querySelector("a").focus({ preventScroll: true });
    state.opened = null;
    return;
  }
  if (state.opened === null) state.scroll = scrollY;
  state.opened = i;
  try {
    const detail = await unpack(`row-data-${i}`);
    if (turn !== state.turn) return;
    byId("index").hidden = true;
    byId("view").hidden = false;
    drawRow(i, detail);
    document.title = `Row ${wanted[1]} · ${byId("title").textContent}`;
    scrollTo(0, 0);
  } catch (error) {
    say(`Row ${wanted[1]} cannot be read: ${error.message}`);
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.id === "filter") {
    if (event.key === "Escape" && event.target.value) { event.target.value = ""; drawIndex(); }
    return;
  }
  if (event.key === "/" && !byId("index").hidden) {
    event.preventDefault();
    byId("filter").focus();
  }
  if (!byId("view").hidden) document.querySelector(`.crumbs [data-key="${CSS.escape(event.key)}"]`)?.click();
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    say("This browser cannot unpack the rows; one of 2023 or later can (Chrome 80, Firefox 113, Safari 16.4).");
    return;
  }
  state.index = await unpack("index-data");
  state.order = state.index.rows.map((_, i) => i);
  byId("summary").replaceChildren(...summary(state.index.rows));
  byId("settings").hidden = !state.index.settings.length;
  byId("settings").lastChild.append(...state.index.settings.map(([name, value]) => fact(visible(name), visible(value))));
  byId("filter").addEventListener("input", () => drawIndex());
  byId("more").firstChild.addEventListener("click", () => drawIndex(true));
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => sortBy(button.parentNode));
  }
  addEventListener("keydown", onKey);
  addEventListener("hashchange", route);
  drawIndex();
  await route();
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => say(`This page cannot be read: ${error.message}`));
