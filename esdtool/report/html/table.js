/** Rows put into the page at once: more make it slow, and the filter finds the others. */
const ROW_LIMIT = 500;

/**
 * Make a table sortable by its headings, and filterable.
 *
 * fillPanel(index, place) fills the panel of the row with that index in the file; null for a table without panels.
 */
function sortableTable(table, fillPanel) {
  const body = table.tBodies[0];
  const rows = [...table.tBodies].flatMap((part) => [...part.rows]);
  const heads = [...table.tHead.rows[0].cells];
  const index = new Map(rows.map((row, position) => [row, position]));
  const panels = new Map();
  const collator = new Intl.Collator("en", { numeric: true });
  const state = { column: null, direction: 0, text: "", chosen: new Map(), limit: ROW_LIMIT };

  const number = (row, column) => {
    const cell = row.cells[column];
    const value = Number(cell.dataset.v ?? (cell.textContent || NaN));
    return Number.isNaN(value) ? null : value; // a dash
  };
  const choice = (row, column) => row.cells[column].dataset.choice ?? row.cells[column].textContent;
  const searched = heads.flatMap((head, column) => ("filter" in head.dataset ? [column] : []));
  const texts = rows.map((row) => searched.map((column) => row.cells[column].textContent).join("\n").toLowerCase());

  function ordered(matching) {
    if (!state.direction) return matching;
    const { column, direction } = state;
    if (heads[column].dataset.kind === "number") {
      const keys = new Map(matching.map((row) => [row, number(row, column)]));
      const numbered = matching.filter((row) => keys.get(row) !== null);
      const missing = matching.filter((row) => keys.get(row) === null);
      numbered.sort((a, b) => direction * (keys.get(a) - keys.get(b)));
      return [...numbered, ...missing];
    }
    const keys = new Map(matching.map((row) => [row, row.cells[column].textContent]));
    return [...matching].sort((a, b) => direction * collator.compare(keys.get(a), keys.get(b)));
  }

  function show() {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = rows.filter((row, position) =>
      words.every((word) => texts[position].includes(word)) &&
      [...state.chosen].every(([column, value]) => value === "" || choice(row, column) === value));
    const shown = ordered(matching).slice(0, state.limit);
    shown.forEach(addButton);
    body.replaceChildren(...shown.flatMap((row) => (panels.has(row) ? [row, panels.get(row)] : [row])));
    let count = `${matching.length} of ${rows.length} ${table.dataset.sortable}`;
    if (shown.length < matching.length) count += `, the first ${shown.length} shown`;
    tools.count.textContent = count;
    tools.more.hidden = shown.length === matching.length;
    tools.more.textContent = `Show all ${matching.length}`;
    heads.forEach((head, column) => {
      const word = state.direction > 0 ? "ascending" : "descending";
      head.setAttribute("aria-sort", state.direction && column === state.column ? word : "none");
    });
  }

  function sortBy(column) {
    // Up, down, and back to the model's own order.
    const before = column === state.column ? state.direction : 0;
    state.column = column;
    state.direction = before === 0 ? 1 : before === 1 ? -1 : 0;
    show();
  }

  function addButton(row) {
    if (!fillPanel || row.querySelector("button")) return;
    const name = row.cells[0].textContent;
    const button = element("button", {
      type: "button", class: "open", "aria-expanded": "false", "aria-label": `ESD of ${name}`,
    }, "ESD");
    button.addEventListener("click", () => togglePanel(row, button));
    row.cells[0].prepend(button, " ");
  }

  function togglePanel(row, button) {
    const open = panels.get(row);
    button.setAttribute("aria-expanded", String(!open));
    if (open) {
      panels.delete(row);
      open.remove();
      return;
    }
    const id = `panel-${index.get(row)}`;
    const place = element("div", { class: "panel", id, role: "region", "aria-label": button.getAttribute("aria-label") });
    const cell = element("td", { colspan: heads.length }, place);
    const panel = element("tr", { class: "panel-row" }, cell);
    button.setAttribute("aria-controls", id);
    panels.set(row, panel);
    row.after(panel);
    fillPanel(index.get(row), place);
    panel.scrollIntoView({ block: "nearest" });
    row.scrollIntoView({ block: "nearest" }); // where both do not fit, the row counts
  }

  function chooser(head, column) {
    const select = element("select", { "aria-label": head.textContent });
    select.append(element("option", { value: "" }, head.dataset.choose));
    const tally = new Map();
    for (const row of rows) tally.set(choice(row, column), (tally.get(choice(row, column)) ?? 0) + 1);
    for (const [value, count] of tally) {
      if (value) select.append(element("option", { value }, `${value} (${count})`));
    }
    select.addEventListener("change", () => { state.chosen.set(column, select.value); show(); });
    return select;
  }

  function makeTools() {
    const input = element("input", { type: "search", placeholder: "Filter", "aria-label": "Filter the rows", autocomplete: "off", spellcheck: "false" });
    input.addEventListener("input", () => { state.text = input.value; show(); });
    const selects = heads.flatMap((head, column) => ("choose" in head.dataset ? [chooser(head, column)] : []));
    const count = element("output", { class: "count", "aria-live": "polite" });
    const more = element("button", { type: "button" });
    more.addEventListener("click", () => { state.limit = Infinity; show(); });
    const bar = element("div", { class: "tools" }, input, ...selects, count, more);
    table.closest(".scroll").before(bar);
    return { input, selects, count, more };
  }

  for (const rest of [...table.tBodies].slice(1)) rest.remove();
  const tools = makeTools();
  heads.forEach((head, column) => {
    const button = element("button", { type: "button", class: "sort" }, ...head.childNodes);
    button.addEventListener("click", () => sortBy(column));
    head.append(button);
  });
  show();

  return {
    /** Make sure that the row with this id is in the page; false if the table has none. */
    reveal(id) {
      const row = rows.find((candidate) => candidate.id === id);
      if (!row) return false;
      if (!row.isConnected) {
        state.text = tools.input.value = "";
        state.chosen.clear();
        for (const select of tools.selects) select.value = "";
        show();
        if (!row.isConnected) { state.limit = Infinity; show(); }
      }
      return true;
    },
  };
}
