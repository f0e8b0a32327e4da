// The page of `write_report`: sorts tables, shows pairs one at a time, and takes a person's labels.
// It enters the page inline; nothing is loaded, and all model text becomes text nodes.
"use strict";
const $ = id => document.getElementById(id);

function el(tag, className, text) {  // all model text enters the page here, as text
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

// Tables: a click on a column's head sorts the rows of each body; what is undefined stays last.
function sortTable(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const up = heads[column].getAttribute("aria-sort") !== "ascending";
  heads.forEach(th => th.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const order = (x, y) => {
    const [a, b] = [value(x), value(y)];
    if (a === "" || b === "") return (a === "") - (b === "");
    const by = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    return up ? by : -by;
  };
  for (const body of table.tBodies) body.append(...[...body.rows].sort(order));
}
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.querySelectorAll("button").forEach((button, column) =>
    button.addEventListener("click", () => sortTable(table, column)));

// Pairs: a pair's name is made of what identifies it, so that its link outlives a new report.
const data = $("pair-data") ? JSON.parse($("pair-data").textContent) : { run: "", pairs: [] };
const pairs = data.pairs;
const byName = new Map();
pairs.forEach((pair, i) => {
  pair.number = i + 1;
  pair.judged = pair.verdicts.length > 0;
  const models = pair.judged ? pair.answers.map(x => x.model) : ["", ""];
  const parts = [pair.test_set, pair.id, ...models, pair.replicate];
  pair.name = parts.map(encodeURIComponent).join("/");
  byName.set(pair.name, pair);
});
// Samples: for each two models the prompts in random order, with what is shown of each. A label
// belongs to the name of both models' answers to a prompt in one replicate, judged or not.
const samples = data.samples ?? {};
for (const sample of Object.values(samples))
  sample.items = sample.order.map(([number, a, b, turned]) => {
    const pair = pairs[number], models = [sample.model_a, sample.model_b];
    const parts = [pair.test_set, pair.id, ...models, pair.replicate];
    pair.label = { name: parts.map(encodeURIComponent).join("/"), pair, models,
      answers: [pair.answers[a], pair.answers[b]], turned: turned === 1 };
    return pair.label;
  });
const labelled = new Map(pairs.filter(pair => pair.judged).map(pair => [pair.name,
  { name: pair.name, pair, models: pair.answers.map(answer => answer.model) }]));
for (const sample of Object.values(samples))
  for (const item of sample.items) labelled.set(item.name, item);
const SHORT = 600;  // characters; a longer text gets a box of its own that scrolls
let shown = pairs, at = 0, unfolded = false;

function prose(text) {
  const node = el("div", text ? "prose" : "prose muted", text || "(empty)");
  node.dir = "auto";
  node.classList.toggle("long", text.length > SHORT);
  if (text.length > SHORT) node.tabIndex = 0;  // so that the arrow keys can scroll it
  return node;
}

function card(title, ...parts) {
  const node = el("section", "card");
  node.append(el("h4", "", title), ...parts);
  return node;
}

function questionCard(pair) {
  const question = card("Question", prose(pair.instruction));
  if (pair.input) question.append(el("h4", "", "Input"), prose(pair.input));
  return question;
}

const counted = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;

function answerCard(title, text) {
  const node = card(title, prose(text));
  node.firstChild.append(el("small", "", counted([...text].length, "character")));
  return node;
}

function columns(...cards) {
  const node = el("div", "columns");
  node.append(...cards);
  return node;
}

function winner(pair, verdict) {
  const model = { a: 0, b: 1, win: 0, lose: 1 }[verdict];
  return model === undefined ? verdict : `${pair.answers[model].model} wins`;
}

function verdicts(pair) {  // folded, and as the reader left it from one pair to the next
  if (!pair.verdicts.length) return [];
  const node = el("details", "said");
  node.append(el("summary", "", "What the judge said"),
    columns(...pair.verdicts.map(verdict => verdictCard(pair, verdict))));
  const words = $("search").value.trim().toLowerCase();
  const inside = pair.verdicts.some(x => (x.review ?? "").toLowerCase().includes(words));
  node.open = unfolded || Boolean(words) && inside;
  node.firstChild.addEventListener("click", () => { unfolded = !node.open; });
  return [node];
}

function verdictCard(pair, verdict) {
  const models = pair.answers.map(answer => answer.model);
  const said = [verdict.score_a, verdict.score_b].map((score, i) =>
    typeof score === "number" ? `${models[i]} ${+score.toFixed(3)}` : "").filter(Boolean);
  said.push(verdict.verdict ? winner(pair, verdict.verdict) : `no verdict: ${verdict.status}`);
  const votes = pair.verdicts.some(x => x.vote);
  const judges = new Set(pair.verdicts.map(x => x.judge)).size > 1;
  const order = verdict.first === null ? "order not recorded"
    : `${models[verdict.first === "a" ? 0 : 1]} shown first`;
  const title = judges ? `${verdict.judge}: ${order}` : order;
  return card(votes ? `${title}, vote ${verdict.vote + 1}` : title,
    el("p", "result", said.join(" · ")), prose(verdict.review ?? ""),
    el("p", "muted", verdict.judge ? `judge: ${verdict.judge}` : ""));
}

function renderPair(pair) {
  const head = el("h3"), link = el("a", "", `#${pair.number}`);
  link.href = `#pair/${pair.name}`;
  link.title = "Link to this pair";
  head.append(link, ` ${pair.id}`);
  const tones = { win: "good", lose: "bad", failed: "warn" }, tags = el("p", "tags");
  tags.append(el("span", `mark ${tones[pair.outcome] ?? "none"}`, winner(pair, pair.outcome)));
  if (pair.flip) tags.append(el("span", "mark warn", "verdicts disagree"));
  if (labelOf(pair)) tags.append(el("span", "mark you", `you: ${youSaid(pair)}`));
  const facts = [pair.models, pair.test_set, pair.category];
  if (pairs.some(x => x.replicate)) facts.push(`replicate ${pair.replicate}`);
  for (const text of facts) tags.append(el("span", "mark", text));
  return [head, tags, questionCard(pair),
    columns(...pair.answers.map(answer => answerCard(answer.model, answer.text))),
    ...verdicts(pair)];
}

function goTo(pair) {
  at = Math.max(0, shown.indexOf(pair));
  $("count").textContent = pair ? `${at + 1} of ${shown.length}` : "no pair matches";
  $("previous").setAttribute("aria-disabled", at === 0);
  $("next").setAttribute("aria-disabled", at >= shown.length - 1);
  $("pair").replaceChildren(...(pair ? renderPair(pair) : []));
  highlight($("search").value.trim().toLowerCase());
}

function step(by) {
  if (!shown[at + by]) return;
  goTo(shown[at + by]);
  history.replaceState(null, "", `#pair/${shown[at].name}`);
  if ($("viewer").getBoundingClientRect().top < -innerHeight / 2) $("viewer").scrollIntoView();
}

// Filters and search.
const OUTCOME = { win: 1, tie: 0, lose: -1, a: 1, b: -1 };
const filters = {
  "by-models": pair => pair.models, "by-test-set": pair => pair.test_set,
  "by-category": pair => pair.category, "by-outcome": pair => pair.outcome,
  "by-label": pair => !labelOf(pair) ? "not labelled" : !pair.judged ? ""
    : OUTCOME[labelOf(pair)] === OUTCOME[pair.outcome] ? "as the judge" : "not as the judge",
};

function haystack(pair) {
  const texts = [...pair.answers.map(x => x.text), ...pair.verdicts.map(x => x.review)];
  texts.push(pair.id, pair.instruction, pair.input);
  return pair.haystack ??= texts.join("\n").toLowerCase();
}

function applyFilters() {
  const words = $("search").value.trim().toLowerCase();
  const chosen = Object.entries(filters).filter(([id]) => $(id).value);
  shown = pairs.filter(pair => chosen.every(([id, of]) => of(pair) === $(id).value)
    && (!$("flips").checked || pair.flip) && (!words || haystack(pair).includes(words)));
  goTo(shown[0]);
}

function clearFilters(keep) {
  for (const id of [...Object.keys(filters), "search"]) $(id).value = "";
  $("flips").checked = false;
  applyFilters();
  if (keep) goTo(keep);
}

function fillOptions(id) {
  const names = [...new Set(pairs.map(filters[id]))].sort((x, y) => x.localeCompare(y));
  $(id).append(...names.map(name => new Option(name)));
}

function highlight(words) {  // marks what was searched, without a change to the document
  if (!globalThis.Highlight) return;
  const ranges = [], walker = document.createTreeWalker($("pair"), NodeFilter.SHOW_TEXT);
  while (words && ranges.length < 500 && walker.nextNode()) {
    const node = walker.currentNode, text = node.data.toLowerCase();
    if (text.length !== node.data.length) continue;  // a letter whose lower case is longer
    for (let i = text.indexOf(words); i >= 0; i = text.indexOf(words, i + words.length)) {
      const range = new Range();
      range.setStart(node, i);
      range.setEnd(node, i + words.length);
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// A link to a part that is folded, or into one, unfolds it.
function unfold() {
  const part = location.hash.length > 1 && $(decodeURIComponent(location.hash.slice(1)));
  if (!part) return;
  const inner = part.classList.contains("fold") && part.querySelector("details");
  for (let node = inner || part; node; node = node.parentElement)
    if (node.tagName === "DETAILS") node.open = true;
  part.scrollIntoView();
}

function openHash() {
  const pair = location.hash.startsWith("#pair/") && byName.get(location.hash.slice(6));
  if (!pair) return;
  if (labelling) leave();
  if (shown.includes(pair)) goTo(pair); else clearFilters(pair);
  $("viewer").scrollIntoView();
}

// Labels: what a person says of a pair, in the order in which it was said; null is a skip. They
// are kept in this browser under the run's key until they are saved.
const STORE = `alpagasus2-labels-${data.run}`;
let entries = [], labels = new Map(), labelling = null, kept = true;

function labelOf(pair) {
  return labels.get(pair.label?.name ?? pair.name) || null;
}

function youSaid(pair) {
  const models = pair.label?.models ?? pair.answers.map(answer => answer.model);
  return labelOf(pair) === "tie" ? "tie" : `${models[labelOf(pair) === "a" ? 0 : 1]} wins`;
}

function restore() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    entries = (stored.entries ?? []).filter(([name]) => labelled.has(name));
    $("labeller").value = stored.labeller ?? "";
  } catch (error) {
    kept = false;
    say(`This browser keeps nothing for this page (${error.name}): save before you leave it.`);
  }
  labels = new Map(entries);
}

function remember() {
  labels = new Map(entries);
  try {
    localStorage.setItem(STORE, JSON.stringify({ labeller: $("labeller").value, entries }));
  } catch (error) {
    kept = false;
    say(`This browser keeps nothing for this page (${error.name}): save before you leave it.`);
  }
}

function say(text) {
  $("label-message").textContent = text;
}

// The models of the filter, or those that decide the claim. The order of the prompts and the side of
// each answer were drawn when the page was made: the same after a reload, whatever the judge says.
function chosen() {
  return samples[$("by-models").value] ?? Object.values(samples)[0];
}

function enter() {
  if (!chosen()) return;
  labelling = chosen();
  const all = labelling.items.length;
  $("label-note").textContent = `${counted(all, "prompt")} in a random order (seed `
    + `${labelling.seed}). ${all < labelling.least ? "So few cannot correct the judge"
      : `From ${labelling.least} labels on they correct the judge`}; `
    + (labelling.needed ? `${labelling.needed} show an effect of the size in question.`
      : "an effect as small as the one in question would need more prompts than there are.");
  document.body.classList.add("labelling");
  $("labelling-choices").hidden = false;
  $("label").setAttribute("aria-pressed", "true");
  if (kept) say("");
  showNext();
  $("viewer").scrollIntoView();
}

function leave() {
  labelling = null;
  document.body.classList.remove("labelling");
  $("labelling-choices").hidden = true;
  $("label").setAttribute("aria-pressed", "false");
  applyFilters();
}

function current() {
  return labelling.items.find(item => !labels.has(item.name));
}

function showNext() {
  const { items } = labelling, needed = labelling.needed ?? items.length, item = current();
  const done = items.filter(x => labels.get(x.name)).length;
  const skipped = items.filter(x => labels.get(x.name) === null).length;
  $("progress").max = needed;
  $("progress").value = done;
  $("progress-text").textContent = `${done} of ${needed} labelled`
    + (skipped ? `, ${skipped} skipped` : "");
  for (const button of document.querySelectorAll("[data-label]")) button.disabled = !item;
  $("again").hidden = Boolean(item) || !skipped;
  $("undo").disabled = !entries.length;
  $("pair").replaceChildren(...(item ? renderBlind(item)
    : [el("p", "result", "Every prompt has had its turn: save the labels.")]));
}

function renderBlind(item) {
  const texts = item.answers.map(answer => answer.text.trim());  // a blank line tells models apart
  if (item.turned) texts.reverse();
  return [questionCard(item.pair),
    columns(card("Answer 1", prose(texts[0])), card("Answer 2", prose(texts[1])))];
}

function give(said) {  // "1", "2", "3", or "" for a skip
  const item = current();
  if (!item) return;
  const sides = item.turned ? ["b", "a"] : ["a", "b"];
  entries.push([item.name, { 1: sides[0], 2: sides[1], 3: "tie" }[said] ?? null]);
  remember();
  afterLabel();
}

function undo() {
  entries.pop();
  remember();
  afterLabel();
}

function again() {
  entries = entries.filter(([, label]) => label !== null);
  remember();
  afterLabel();
}

function afterLabel() {
  showNext();
  if ($("viewer").getBoundingClientRect().top < 0) $("viewer").scrollIntoView();
}

function labelLines(skipped = false) {
  return entries.filter(([, label]) => (label === null) === skipped).map(([name, label]) => {
    const { pair, models: [model_a, model_b] } = labelled.get(name);
    const line = { id: pair.id, test_set: pair.test_set, model_a, model_b,
      replicate: pair.replicate };
    return skipped ? line : { ...line, label };
  });
}

function save() {
  const file = { labeller: $("labeller").value.trim() || "person",
    sample: { seed: chosen().seed, drawn_by: "SHA-256 of seed, test set and id" },
    labels: labelLines(), skipped: labelLines(true) };
  const link = el("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify(file, null, 1)}\n`],
    { type: "application/json" }));
  link.download = "labels.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  kept = true;
  say(`${counted(file.labels.length, "label")} saved. Make the report again with --labels labels.json.`);
}

const FLIP = { a: "b", b: "a", tie: "tie" };

function found(line) {  // [name, label] of a saved line, whichever way round its models stand
  const name = (a, b) => [line.test_set, line.id, a, b, line.replicate ?? 0]
    .map(encodeURIComponent).join("/");
  const [one, two] = [name(line.model_a, line.model_b), name(line.model_b, line.model_a)];
  if (labelled.has(one)) return [one, line.label];
  return labelled.has(two) ? [two, FLIP[line.label] ?? null] : null;
}

function load(text) {
  const file = JSON.parse(text);
  if (!Array.isArray(file.labels) || file.labels.some(line => !FLIP[line?.label]))
    throw new Error("no list of labels a, b or tie");
  const mine = $("labeller").value.trim(), theirs = String(file.labeller ?? "");
  if (labelLines().length && mine && theirs && mine !== theirs)
    throw new Error(`these are ${theirs}'s labels and those here ${mine}'s; keep two files`);
  const here = file.labels.map(found).filter(Boolean);
  const added = here.filter(([name]) => !labels.get(name));
  const passed = (file.skipped ?? []).map(line => found({ ...line, label: null })).filter(Boolean);
  added.push(...passed.filter(([name]) => !labels.has(name)));
  const names = new Set(added.map(([name]) => name));
  entries = [...added, ...entries.filter(([name]) => !names.has(name))];
  $("labeller").value ||= theirs;
  remember();
  const loaded = added.filter(([, label]) => label).length;
  say(`${counted(loaded, "label")} loaded; ${counted(here.length - loaded, "pair")} had one `
    + `already; ${file.labels.length - here.length} of no pair of this report.`);
}

async function loadFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    load(await file.text());
    if (labelling) showNext();
  } catch (error) {
    say(`${file.name} was not loaded: ${error.message}.`);
  }
}

