// The swarm as this peer sees it. Names and figures come from other peers: they only ever become text nodes.

const PERIOD_MS = 5000;
const MATRIX_PEERS = 16;
const SVG = "http://www.w3.org/2000/svg";

function make(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children.map((each) => (each instanceof Node ? each : String(each))));
  return made;
}

function seconds(value) {
  if (value === null) return "-";
  return value < 1 ? `${(value * 1e3).toFixed(1)} ms` : `${value.toFixed(1)} s`;
}

function count(value) {
  return Math.round(value).toLocaleString("en");
}

function short(peer) {
  return peer.name || `…${peer.peer_id.slice(-8)}`;
}

// How others reach a peer, and how we did: "mapped", "relayed / punched".
function link(peer) {
  const reach = peer.reachability || (peer.relayed ? "relayed" : "?");
  return peer.link && peer.link !== reach ? `${reach} / ${peer.link}` : reach;
}

function table(titles, rows) {
  const heads = titles.map((each) => {
    const head = make("th", "", each);
    head.scope = "col";
    return head;
  });
  const shown = make("div", "table", make("table", "", make("thead", "", make("tr", "", ...heads)), make("tbody", "", ...rows)));
  shown.tabIndex = 0;  // can be wider than a phone: the keyboard must be able to scroll it
  return shown;
}

function showSessions(model) {
  if (!model.sessions.length) return make("p", "words", "nobody asks through this peer now.");
  const names = new Map(model.peers.map((peer) => [peer.peer_id, short(peer)]));
  const list = model.sessions.map((session) => {
    const hops = session.route.map((hop) => {
      const named = names.get(hop.peer_id) ?? `…${hop.peer_id.slice(-8)}`;
      const shown = make("span", "hop", `${hop.blocks[0]}:${hop.blocks[1]} ${named}`, make("small", "", seconds(hop.round_trip_s)));
      shown.title = `${hop.peer_id}${hop.link ? `, ${hop.link}` : ""}: waits ${seconds(hop.queue_s)}, computes ${seconds(hop.compute_s)}`;
      return shown;
    });
    const said = session.tokens ? `${session.tokens} tokens, ${session.tokens_per_s.toFixed(1)}/s` : "reads its prompt";
    return make("li", "", make("span", "told", said), ...hops);
  });
  return make("ul", "sessions", ...list);
}

// Rows ask, columns answer; servers measure those that hold the blocks after theirs.
function showRoundTrips(model, ourselves) {
  const known = new Map(model.peers.map((peer) => [peer.peer_id, peer]));
  const us = { peer_id: ourselves, name: "this peer", round_trips_s: {} };
  for (const peer of model.peers) if (peer.round_trip_s !== null && peer.peer_id !== ourselves) us.round_trips_s[peer.peer_id] = peer.round_trip_s;
  const rows = [us, ...model.peers.filter((peer) => peer.peer_id !== ourselves)].filter((row) => Object.keys(row.round_trips_s).some((to) => known.has(to)));
  const columns = model.peers.filter((peer) => rows.some((row) => peer.peer_id in row.round_trips_s));
  if (!columns.length) return [];
  const told = rows.slice(0, MATRIX_PEERS).map((row) => {
    const head = make("th", "peer", short(row));
    head.scope = "row";
    head.title = row.peer_id;
    return make("tr", "", head, ...columns.slice(0, MATRIX_PEERS).map((peer) => {
      const value = row.round_trips_s[peer.peer_id];
      if (value === undefined) return make("td", "rtt none", row.peer_id === peer.peer_id ? "" : "·");
      return make("td", `rtt ${value < 0.01 ? "near" : value < 0.1 ? "mid" : "far"}`, seconds(value));
    }));
  });
  const left = Math.max(rows.length, columns.length) - MATRIX_PEERS;
  const more = left > 0 ? [make("p", "words", `${left} more are left out.`)] : [];
  return [make("h3", "", "Round trips, from row to column"), table(["", ...columns.slice(0, MATRIX_PEERS).map(short)], told), ...more];
}

function draw(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function figure(value) {
  return value < 10 && !Number.isInteger(value) ? value.toFixed(1) : value.toFixed(0);
}

function plot(title, values, periodS, room) {
  const [width, height] = [300, 90];
  const top = Math.max(...values, 1e-9);
  const at = (index) => (width * (room - values.length + index)) / (room - 1);
  const points = values.map((value, index) => `${at(index).toFixed(1)},${(height - (height - 4) * (value / top)).toFixed(1)}`);
  const area = `${at(0).toFixed(1)},${height} ${points.join(" ")} ${width},${height}`;
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img" },
    draw("polygon", { class: "area", points: area }), draw("polyline", { class: "curve", points: points.join(" ") }));
  const [now, most] = [figure(values.at(-1)), figure(Math.max(...values))];
  picture.setAttribute("aria-label", `${title}: now ${now}, at most ${most}`);
  const minutes = Math.round((room * periodS) / 60);
  return make("figure", "plot", make("figcaption", "", title, make("strong", "", now)), picture,
    make("div", "axis", make("span", "", `${minutes} min ago`), make("span", "", `at most ${most}`), make("span", "", "now")));
}

function showHistory(history, serves) {
  const box = document.getElementById("history");
  box.hidden = history.samples.length < 2;
  if (box.hidden) return;
  const shown = [["Tokens generated per second", "generated_per_s"], ["Prompt tokens per second", "prompt_per_s"], ["Answers at once", "answers"]];
  if (serves) shown.push(["Sessions served to others and us", "sessions"]);
  const plots = shown.map(([title, name]) => plot(title, history.samples.map((each) => each[name]), history.period_s, history.room));
  box.querySelector(".plots").replaceChildren(...plots);
}

