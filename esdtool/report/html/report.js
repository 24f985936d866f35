// Text goes in through textContent only: names come from checkpoints that nobody has vouched for.

/** An HTML element with attributes and children (texts or elements). */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** An SVG element with attributes and children. */
function shape(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A number in at most four digits, a dash for none. */
function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return String(value);
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

function addThemeButton() {
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : scheme.matches);
  const button = element("button", { type: "button", class: "theme" });
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  scheme.addEventListener("change", label);
  label();
  document.body.prepend(button);
  document.body.prepend(document.querySelector(".skip")); // stays the first stop of the Tab key
}

/** Bring the row that the address names into its table, even where a filter or the limit hides it. */
function showTarget(tables) {
  const anchor = location.hash.slice(1);
  const found = tables.find((table) => table.reveal(anchor));
  if (found) document.getElementById(anchor).scrollIntoView({ block: "center" });
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  addThemeButton();
  const tables = [...document.querySelectorAll("table[data-sortable]")].map((table) =>
    sortableTable(table, "panels" in table.dataset ? (index, place) => fillPanel(data, index, place) : null),
  );
  document.querySelectorAll("figure.chart").forEach(livelyChart);
  for (const link of document.querySelectorAll('a[href^="#m"]')) {
    // Before the browser follows the link, which it can only to a row that is there.
    link.addEventListener("click", () => tables.some((table) => table.reveal(link.hash.slice(1))));
  }
  window.addEventListener("hashchange", () => showTarget(tables));
  if (location.hash) showTarget(tables);
}
