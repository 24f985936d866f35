const MARGIN = { left: 58, right: 14, top: 12, bottom: 46 };

/** The panel of one module: its ESD and what else is known. Entries have the form that panels.py gives them. */
function fillPanel(data, index, place) {
  const entry = data.rows[index];
  if (typeof entry === "string") {
    place.append(element("p", { class: "note" }, entry));
    return;
  }
  const [metrics, fits, words, histogram, drawn, marchenkoPastur] = entry;
  if (histogram) {
    const figure = element("figure", { class: "esd" });
    place.append(figure);
    const fit = drawn === null ? null : { name: data.estimators[drawn], ...fitOf(fits[drawn]) };
    const box = element("div");
    figure.append(box);
    const draw = () => box.replaceChildren(
      esdFigure(histogram, fit, nullCurve(data, marchenkoPastur), Math.min(Math.max(figure.clientWidth, 260), 640)),
    );
    draw();
    // Drawn at the width it is shown at, so that its text keeps its size.
    let width = figure.clientWidth;
    new ResizeObserver(() => {
      if (figure.clientWidth && Math.abs(figure.clientWidth - width) > 8 && !window.matchMedia("print").matches) {
        width = figure.clientWidth;
        draw();
      }
    }).observe(figure);
    if (!fit && fits[0]) {
      figure.append(element("p", { class: "note" }, `No tail is drawn: ${data.estimators[0]} fits windows of the matrix, whose eigenvalues have another scale.`));
    }
  } else if (data.missing) {
    place.append(element("p", { class: "note" }, data.missing));
  }
  place.append(numbersOf(data, metrics, fits, words, histogram));
}

/** A tail. `height` is its density at xmin times xmin, `rate` the Lambda of a law with the factor exp(-Lambda x). */
function fitOf([alpha, stderr, xmin, count, distance, height = alpha - 1, rate = null]) {
  return { alpha, stderr, xmin, count, distance, height, rate };
}

/** Alpha and its standard error, where that is known. */
function withError(fit, digits) {
  return fit.alpha.toFixed(digits) + (fit.stderr === null ? "" : ` ± ${fit.stderr.toFixed(2)}`);
}

/** Points of a tail's density from xmin to the end of the axis. */
function tailCurve(fit, total, high) {
  const steps = fit.rate === null ? 1 : 40;
  return Array.from({ length: steps + 1 }, (_, i) => {
    const x = fit.xmin * (high / fit.xmin) ** (i / steps);
    const cut = fit.rate === null ? 1 : Math.exp(-fit.rate * (x - fit.xmin));
    return [x, (fit.count / total) * (fit.height / fit.xmin) * (x / fit.xmin) ** -fit.alpha * cut];
  });
}

function numbersOf(data, metrics, fits, words, histogram) {
  const [status, warning, spectrum, law] = words;
  const box = element("div", { class: "numbers" });
  const rows = data.estimators.flatMap((name, position) => {
    if (!fits[position]) return [];
    const fit = fitOf(fits[position]);
    const cells = [withError(fit, 3), short(fit.xmin), fit.count, fit.distance === null ? "-" : fit.distance.toFixed(3)];
    return [element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", { class: "n" }, String(cell))))];
  });
  if (rows.length) {
    const heads = ["fit", "alpha", "xmin", "in tail", "KS"].map((head, column) =>
      element("th", { scope: "col", class: column ? "n" : null }, head));
    box.append(element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)));
  }
  const pairs = data.metrics.flatMap((label, position) =>
    (metrics[position] === null ? [] : [[label, short(metrics[position])]]));
  if (spectrum) pairs.push(["eigenvalues from", spectrum]);
  if (law) pairs.push(["best law", law]);
  if (warning) pairs.push(["warning by ks", warning]);
  if (status) pairs.unshift(["status", status]);
  if (histogram) {
    const below = histogram[2] - histogram[3].reduce((sum, count) => sum + count, 0);
    if (below) pairs.push(["left of the axis", String(below)]);
  }
  box.append(element("dl", {}, ...pairs.map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value)))));
  return box;
}

/** Points of the Marchenko-Pastur density, brought to the module's scale. */
function nullCurve(data, reference) {
  if (!reference) return null;
  const [low, high, densities] = data.nulls[reference[0]];
  const scale = reference[1];
  const middle = (Math.log(low) + Math.log(high)) / 2;
  const half = (Math.log(high) - Math.log(low)) / 2;
  return densities.map((density, i) => {
    const x = Math.exp(middle - half * Math.cos((Math.PI * i) / (densities.length - 1)));
    return [x * scale, density / scale];
  });
}

