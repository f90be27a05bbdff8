"use strict";
// Texts come from models and corpora: they are only ever put into text nodes.

const data = JSON.parse(document.getElementById("data").textContent);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// A token with its outer spaces as dots.
function chip(text, hit) {
  const [, before, word, behind] = /^( *)([^]*?)( *)$/.exec(text);
  const dots = (spaces) => (spaces ? make("span", { class: "space" }, "·".repeat(spaces.length)) : null);
  return make("span", { class: hit ? "token hit" : "token", dir: "auto" }, dots(before), word || (text ? null : "(empty)"), dots(behind));
}

function folded(text) {
  return text.trim().toLowerCase();
}

// What stands behind # in the address: n17, e3n17, or q=Paris&sort=fired.
function address() {
  const hash = location.hash.slice(1);
  const own = /^(?:e(\d+))?n(\d+)$/.exec(hash);
  return own ? { expert: own[1] === undefined ? null : Number(own[1]), neuron: Number(own[2]) } : { query: new URLSearchParams(hash) };
}

function later(act) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, 120);
  };
}
