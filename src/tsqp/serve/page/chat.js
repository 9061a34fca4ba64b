// The chat: one conversation, answered in a stream, kept in this tab only.
"use strict";

import { $, duration, headers, problem, serverEvents } from "./common.js";
import { engine, wakePoll } from "./engine.js";

const TOUCH = window.matchMedia("(pointer: coarse)");

export const chat = { messages: [], model: "", stopper: null, started: 0, first: 0, pieces: 0, tokens: 0, ended: 0 };

function bubble(role, text) {
  $("empty").hidden = true;
  const box = document.createElement("div");
  box.className = `message ${role}`;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : "Model";
  const body = document.createElement("span");
  body.className = "body";
  body.textContent = text;
  box.append(who, body);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return box;
}

function note(box, text) {
  const end = document.createElement("span");
  end.className = "end";
  end.textContent = text;
  box.append(end);
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

/** Ask which model is served, unless that is known. */
export async function askModel() {
  if (chat.model) return;
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await problem(response));
  chat.model = (await response.json()).data[0].id;
  $("model").textContent = chat.model;
}

function request() {
  return {
    model: chat.model,
    messages: chat.messages,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** Read one streamed answer into its bubble; return why it ended. */
async function readAnswer(response, box) {
  const log = $("log");
  const body = box.querySelector(".body");
  let reason = "broken off";
  for await (const data of serverEvents(response)) {
    if (data === "[DONE]") return reason;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    if (event.usage) chat.tokens = event.usage.completion_tokens;
    const choice = event.choices && event.choices[0];
    if (choice && choice.delta && choice.delta.content) {
      if (!chat.first) chat.first = performance.now();
      chat.pieces += 1;
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      body.append(choice.delta.content);
      if (atEnd) log.scrollTop = log.scrollHeight;
      showRate();
    }
    if (choice && choice.finish_reason) reason = choice.finish_reason;
  }
  return reason;
}

function busy(on) {
  $("send").disabled = on;
  $("stop").disabled = !on;
  $("clear").disabled = on;
  $("log").setAttribute("aria-busy", String(on));
}

export async function send(event) {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (chat.stopper || !text) return;
  showError("");
  $("prompt").value = "";
  chat.messages.push({ role: "user", content: text });
  const asked = bubble("user", text);
  const box = bubble("assistant", "");
  Object.assign(chat, { stopper: new AbortController(), started: performance.now(), first: 0, pieces: 0, tokens: 0, ended: 0 });
  engine.begin();
  busy(true);
  $("announce").textContent = "The model is answering.";
  let ended = "";
  try {
    await askModel();
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify(request()),
      signal: chat.stopper.signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    ended = await readAnswer(response, box);
  } catch (error) {
    ended = error.name === "AbortError" ? "stopped" : "failed";
    if (ended === "failed") showError(error instanceof TypeError ? "The connection to the server was lost." : error.message);
  }
  finish(text, asked, box, ended);
}

function finish(text, asked, box, ended) {
  const answer = box.querySelector(".body").textContent;
  chat.ended = performance.now();
  chat.stopper = null;
  busy(false);
  showRate();
  wakePoll();
  if (answer) {
    chat.messages.push({ role: "assistant", content: answer });
  } else {
    chat.messages.pop();
  }
  if (!answer && ended === "failed") {
    box.remove();
    asked.remove();
    if (!$("prompt").value) $("prompt").value = text;
    $("empty").hidden = $("log").querySelector(".message") !== null;
  }
  const why = { length: "cut off at the number of tokens asked for", stopped: "stopped", failed: "ended by an error",
    "broken off": "the connection ended early" }[ended];
  if (why && box.isConnected) note(box, why);
  $("announce").textContent = ended === "failed" ? "" : `${answer || "No answer"}${why ? ` (${why})` : ""}`;
  refocus();
}

/** Go back to where the next message is typed, but not away from something else, and without a phone's keyboard. */
function refocus() {
  const at = document.activeElement;
  if (at && at !== document.body && !["prompt", "send", "stop"].includes(at.id)) return;
  $(TOUCH.matches ? "log" : "prompt").focus({ preventScroll: true });
}

export function clearChat() {
  chat.messages = [];
  for (const box of $("log").querySelectorAll(".message")) box.remove();
  $("empty").hidden = false;
  showError("");
  $("announce").textContent = "New conversation.";
  $("prompt").focus();
}

function showRate() {
  if (!chat.first) return;
  $("first").textContent = duration((chat.first - chat.started) / 1000);
  const seconds = ((chat.ended || performance.now()) - chat.first) / 1000;
  const tokens = chat.tokens || chat.pieces;
  if (tokens > 1 && seconds > 0) $("rate").textContent = ((tokens - 1) / seconds).toFixed(1);
}
