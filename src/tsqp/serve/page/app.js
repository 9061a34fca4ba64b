// The page: a chat with this server's own API, the worker's view beside it, and the engine's numbers below.
// No framework, no build step, no other server. Every text that arrives is shown as text, never as markup.
"use strict";

import { askModel, chat, clearChat, send } from "./chat.js";
import { $, pauseOrKey } from "./common.js";
import { poll, wakePoll } from "./engine.js";
import { view, watch } from "./view.js";

async function findModel() {
  for (let wait = 500; !chat.model; wait = Math.min(2 * wait, 8000)) {
    try { await askModel(); } catch { await pauseOrKey(wait); }
  }
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  try { localStorage.setItem("theme", theme); } catch { /* not kept */ }
}

function start() {
  let theme = "auto";
  try { theme = localStorage.getItem("theme") || theme; } catch { /* not kept */ }
  setTheme(["auto", "light", "dark"].includes(theme) ? theme : "auto");
  $("theme").addEventListener("click", () => {
    const order = ["auto", "light", "dark"];
    const now = document.documentElement.dataset.theme || "auto";
    setTheme(order[(order.indexOf(now) + 1) % order.length]);
  });
  $("form").addEventListener("submit", send);
  $("stop").addEventListener("click", () => chat.stopper && chat.stopper.abort());
  $("clear").addEventListener("click", clearChat);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && chat.stopper) chat.stopper.abort();
  });
  $("requests-box").addEventListener("toggle", () => view.last && view.show(view.last));
  document.addEventListener("visibilitychange", () => wakePoll());
  findModel();
  poll(() => chat.stopper !== null);
  watch();
}

start();
