/** The values of a chart's curves at the pointer (or the arrow keys), and a legend that brings a curve out. */
function livelyChart(figure) {
  const drawing = figure.querySelector("svg.lines");
  const places = JSON.parse(drawing.dataset.values);
  const curves = [...drawing.querySelectorAll(".curve")];
  const legend = figure.querySelector(".keys");
  const at = element("li", { class: "at", "aria-live": "polite" });
  const values = [];
  const buttons = [...legend.children].map((entry, index) => {
    const button = element("button", { type: "button", "aria-pressed": "false" }, ...entry.childNodes);
    values[index] = element("span", { class: "value" });
    button.append(values[index]);
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button && pressed));
      bringOut(pressed ? index : null);
    });
    button.addEventListener("pointerenter", () => bringOut(index));
    button.addEventListener("pointerleave", () => bringOut(chosen()));
    entry.replaceChildren(button);
    return button;
  });
  legend.append(at);
  const chosen = () => {
    const index = buttons.findIndex((button) => button.getAttribute("aria-pressed") === "true");
    return index < 0 ? null : index;
  };
  const bringOut = (index) => {
    drawing.classList.toggle("lit", index !== null);
    curves.forEach((curve, position) => curve.classList.toggle("on", position === index));
  };
  const box = drawing.viewBox.baseVal;
  const cross = shape("line", { class: "cross", y1: 12, y2: box.height - 40 });
  let current = null;
  const tell = (position) => {
    current = position;
    const [x, words, numbers] = places[position];
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    drawing.prepend(cross);
    at.textContent = words;
    values.forEach((value, index) => { value.textContent = numbers[index] || "–"; });
  };
  const clear = () => {
    current = null;
    cross.remove();
    at.textContent = "";
    for (const value of values) value.textContent = "";
  };
  drawing.addEventListener("pointermove", (event) => {
    const frame = drawing.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * box.width;
    const distance = (position) => Math.abs(places[position][0] - x);
    tell(places.reduce((best, _, position) => (distance(position) < distance(best) ? position : best), 0));
  });
  drawing.addEventListener("pointerleave", clear);
  const scroller = drawing.closest(".scroll");
  scroller.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    tell(current === null ? (step > 0 ? 0 : places.length - 1) : Math.min(Math.max(current + step, 0), places.length - 1));
  });
  scroller.addEventListener("blur", clear);
}
