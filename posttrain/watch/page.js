"use strict";
// Draws view.json and stage.json. Every text of a run is set as text: nothing here makes HTML out of data.

const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const POLL = 1500; // milliseconds
const WIDTH = 300, HEIGHT = 160, LEFT = 46, RIGHT = 8, TOP = 12, BOTTOM = 24; // of a chart
const OPEN = ["running", "failed", "interrupted"];
const CHARTS = [
  ["Reward", ["reward", "heldout_reward"]],
  ["KL, nats", ["kl", "kl_anchor"]],
  ["Length, tokens", ["length", "heldout_length"]],
  ["Loss", ["loss", "heldout_loss"]],
  ["Divergence, nats", ["divergence", "heldout_divergence"]],
  ["Accuracy", ["accuracy", "heldout_accuracy"]],
];
const LABELS = {
  kl: "KL to the SFT policy", kl_anchor: "KL to the anchor", heldout_reward: "held out", heldout_length: "held out",
  heldout_loss: "held out", heldout_divergence: "held out", heldout_accuracy: "held out",
};
const TILES = {
  reward: "reward", heldout_reward: "reward, held out", kl: "KL to the SFT policy", kl_anchor: "KL to the anchor",
  length: "length, tokens", truncated: "truncated", gradient_norm: "gradient norm", clipped: "steps clipped",
  learning_rate: "learning rate", loss: "loss", heldout_loss: "loss, held out", accuracy: "accuracy",
  divergence: "divergence", entropy: "entropy",
};
const SHARES = ["truncated", "clipped"];

let chosen = null; // the name of a stage that was clicked
let opened = new Set(); // folded groups that were opened

