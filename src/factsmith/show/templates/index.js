// data.words   the tokens, as text
// data.layers  [{layer, file, banks: [[expert or null, tokens]]}]: numbers of words, the first neuron's first
// data.width   how many tokens each neuron has
const MOST = 200;
const field = (id) => document.getElementById(id);
const lowered = data.words.map(folded);

// Return the neurons that promote a word: whole tokens first, then the highest rank.
function find(word) {
  const exact = new Set();
  const part = new Set();
  lowered.forEach((token, at) => {
    if (token === word) exact.add(at);
    else if (token.includes(word)) part.add(at);
  });
  const matches = [];
  for (const { layer, file, banks } of data.layers) {
    for (const [expert, tokens] of banks) {
      tokens.forEach((token, at) => {
        if (!exact.has(token) && !part.has(token)) return;
        const neuron = Math.floor(at / data.width);
        matches.push({ layer, file, expert, neuron, token, rank: at % data.width, loose: exact.has(token) ? 0 : 1 });
      });
    }
  }
  return matches.sort((a, b) => a.loose - b.loose || a.rank - b.rank);
}

function search() {
  const query = (address().query || new URLSearchParams()).get("q") || "";
  if (field("q").value.trim() !== query.trim()) field("q").value = query;
  const word = folded(query);
  for (const link of document.querySelectorAll("a.layer")) {
    link.setAttribute("href", link.dataset.file + (word ? "#" + new URLSearchParams({ q: query.trim() }) : ""));
  }
  field("matches").hidden = !word || !data.width;
  const matches = word && data.width ? find(word) : [];
  field("count").textContent = !word || !data.width ? "" : matches.length > MOST
    ? `${matches.length.toLocaleString("en")} matches; the first ${MOST} are shown`
    : `${matches.length} match${matches.length === 1 ? "" : "es"} among the first ${data.width} tokens of each value`;
  field("rows").replaceChildren(...matches.slice(0, MOST).map((row) => {
    const id = (row.expert === null ? "" : `e${row.expert}`) + `n${row.neuron}`;
    const name = [row.layer, ...(row.expert === null ? [] : [row.expert]), row.neuron].join(" ");
    return make(
      "tr",
      null,
      make("td", null, make("a", { href: `${row.file}#${id}` }, name)),
      make("td", null, chip(data.words[row.token], true)),
      make("td", { class: "n" }, String(row.rank + 1)),
    );
  }));
}

field("q").addEventListener("input", later(() => {
  history.replaceState(null, "", "#" + new URLSearchParams(field("q").value.trim() ? { q: field("q").value.trim() } : {}));
  search();
}));
field("search").addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", search);
for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
search();
