// Sets the theme before the page is drawn. "system" follows the operating system.
(function () {
  "use strict";
  const root = document.documentElement;
  let chosen = "system";
  try { chosen = localStorage.getItem("studio-theme") || "system"; } catch { /* no storage */ }
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  root.classList.add("js");
})();
