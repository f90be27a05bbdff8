"use strict";
// Texts come from models and corpora, so they go into text nodes only.

const data = JSON.parse(document.getElementById("data").textContent);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// Return a token with its outer spaces as dots.
function chip(text, hit) {
  const [, before, word, after] = /^( *)([^]*?)( *)$/.exec(text);
  const dots = (spaces) => (spaces ? make("span", { class: "space" }, "·".repeat(spaces.length)) : null);
  return make("span", { class: hit ? "token hit" : "token", dir: "auto" }, dots(before), word || (text ? null : "(empty)"), dots(after));
}

function folded(text) {
  return text.trim().toLowerCase();
}

// Read the part of the address after #: n17, e3n17, or q=Paris&sort=fired.
function address() {
  const hash = location.hash.slice(1);
  const name = /^(?:e(\d+))?n(\d+)$/.exec(hash);
  if (!name) return { query: new URLSearchParams(hash) };
  return { expert: name[1] === undefined ? null : Number(name[1]), neuron: Number(name[2]) };
}

// Return a function that acts once typing pauses.
function later(act) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, 120);
  };
}