/** A histogram on log-log axes with the fitted tail and the untrained null. */
function esdFigure([low, high, total, counts], fit, curve, width) {
  const height = Math.round(Math.max(width * 0.62, 230));
  const ratio = (high / low) ** (1 / counts.length);
  const edge = (i) => low * ratio ** i;
  const bars = counts.flatMap((count, i) =>
    (count ? [[edge(i), edge(i + 1), count / (total * (edge(i + 1) - edge(i)))]] : []));
  const tail = fit && tailCurve(fit, total, high);
  const densities = bars.map((bar) => bar[2]).concat(tail ? tail.map((point) => point[1]) : []);
  const spread = Math.log10(Math.max(...densities) / Math.min(...densities)) * 0.05 + 0.05;
  const xs = logAxis(low, high, MARGIN.left, width - MARGIN.right);
  const ys = logAxis(Math.min(...densities) / 10 ** spread, Math.max(...densities) * 10 ** spread,
    height - MARGIN.bottom, MARGIN.top);
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  drawing.append(shape("title", {}, fit ? `ESD, alpha ${fit.alpha.toFixed(2)}` : "ESD"));
  drawing.append(axes(xs, ys, width, height));
  const bottom = height - MARGIN.bottom;
  for (const [left, right, density] of bars) {
    const x = xs.at(left);
    drawing.append(shape("rect", {
      class: "bar", x: x.toFixed(2), y: ys.at(density).toFixed(2),
      width: Math.max(xs.at(right) - x - 0.7, 0.7).toFixed(2), height: (bottom - ys.at(density)).toFixed(2),
    }));
  }
  let hasNull = false;
  if (curve) {
    // Its density falls to zero at an edge: down to the axis, and no further.
    const points = curve.map(([x, y]) => [x, Math.max(y, ys.low)]);
    const inside = points.filter(([x, y]) => x >= low && x <= high && y <= ys.high);
    hasNull = inside.length > 1;
    if (hasNull) drawing.append(line(inside, xs, ys, "mp"));
  }
  if (fit) {
    drawing.append(shape("line", { class: "xmin", x1: xs.at(fit.xmin), x2: xs.at(fit.xmin), y1: MARGIN.top, y2: bottom }));
    drawing.append(line(tail, xs, ys, "tail"));
  }
  return withLegend(drawing, fit, hasNull);
}

function withLegend(drawing, fit, hasNull) {
  const items = [["bar", "ESD"]];
  if (fit) {
    items.push(["tail", `alpha ${withError(fit, 3)} (${fit.name})`]);
    items.push(["xmin", `xmin ${short(fit.xmin)}`]);
  }
  if (hasNull) items.push(["mp", "untrained (Marchenko-Pastur)"]);
  const keys = items.map(([kind, words]) => element("span", {}, shape("svg", { viewBox: "0 0 24 12", width: 24, height: 12, "aria-hidden": "true" },
    kind === "bar" ? shape("rect", { class: kind, x: 2, y: 1, width: 20, height: 10 })
      : shape(kind === "xmin" ? "line" : "polyline", kind === "xmin"
        ? { class: kind, x1: 12, x2: 12, y1: 0, y2: 12 } : { class: kind, points: "0,6 24,6" })), ` ${words}`));
  const fragment = document.createDocumentFragment();
  fragment.append(drawing, element("figcaption", {}, ...keys));
  return fragment;
}

function line(points, xs, ys, kind) {
  const path = points.map(([x, y]) => `${xs.at(x).toFixed(2)},${ys.at(y).toFixed(2)}`).join(" ");
  return shape("polyline", { class: kind, points: path });
}

/** A logarithmic axis between two places of the drawing, with its decades. */
function logAxis(low, high, from, to) {
  const start = Math.log10(low);
  const span = Math.log10(high) - start || 1;
  const at = (value) => from + ((Math.log10(value) - start) / span) * (to - from);
  const decades = [];
  for (let power = Math.ceil(start - 1e-9); power <= start + span + 1e-9; power += 1) decades.push(power);
  const minor = [];
  for (let power = Math.floor(start); power <= start + span; power += 1) {
    for (let digit = 2; digit < 10; digit += 1) {
      const value = digit * 10 ** power;
      if (value >= low && value <= high) minor.push(value);
    }
  }
  // On less than a decade the numbers between the powers of ten are what can be read.
  const labelled = decades.length >= 2 ? [] : minor.filter((value) => [2, 5].includes(Math.round(value / 10 ** Math.floor(Math.log10(value)))));
  const room = Math.max(1, Math.floor(Math.abs(to - from) / (from < to ? 44 : 24)));
  if (decades.length + labelled.length < 2) {
    decades.length = 0;
    labelled.splice(0, labelled.length, low, high);
  }
  return { at, low, high, decades, minor, labelled, every: Math.ceil(decades.length / room) };
}

function axes(xs, ys, width, height) {
  const group = shape("g", { class: "axes" });
  const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
  group.append(shape("path", { d: `M${left},${top}V${bottom}H${right}` }));
  const tick = (horizontal, value, length) => {
    const place = horizontal ? xs.at(value) : ys.at(value);
    group.append(shape("path", { d: horizontal ? `M${place},${bottom}v${length}` : `M${left},${place}h${-length}` }));
    return place;
  };
  const label = (horizontal, place, ...children) => group.append(shape("text", horizontal
    ? { x: place, y: bottom + 20, "text-anchor": "middle" } : { x: left - 9, y: place + 4, "text-anchor": "end" }, ...children));
  for (const [horizontal, axis] of [[true, xs], [false, ys]]) {
    for (const value of axis.minor) tick(horizontal, value, 3);
    for (const power of axis.decades) {
      const place = tick(horizontal, 10 ** power, 6);
      if (power % axis.every === 0) {
        label(horizontal, place, "10", shape("tspan", { dy: -5, "font-size": "75%" }, String(power).replace("-", "−")));
      }
    }
    for (const value of axis.labelled) label(horizontal, tick(horizontal, value, 6), value < 1e-3 || value >= 1e5 ? value.toExponential(0) : short(value));
  }
  group.append(
    shape("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, "eigenvalue λ of WᵀW"),
    shape("text", { transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "density"),
  );
  return group;
}