// Keys.
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest?.("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const key = event.key.toLowerCase();
  if (key === "?") return $("keys").open ? $("keys").close() : $("keys").showModal();
  if ($("keys").open) return;
  if (key === "l") return labelling ? leave() : enter();
  if (labelling) {
    const does = { 1: () => give("1"), 2: () => give("2"), 3: () => give("3"), s: () => give(""),
      u: undo, escape: leave }[key];
    if (does && !event.repeat) does();
    return;
  }
  if (key === "/") {
    event.preventDefault();
    $("filtering").open = true;
    $("viewer").scrollIntoView();
    $("search").focus();
  }
  const by = { arrowright: 1, j: 1, arrowleft: -1, k: -1 }[key];
  if (by && !event.target.closest?.(".scroll")) step(by);
}

function showOnly(button) {  // from a table's row to its pairs
  clearFilters();
  for (const [name, id] of [["testSet", "by-test-set"], ["models", "by-models"],
    ["category", "by-category"]])
    if (button.dataset[name]) $(id).value = button.dataset[name];
  applyFilters();
  $("filtering").open = true;
  $("viewer").scrollIntoView();
}

function start() {
  restore();
  for (const id of Object.keys(filters)) {
    if (id !== "by-label") fillOptions(id);
    $(id).addEventListener("change", applyFilters);
  }
  for (const id of ["search", "flips"]) $(id).addEventListener("input", applyFilters);
  const clicks = {
    clear: () => clearFilters(shown[at]), previous: () => step(-1), next: () => step(1),
    label: () => labelling ? leave() : enter(), leave, undo, again, save,
    load: () => $("label-file").click(), "keys-close": () => $("keys").close(),
  };
  for (const [id, does] of Object.entries(clicks)) $(id).addEventListener("click", does);
  for (const button of document.querySelectorAll("[data-label]"))
    button.addEventListener("click", () => give(button.dataset.label));
  for (const button of document.querySelectorAll(".show"))
    button.addEventListener("click", () => showOnly(button));
  $("label-file").addEventListener("change", loadFile);
  $("labeller").addEventListener("input", remember);
  $("label").hidden = !chosen();
  for (const button of document.querySelectorAll(".to-labels")) {
    button.hidden = !chosen();
    button.addEventListener("click", enter);
  }
  for (const button of document.querySelectorAll(".to-keys")) {
    button.hidden = false;
    button.addEventListener("click", () => $("keys").showModal());
  }
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", openHash);
  window.addEventListener("beforeunload", event => {
    if (!kept && entries.length) event.preventDefault();
  });
  applyFilters();
  openHash();
}
window.addEventListener("hashchange", unfold);
window.addEventListener("beforeprint", () => {  // paper cannot be unfolded
  for (const node of document.querySelectorAll("details")) node.open = true;
});
unfold();
if (pairs.length) start();
