"use strict";

const LINES = 300; // tokens drawn in the diagram of radii
const BARS = 0.24; // share of the lattice view's width

/** A diagram against the step, with a cursor. What stays the same is drawn once. */
class Plot {
  constructor(title, summary) {
    this.canvas = element("canvas", { role: "img", "aria-label": `${title}. ${summary}` });
    this.heading = element("figcaption", {}, title);
    this.figure = element("figure", {}, this.heading, this.canvas);
    this.base = document.createElement("canvas");
  }

  /** Whether the data has what this shows. */
  fits() {
    return true;
  }

  /** The figure's x axis, in CSS pixels: [left, right]. */
  get span() {
    return [46, this.canvas.clientWidth - 8];
  }

  place(step, time) {
    const [left, right] = this.span;
    return left + time.place(step) * (right - left);
  }

  /** The step at a place on the canvas. */
  stepAt(x, time) {
    const [left, right] = this.span;
    return time.step(Math.max(0, Math.min(1, (x - left) / (right - left))));
  }

  get bottom() {
    return this.canvas.clientHeight - 20;
  }

  height(value) {
    return this.bottom - ((value - this.low) / (this.high - this.low || 1)) * (this.bottom - 8);
  }

  draw(view) {
    const ratio = fitCanvas(this.canvas);
    const { width, height } = this.canvas;
    const key = [width, height, view.version, this.key(view)].join();
    if (key !== this.drawn) {
      Object.assign(this.base, { width, height });
      this.drawn = key;
      const context = this.base.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.font = "11px system-ui, sans-serif";
      this.drawBase(context, view);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.drawImage(this.base, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.font = "11px system-ui, sans-serif";
    this.drawOver(context, view);
    const x = this.place(view.step, view.time);
    context.strokeStyle = view.theme.accent;
    context.lineWidth = 1.5;
    line(context, x, 4, x, this.bottom);
  }

  /** What the part that stays the same depends on, besides size, time scale and data. */
  key() {
    return "";
  }

  drawOver() {}

  drawTime(context, { time, theme }) {
    context.strokeStyle = theme.line;
    context.fillStyle = theme.faint;
    context.textAlign = "center";
    context.textBaseline = "top";
    context.lineWidth = 1;
    let free = -Infinity;
    for (const tick of time.ticks()) {
      const x = this.place(tick, time);
      line(context, x, 4, x, this.bottom);
      const text = count(Math.round(tick));
      const half = context.measureText(text).width / 2;
      const center = Math.min(x, this.span[1] + 8 - half);
      if (center - half < free) continue;
      context.fillText(text, center, this.bottom + 5);
      free = center + half + 6;
    }
  }

  drawValues(context, { theme }) {
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const tick of niceTicks(this.low, this.high, 4)) {
      context.strokeStyle = theme.line;
      line(context, this.span[0], this.height(tick), this.span[1], this.height(tick));
      context.fillStyle = theme.faint;
      context.fillText(short(tick), this.span[0] - 5, this.height(tick));
    }
  }

  curve(context, steps, values, time, isStairs = false) {
    context.beginPath();
    let isDown = false;
    let last = 0;
    for (let i = 0; i < steps.length; i++) {
      const [x, y] = [this.place(steps[i], time), this.height(values[i])];
      if (!Number.isFinite(y)) isDown = false;
      else {
        if (isDown && isStairs) context.lineTo(x, last);
        isDown ? context.lineTo(x, y) : context.moveTo(x, y);
        [isDown, last] = [true, y];
      }
    }
    context.stroke();
  }
}

class LossPlot extends Plot {
  constructor() {
    super("Loss", "Cross-entropy in nats per token, of each step and as a moving average.");
  }

  fits(data) {
    return Boolean(data.losses && data.losses.some(Number.isFinite));
  }

  drawBase(context, view) {
    const { loss_steps: steps, losses } = view.data;
    const each = losses.subarray(0, steps.length);
    const mean = losses.subarray(steps.length);
    const finite = each.filter(Number.isFinite).sort();
    this.low = Math.min(finite[0], finite[Math.floor(finite.length * 0.01)]);
    this.high = finite[finite.length - 1] === this.low ? this.low + 1 : finite[finite.length - 1];
    this.drawTime(context, view);
    this.drawValues(context, view);
    context.strokeStyle = view.theme.faint;
    context.globalAlpha = 0.5;
    context.lineWidth = 0.6;
    this.curve(context, steps, each, view.time);
    context.globalAlpha = 1;
    context.strokeStyle = view.theme.groups[0];
    context.lineWidth = 1.8;
    this.curve(context, steps, mean, view.time);
  }
}

class DistinctPlot extends Plot {
  constructor() {
    super("Distinct vectors", "How many different vectors there are, of all tokens and of each group.");
  }

  drawBase(context, view) {
    const { data, theme } = view;
    const names = data.info.distinct;
    [this.low, this.high] = [0, Math.max(...data.distinct) * 1.05];
    this.drawTime(context, view);
    this.drawValues(context, view);
    const right = this.span[1];
    names.forEach((name, i) => {
      context.lineWidth = i ? 1.6 : 3.5; // all tokens: behind the groups
      const values = Array.from(data.steps, (_, frame) => data.distinct[frame * names.length + i]);
      context.strokeStyle = context.fillStyle = theme.groupColor(name);
      this.curve(context, data.steps, values, view.time, true);
      context.textAlign = "right";
      context.textBaseline = "bottom";
      context.fillText(name, right - 4, this.bottom - 4 - 13 * (names.length - 1 - i));
    });
  }
}

class RadiusPlot extends Plot {
  constructor() {
    super("Radius: distance from the centroid", "Space-time diagram: a line for each token.");
  }

