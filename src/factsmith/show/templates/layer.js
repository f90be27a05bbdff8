// data.layer    the layer; data.command: the start of the command that makes a card
// data.banks    [{expert or null, neurons: how many}]
// data.neurons  [bank, number, share of the tokens where it fires,
//               [token, score, ...] promoted, [token, score, ...] demoted,
//               [coefficient, text, start, stop, ...] highest, the same lowest,
//               [fact, coefficient, adds, ...]]
// data.words, data.texts, data.facts   what tokens, texts and facts are numbers of
const [BANK, NUMBER, FIRED, UP, DOWN, TOP, BOTTOM, FACTS] = [0, 1, 2, 3, 4, 5, 6, 7];
const CHUNK = 60;
const field = (id) => document.getElementById(id);
const list = field("neurons");
const lowered = { words: data.words.map(folded), texts: data.texts.map((text) => text.toLowerCase()), facts: null };
lowered.facts = data.facts.map((pair) => pair.join(" ").toLowerCase());
let shown = [];
let wanted = "";
let isAfter = null;

// Cut a flat list into rows.
function rows(flat, width) {
  const cut = [];
  for (let at = 0; at < flat.length; at += width) cut.push(flat.slice(at, at + width));
  return cut;
}

function nameOf(neuron) {
  const expert = data.banks[neuron[BANK]].expert;
  return { id: (expert === null ? "" : "e" + expert) + "n" + neuron[NUMBER], text: (expert === null ? "" : expert + " · ") + neuron[NUMBER] };
}

// ── search ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

// Return whether a trigger fires at a word or after it.
function after(word) {
  const ends = lowered.texts.map((text) => (text.includes(word) ? text.indexOf(word) + word.length : Infinity));
  return ([, text, , stop]) => ends[text] <= stop;
}

// Return how well each neuron matches a query: larger is better, and 0 is no match.
function scorer(query, where) {
  const inside = (kind) => where === "any" || where === kind;
  const word = folded(query);
  const words = lowered.words.map((token) => (token === word ? 2 : token.includes(word) ? 1 : 0));
  const fires = after(word);
  const facts = lowered.facts.map((text) => text.includes(word));
  const best = (flat) => {
    let score = 0;
    for (let at = 0; at < flat.length; at += 2) score = Math.max(score, words[flat[at]] * (1 - at / (4 * flat.length)));
    return score;
  };
  const share = (flat) => (flat.length ? rows(flat, 4).filter(fires).length / (flat.length / 4) : 0);
  return (neuron) => {
    let score = 0;
    if (where === "any" && String(neuron[NUMBER]) === word) score += 1000;
    if (inside("promotes")) score += 100 * best(neuron[UP]);
    if (inside("demotes")) score += 10 * best(neuron[DOWN]);
    if (inside("triggers")) score += 5 * share(neuron[TOP]) + share(neuron[BOTTOM]);
    if (inside("facts")) score += rows(neuron[FACTS], 3).filter((row) => facts[row[0]]).length;
    return score;
  };
}

const extreme = (neuron) => Math.max(Math.abs(neuron[TOP][0] || 0), Math.abs(neuron[BOTTOM][0] || 0));
const ORDERS = {
  number: (neuron) => 0,
  fired: (neuron) => neuron[FIRED],
  rare: (neuron) => -neuron[FIRED],
  score: (neuron) => neuron[UP][1] || 0,
  coefficient: extreme,
};

function search() {
  const { neuron, expert, query } = address();
  if (neuron !== undefined) {
    wanted = "";
    shown = data.neurons.filter((each) => each[NUMBER] === neuron && data.banks[each[BANK]].expert === expert);
  } else {
    wanted = (query.get("q") || "").trim();
    const sort = query.get("sort") || "best";
    const bank = query.get("expert");
    field("q").value = field("q").value.trim() === wanted ? field("q").value : wanted;
    field("in").value = query.get("in") || "any";
    field("sort").value = sort;
    if (field("expert")) field("expert").value = bank || "";
    shown = data.neurons.filter((each) => !bank || String(data.banks[each[BANK]].expert) === bank);
    if (wanted) {
      const score = scorer(wanted, field("in").value);
      const scores = new Map(shown.map((each) => [each, score(each)]));
      shown = shown.filter((each) => scores.get(each) > 0);
      if (sort === "best") shown.sort((a, b) => scores.get(b) - scores.get(a));
    }
    const order = ORDERS[sort];
    if (order) shown.sort((a, b) => order(b) - order(a));
  }
  const all = data.neurons.length.toLocaleString("en");
  field("count").replaceChildren(
    neuron === undefined ? `${shown.length.toLocaleString("en")} of ${all} neurons` : shown.length ? "one neuron; " : "this layer has no such neuron; ",
  );
  if (neuron !== undefined) field("count").append(make("a", { href: "#" }, `show all ${all}`));
  isAfter = after(folded(wanted));
  list.replaceChildren();
  extend();
  if (neuron !== undefined && shown.length) list.querySelector("details").open = true;
}

// Write the search into the address, so that a reader can share it.
function remember() {
  const query = new URLSearchParams();
  if (field("q").value.trim()) query.set("q", field("q").value.trim());
  if (field("in").value !== "any") query.set("in", field("in").value);
  if (field("sort").value !== "best") query.set("sort", field("sort").value);
  if (field("expert") && field("expert").value) query.set("expert", field("expert").value);
  history.replaceState(null, "", "#" + query);
  search();
}