function node(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function number(value) {
  if (typeof value !== "number") return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("-", "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

function duration(seconds) {
  if (typeof seconds !== "number") return "";
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  if (hours) return `${hours} h ${String(minutes).padStart(2, "0")} min`;
  return minutes ? `${minutes} min ${String(whole % 60).padStart(2, "0")} s` : `${whole} s`;
}

function show(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
  $(id).hidden = !text;
}

function left(stage) {
  if (stage.status !== "running") return "";
  return typeof stage.eta_seconds === "number" ? `${duration(stage.eta_seconds)} left` : "time left unknown";
}

function steps(stage) {
  if (typeof stage.step !== "number") return "";
  const rate = stage.status === "running" && stage.steps_per_second ? `, ${number(stage.steps_per_second)}/s` : "";
  return `step ${stage.step} of ${stage.steps}${rate}`;
}

function row(stage, shown) {
  const made = node("tr", null, stage.name === shown ? "chosen" : "");
  const name = node("td", null, "name"), button = node("button", stage.name);
  button.addEventListener("click", () => { chosen = stage.name; poll(); });
  name.append(button);
  made.append(name, node("td", stage.command), node("td", stage.status, stage.status), node("td", steps(stage), "number"),
    node("td", duration(stage.elapsed_seconds), "number"), node("td", left(stage), "number"));
  return made;
}

function table(stages, shown) {
  const made = node("table");
  made.append(...stages.map(stage => row(stage, shown)));
  return made;
}

function drawStages(view, shown) {
  const parts = [], few = view.stages.length <= 12;
  const first = view.stages.filter(stage => few || OPEN.includes(stage.status));
  if (first.length) parts.push(table(first, shown));
  for (const status of few ? [] : [...new Set(view.stages.map(stage => stage.status))]) {
    if (OPEN.includes(status)) continue;
    const those = view.stages.filter(stage => stage.status === status);
    const fold = node("details");
    fold.open = opened.has(status);
    fold.addEventListener("toggle", () => fold.open ? opened.add(status) : opened.delete(status));
    fold.append(node("summary", `${those.length} ${status}`), table(those, shown));
    parts.push(fold);
  }
  const focused = document.activeElement && document.activeElement.closest("#stages button");
  const name = focused ? focused.textContent : null;
  $("stages").replaceChildren(...parts);
  if (name !== null) [...document.querySelectorAll("#stages button")].find(one => one.textContent === name)?.focus();
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return found;
}

function range(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; low -= pad; high += pad; }
  return [low, high];
}

function chart(title, names, curves, limit) {
  const lines = names.map(name => curves[name] || []);
  const points = lines.flat();
  if (!points.length) return null;
  const [firstStep, lastStep] = range(points.map(point => point[0]));
  const values = points.map(point => point[1]);
  // A limit is drawn where it is near enough not to flatten the curve.
  const near = limit !== undefined && Math.max(...values) > limit / 3;
  const [low, high] = range(near ? [...values, limit] : values);
  const x = step => LEFT + (step - firstStep) / (lastStep - firstStep) * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title} over steps`});
  for (const value of ticks(low, high)) {
    svg.append(shape("line", {class: "gridline", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value)}));
    svg.append(shape("text", {x: LEFT - 6, y: y(value) + 4, "text-anchor": "end"}, number(value)));
  }
  if (near) svg.append(shape("line", {class: "limit", x1: LEFT, x2: WIDTH - RIGHT, y1: y(limit), y2: y(limit)}));
  svg.append(shape("text", {x: LEFT, y: HEIGHT - 5}, `step ${number(Math.min(...points.map(point => point[0])))}`));
  svg.append(shape("text", {x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end"},
    number(Math.max(...points.map(point => point[0])))));
  const caption = node("figcaption");
  caption.append(node("b", title));
  lines.forEach((line, index) => {
    if (!line.length) return;
    const path = line.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    if (line.length > 1) svg.append(shape("path", {class: `line${index}`, d: path}));
    const [step, value] = line[line.length - 1];
    svg.append(shape("circle", {class: `line${index}`, cx: x(step), cy: y(value), r: 3}));
    caption.append(node("span", `${LABELS[names[index]] || "training"} ${number(value)}`, `line${index}`));
  });
  const figure = node("figure");
  figure.append(caption, svg);
  return figure;
}

function promptText(prompt) {
  if (typeof prompt === "string") return prompt;
  if (!Array.isArray(prompt)) return prompt === undefined ? "" : JSON.stringify(prompt);
  return prompt.map(turn => turn && typeof turn === "object" && "content" in turn ? String(turn.content) : String(turn))
    .join("\n");
}

function drawSample(sample) {
  $("sample").hidden = !sample;
  if (!sample) return;
  show("sample-title", `Sample at step ${sample.step}`);
  show("prompt", promptText(sample.prompt));
  show("answer", String(sample.completion ?? ""));
  const figures = ["reward", "kl", "length"].filter(name => typeof sample[name] === "number");
  show("score", figures.map(name => `${name === "kl" ? "KL" : name} ${number(sample[name])}`).join("   "));
}

function drawStage(stage, found) {
  $("stage").hidden = !stage;
  if (!stage) return;
  show("stage-name", stage.name);
  show("stage-line", [stage.command, stage.status, steps(stage), duration(stage.elapsed_seconds), left(stage)]
    .filter(Boolean).join(" · "));
  show("stage-error", stage.error || "");
  const guards = found ? found.guards : [], limits = guards.find(one => one.guard.startsWith("KL"));
  $("guards").replaceChildren(...guards.map(one =>
    node("li", `${one.guard}: ${number(one.value)}, limit ${number(one.limit)}`, one.near ? "near" : "")));
  const curves = found ? found.curves : {};
  const drawn = CHARTS.map(([title, names]) =>
    chart(title, names, curves, limits && names[0] === "kl" ? limits.limit : undefined));
  $("charts").replaceChildren(...drawn.filter(Boolean).slice(0, 4));
  const figures = found ? found.figures : {};
  $("figures").replaceChildren(...Object.entries(TILES).filter(([name]) => name in figures).map(([name, label]) => {
    const tile = node("div"), value = figures[name];
    const share = SHARES.includes(name) && typeof value === "number";
    tile.append(node("dt", label), node("dd", share ? `${number(100 * value)} %` : number(value)));
    return tile;
  }));
  drawSample(found && found.sample);
}

async function get(path) {
  const answer = await fetch(path, {cache: "no-store", credentials: "omit"});
  if (!answer.ok) throw new Error(String(answer.status));
  return answer.json();
}

async function draw() {
  const view = await get("view.json");
  if (!view.stages) { show("out", view.out || ""); show("status", view.waiting || ""); return; }
  document.title = `${view.status} · ${view.out.split("/").pop()} · gemma2 watch`;
  show("out", view.out);
  show("status", view.status);
  $("status").className = `badge ${view.status}`;
  const several = view.kind === "pipeline", settled = ["complete", "not needed"];
  const done = view.stages.filter(stage => settled.includes(stage.status)).length;
  const only = view.stages[0] || {};
  show("progress", several ? `${done} of ${view.stages.length} stages done` : steps(only));
  show("elapsed", duration(view.elapsed_seconds));
  const eta = typeof view.eta_seconds === "number" ? `${duration(view.eta_seconds)} left` : "time left unknown";
  show("eta", view.over ? "" : eta);
  const share = several ? done / Math.max(1, view.stages.length) : view.status === "complete" ? 1 : only.step / only.steps;
  $("track").hidden = !Number.isFinite(share);
  $("done").style.width = `${100 * (share || 0)}%`;
  show("alerts", view.alerts.map(one => `Alert, ${one.stage}: ${one.alert}`).join("\n"));
  const running = view.stages.find(stage => stage.status === "running" && "figures" in stage);
  const shown = view.stages.find(stage => stage.name === chosen) || running ||
    view.stages.find(stage => stage.status === "failed") || view.stages.find(stage => "figures" in stage);
  $("stages-section").hidden = !several;
  if (several) drawStages(view, shown && shown.name);
  let found = null;
  if (shown) try { found = await get(`stage.json?name=${encodeURIComponent(shown.name)}`); } catch { found = null; }
  drawStage(shown, found);
}

let timer = null, busy = false;
async function poll() {
  clearTimeout(timer);
  if (!busy) {
    busy = true;
    try { await draw(); show("connection", ""); }
    catch (error) { show("connection", "gemma2 watch does not answer: it has ended, or is not reached."); }
    busy = false;
  }
  timer = setTimeout(poll, document.hidden ? 10 * POLL : POLL);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
poll();