  radii(data, token) {
    return Array.from(data.steps, (_, frame) => data.channel(frame, RADIUS, token));
  }

  drawBase(context, view) {
    const { data, theme } = view;
    this.low = 0;
    this.high = 0;
    for (let frame = 0; frame < data.frames; frame++) {
      const [low, size] = data.ranges.subarray(2 * (frame * 5 + RADIUS));
      this.high = Math.max(this.high, low + size);
    }
    this.high = this.high * 1.03 || 1;
    this.drawTime(context, view);
    this.drawValues(context, view);
    context.lineWidth = 0.7;
    context.globalAlpha = data.tokens > 60 ? 0.55 : 0.9;
    const gap = Math.max(1, data.tokens / LINES);
    const tokens = Array.from({ length: Math.min(LINES, data.tokens) }, (_, i) => Math.floor(i * gap));
    for (const token of tokens.sort((a, b) => data.group[a] - data.group[b])) {
      context.strokeStyle = theme.groups[data.group[token]];
      this.curve(context, data.steps, this.radii(data, token), view.time);
    }
    context.globalAlpha = 1;
  }

  drawOver(context, view) {
    if (view.selected < 0) return;
    context.strokeStyle = view.theme.accent;
    context.lineWidth = 2;
    this.curve(context, view.data.steps, this.radii(view.data, view.selected), view.time);
  }
}

/** How far a token moves along each dimension: all frames as a picture, the frame at the cursor as bars. */
class LatticePlot extends Plot {
  constructor() {
    super("Lattice view", "Displacement of the selected token in ulp, for each dimension.");
  }

  get span() {
    return [46, 46 + (this.canvas.clientWidth - 54) * (1 - BARS) - 12];
  }

  key({ selected }) {
    return selected;
  }

  row(dimension, dim) {
    return 8 + ((this.bottom - 8) * dimension) / dim;
  }

  drawBase(context, view) {
    const { data, selected, theme, time } = view;
    [this.low, this.high] = [0, 1];
    this.drawTime(context, view);
    context.fillStyle = theme.faint;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const tick of niceTicks(0, data.dim - 1, 4)) {
      if (tick % 1 === 0) context.fillText(tick, 41, this.row(tick + 0.5, data.dim));
    }
    this.all = Array.from({ length: data.frames }, (_, frame) => (selected < 0 ? null : data.moves(frame, selected)));
    this.most = 1;
    const [left, right] = this.span;
    if (!this.all[0]) {
      context.textAlign = "center";
      const text = selected < 0 ? "select a token" : "this token's is not in the page";
      context.fillText(text, (left + right) / 2, this.bottom / 2);
      return;
    }
    for (const moves of this.all) {
      for (const move of moves) if (Number.isFinite(move)) this.most = Math.max(this.most, Math.abs(move));
    }
    for (let x = Math.ceil(left); x < right; x++) {
      const moves = this.all[data.frameAt(this.stepAt(x + 0.5, time) + 1e-9)];
      for (let dimension = 0; dimension < data.dim; dimension++) {
        const strength = this.strength(moves[dimension]);
        if (!strength) continue;
        context.fillStyle = strength > 0 ? theme.plus : theme.minus;
        context.globalAlpha = Math.abs(strength);
        const y = this.row(dimension, data.dim);
        context.fillRect(x, y, 1, this.row(dimension + 1, data.dim) - y);
      }
    }
    context.globalAlpha = 1;
  }

  /** From -1 to 1, by the logarithm of the displacement: 0 for none, 0.3 for one ulp. */
  strength(move) {
    if (!move) return 0; // NaN as well
    const size = Math.abs(move);
    const most = Math.log(Math.max(this.most, 2));
    return Math.sign(move) * (size < 1 ? 0.3 * size : 0.3 + (0.7 * Math.log(Math.min(size, this.most))) / most);
  }

  drawOver(context, view) {
    const { data, frame, theme } = view;
    const moves = this.all[frame];
    if (!moves) return;
    const left = this.span[1] + 12;
    const half = (this.canvas.clientWidth - 8 - left) / 2;
    const center = left + half;
    context.strokeStyle = theme.faint;
    context.lineWidth = 1;
    line(context, center, 8, center, this.bottom);
    moves.forEach((move, dimension) => {
      context.fillStyle = move > 0 ? theme.plus : theme.minus;
      const y = this.row(dimension, data.dim);
      const length = this.strength(move) * half;
      context.fillRect(
        center + Math.min(0, length),
        y,
        Math.abs(length),
        Math.max(1, this.row(dimension + 1, data.dim) - y - 0.5),
      );
    });
    context.fillStyle = theme.faint;
    context.textBaseline = "top";
    context.textAlign = "center";
    context.fillText(`± ${short(this.most)} ulp`, center, this.bottom + 5);
  }
}

function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
