// CartPole films side by side, drawn from their states, all on one clock. Texts go in by textContent alone.

const SLOWER = 5;

function make(parent, kind, attributes = {}, text = "") {
  const svg = ["svg", "g", "line", "rect"].includes(kind);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", kind) : document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

// Track, cart and pole of one film. Returns what draws the film's state at a step.
function screen(parent, film, drawn) {
  const { track, tilt, cart: [width, height], pole: length } = drawn;
  const edge = track + 0.4, last = film.x.length - 1;
  const box = make(parent, "div", { style: "flex: 1 1 13em; min-width: 0; max-width: 26em" });
  make(box, "div", { style: "font-weight: 600; overflow-wrap: anywhere" }, film.name);
  const view = `${-edge} ${-height - 1.1 * length} ${2 * edge} ${height + 1.1 * length + 0.15}`;
  const picture = make(box, "svg", { viewBox: view, style: "display: block; width: 100%", role: "img", "aria-label": `${film.name}: ${film.end}` });
  const line = (into, x1, y1, x2, y2, more) =>
    make(into, "line", { x1, y1, x2, y2, stroke: drawn.quiet, "stroke-width": 0.04, ...more });
  line(picture, -track, 0, track, 0);
  for (const end of [-track, track]) line(picture, end, -0.12, end, 0.12);
  const moving = make(picture, "g");
  for (const angle of [-tilt, tilt])
    line(moving, 0, -height, 0, -height - 1.08 * length, { "stroke-dasharray": "0.05 0.1", transform: `rotate(${angle} 0 ${-height})` });
  make(moving, "rect", { x: -width / 2, y: -height, width, height, fill: drawn.grid, stroke: drawn.ink, "stroke-width": 0.03 });
  const pole = line(moving, 0, -height, 0, -height - length, { class: "pole", "stroke-width": 0.12, "stroke-linecap": "round" });
  const state = make(box, "div", { class: "state" });
  return (step) => {
    const at = Math.min(step, last), over = step >= last;
    moving.setAttribute("transform", `translate(${film.x[at] / 1000} 0)`);
    pole.setAttribute("transform", `rotate(${(film.theta[at] / 1000) * (180 / Math.PI)} 0 ${-height})`);
    pole.setAttribute("stroke", over && film.failed ? drawn.down : drawn.up);
    state.textContent = over ? film.end : `step ${at}`;
  };
}

function render({ model, el }) {
  const films = model.get("films"), drawn = model.get("drawn");
  const end = Math.max(0, ...films.map((film) => film.x.length - 1));
  const root = make(el, "section", {
    class: "minirlhf-films", "aria-label": "Films of CartPole",
    "data-lm-suppress-shortcuts": "true", // JupyterLab's own keys stay out of here
    style: `padding: 0.75em; border: 1px solid ${drawn.grid}; border-radius: 0.4em; background: #fff; color: ${drawn.ink}; font-size: 13px; line-height: 1.4`,
  });
  const row = make(root, "div", { style: "display: flex; flex-wrap: wrap; gap: 1em" });
  const screens = films.map((film) => screen(row, film, drawn));
  const keys = make(root, "div", { style: "display: flex; flex-wrap: wrap; gap: 0.75em; align-items: center; margin-top: 0.75em" });
  const button = make(keys, "button", { type: "button", style: "font: inherit; min-width: 5em; padding: 0.2em 0.6em" }, "Play");
  const slider = make(keys, "input", { type: "range", min: 0, max: end, value: 0, "aria-label": "Time", style: "flex: 1 1 12em; min-width: 0" });
  const clock = make(keys, "span", { class: "clock", style: "min-width: 9em; font-variant-numeric: tabular-nums" });
  const label = make(keys, "label");
  const slow = make(label, "input", { type: "checkbox" });
  label.append(` ${SLOWER} times slower`);

  let at = 0, before = null, frame = 0; // `at`: the time in steps, with fractions; `before`: null while paused

  function draw() {
    const step = Math.floor(at), text = `${(step * drawn.tau).toFixed(2)} s, step ${step}`;
    for (const show of screens) show(step);
    slider.value = step;
    slider.setAttribute("aria-valuetext", text);
    clock.textContent = text;
    button.textContent = before === null ? "Play" : "Pause";
  }
  function pause() {
    before = null;
    cancelAnimationFrame(frame);
    draw();
  }
  function tick(now) {
    const passed = Math.max(0, now - before) / 1000 / drawn.tau; // a frame may be older than the click
    at = Math.min(end, at + passed / (slow.checked ? SLOWER : 1));
    before = now;
    if (at >= end) return pause();
    draw();
    frame = requestAnimationFrame(tick);
  }
  button.addEventListener("click", () => {
    if (before !== null) return pause();
    if (at >= end) at = 0;
    before = performance.now();
    draw();
    frame = requestAnimationFrame(tick);
  });
  slider.addEventListener("input", () => {
    at = Number(slider.value);
    pause();
  });
  root.addEventListener("keydown", (event) => event.stopPropagation());
  slider.addEventListener("keydown", (event) => { // in JupyterLab the slider's own keys do nothing
    const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: end }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    at = Math.max(0, Math.min(end, Math.floor(to)));
    pause();
  });
  draw();
  return () => cancelAnimationFrame(frame);
}

export default { render };
