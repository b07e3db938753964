// The chat page. History lives in this browser's storage; everything shown is built from text nodes.

import { render } from "./markdown.js";
import { chat } from "./stream.js";

const STORE = "petals.chats";
const PREFERENCES = "petals.settings";
const KEEP_CHATS = 100;
// Small models, such as the default one, ramble at 0.7.
const DEFAULTS = { system: "", temperature: "0.2", top_p: "0.9", frequency_penalty: "0.2", max_tokens: "512", seed: "", key: "", model: "" };
const FIELDS = ["system", "temperature", "top_p", "frequency_penalty", "max_tokens", "seed", "key"];

const $ = (id) => document.getElementById(id);
const store = readStore();
let settings = { ...DEFAULTS, ...readJson(PREFERENCES, {}) };
let running = null; // {controller, chat}: the answer that is being written

function readJson(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function readStore() {
  const found = readJson(STORE, {});
  const chats = Array.isArray(found.chats) ? found.chats.filter((each) => each && Array.isArray(each.messages)) : [];
  return { chats, now: found.now ?? null };
}

function save() {
  store.chats.sort((a, b) => b.touched - a.touched);
  while (true) {
    try {
      localStorage.setItem(STORE, JSON.stringify({ chats: store.chats.slice(0, KEEP_CHATS), now: store.now }));
      localStorage.setItem(PREFERENCES, JSON.stringify(settings));
      return;
    } catch {
      if (store.chats.length < 2) return; // storage is full or forbidden: this chat lives as long as the page
      store.chats.pop();
    }
  }
}

function current() {
  return store.chats.find((each) => each.id === store.now) ?? null;
}

function make(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** Whether what had the focus is gone, or is about to be. */
function lostFocus() {
  return document.activeElement === document.body || Boolean(document.activeElement?.closest("[hidden]"));
}

/** Where the keyboard goes on when what had the focus is gone. On a touch screen that would bring up its keyboard. */
function toPrompt() {
  if (!matchMedia("(pointer: coarse)").matches) $("prompt").focus();
}

function button(label, act, className = "") {
  const made = make("button", className, label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// ---- showing

function show() {
  const now = current();
  $("welcome").hidden = Boolean(now?.messages.length);
  $("messages").replaceChildren(...(now?.messages ?? []).map((_, index) => item(now, index)));
  $("chats").replaceChildren(
    ...store.chats.map((each) => {
      const open = button(each.title || "New chat", () => select(each.id), "name");
      open.title = each.title;
      if (each.id === store.now) open.setAttribute("aria-current", "true");
      const drop = button("×", () => remove(each.id), "drop");
      drop.setAttribute("aria-label", `Delete ${each.title || "this chat"}`);
      return make("li", each.id === store.now ? "now" : "", open, drop);
    }),
  );
  document.title = now?.title ? `${now.title} · Petals` : "Petals chat";
  buttons();
}

function buttons() {
  const sent = document.activeElement === $("send");
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  if (running && sent) $("stop").focus();
  $("send").disabled = !$("prompt").value.trim() || !$("model").value;
  for (const each of document.querySelectorAll("#messages .acts button:not(.copy)")) each.disabled = Boolean(running);
}

function item(conversation, index) {
  const message = conversation.messages[index];
  const body = make("div", "body");
  const name = make("span", "hidden", message.role === "user" ? "You: " : "Model: ");
  const acts = make("div", "acts");
  const made = make("li", message.role, name, body, acts);
  fill(made, message);
  if (message.role === "user") {
    acts.append(button("Edit", () => edit(conversation, index, made)));
  } else {
    const copy = button("Copy", async () => {
      await navigator.clipboard?.writeText(message.content).catch(() => {});
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    }, "copy");
    if (message.content) acts.append(copy);
    if (index === conversation.messages.length - 1) {
      acts.append(button(message.error ? "Try again" : "Regenerate", () => regenerate(conversation)));
    }
    acts.append(make("span", "told", message.told ?? ""));
  }
  return made;
}

function fill(made, message) {
  const body = made.querySelector(".body");
  if (message.role === "user") body.textContent = message.content;
  else render(message.content, body);
  body.hidden = Boolean(message.error) && !message.content;
  made.querySelector(".error")?.remove();
  if (message.error) {
    const error = make("div", "error", message.error);
    error.setAttribute("role", "alert");
    body.after(error);
  }
}

function nearEnd() {
  const view = $("scroll");
  return view.scrollHeight - view.scrollTop - view.clientHeight < 80;
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function announce(text) {
  $("announce").textContent = text;
}

let lastRoute = "";

function showRoute(told) {
  const hops = told.route.map((hop) => {
    const shown = make("span", "hop", `${hop.blocks[0]}:${hop.blocks[1]} via …${hop.peer_id.slice(-6)} (${(hop.round_trip_s * 1e3).toFixed(0)} ms)`);
    shown.title = hop.peer_id;
    return shown;
  });
  const path = told.route.map((hop) => `${hop.blocks}@${hop.peer_id}`).join(" ");
  const moved = Boolean(lastRoute) && path !== lastRoute && Boolean(running);
  if (moved) {
    hops.push(make("span", "hop moved", "route changed"));
    announce("A peer left; the answer goes on over another route.");
  }
  lastRoute = path;
  $("route").replaceChildren(...hops);
}

// ---- acting

function select(id) {
  stop();
  store.now = id;
  save();
  show();
  closeSide();
  toEnd();
  $("prompt").focus();
}

function startNew() {
  stop();
  store.now = null;
  $("speed").textContent = "";
  $("route").replaceChildren();
  save();
  show();
  closeSide();
  $("prompt").focus();
}

function remove(id) {
  const title = store.chats.find((each) => each.id === id)?.title || "this chat";
  if (!confirm(`Delete “${title}”?`)) return;
  if (running?.chat.id === id) stop();
  store.chats = store.chats.filter((each) => each.id !== id);
  if (store.now === id) store.now = null;
  save();
  show();
  $("new").focus();
}

function submit(text) {
  if (running || !text.trim() || !$("model").value) return;
  let now = current();
  if (!now) {
    now = { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [], touched: Date.now() };
    store.chats.unshift(now);
    store.now = now.id;
  }
  if (!now.title) now.title = text.trim().split("\n")[0].slice(0, 60);
  now.messages.push({ role: "user", content: text });
  answer(now);
}

function regenerate(conversation) {
  if (running) return;
  conversation.messages.pop();
  answer(conversation);
}

function edit(conversation, index, made) {
  if (running) return;
  const area = make("textarea");
  area.value = conversation.messages[index].content;
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit your message");
  const save = button("Send", () => {
    if (!area.value.trim()) return;
    conversation.messages.splice(index);
    conversation.messages.push({ role: "user", content: area.value });
    if (index === 0) conversation.title = area.value.trim().split("\n")[0].slice(0, 60);
    answer(conversation);
  }, "primary");
  const cancel = button("Cancel", () => {
    show();
    toPrompt();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel.click();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save.click();
    }
  });
  made.replaceChildren(make("div", "edit", area, make("div", "row", cancel, save)));
  area.focus();
}

function stop() {
  running?.controller.abort();
}

/** Ask for the next message of `conversation` and show it as it comes. */
async function answer(conversation) {
  const message = { role: "assistant", content: "" };
  const system = settings.system.trim();
  const asked = conversation.messages.filter((each) => each.content).map(({ role, content }) => ({ role, content }));
  conversation.messages.push(message);
  conversation.touched = Date.now();
  const controller = new AbortController();
  const mine = (running = { controller, chat: conversation });
  lastRoute = "";
  save();
  show();
  toEnd();
  announce("The model is answering.");
  const made = $("messages").lastElementChild;
  made.querySelector(".body").classList.add("waiting");
  made.classList.add("writing");
  if (lostFocus()) $("stop").focus();
  const began = performance.now();
  let first = 0;
  let count = 0;
  let drawing = false;
  const draw = () => {
    drawing = false;
    const follow = nearEnd();
    fill(made, message);
    if (follow) toEnd();
  };
  const tell = () => {
    const seconds = (performance.now() - first) / 1e3;
    message.told = count > 1 ? `${count} tokens, ${((count - 1) / Math.max(seconds, 1e-3)).toFixed(1)} tokens/s` : "";
    $("speed").textContent = message.told;
  };
  $("speed").textContent = "waiting for the swarm";
  $("route").replaceChildren();
  try {
    const request = {
      model: $("model").value,
      messages: system ? [{ role: "system", content: system }, ...asked] : asked,
      temperature: Number(settings.temperature),
      top_p: Number(settings.top_p),
      frequency_penalty: Number(settings.frequency_penalty),
      ...(Number(settings.max_tokens) >= 1 ? { max_tokens: Math.floor(Number(settings.max_tokens)) } : {}),
      ...(settings.seed !== "" && Number.isSafeInteger(Number(settings.seed)) ? { seed: Number(settings.seed) } : {}),
    };
    for await (const event of chat(request, settings.key, controller.signal)) {
      if (event.text) {
        count += 1;
        first ||= performance.now();
        message.content += event.text;
        tell();
        if (!drawing) {
          drawing = true;
          requestAnimationFrame(draw);
        }
      }
      if (event.route) showRoute(event.route);
      if (event.finish === "length") message.told += ", cut at the longest answer";
    }
    announce(`Answer: ${message.content}`);
  } catch (error) {
    if (controller.signal.aborted) {
      message.told = `${message.told ?? ""}${message.told ? ", " : ""}stopped`;
      announce("Stopped.");
    } else {
      message.error = error.message;
    }
  }
  if (!first) $("speed").textContent = "";
  else if (!message.error) $("speed").textContent = `${$("speed").textContent}, first after ${((first - began) / 1e3).toFixed(1)} s`;
  if (running === mine) running = null;
  if (!message.content && !message.error) conversation.messages.pop();
  save();
  const follow = nearEnd();
  show();
  if (follow) toEnd();
  if (lostFocus()) toPrompt();
  lookAtSwarm();
}

// ---- the page around it

function grow() {
  const area = $("prompt");
  area.rows = 1;
  area.rows = Math.min(10, Math.max(1, Math.round((area.scrollHeight - 12) / 24))); // 12: its padding
}

function openSide(open) {
  $("side").classList.toggle("open", open);
  $("shade").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
  if (open) $("new").focus();
}

function closeSide() {
  openSide(false);
}

function showSettings() {
  for (const name of FIELDS) $(name).value = settings[name];
  for (const each of document.querySelectorAll("#settings output")) each.textContent = $(each.htmlFor[0]).value;
}

function openSettings(field) {
  showSettings();
  $("settings").showModal();
  if (field) $(field).focus();
}

async function listModels() {
  const select = $("model");
  try {
    const headers = settings.key ? { authorization: `Bearer ${settings.key}` } : {};
    const response = await fetch("/v1/models", { headers });
    const found = await response.json();
    if (!response.ok) {
      throw Object.assign(new Error(found.error?.message ?? `status ${response.status}`), { wantsKey: response.status === 401 });
    }
    const names = found.data.map((each) => each.id);
    const short = names.map((each) => each.split("/").pop()); // a phone has no room for who made it
    const unique = new Set(short).size === names.length;
    select.replaceChildren(...names.map((each, index) => new Option(unique ? short[index] : each, each)));
    if (names.includes(settings.model)) select.value = settings.model;
    select.title = select.value;
    $("trouble").replaceChildren();
    lookAtSwarm();
  } catch (error) {
    select.replaceChildren(new Option("no model", ""));
    let said = error instanceof TypeError ? "This peer can not be reached." : error.message;
    if (error.wantsKey && !settings.key) said = "This peer wants an API key.";
    $("trouble").replaceChildren(said, error.wantsKey ? button("Enter a key", () => openSettings("key")) : "");
  }
  buttons();
}

/** Say before somebody waits for it that an answer can not come now. */
async function lookAtSwarm() {
  try {
    const response = await fetch("/api/swarm", { headers: settings.key ? { authorization: `Bearer ${settings.key}` } : {} });
    const model = (await response.json()).models.find((each) => each.model === $("model").value);
    const broken = model?.health === "broken";
    $("trouble").replaceChildren(...(broken ? [`Now ${model.words}: answers wait until a peer that serves them joins.`] : []));
  } catch {
    // The next question will tell.
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (running || !text.trim()) return;
  $("prompt").value = "";
  grow();
  submit(text);
});
$("prompt").addEventListener("input", () => {
  grow();
  buttons();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => {
  stop();
  $("prompt").focus();
});
$("new").addEventListener("click", startNew);
$("menu").addEventListener("click", () => openSide(!$("side").classList.contains("open")));
$("shade").addEventListener("click", closeSide);
$("model").addEventListener("change", () => {
  settings.model = $("model").title = $("model").value;
  save();
  lookAtSwarm();
});
for (const idea of document.querySelectorAll("#ideas button")) idea.addEventListener("click", () => submit(idea.textContent));
$("open-settings").addEventListener("click", () => openSettings());
$("settings").addEventListener("input", (event) => {
  if (FIELDS.includes(event.target.id)) settings[event.target.id] = event.target.value;
  for (const each of document.querySelectorAll("#settings output")) each.textContent = $(each.htmlFor[0]).value;
});
$("settings").addEventListener("close", () => {
  save();
  listModels();
});
$("reset").addEventListener("click", () => {
  settings = { ...DEFAULTS, key: settings.key, model: settings.model };
  showSettings();
});
$("forget").addEventListener("click", () => {
  if (!confirm("Delete all chats of this browser?")) return;
  stop();
  store.chats = [];
  $("settings").close();
  startNew();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) {
    if ($("side").classList.contains("open")) {
      closeSide();
      $("menu").focus();
    } else {
      stop();
    }
  }
});

show();
listModels();
$("prompt").focus();
