"use strict";
// The latent explorer: a plane of two units, sliders of the most active ones, labels; the decoder's image follows.
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const find = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), attributes);
    node.append(...children);
    return node;
  };
  const TABLEAU = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
  const { units } = data, count = units.length, calm = matchMedia("(prefers-reduced-motion: reduce)");
  const [height, width] = data.shape.slice(-2), channels = data.shape.length === 3 ? data.shape[0] : 1;
  const points = Uint8Array.from(atob(data.points), (letter) => letter.charCodeAt(0)), number = points.length / count;
  const decode = pyrovae.load(data.decoder), plane = find("plane"), dot = plane.querySelector("i"), sliders = [];
  const classes = data.labels ? [...new Set(data.labels)].sort((a, b) => a - b) : [];
  const named = classes.length > 1 && classes.length <= 20;
  const colourOf = (label) => {
    const i = classes.indexOf(label);
    return classes.length <= 10 ? TABLEAU[i] : `hsl(${(360 * i) / classes.length} 60% 50%)`;
  };
  let code = data.starts[0].code.slice(), label = 0, axes = [0, Math.min(1, count - 1)], waiting = false, walking = 0, said = 0;

  const at = (k) => code[units[k].index];
  const share = (k) => (at(k) - units[k].low) / (units[k].high - units[k].low);
  const short = (value) => value.toFixed(2).replace("-", "\u2212");

  function draw() {
    waiting = false;
    const pixels = decode(label, code), canvas = find("decoded"), context = canvas.getContext("2d");
    const image = context.createImageData(width, height), size = width * height;
    for (let i = 0; i < size; i++) {
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(255 * Math.min(1, Math.max(0, pixels[channels === 3 ? c * size + i : i])));
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    dot.style.left = `${100 * Math.min(1, Math.max(0, share(axes[0])))}%`;
    dot.style.top = `${100 - 100 * Math.min(1, Math.max(0, share(axes[1])))}%`;
    sliders.forEach(({ input, output }, k) => { input.value = at(k); output.textContent = short(at(k)); });
    clearTimeout(said);
    said = setTimeout(say, 250);
  }

  function say() {
    const place = [...new Set(axes)].map((k) => `${units[k].name} ${short(at(k))}`).join(", ");
    const near = named ? `; the nearest ${data.own ? "sample" : "test image"} is of label ${nearest()}` : "";
    find("status").textContent = place + near;
    find("decoded").setAttribute("aria-label", `Decoded image, ${height} by ${width} pixels${near}`);
  }

  function nearest() {
    let best = Infinity, found = 0;
    for (let i = 0; i < number; i++) {
      let distance = 0;
      for (let k = 0; k < count; k++) distance += ((points[i * count + k] / 255 - share(k)) * (units[k].high - units[k].low)) ** 2;
      if (distance < best) [best, found] = [distance, i];
    }
    return data.labels[found];
  }

  function show() {
    if (!waiting) { waiting = true; requestAnimationFrame(draw); }
  }

  function move(values) {
    stop();
    for (const [k, value] of values) code[units[k].index] = Math.min(units[k].high, Math.max(units[k].low, value));
    show();
  }

  function scatter() {
    const canvas = plane.querySelector("canvas"), side = plane.clientWidth, ratio = devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(side * ratio);
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    context.scale(ratio, ratio);
    context.strokeStyle = style.getPropertyValue("--lines");
    const zero = axes.map((k) => (0 - units[k].low) / (units[k].high - units[k].low));
    context.beginPath();
    if (zero[0] > 0 && zero[0] < 1) { context.moveTo(zero[0] * side, 0); context.lineTo(zero[0] * side, side); }
    if (zero[1] > 0 && zero[1] < 1) { context.moveTo(0, (1 - zero[1]) * side); context.lineTo(side, (1 - zero[1]) * side); }
    context.stroke();
    context.globalAlpha = 0.6;
    context.fillStyle = style.getPropertyValue("--accent");
    for (let i = 0; i < number; i++) {
      if (named) context.fillStyle = colourOf(data.labels[i]);
      context.beginPath();
      context.arc(points[i * count + axes[0]] / 255 * side, (1 - points[i * count + axes[1]] / 255) * side, side > 300 ? 2.2 : 1.6, 0, 7);
      context.fill();
    }
  }

  function choose(i, k) {
    if (axes[1 - i] === k) axes[1 - i] = axes[i];
    axes[i] = k;
    document.querySelectorAll("#axes select").forEach((select, j) => { select.value = axes[j]; });
    scatter();
    show();
  }

  function begin(start) {
    code = start.code.slice();
    if (data.classes && start.label !== null) pick(start.label);
    show();
  }

  function pick(y) {
    label = y;
    document.querySelectorAll("#classes button").forEach((button, i) => button.setAttribute("aria-pressed", i === y));
    show();
  }

  function stop() {
    cancelAnimationFrame(walking);
    walking = 0;
    find("walk").setAttribute("aria-pressed", "false");
  }

  // From one datum's code to the next, for ever; a step at a time for who wants no motion.
  let leg = 0;
  function walk() {
    const next = () => data.starts[(leg + 1) % data.starts.length];
    if (calm.matches) { begin(next()); leg++; return; }
    const LEG = 1600, from = code.slice();
    let first = null, origin = from;
    find("walk").setAttribute("aria-pressed", "true");
    const step = (time) => {
      first ??= time;
      const t = Math.min(1, (time - first) / LEG), eased = t * t * (3 - 2 * t), goal = next();
      code = goal.code.map((value, i) => origin[i] + eased * (value - origin[i]));
      if (data.classes && t > 0.5 && goal.label !== null && goal.label !== label) pick(goal.label);
      show();
      if (t === 1) { first = null; origin = goal.code; leg++; }
      walking = requestAnimationFrame(step);
    };
    walking = requestAnimationFrame(step);
  }

  function follow(event) {
    const box = plane.getBoundingClientRect();
    const shares = [(event.clientX - box.left) / box.width, 1 - (event.clientY - box.top) / box.height];
    move(axes.map((k, i) => [k, units[k].low + Math.min(1, Math.max(0, shares[i])) * (units[k].high - units[k].low)]));
  }

  function press(event) {
    const step = (event.shiftKey ? 0.1 : 0.02), towards = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (event.key === "Home") move(axes.map((k) => [k, (units[k].low + units[k].high) / 2]));
    else if (event.key in towards) move(axes.map((k, i) => [k, at(k) + towards[event.key][i] * step * (units[k].high - units[k].low)]));
    else return;
    event.preventDefault();
  }

  units.forEach((unit, k) => {
    const output = make("output", { textContent: "" });
    const input = make("input", { type: "range", min: unit.low, max: unit.high, step: (unit.high - unit.low) / 200, value: at(k) });
    input.setAttribute("aria-label", unit.name);
    input.addEventListener("input", () => move([[k, Number(input.value)]]));
    sliders.push({ input, output });
    find("sliders").append(make("label", {}, make("span", { textContent: unit.name }), input, output));
  });
  ["across", "up"].forEach((name, i) => {
    if (count < 3) { find("axes").append(make("span", { textContent: `${name}: ${units[axes[i]].name}` })); return; }
    const select = make("select", {}, ...units.map((unit, k) => make("option", { value: k, textContent: unit.name })));
    select.value = axes[i];
    select.addEventListener("change", () => choose(i, Number(select.value)));
    find("axes").append(make("label", {}, name, select));
  });
  data.starts.forEach((start, i) => {
    const told = start.label === null ? "" : `, label ${start.label}`;
    const button = make("button", { type: "button", title: `Begin here${told}` }, make("img", { src: start.image, alt: `${data.own ? "Sample" : "Test image"} ${i + 1}${told}` }));
    button.addEventListener("click", () => { stop(); leg = i; begin(start); });
    find("starts").append(button);
  });
  for (let y = 0; y < (data.classes ?? 0); y++) {
    const button = make("button", { type: "button", textContent: y });
    button.addEventListener("click", () => { stop(); pick(y); });
    find("classes").append(button);
  }
  if (named) {
    find("legend").hidden = false;
    find("legend").append(...classes.map((name) => {
      const entry = make("span", { textContent: name });
      entry.style.setProperty("--colour", colourOf(name));
      return entry;
    }));
  }
  find("walk").addEventListener("click", () => (walking ? stop() : walk()));
  find("centre").addEventListener("click", () => { stop(); code = data.mean.slice(); show(); });
  plane.addEventListener("pointerdown", (event) => { plane.setPointerCapture(event.pointerId); follow(event); });
  plane.addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
  plane.addEventListener("keydown", press);
  addEventListener("themechange", scatter);

  find("explorer").hidden = false;
  find("classes").hidden = !data.classes;
  Object.assign(find("decoded"), { width, height });
  new ResizeObserver(scatter).observe(plane);
  if (data.classes) pick(data.starts[0].label ?? 0); else show();
})();
