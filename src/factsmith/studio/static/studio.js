// What the pages do besides links and forms: news from the server, the theme, keys, copies.
(function () {
  "use strict";
  const body = () => document.body;

  function say(text) { document.getElementById("said").textContent = text; }

  function save(content, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(content);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // What scrolls sideways can be reached by keyboard; what does not is no stop on the way.
  function reach() {
    for (const box of document.querySelectorAll("main :is(.scroll, .wide, .plot, pre)")) {
      if (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) {
        box.tabIndex = 0;
      } else box.removeAttribute("tabindex");
    }
  }

  window.addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);
  window.studio = { say, save, reach };

  // ── news ──────────────────────────────────────────────────────────────────────────────────────
  // One stream for a visible tab, none for a hidden one: browsers allow six connections to a host.

  let stream = null, again = 1000, timer = null;

  function tell(name, detail) { body().dispatchEvent(new CustomEvent("studio:" + name, { detail })); }

  function listen() {
    clearTimeout(timer);
    if (stream || document.hidden || !document.getElementById("jobs-indicator")) return;
    stream = new EventSource("/events");
    stream.addEventListener("open", () => { again = 1000; lose(false); });
    stream.addEventListener("job", (event) => hear(JSON.parse(event.data)));
    stream.addEventListener("ledger", (event) => move(JSON.parse(event.data)));
    stream.addEventListener("error", () => {
      gone ??= setTimeout(() => lose(true), 5000);
      if (stream?.readyState !== EventSource.CLOSED) return; // it connects again by itself
      stream = null;
      timer = setTimeout(listen, again);
      again = Math.min(again * 2, 30000);
    });
  }

  const states = new Map(); // the last state of each job
  const over = ["done", "failed", "cancelled"];

  function hear(job) {
    for (const card of document.querySelectorAll(`[data-job="${job.id}"]`)) show(card, job);
    tell("job", job);
    tell("job-" + job.id, job);
    if (states.get(job.id) === job.state) return;
    states.set(job.id, job.state);
    tell("jobs", job);
    if (over.includes(job.state)) tell(`job-${job.id}-over`, job);
  }

  function move(ledger) { // a page that shows where the workspace stands hears when it moves
    const standing = `${ledger.current} ${ledger.head}`;
    if (body().dataset.standing === standing) return;
    body().dataset.standing = standing;
    const [name, behind] = ["[data-current]", "[data-behind]"].map((each) => document.querySelector(each));
    if (name) name.textContent = ledger.current.slice(0, 12);
    if (behind) behind.hidden = ledger.current === ledger.head;
    tell("ledger", ledger);
  }

  function show(card, job) {
    const [first, ...others] = job.ahead ?? [];
    const more = others.length ? ` and ${others.length} more` : "";
    const texts = {
      ahead: first ? `after ${first}${more}` : "",
      state: job.state, stage: job.stage, step: job.step, seconds: String(Math.round(job.seconds)),
      count: job.total ? `${job.done} of ${job.total}` : "", left: job.left ? ", " + job.left : "",
    };
    for (const place of card.querySelectorAll("[data-field]")) {
      place.textContent = texts[place.dataset.field] ?? "";
    }
    const bar = card.querySelector("progress");
    if (!bar) return;
    if (job.total) {
      bar.max = 1;
      bar.value = Math.min(job.done / job.total, 1);
    } else bar.removeAttribute("value");
  }

  let gone = null; // waits before the page says that the studio does not answer

  function lose(isLost) {
    clearTimeout(gone);
    gone = null;
    const note = document.getElementById("lost");
    if (note) note.hidden = !isLost;
  }

  function silence() {
    stream?.close();
    stream = null;
    lose(false);
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return silence();
    listen();
    tell("jobs", null); // what happened while the tab was hidden
  });
  window.addEventListener("pagehide", silence);
  window.addEventListener("pageshow", listen);

  // ── requests of htmx ──────────────────────────────────────────────────────────────────────────

  document.addEventListener("htmx:configRequest", (event) => {
    const { verb, headers, formData } = event.detail;
    const token = document.querySelector("meta[name='csrf']");
    if (token && verb !== "get") headers["X-CSRF-Token"] = token.content;
    if (verb !== "get") return;
    for (const name of new Set(formData.keys())) { // a short address: nothing empty, boxes once
      const values = formData.getAll(name).filter((value) => value !== "");
      formData.delete(name);
      const isBox = values.length === 2 && values[0] === "false" && values[1] === "true";
      for (const value of isBox ? ["true"] : values) formData.append(name, value);
    }
  });

  let unfolded = []; // the folded parts of a form that are open stay open when it is swapped

  document.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.xhr.status === 401) { // the session is over: the page says how to get in
      event.detail.shouldSwap = false;
      return window.location.reload();
    }
    unfolded = [...document.querySelectorAll("details[id][open]")].map((each) => each.id);
  });
  document.addEventListener("htmx:afterSwap", () => {
    for (const id of unfolded) document.getElementById(id)?.setAttribute("open", "");
  });
  document.addEventListener("htmx:afterSettle", (event) => {
    showTheme();
    reach();
    if (!event.detail.requestConfig?.elt?.matches("form.verb")) return;
    const answer = document.getElementById("answer");
    say(answer?.querySelector(".waiting") ? "Working." : "The answer is shown.");
    if (answer && answer.getBoundingClientRect().top > window.innerHeight * 0.8) {
      answer.scrollIntoView({ block: "start" });
    }
  });
  document.addEventListener("htmx:sendError", () => lose(true));

  // ── the theme ─────────────────────────────────────────────────────────────────────────────────

  function setTheme(name) {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    try { localStorage.setItem("studio-theme", name); } catch { /* no storage */ }
    document.dispatchEvent(new CustomEvent("studio:theme"));
  }

  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-theme-switch]")) setTheme(event.target.value);
  });
  window.addEventListener("storage", (event) => {
    if (event.key !== "studio-theme") return;
    setTheme(event.newValue ?? "system");
    showTheme();
  });

  function showTheme() {
    const chosen = document.documentElement.dataset.theme ?? "system";
    for (const each of document.querySelectorAll("[data-theme-switch]")) each.value = chosen;
  }

  // ── clicks ────────────────────────────────────────────────────────────────────────────────────

  async function copy(text, element) {
    try {
      await navigator.clipboard.writeText(text);
      say("Copied.");
      const before = element.textContent;
      if (before === "Copied") return;
      element.textContent = "Copied";
      setTimeout(() => { element.textContent = before; }, 1500);
    } catch {
      say("The browser does not allow copying; the text is selected.");
      const shown = document.getElementById(element.dataset.copy ?? "");
      if (shown) window.getSelection().selectAllChildren(shown);
    }
  }

  function another(button) {
    const list = button.closest("[data-list]");
    const inputs = list.querySelectorAll("input");
    const fresh = inputs[inputs.length - 1].cloneNode();
    fresh.value = "";
    fresh.required = false;
    button.before(fresh);
    fresh.focus();
  }

  document.addEventListener("click", (event) => {
    const element = event.target.closest("button, a");
    if (!element) return;
    const data = element.dataset;
    if ("copy" in data) copy(document.getElementById(data.copy).textContent, element);
    else if ("copyAddress" in data) copy(new URL(data.copyAddress, location.href).href, element);
    else if ("more" in data) another(element);
    else if ("open" in data) document.getElementById(data.open)?.showModal();
    else if ("close" in data) element.closest("dialog")?.close();
    else if ("menu" in data) {
      const open = document.getElementById("rooms").classList.toggle("open");
      element.setAttribute("aria-expanded", String(open));
    } else if (element.getAttribute("aria-disabled") === "true") event.preventDefault();
  });

  // ── keys ──────────────────────────────────────────────────────────────────────────────────────

  let pressed = 0; // when "g" was pressed

  function go(key) {
    if (!/^[a-z]$/.test(key)) return;
    const place = key === "q" ? "#jobs-indicator a" : `#rooms a[data-key="${key}"]`;
    document.querySelector(place)?.click();
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      for (const term of document.querySelectorAll(".term:hover, .term:focus-within")) shut(term);
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, select, [contenteditable], dialog")) return;
    if (Date.now() - pressed < 1500) {
      pressed = 0;
      return go(event.key);
    }
    if (event.key === "g") pressed = Date.now();
    else if (event.key === "?") document.getElementById("shortcuts")?.showModal();
    else if (event.key === "/") {
      const first = document.querySelector("main :is(input, textarea, select):not([type=hidden], :disabled)");
      if (!first) return;
      event.preventDefault();
      first.focus();
    }
  });

  for (const kind of ["mouseover", "focusin"]) { // an explanation stays inside the window
    document.addEventListener(kind, (event) => {
      const text = event.target.closest?.(".term")?.querySelector(".term-text");
      if (!text) return;
      text.style.left = "0";
      const beyond = text.getBoundingClientRect().right - document.documentElement.clientWidth + 8;
      if (beyond > 0) text.style.left = `${-beyond}px`;
    });
  }

  function shut(term) {
    term.classList.add("shut");
    const open = () => term.classList.remove("shut");
    term.addEventListener("mouseleave", open, { once: true });
    term.addEventListener("focusout", open, { once: true });
  }

  // ── files that are dropped ────────────────────────────────────────────────────────────────────

  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      const input = document.querySelector("main input[data-drop]:not(:disabled)");
      if (!input || !event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      input.classList.toggle("over", kind === "dragover");
      if (kind === "drop") input.files = event.dataTransfer.files;
      if (kind === "drop") input.dispatchEvent(new Event("change", { bubbles: true }));
    });
  }

  document.addEventListener("change", (event) => { // before anything is sent
    const { files, dataset } = event.target;
    if (!files || !dataset.most) return;
    const total = [...files].reduce((sum, file) => sum + file.size, 0);
    const inMegabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
    const isLarge = total > Number(dataset.most) - 10000; // room for the other fields
    event.target.setCustomValidity(isLarge
      ? `The file has ${inMegabytes(total)}; studio takes ${inMegabytes(dataset.most)} at most. Split it.`
      : "");
    event.target.reportValidity();
  });

  document.addEventListener("DOMContentLoaded", () => { showTheme(); reach(); listen(); });
})();
