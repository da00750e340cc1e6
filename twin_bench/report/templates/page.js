"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(find(id).textContent);
  const make = (tag, text, parent) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text; // never as markup
    if (parent) parent.append(element);
    return element;
  };
  const table = find("scores");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const shown = (cell) => cell.textContent.replace(/\s+/g, " ").trim();
  const say = (text) => { find("status").textContent = text; };
  document.documentElement.classList.add("js");

  // The protocol: the sections of all others are hidden, and the table's filter follows.
  const byProtocol = find("by-protocol");
  const switchTo = (protocol) => {
    for (const part of document.querySelectorAll("main [data-protocol]:not(tr)")) part.hidden = part.dataset.protocol !== protocol;
    byProtocol.value = protocol;
    filter();
  };

  // The table: filters, columns, sorting.
  const columns = [...document.querySelectorAll("#columns input")];
  const filter = () => {
    const protocol = byProtocol ? byProtocol.value : "";
    const track = find("by-track").value;
    const part = find("by-method").value.trim().toLowerCase();
    for (const row of body.rows) {
      row.hidden = Boolean(protocol && row.dataset.protocol !== protocol)
        || Boolean(track && row.dataset.track !== track)
        || !row.cells[0].textContent.toLowerCase().includes(part);
    }
    count();
  };
  const count = () => {
    const rows = [...body.rows];
    say(`${rows.filter((row) => !row.hidden).length} of ${rows.length} rows are shown.`);
  };
  const arrange = () => {
    const task = find("by-task").value;
    const hidden = heads.map((head) => Boolean(task && head.dataset.task && head.dataset.task !== task));
    for (const box of columns) if (!box.checked) hidden[Number(box.value)] = true;
    for (const row of table.rows) [...row.cells].forEach((cell, place) => { cell.hidden = hidden[place]; });
  };
  const value = (row, place) => {
    const cell = row.cells[place];
    const key = cell.dataset.v === undefined ? shown(cell) : cell.dataset.v;
    if (!heads[place].classList.contains("number")) return key.toLowerCase();
    return key === "" ? null : Number(key);
  };
  const sort = (place) => {
    const head = heads[place];
    const numbers = head.classList.contains("number");
    const first = numbers && shown(head) !== "rank" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const one of heads) one.setAttribute("aria-sort", one === head ? order : "none");
    const sign = order === "ascending" ? 1 : -1;
    const keyed = [...body.rows].map((row) => [value(row, place), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last
      return sign * (numbers ? a - b : a < b ? -1 : Number(a > b));
    });
    body.append(...keyed.map(([, row]) => row));
    say(`Sorted by ${shown(head)}, ${order}.`);
  };
  heads.forEach((head, place) => {
    const button = make("button", head.textContent);
    button.type = "button";
    button.addEventListener("click", () => sort(place));
    head.replaceChildren(button);
  });

  // Copying what is shown.
  const visible = () => [table.tHead.rows[0], ...body.rows].filter((row) => !row.hidden)
    .map((row) => [...row.cells].filter((cell) => !cell.hidden).map(shown));
  const forms = {
    markdown: ([head, ...rows]) => {
      const line = (cells) => `| ${cells.map((text) => text.replace(/[\\|]/g, "\\$&").replace(/</g, "&lt;")).join(" | ")} |`;
      return [line(head), `|${" --- |".repeat(head.length)}`, ...rows.map(line)].join("\n");
    },
    latex: ([head, ...rows]) => {
      const special = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" };
      const line = (cells) => `${cells.map((text) => text.replace(/[&%$#_{}~^\\]/g, (one) => special[one] || `\\${one}`)).join(" & ")} \\\\`;
      return [`\\begin{tabular}{l${"r".repeat(head.length - 1)}}`, "\\toprule", line(head), "\\midrule", ...rows.map(line), "\\bottomrule", "\\end{tabular}"].join("\n");
    },
    csv: (rows) => rows.map((cells) => cells.map((text) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text)).join(",")).join("\n"),
  };
  const copy = async (form, name) => {
    const text = `${forms[form](visible())}\n`;
    try {
      await navigator.clipboard.writeText(text);
      find("copied").hidden = true;
      say(`The table is in the clipboard as ${name}.`);
    } catch {
      find("copied").hidden = false;
      find("copied-text").value = text;
      find("copied-text").select();
      say(`The browser gives no clipboard. The ${name} text is selected below.`);
    }
  };

  // A cell's details.
  const facts = (pairs, parent) => {
    const list = make("dl", null, parent);
    list.className = "facts";
    for (const [name, content] of pairs) {
      const line = make("div", null, list);
      make("dt", name, line);
      const place = make("dd", null, line);
      if (content !== null && typeof content === "object" && Object.keys(content).length && !Array.isArray(content)) facts(Object.entries(content), place);
      else place.textContent = typeof content === "object" ? JSON.stringify(content) : String(content);
    }
  };
  const wrongRows = (cell, parent) => {
    make("h3", "Rows that it got wrong", parent);
    const rows = read("rows");
    const own = rows.cells[cell.rows];
    if (!own) return void make("p", "The rows of this score were not kept.", parent);
    const task = rows.tasks[cell.task];
    const many = (number) => number.toLocaleString("en");
    const rule = own.graded ? `${many(own.wrong)} rows are not wholly right; the worst come first.` : `${many(own.wrong)} rows are wrong.`;
    const some = own.rows.length < own.wrong ? ` The first ${many(own.rows.length)} are shown.` : "";
    make("p", rule + some, parent);
    if (!own.rows.length) return;
    const texts = own.rows.some(([row]) => task.rows[row][2] !== null);
    if (!texts) make("p", "The rows' texts were not kept: --log-samples keeps them.", parent).className = "small";
    const box = make("div", null, parent);
    box.className = "scroll";
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "Rows that it got wrong");
    const list = make("table", null, box);
    make("caption", own.against ? `Beside the predictions of ${own.against}` : "Predictions", list);
    const head = make("tr", null, make("thead", null, list));
    const names = ["row", ...(texts ? ["text"] : []), "target", "prediction", ...(own.against ? [own.against] : []), ...(own.graded ? [own.graded] : [])];
    for (const name of names) make("th", name, head).scope = "col";
    const lines = make("tbody", null, list);
    for (const [row, answer, other, score] of own.rows) {
      const [identity, target, text] = task.rows[row];
      const line = make("tr", null, lines);
      make("th", identity, line).scope = "row";
      if (texts) make("td", text, line).className = "sentence";
      make("td", target, line);
      make("td", task.answers[answer], line);
      if (own.against) make("td", other < 0 ? "" : task.answers[other], line);
      if (own.graded) make("td", score, line);
    }
  };
  const dialog = find("cell");
  let opener = null;
  const open = (button) => {
    const { cells, shared } = read("details");
    const cell = cells[Number(button.dataset.cell)];
    opener = button;
    find("cell-title").textContent = `${cell.method} on ${cell.task}, protocol ${cell.protocol}`;
    const place = find("cell-body");
    place.replaceChildren();
    facts(cell.facts, place);
    for (const [name, number] of [["Settings", cell.settings], ["Notes: router, calibration, tuning", cell.notes], ["Versions", cell.versions]]) {
      const pairs = Object.entries(shared[number] || {});
      if (pairs.length) { make("h3", name, place); facts(pairs, place); }
    }
    wrongRows(cell, place);
    dialog.showModal();
    dialog.scrollTop = 0;
  };
  dialog.addEventListener("close", () => { if (opener) opener.focus(); });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  // The controls.
  body.addEventListener("click", (event) => { const button = event.target.closest("button[data-cell]"); if (button) open(button); });
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["by-protocol", "by-track"]) if (find(id)) find(id).addEventListener("change", filter);
  find("by-method").addEventListener("input", filter);
  find("by-task").addEventListener("change", arrange);
  for (const box of columns) box.addEventListener("change", arrange);
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy, button.textContent));
  find("filters").hidden = false;
  arrange();
  const protocols = find("switch");
  if (protocols) {
    protocols.hidden = false;
    protocols.addEventListener("change", (event) => switchTo(event.target.value));
    switchTo(protocols.elements.protocol.value);
  } else filter();
  window.addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("main details:not(.filters details)")) part.open = true; });
})();