// ── the list ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function extend() {
  const from = list.children.length;
  list.append(...shown.slice(from, from + CHUNK).map(item));
  field("more").hidden = list.children.length >= shown.length;
}

const hit = (word) => wanted !== "" && lowered.words[word].includes(folded(wanted));

function item(neuron) {
  const name = nameOf(neuron);
  const top = rows(neuron[TOP], 4);
  const firing = (wanted !== "" && top.find(isAfter)) || top[0];
  const end = firing ? triggerText(...firing.slice(1), true) : make("span", { class: "quiet" }, "no text");
  const tokens = rows(neuron[UP], 2);
  const first = [...tokens.filter(([word]) => hit(word)), ...tokens.filter(([word]) => !hit(word))].slice(0, 5);
  const details = make(
    "details",
    null,
    make(
      "summary",
      null,
      make("span", { class: "name" }, name.text),
      make("span", { class: "tokens" }, first.map(([word]) => chip(data.words[word], hit(word)))),
      end,
      make("span", { class: "right" }, (100 * neuron[FIRED]).toFixed(1) + "%"),
    ),
  );
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(inside(neuron, name));
  });
  return make("li", { id: name.id }, details);
}

function triggerText(text, start, stop, short) {
  const whole = data.texts[text];
  const before = short && start > 90 ? "…" + whole.slice(start - 90, start).trimStart() : whole.slice(0, start);
  const after = short ? null : make("span", { class: "after" }, whole.slice(stop));
  return make("span", { class: "text", dir: "auto" }, make("span", null, before), make("mark", null, whole.slice(start, stop)), after);
}

function table(caption, heads, body) {
  const head = make("thead", null, make("tr", null, heads.map(([text, kind]) => make("th", { scope: "col", class: kind }, text))));
  return make("table", null, make("caption", null, caption), head, make("tbody", null, body));
}

function scores(title, flat, most, kind) {
  const body = rows(flat, 2).map(([word, score]) => {
    const bar = make("span", { class: "bar " + kind });
    bar.style.width = (100 * Math.abs(score)) / most + "%";
    return make("tr", null, make("td", null, chip(data.words[word], hit(word))), make("td", { class: "bars" }, bar), number(score, 2));
  });
  return make("section", { class: "panel" }, make("h3", null, title), table("What one unit of the coefficient adds to the logit.", [["token"], ["", ""], ["score", "n"]], body));
}

const number = (value, digits) => {
  const text = Math.abs(value).toFixed(digits);
  return make("td", { class: "n" }, (value < 0 && Number(text) ? "−" : "+") + text); // 0 has no minus
};

function places(title, flat) {
  const body = rows(flat, 4).map(([coefficient, text, start, stop]) =>
    make("tr", null, number(coefficient, 2), make("td", null, triggerText(text, start, stop, false))),
  );
  return make("section", { class: "panel wide" }, make("h3", null, title), table(
    "The token is marked. The model has not yet read the grey text after it.", [["coefficient", "n"], ["text"]], body,
  ));
}

function facts(flat) {
  const body = rows(flat, 3).map(([fact, coefficient, adds]) => {
    const [prompt, answer] = data.facts[fact];
    return make("tr", null, number(coefficient, 2), number(adds, 2), make("td", { dir: "auto" }, prompt + " ", make("strong", null, answer)));
  });
  const caption = `Of ${data.facts.length} known facts tested. This is a correlation; the card shows what an answer loses without the neuron.`;
  return make("section", { class: "panel wide" }, make("h3", null, "Facts it adds most to"), table(
    caption, [["coefficient", "n"], ["adds", "n"], ["fact"]], body,
  ));
}

function inside(neuron, name) {
  const most = Math.max(...rows(neuron[UP], 2).concat(rows(neuron[DOWN], 2)).map((row) => Math.abs(row[1])), 1e-9);
  const numbers = [data.layer, ...(data.banks[neuron[BANK]].expert === null ? [] : [data.banks[neuron[BANK]].expert]), neuron[NUMBER]];
  const near = (step, text) => {
    const id = name.id.replace(/\d+$/, neuron[NUMBER] + step);
    const exists = neuron[NUMBER] + step >= 0 && neuron[NUMBER] + step < data.banks[neuron[BANK]].neurons;
    return exists ? make("a", { href: "#" + id }, text) : null;
  };
  return make(
    "div",
    { class: "details" },
    make(
      "div",
      { class: "grid" },
      scores("Promotes", neuron[UP], most, "up"),
      scores("Demotes", neuron[DOWN], most, "down"),
      neuron[TOP].length ? places("Fires most", neuron[TOP]) : null,
      neuron[BOTTOM].length ? places("Is lowest", neuron[BOTTOM]) : null,
      neuron[FACTS].length ? facts(neuron[FACTS]) : null,
    ),
    make("nav", null, make("a", { href: "#" + name.id }, "link to this neuron"), near(-1, "← previous"), near(1, "next →")),
    make("p", { class: "quiet" }, "Make its card: ", make("code", null, `${data.command} ${numbers.join(" ")} --out card.html`)),
  );
}

for (const id of ["in", "sort", "expert"]) if (field(id)) field(id).addEventListener("change", remember);
field("q").addEventListener("input", later(remember));
field("search").addEventListener("submit", (event) => {
  event.preventDefault();
  remember();
});
field("more").addEventListener("click", extend);
if ("IntersectionObserver" in window) {
  new IntersectionObserver((seen) => seen[0].isIntersecting && extend(), { rootMargin: "600px" }).observe(field("more"));
}
window.addEventListener("hashchange", search);
for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
search();
