// The engine's numbers: polled, and counted from the beginning of the newest answer.
"use strict";

import { $, bytes, duration, headers, pause, problem, setText, shape } from "./common.js";

const BUSY_POLL_MS = 300;
const IDLE_POLL_MS = 3000;

// Of the enclave's time; what is left of it is shown as its rest.
const WITHIN = ["attention", "quantise", "mask", "check", "ahead", "mask_wait"];
let knowFirst;

/** The newest numbers, and those from when the newest answer began; `known` is the first that came. */
export const engine = {
  names: { worker: "worker", wire: "on the way", attention: "attention", quantise: "quantising", mask: "masking",
    check: "checking", ahead: "preparing checks and masks", mask_wait: "waiting for masks", rest: "rest of the enclave",
    sampling: "sampling" },
  before: null,
  now: null,
  known: new Promise((resolve) => { knowFirst = resolve; }),

  /** Numbers of this answer are counted from here. */
  begin() {
    this.before = this.now;
    for (const id of ["rate", "first"]) $(id).textContent = "–";
    wakePoll();
  },

  show(stats) {
    if (!this.before || stats.steps < this.before.steps) this.before = stats;
    this.now = stats;
    knowFirst(stats);
    setText("level", stats.level || "");
    $("level").hidden = !stats.level;
    $("running").textContent = stats.queued ? `${stats.running}, ${stats.queued} wait` : String(stats.running);
    const used = stats.blocks_total - stats.blocks_free;
    $("blocks").textContent = stats.blocks_total ? `${Math.round((100 * used) / stats.blocks_total)} %` : "–";
    const crossed = (at) => at.bytes_sent + at.bytes_received;
    $("traffic").textContent = bytes(crossed(stats) - crossed(this.before));
    this.showPool(stats);
    this.showParts(stats);
    const failures = stats.integrity_failures ? ` Wrong products found: ${stats.integrity_failures}.` : "";
    setText("state", (stats.ready ? "Ready." : `Not ready: ${stats.reason.replace(/\.$/, "")}.`) + failures);
  },

  showPool(stats) {
    const masked = stats.pool_wanted > 0;
    const level = masked ? stats.pool_held / stats.pool_wanted : 0;
    $("pool").textContent = masked ? `${Math.round(100 * level)} %` : "not used";
    $("pool-meter").hidden = !masked;
    $("pool-meter").value = Math.min(1, level);
  },

  /** Seconds of this answer by part: parts that do not overlap, so that they add up to its steps. */
  parts(stats) {
    const spent = (name) => (stats.seconds[name] || 0) - (this.before.seconds[name] || 0);
    const rest = Math.max(0, spent("enclave") - WITHIN.reduce((sum, name) => sum + spent(name), 0));
    return Object.entries(this.names)
      .map(([name, text], index) => ({ name: text, index, seconds: name === "rest" ? rest : spent(name) }))
      .filter((part) => part.seconds > 0);
  },

  showParts(stats) {
    const parts = this.parts(stats);
    const filled = (stats.seconds.mask_fill || 0) - (this.before.seconds.mask_fill || 0);
    $("filling").textContent = filled > 0 ? `Beside it, in idle time: ${duration(filled)} of filling the mask pool.` : "";
    const total = parts.reduce((sum, part) => sum + part.seconds, 0);
    const bar = $("parts");
    const list = $("parts-list");
    bar.replaceChildren();
    list.replaceChildren();
    if (!total) return;
    let x = 0;
    for (const part of parts) {
      const width = (1000 * part.seconds) / total;
      bar.append(shape("rect", { x: x.toFixed(2), y: 0, width: width.toFixed(2), height: 22, class: `part-${part.index}` }));
      x += width;
      const item = document.createElement("li");
      const key = shape("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" });
      key.append(shape("rect", { width: 12, height: 12, rx: 2, class: `part-${part.index}` }));
      item.append(key, `${part.name} ${duration(part.seconds)}`);
      list.append(item);
    }
    bar.setAttribute("aria-label", `Time by part: ${parts.map((p) => `${p.name} ${duration(p.seconds)}`).join(", ")}`);
  },
};

let wake = () => {};

/** Ask for the numbers now. */
export function wakePoll() {
  wake();
}

/** Ask for the numbers for ever, more often while an answer is made. */
export async function poll(isBusy) {
  for (;;) {
    if (!document.hidden) {
      try {
        const response = await fetch("status", { headers: headers(), cache: "no-store" });
        if (response.ok) engine.show(await response.json());
        else setText("state", await problem(response));
      } catch {
        setText("state", "The server does not answer.");
      }
    }
    const wait = isBusy() ? BUSY_POLL_MS : IDLE_POLL_MS;
    await Promise.race([pause(wait), new Promise((resolve) => { wake = resolve; })]);
  }
}
