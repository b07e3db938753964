// Markdown to DOM nodes. What a model says is untrusted: text only ever becomes text nodes, elements come from the
// short list below, and links are kept only where they lead to http, https or mailto. Nothing is parsed as HTML.

const LINK = /^(https?:\/\/|mailto:)[^\s]+$/i;
const INLINE = new RegExp(
  [
    /\\([\\`*_{}#+\-.!|~<>])/, // brackets are not among them: \( and \[ begin formulas
    /(?<ticks>`+)(?<code>[\s\S]*?[^`])\k<ticks>(?!`)/,
    /\*\*\*(?<both>[^\s*](?:[^*]*?[^\s*])?)\*\*\*/,
    /\*\*(?<strong>[^\s*](?:[\s\S]*?[^\s])?)\*\*/,
    /(?<!\w)__(?<strong2>[^\s_](?:[\s\S]*?[^\s])?)__(?!\w)/,
    /\*(?<em>[^\s*](?:[^*]*?[^\s*])?)\*/,
    /(?<!\w)_(?<em2>[^\s_](?:[^_]*?[^\s_])?)_(?!\w)/,
    /~~(?<struck>[^~]+)~~/,
    /\[(?<label>[^\]\n]{1,500})\]\((?<target>(?:[^()\s]|\([^()\s]*\)){1,2000})\)/,
    /(?<bare>https?:\/\/[^\s<>"'`)\]]+[^\s<>"'`)\].,;:!?])/,
  ]
    .map((each) => each.source)
    .join("|"),
);

/** Fill `target` with `text`. */
export function render(text, target) {
  target.replaceChildren(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0));
}

function element(name, children = [], className = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** Lines to block elements; `depth` bounds how far quotes and lists nest. */
function blocks(lines, depth) {
  const made = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(line);
    const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      const body = [];
      at += 1;
      while (at < lines.length && !isClosing(lines[at], fence[1])) body.push(lines[at++]);
      at += 1;
      made.push(code(body.join("\n"), fence[2]));
    } else if (heading) {
      made.push(element(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2])));
      at += 1;
    } else if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      made.push(element("hr"));
      at += 1;
    } else if (depth < 6 && /^\s{0,3}>/.test(line)) {
      const body = [];
      while (at < lines.length && /^\s{0,3}>/.test(lines[at])) body.push(lines[at++].replace(/^\s{0,3}> ?/, ""));
      made.push(element("blockquote", blocks(body, depth + 1)));
    } else if (depth < 6 && ITEM.test(line)) {
      at = list(lines, at, depth, made);
    } else if (isTable(lines, at)) {
      at = table(lines, at, made);
    } else {
      const body = [];
      while (at < lines.length && lines[at].trim() && (body.length === 0 || !startsBlock(lines, at))) {
        body.push(lines[at++]);
      }
      made.push(element("p", inline(body.join("\n"))));
    }
  }
  return made;
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function startsBlock(lines, at) {
  return /^ {0,3}(`{3,}|~{3,}|>|#{1,6}\s)/.test(lines[at]) || ITEM.test(lines[at]) || isTable(lines, at);
}

function isClosing(line, fence) {
  const trimmed = line.trim();
  return trimmed.length >= fence.length && trimmed === fence[0].repeat(trimmed.length);
}

function list(lines, at, depth, made) {
  const first = ITEM.exec(lines[at]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const items = [];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > indent + 1 || item[1].length < indent || /\d/.test(item[2]) !== ordered) break;
    const body = [item[3]];
    const inset = lines[at].length - item[3].length;
    at += 1;
    while (at < lines.length) {
      const next = lines[at];
      const leading = next.length - next.trimStart().length;
      if (!next.trim()) {
        const after = lines.slice(at + 1).find((each) => each.trim());
        if (after === undefined || after.length - after.trimStart().length <= indent) break;
      } else if (leading <= indent && (ITEM.test(next) || startsBlock(lines, at) || !lines[at - 1].trim())) {
        break;
      }
      body.push(next.slice(Math.min(leading, inset)));
      at += 1;
    }
    const task = ordered ? null : /^\[([ xX])\]\s+/.exec(body[0]);
    if (task) body[0] = `${task[1] === " " ? "☐" : "☑"} ${body[0].slice(task[0].length)}`;
    items.push(element("li", tight(blocks(body, depth + 1)), task ? "task" : ""));
    while (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
  }
  const made_list = element(ordered ? "ol" : "ul", items);
  if (ordered) made_list.start = parseInt(first[2], 10);
  made.push(made_list);
  return at;
}

/** An item of one paragraph needs no paragraph. */
function tight(nodes) {
  return nodes.length > 0 && nodes[0].tagName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
}

function isTable(lines, at) {
  return lines[at].includes("|") && /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)*\|?\s*$/.test(lines[at + 1] ?? "");
}

function table(lines, at, made) {
  const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((each) => each.trim());
  const sides = cells(lines[at + 1]).map((each) => (/:$/.test(each) ? (/^:/.test(each) ? "center" : "right") : ""));
  const width = cells(lines[at]).length;
  const row = (line, name) => {
    const found = cells(line);
    return element("tr", Array.from({ length: width }, (_, i) => element(name, inline(found[i] ?? ""), sides[i] ?? "")));
  };
  const head = element("thead", [row(lines[at], "th")]);
  const body = element("tbody");
  at += 2;
  while (at < lines.length && lines[at].includes("|")) body.append(row(lines[at++], "td"));
  const made_table = element("div", [element("table", [head, body])], "table");
  made_table.tabIndex = 0; // can be wider than a phone: the keyboard must be able to scroll it
  made.push(made_table);
  return at;
}

function code(text, language) {
  const copy = element("button", ["Copy"], "copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Not allowed";
    }
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  const bar = element("div", [element("span", [language || "text"]), copy], "bar");
  const pre = element("pre", [element("code", [text])]);
  pre.tabIndex = 0;
  return element("div", [bar, pre], "code");
}

/** Text within a block to nodes. */
function inline(text, depth = 0) {
  const made = [];
  let rest = text;
  while (rest) {
    const found = depth < 5 ? INLINE.exec(rest) : null;
    if (!found) {
      made.push(...lines(rest));
      break;
    }
    made.push(...lines(rest.slice(0, found.index)));
    const [whole, escaped] = found;
    const { code, both, label, target, bare, struck } = found.groups;
    const [strong, em] = [found.groups.strong ?? found.groups.strong2, found.groups.em ?? found.groups.em2];
    const inner = (text) => inline(text, depth + 1);
    if (escaped !== undefined) made.push(escaped);
    else if (code !== undefined) made.push(element("code", [code.trim() || code]));
    else if (both !== undefined) made.push(element("strong", [element("em", inner(both))]));
    else if (strong !== undefined) made.push(element("strong", inner(strong)));
    else if (em !== undefined) made.push(element("em", inner(em)));
    else if (struck !== undefined) made.push(element("s", inner(struck)));
    else if (bare !== undefined) made.push(link(bare, [bare]));
    else if (LINK.test(target)) made.push(link(target, inner(label)));
    else made.push(whole);
    rest = rest.slice(found.index + whole.length);
  }
  return made;
}

/** A line break in the source stays one. */
function lines(text) {
  return text.split("\n").flatMap((each, index) => (index ? [element("br"), each] : [each])).filter((each) => each !== "");
}

function link(target, children) {
  const made = element("a", children);
  made.href = target;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  return made;
}