function showModel(model, ourselves) {
  const health = make("span", `health ${model.health}`, model.health);
  const map = make("div", "map");
  map.setAttribute("role", "img");
  map.setAttribute("aria-label", `Copies of blocks 0 to ${model.num_blocks - 1}: ${model.copies.join(", ")}`);
  model.copies.forEach((copies, block) => {
    const cell = make("span", `c${Math.min(copies, 3)}`, copies);
    cell.title = `block ${block}: ${copies} ${copies === 1 ? "copy" : "copies"}, ${model.blocks_per_s[block].toFixed(1)} passes/s`;
    map.append(cell);
  });
  const lanes = model.peers.map((peer) => {
    const line = make("div", "lane");
    const bar = make("span", `bar ${peer.state}`);
    bar.style.left = `${(100 * peer.blocks[0]) / model.num_blocks}%`;
    bar.style.width = `${(100 * (peer.blocks[1] - peer.blocks[0])) / model.num_blocks}%`;
    bar.title = `${peer.blocks[0]}:${peer.blocks[1]} ${peer.name || peer.peer_id}`;
    line.append(bar);
    return line;
  });
  const titles = ["Peer", "Blocks", "State", "Decode", "Prefill", "Waits", "Cache left", "Round trip", "Link", "Runs"];
  const rows = model.peers.map((peer) => {
    const name = make("td", "peer", short(peer));
    name.title = peer.peer_id;
    const state = peer.banned_s > 0 ? `avoided for ${peer.banned_s.toFixed(0)} s` : peer.state;
    return make("tr", "", name,
      make("td", "", `${peer.blocks[0]}:${peer.blocks[1]}`), make("td", "", state),
      make("td", "", `${count(peer.decode_blocks_per_s)} blocks/s`), make("td", "", `${count(peer.prefill_blocks_per_s)} blocks/s`),
      make("td", "", seconds(peer.queue_s)), make("td", "", `${count(peer.cache_tokens_left)} tokens`),
      make("td", "", seconds(peer.round_trip_s)), make("td", "", link(peer)),
      make("td", "", `${peer.dtype}${peer.quant_type === "none" ? "" : ` ${peer.quant_type}`}, ${peer.version || "?"}`));
  });
  return make("section", "model",
    make("h2", "", model.model, " ", health), make("p", "words", `${model.words}.`),
    make("h3", "", "Copies of each block"), map, make("div", "lanes", ...lanes),
    make("div", "axis", make("span", "", "block 0"), make("span", "", `block ${model.num_blocks - 1}`)),
    make("h3", "", `Peers (${model.peers.length})`), table(titles, rows),
    make("h3", "", `Routes now (${model.sessions.length})`), showSessions(model), ...showRoundTrips(model, ourselves));
}

function showContribution(told, names) {
  const titles = ["Peer", "Gave us", "Got from us", "Balance", "Weight"];
  const rows = told.peers.map((peer) => {
    const name = make("td", "peer", names.get(peer.peer_id) ?? `…${peer.peer_id.slice(-8)}`);
    name.title = peer.peer_id;
    return make("tr", "", name,
      ...[peer.taken, peer.given, peer.balance].map((each) => make("td", "", count(each))),
      make("td", "", peer.weight.toFixed(1)));
  });
  return make("section", "model contribution",
    make("h2", "", "Given and taken"),
    make("p", "words", `This peer gave ${count(told.given)} block-tokens and took ${count(told.taken)}.`),
    rows.length ? table(titles, rows) : "");
}

// What is wider or longer than the screen stays where the reader had moved it to, and the keyboard where it was.
function keepPlace(box, renew) {
  const movable = () => [...box.querySelectorAll(".table, .lanes")];
  const before = movable().map((each) => [each.scrollLeft, each.scrollTop]);
  const focused = movable().indexOf(document.activeElement);
  renew();
  movable().forEach((each, index) => {
    [each.scrollLeft, each.scrollTop] = before[index] ?? [0, 0];
    if (index === focused) each.focus({ preventScroll: true });
  });
}

async function refresh() {
  const trouble = document.getElementById("trouble");
  try {
    const key = JSON.parse(localStorage.getItem("petals.settings") ?? "{}").key;
    const response = await fetch("/api/swarm", { headers: key ? { authorization: `Bearer ${key}` } : {} });
    const told = await response.json();
    if (!response.ok) throw new Error(response.status === 401 ? "This peer wants an API key: enter it in the chat's settings." : told.error.message);
    const models = document.getElementById("models");
    const names = new Map(told.models.flatMap((model) => model.peers.map((peer) => [peer.peer_id, short(peer)])));
    const shown = told.models.map((model) => showModel(model, told.peer_id));
    keepPlace(models, () => models.replaceChildren(...shown, showContribution(told.contribution, names)));
    showHistory(told.history, told.models.some((model) => model.peers.some((peer) => peer.peer_id === told.peer_id)));
    models.setAttribute("aria-busy", "false");
    trouble.hidden = true;
  } catch (error) {
    trouble.textContent = error instanceof TypeError ? "This peer can not be reached." : error.message;
    trouble.hidden = false;
  }
  setTimeout(refresh, PERIOD_MS);
}

refresh();
