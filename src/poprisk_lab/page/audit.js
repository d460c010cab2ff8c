(() => {
  "use strict";
  const PAGE = 40;
  const {kind, classes, columns, cells: names, suspects, key} = JSON.parse(document.getElementById("data").textContent);
  const at = Object.fromEntries(columns.map((name, i) => [name, i]));
  const get = id => document.getElementById(id);
  const marks = new Map();  // position in the data -> {mark, label}
  let shown = suspects, first = 0, current = 0, stored = true;

  const label = value => value === null ? "none" : kind === "regression" ? String(value) : classes[value];
  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };

  // What was marked before, in this browser; a page opened as a file may have no storage.
  try {
    for (const [row, mark] of JSON.parse(localStorage.getItem(key) ?? "[]")) marks.set(row, mark);
  } catch { stored = false; }
  function remember() {
    try { localStorage.setItem(key, JSON.stringify([...marks])); } catch { stored = false; }
    const n = marks.size, kept = stored ? "kept in this browser" : "kept only while this page is open";
    get("kept").textContent = n ? `${n.toLocaleString("en")} marked, ${kept}.` : "";
    get("download").disabled = n === 0;
  }

  function mark(suspect, wanted, corrected) {
    const row = suspect[at.row], old = marks.get(row);
    if (old?.mark === wanted && corrected === undefined) marks.delete(row);
    else marks.set(row, {mark: wanted, label: corrected ?? suspect[at.suggested]});
    remember();
  }

  function choices(select, position, title) {
    const counts = new Map();
    for (const s of suspects) counts.set(s[position], (counts.get(s[position]) ?? 0) + 1);
    select.append(element("option", {value: "", textContent: "all"}));
    for (const [value, count] of [...counts].sort((a, b) => b[1] - a[1]))
      select.append(element("option", {value: String(value), textContent: `${label(value)} (${count})`}));
    select.closest("label").hidden = kind === "regression";
    select.ariaLabel = title;
  }

  function matches(suspect) {
    const given = get("by-given").value, suggested = get("by-suggested").value, want = get("by-mark").value;
    const text = get("by-text").value.toLowerCase();
    return (given === "" || String(suspect[at.given]) === given)
      && (suggested === "" || String(suspect[at.suggested]) === suggested)
      && (want === "" || (marks.get(suspect[at.row])?.mark ?? "none") === want)
      && (text === "" || suspect[at.search].includes(text));
  }

  function card(suspect, position) {
    const row = suspect[at.row], now = marks.get(row);
    const item = element("li", {tabIndex: position === current ? 0 : -1});
    item.dataset.mark = now?.mark ?? "";
    item.dataset.position = position;
    const picture = suspect[at.picture];
    if (picture) item.append(element("img", {src: picture, alt: suspect[at.name], width: 64, height: 64}));
    const body = element("div", {className: "what"});
    body.append(element("p", {className: "change"},
      element("b", {textContent: label(suspect[at.given])}), " → ",
      element("b", {className: "suggested", textContent: label(suspect[at.suggested])}),
      element("small", {textContent: ` ${suspect[at.told]}`})));
    body.append(element("p", {className: "caption", textContent: suspect[at.name]}));
    const cells = suspect[at.shown].map((value, i) => [names[i], value]);
    if (cells.length === 1) body.append(element("p", {className: "text", textContent: cells[0][1] ?? ""}));
    else if (cells.length) {
      const list = element("dl", {className: "cells"});
      for (const [name, value] of cells)
        list.append(element("div", {}, element("dt", {textContent: name}), element("dd", {textContent: value ?? "–"})));
      body.append(element("details", {}, element("summary", {textContent: "The row"}), list));
    }
    item.append(body, buttons(suspect, now));
    return item;
  }

  function buttons(suspect, now) {
    const box = element("div", {className: "marks", role: "group", ariaLabel: "Mark"});
    for (const [name, title] of [["fix", "Fix"], ["keep", "Keep"], ["unsure", "Unsure"]]) {
      const button = element("button", {type: "button", className: "chip", textContent: title});
      button.setAttribute("aria-pressed", String(now?.mark === name));
      button.addEventListener("click", () => { mark(suspect, name); draw(); });
      box.append(button);
    }
    if (kind !== "regression" && classes.length > 2) {
      const other = element("select", {ariaLabel: "The right label"});
      classes.forEach((name, i) => other.append(element("option", {value: i, textContent: name})));
      other.value = now?.label ?? suspect[at.suggested];
      other.addEventListener("change", () => { mark(suspect, "fix", Number(other.value)); draw(); });
      box.append(other);
    }
    return box;
  }

  function draw(focus = false) {
    current = Math.max(0, Math.min(current, shown.length - 1));
    first = Math.floor(current / PAGE) * PAGE;
    const list = get("list"), last = Math.min(first + PAGE, shown.length);
    list.replaceChildren(...shown.slice(first, last).map((s, i) => card(s, first + i)));
    list.start = first + 1;
    get("count").textContent = `${shown.length.toLocaleString("en")} of ${suspects.length.toLocaleString("en")} suspects.`;
    get("where").textContent = shown.length ? `${first + 1} to ${last}` : "";
    get("earlier").disabled = first === 0;
    get("later").disabled = last >= shown.length;
    if (focus) list.children[current - first]?.focus({preventScroll: false});
  }

  function filter() { shown = suspects.filter(matches); current = 0; draw(); }

  function go(to) { current = to; draw(true); }

  function cell(value) {
    const text = String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function download() {
    const lines = [["index", "name", "given", "label", "mark"].join(",")];
    for (const s of suspects) {
      const now = marks.get(s[at.row]);
      if (now === undefined) continue;
      const right = now.mark === "fix" ? now.label : s[at.given];
      lines.push([s[at.row], s[at.name], label(s[at.given]), label(right), now.mark].map(cell).join(","));
    }
    const blob = new Blob([lines.join("\n") + "\n"], {type: "text/csv"});
    const link = element("a", {href: URL.createObjectURL(blob), download: "marked.csv"});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const pressed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const suspect = shown[current], wanted = {f: "fix", x: "keep", u: "unsure"}[pressed];
    if (pressed === "j" || pressed === "ArrowDown" && event.target.closest("#list")) go(current + 1);
    else if (pressed === "k" || pressed === "ArrowUp" && event.target.closest("#list")) go(current - 1);
    else if (wanted && suspect) { mark(suspect, wanted); draw(true); }
    else return;
    event.preventDefault();
  });
  get("list").addEventListener("focusin", event => {
    const item = event.target.closest("li");
    if (item) current = Number(item.dataset.position);
  });
  choices(get("by-given"), at.given, "Given label");
  choices(get("by-suggested"), at.suggested, "Suggested label");
  for (const id of ["by-given", "by-suggested", "by-mark", "by-text"]) get(id).addEventListener("input", filter);
  get("earlier").addEventListener("click", () => go(first - PAGE));
  get("later").addEventListener("click", () => go(first + PAGE));
  get("download").addEventListener("click", download);
  remember();
  draw();
})();
