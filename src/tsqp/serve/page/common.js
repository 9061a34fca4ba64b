// What every part of the page uses: requests to this server, server-sent events, and a few helpers for the document.
"use strict";

export const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** Headers of every request. The key lives in its input field and nowhere else. */
export function headers(more = {}) {
  const key = $("key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** Yield the data of each server-sent event; comments, which pad events, are skipped. */
export async function* serverEvents(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Return the sentence of an error answer; OpenAI's form, or what the status says. */
export async function problem(response) {
  let message = "";
  try { message = (await response.json()).error.message; } catch { /* not in that form */ }
  if (response.status === 401) {
    $("settings").open = true;
    return `${message || "The server asks for an API key."} Enter it under Settings.`;
  }
  return message || `The server answered ${response.status} ${response.statusText}.`;
}

export const pause = (ms) => new Promise((wake) => setTimeout(wake, ms));

export const number = new Intl.NumberFormat("en");

export function duration(seconds) {
  return seconds < 1 ? `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(2)} s`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${count.toFixed(unit && count < 100 ? 1 : 0)}\u00a0${units[unit]}`;
}

export function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** Change a text only when it is another: live regions are read out on every change. */
export function setText(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

/** Wait for some time, or until another API key is entered. */
export function pauseOrKey(ms) {
  return Promise.race([pause(ms), new Promise((wake) => $("key").addEventListener("change", wake, { once: true }))]);
}
