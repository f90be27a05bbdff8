// Charts: Vega-Lite specifications from the page, drawn in the colours of the theme.
//
// The content security policy forbids eval, so Vega gets its expressions from an interpreter. The
// libraries are loaded when the first chart appears. Texts become DOM texts only.
(function () {
  "use strict";
  const here = document.currentScript.dataset;
  const views = new Map(); // figure → {view, chart}
  const begun = new WeakSet(); // figures that are drawn, or will be once the libraries are there
  let libraries = null;
  const MOST_SVG_ROWS = 3000; // more marks than that are drawn on a canvas

  function load(address) {
    return new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = address;
      script.addEventListener("load", done);
      script.addEventListener("error", () => failed(new Error("cannot load " + address)));
      document.head.append(script);
    });
  }

  function ready() {
    libraries ??= load(here.vega).then(() => Promise.all([load(here.lite), load(here.interpreter)]));
    return libraries;
  }

  // ── the theme ─────────────────────────────────────────────────────────────────────────────────

  function config(width) {
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(name).trim();
    const list = (name) => get(name).split(/\s+/);
    const ink = get("--ink"), quiet = get("--quiet"), line = get("--line");
    const font = getComputedStyle(document.body).fontFamily;
    const colours = [1, 2, 3, 4, 5, 6].map((n) => get("--chart-" + n));
    const heat = list("--heat");
    return {
      background: null, font, aria: false, padding: 2,
      autosize: { type: "fit-x", contains: "padding", resize: true },
      view: { stroke: null },
      mark: { color: colours[0], tooltip: true },
      bar: { color: colours[0] }, text: { color: ink, fontSize: 12 }, rule: { color: quiet },
      line: { strokeWidth: 2 }, point: { size: 50, filled: true, strokeWidth: 2 },
      axis: {
        labelColor: ink, titleColor: quiet, titleFontWeight: "normal", labelFontSize: 12,
        titleFontSize: 12, gridColor: line, domainColor: line, tickColor: line, labelPadding: 6,
      },
      axisY: { labelLimit: Math.max(90, Math.min(300, 0.42 * width)) },
      legend: { labelColor: ink, titleColor: quiet, titleFontWeight: "normal", labelFontSize: 12,
        titleFontSize: 12, symbolStrokeWidth: 2 },
      header: { labelColor: ink, titleColor: quiet },
      range: { category: colours, heatmap: heat, ramp: list("--pale"),
        diverging: list("--diverging"), ordinal: heat.slice(2) },
    };
  }

  // ── drawing ───────────────────────────────────────────────────────────────────────────────────

  function read(figure) {
    // htmx takes scripts out of what it swaps in, so the data is in a template.
    return JSON.parse(figure.querySelector(":scope > [data-chart-data]").content.textContent);
  }

  async function draw(figure) {
    const plot = figure.querySelector(".plot");
    try {
      await ready();
      const chart = views.get(figure)?.chart ?? read(figure);
      views.get(figure)?.view.finalize();
      const spec = { ...chart.spec, data: { values: chart.rows.map((row) => ({ ...row })) } };
      const { columns, step } = chart.spec.usermeta ?? {}; // cells with words keep their width
      if (columns && plot.clientWidth - 60 < columns * step) spec.width = { step };
      const quiet = { warn() {}, info() {}, debug() {}, error: console.error, level() { return this; } };
      const compiled = window.vegaLite.compile(spec, { config: config(plot.clientWidth), logger: quiet }).spec;
      const view = new window.vega.View(window.vega.parse(compiled, null, { ast: true }), {
        expr: window.vegaInterpreter, container: plot.firstElementChild, hover: true, tooltip: showTip,
        renderer: chart.rows.length > MOST_SVG_ROWS ? "canvas" : "svg",
        loader: { load: refuse, sanitize: refuse, http: refuse, file: refuse },
      });
      view.addEventListener("click", (event, item) => follow(item));
      plot.classList.toggle("linked", chart.rows.some((row) => row.href));
      views.set(figure, { view, chart });
      await view.runAsync();
      plot.firstElementChild.setAttribute("aria-hidden", "true"); // the label of .plot says it
      figure.dataset.drawn = "true";
      window.studio.reach();
    } catch (problem) {
      plot.classList.add("failed");
      plot.textContent = "The picture cannot be drawn. Its numbers are below.";
      console.error(problem);
    }
  }

  function refuse() { return Promise.reject(new Error("charts load nothing")); }

  function follow(item) {
    const address = item?.datum?.href;
    // Only pages of this studio: "/room/verb?…", never "//host" or "scheme:".
    if (typeof address === "string" && /^\/(?![/\\])/.test(address)) window.location.assign(address);
  }

  function drawAll(root) {
    for (const [figure, { view }] of views) {
      if (!figure.isConnected) { view.finalize(); views.delete(figure); }
    }
    for (const figure of root.querySelectorAll("figure[data-chart]")) {
      if (begun.has(figure)) continue;
      begun.add(figure);
      draw(figure);
    }
  }

  function redraw() { for (const figure of [...views.keys()]) draw(figure); }

  // ── the tooltip ───────────────────────────────────────────────────────────────────────────────

  let tip = null;

  function showTip(handler, event, item, value) {
    tip ??= Object.assign(document.createElement("div"), { className: "vega-tip", hidden: true });
    const empty = value === null || value === undefined || value === "";
    tip.hidden = empty;
    if (empty) return;
    (document.querySelector("dialog[open].whole") ?? document.body).append(tip);
    tip.replaceChildren();
    if (typeof value === "object") {
      for (const [name, text] of Object.entries(value)) {
        if (name === "href") continue;
        const [label, content] = [document.createElement("span"), document.createElement("span")];
        label.className = "name";
        label.textContent = name;
        content.textContent = String(text);
        tip.append(label, content);
      }
    } else {
      const line = document.createElement("span");
      line.className = "whole";
      line.textContent = String(value);
      tip.append(line);
    }
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
    const top = event.clientY + 18 + box.height > window.innerHeight
      ? event.clientY - box.height - 10 : event.clientY + 18;
    tip.style.left = Math.max(4, left) + "px"; // through the object model: the policy allows that
    tip.style.top = Math.max(4, top) + "px";
  }

  // ── what the buttons do ───────────────────────────────────────────────────────────────────────

  async function picture(figure, kind) {
    const { view, chart } = views.get(figure);
    const ground = getComputedStyle(document.documentElement).getPropertyValue("--panel").trim();
    const before = view.background();
    view.background(ground);
    try {
      const content = kind === "svg"
        ? new Blob([await view.toSVG()], { type: "image/svg+xml" })
        : await view.toCanvas(3).then((canvas) => new Promise((done) => canvas.toBlob(done)));
      window.studio.save(content, `${chart.name}.${kind}`);
    } finally {
      view.background(before);
      await view.runAsync();
    }
  }

  function maximise(figure) {
    const place = document.createComment("chart");
    const dialog = document.createElement("dialog");
    dialog.className = "whole";
    dialog.setAttribute("aria-label", figure.querySelector(".chart-title").textContent);
    const close = document.createElement("button");
    close.type = "button";
    close.className = "small";
    close.textContent = "Close";
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => {
      place.replaceWith(figure);
      dialog.remove();
      draw(figure);
      figure.querySelector("[data-do='maximise']")?.focus();
    });
    figure.replaceWith(place);
    dialog.append(close, figure);
    document.body.append(dialog);
    dialog.showModal();
    draw(figure);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    const figure = button?.closest("figure[data-chart]");
    if (!figure || !views.has(figure)) return;
    if (button.dataset.do !== "maximise") picture(figure, button.dataset.do);
    else if (!figure.closest("dialog.whole")) maximise(figure);
  });

  document.addEventListener("DOMContentLoaded", () => drawAll(document));
  document.addEventListener("htmx:afterSettle", () => { if (tip) tip.hidden = true; drawAll(document); });
  document.addEventListener("studio:theme", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
