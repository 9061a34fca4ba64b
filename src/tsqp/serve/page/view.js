// What the worker sees: snapshots that a demonstration worker publishes; a production server has none.
"use strict";

import { $, bytes, headers, number, pauseOrKey, problem, serverEvents, setText, shape } from "./common.js";
import { engine } from "./engine.js";

const BINS = 64;
const WORDS_IN_TABLE = 2;
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

const VERDICTS = {
  open: "It reads every word: it is sent the very token ids, and every activation in clear.",
  verified: "It reads every word: each row it gets lies next to one row of the public embedding table.",
  masked: "It sees uniform noise. The attack that reads every word at “verified” finds nothing.",
};
const READINGS = {
  ids: ["What it reads", "Token ids it was sent, decoded with the model's public tokenizer."],
  nearest: ["What it reads", "The nearest row of the public embedding table, for each row that came."],
  guess: ["Its best attempt to read it", "The same nearest-row attack as at “verified”. It finds a token for anything; these are chance."],
};

function setVerdict(text, kind) {
  setText("verdict", text);
  $("verdict").className = `verdict ${kind}`;
}

/** Entropy of a histogram, in bits. */
function entropy(counts) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  return counts.reduce((sum, count) => (count ? sum - (count / total) * Math.log2(count / total) : sum), 0);
}

function bars(svg, counts, width, height, gap) {
  const most = Math.max(1, ...counts);
  if (svg.childElementCount !== BINS) {
    svg.replaceChildren(...counts.map((_, index) =>
      shape("rect", { x: (index * width) / BINS, width: width / BINS - gap, y: 0, height: 0 })));
  }
  counts.forEach((count, index) => {
    const tall = (height * count) / most;
    svg.children[index].setAttribute("y", (height - tall).toFixed(2));
    svg.children[index].setAttribute("height", tall.toFixed(2));
  });
}

function edge(limit) {
  const power = Math.log2(limit);
  return power >= 16 ? `2${[...String(power)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("")}` : String(limit);
}

function showHistogram(histogram) {
  const total = histogram.counts.reduce((sum, count) => sum + count, 0);
  const bits = entropy(histogram.counts);
  const verdict = bits > 5.9 ? "as even as chance" : "uneven, so they tell something";
  const sentence = `${number.format(total)} values of the first layer's rows, spread ${bits.toFixed(2)} of 6 bits: ${verdict}`;
  $("spread").textContent = sentence;
  bars($("histogram"), histogram.counts, 640, 120, 1);
  $("histogram").setAttribute("aria-label", `Histogram over ${BINS} bins from -${edge(histogram.limit)} to ${edge(histogram.limit)}. ${sentence}`);
  $("low").textContent = `−${edge(histogram.limit)}`;
  $("high").textContent = edge(histogram.limit);
}

function cell(text, kind) {
  const element = document.createElement("td");
  if (kind) element.className = kind;
  element.textContent = text;
  return element;
}

function requestRow(each) {
  const row = document.createElement("tr");
  const chart = document.createElement("td");
  if (each.histogram) {
    const svg = shape("svg", { viewBox: "0 0 128 20", preserveAspectRatio: "none", class: "spark", "aria-hidden": "true" });
    bars(svg, each.histogram.counts, 128, 20, 0);
    chart.append(svg);
  }
  row.append(cell(each.group || each.operation.toLowerCase()), cell(number.format(each.rows), "n"), cell(each.dtype),
    cell(number.format(each.size_bytes), "n"), chart, cell(each.words.slice(0, WORDS_IN_TABLE).join(" "), "mono"));
  return row;
}

function showReading(reading, level) {
  $("reading").hidden = !reading;
  if (!reading) return level === "masked";
  const reads = reading.sure > 0.5;
  const [title, text] = READINGS[reads ? reading.by : "guess"];
  setText("reading-title", title);
  const share = reading.by === "nearest" ? ` It is sure of ${Math.round(100 * reading.sure)} % of the tokens.` : "";
  $("reading-note").textContent = text + share;
  $("reading").className = reads ? "read" : "guess";
  const box = $("text");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  $("read-prompt").textContent = reading.prompt;
  $("read-answer").textContent = reading.answer;
  if (atEnd) box.scrollTop = box.scrollHeight;
  return !reads;
}

export const view = {
  shownAt: 0,

  show(event) {
    if (!event.requests) {
      $("seen").hidden = true;
      setVerdict("Nothing yet. Send a message: what then arrives at the worker appears here.", "");
      return;
    }
    $("seen").hidden = false;
    const safe = showReading(event.reading, event.level);
    if (safe && event.level !== "masked") {
      setVerdict("It gets activations in clear, but could not put them into words so far.", "bad");
    } else if (!safe && event.level === "masked") {
      setVerdict("It reads words although the level is masked: this must not happen, please report it.", "bad");
    } else {
      setVerdict(VERDICTS[event.level] || "", safe ? "good" : "bad");
    }
    $("received").textContent = `${number.format(event.requests)} requests, ${bytes(event.size_bytes)} for this answer`;
    $("words").textContent = event.words.join(" ");
    if (event.histogram) showHistogram(event.histogram);
    if ($("requests-box").open) $("requests").replaceChildren(...event.last.map(requestRow));
    this.last = event;
  },

  /** Draw at most once a second for those who asked for little motion. */
  take(event) {
    const now = performance.now();
    if (calm.matches && now - this.shownAt < 1000 && this.last && this.last.run === event.run) {
      clearTimeout(this.later);
      this.later = setTimeout(() => this.take(event), 1000);
      return;
    }
    clearTimeout(this.later);
    this.shownAt = now;
    this.show(event);
  },

  notOffered() {
    $("seen").hidden = true;
    setVerdict("Not offered by this server.", "");
    const text = document.createElement("p");
    text.className = "soft";
    text.textContent = "Only a demonstration shows what its worker sees; a production server never does. "
      + "To watch one: tsqp demo, or tsqp demo --level open.";
    $("verdict").after(text);
  },
};

export async function watch() {
  if (!(await engine.known).view) { view.notOffered(); return; }
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      const response = await fetch("view", { headers: headers({ Accept: "text/event-stream" }), cache: "no-store" });
      if (response.status === 404) { view.notOffered(); return; }
      if (response.ok) {
        for await (const data of serverEvents(response)) {
          wait = 500;
          view.take(JSON.parse(data));
        }
      } else {
        setVerdict(await problem(response), "");
      }
    } catch {
      setVerdict("The connection to the worker's view was lost; trying again.", "");
    }
    await pauseOrKey(wait);
  }
}
