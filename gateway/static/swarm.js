// The swarm as this peer sees it. Names and figures come from other peers: they only ever become text nodes.

const PERIOD_MS = 5000;

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

function showModel(model) {
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
  const titles = ["Peer", "Blocks", "State", "Decode", "Prefill", "Waits", "Cache left", "Round trip", "Runs"];
  const head = make("tr", "", ...titles.map((each) => make("th", "", each)));
  const rows = model.peers.map((peer) => {
    const name = make("td", "peer", peer.name || `…${peer.peer_id.slice(-8)}`);
    name.title = peer.peer_id;
    const state = peer.banned_s > 0 ? `avoided for ${peer.banned_s.toFixed(0)} s` : peer.state;
    return make("tr", "", name,
      make("td", "", `${peer.blocks[0]}:${peer.blocks[1]}`), make("td", "", state),
      make("td", "", `${peer.decode_blocks_per_s.toFixed(0)} blocks/s`), make("td", "", `${peer.prefill_blocks_per_s.toFixed(0)} blocks/s`),
      make("td", "", seconds(peer.queue_s)), make("td", "", `${peer.cache_tokens_left.toLocaleString()} tokens`),
      make("td", "", seconds(peer.round_trip_s)),
      make("td", "", `${peer.dtype}${peer.quant_type === "none" ? "" : ` ${peer.quant_type}`}, ${peer.version || "?"}`));
  });
  const table = make("table", "", make("thead", "", head), make("tbody", "", ...rows));
  return make("section", "model",
    make("h2", "", model.model, " ", health), make("p", "words", `${model.words}.`),
    make("h3", "", "Copies of each block"), map, make("div", "lanes", ...lanes),
    make("h3", "", `Peers (${model.peers.length})`), make("div", "table", table));
}

function showContribution(told) {
  const titles = ["Peer", "Gave us", "Got from us", "Balance", "Weight"];
  const head = make("tr", "", ...titles.map((each) => make("th", "", each)));
  const rows = told.peers.map((peer) => {
    const name = make("td", "peer", `…${peer.peer_id.slice(-8)}`);
    name.title = peer.peer_id;
    return make("tr", "", name,
      ...[peer.taken, peer.given, peer.balance].map((count) => make("td", "", count.toLocaleString())),
      make("td", "", peer.weight.toFixed(1)));
  });
  const table = make("table", "", make("thead", "", head), make("tbody", "", ...rows));
  return make("section", "model contribution",
    make("h2", "", "Given and taken"),
    make("p", "words", `This peer gave ${told.given.toLocaleString()} block-tokens and took ${told.taken.toLocaleString()}.`),
    rows.length ? make("div", "table", table) : "");
}

async function refresh() {
  const trouble = document.getElementById("trouble");
  try {
    const key = JSON.parse(localStorage.getItem("petals.settings") ?? "{}").key;
    const response = await fetch("/api/swarm", { headers: key ? { authorization: `Bearer ${key}` } : {} });
    const told = await response.json();
    if (!response.ok) throw new Error(told.error.message);
    const models = document.getElementById("models");
    models.replaceChildren(...told.models.map(showModel), showContribution(told.contribution));
    models.setAttribute("aria-busy", "false");
    trouble.hidden = true;
  } catch (error) {
    trouble.textContent = error instanceof TypeError ? "This peer can not be reached." : error.message;
    trouble.hidden = false;
  }
  setTimeout(refresh, PERIOD_MS);
}

refresh();
