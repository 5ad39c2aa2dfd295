"use strict";

const SHADES = 5; // of each color, from near to far
const BINS = 256; // of depth
const PICK = 14; // pixels within which the pointer finds a token
const LABELS = 30; // of black holes, at most
const TRAIL_POINTS = 12000; // of all trails together

/** The cloud of vectors in three dimensions, on a canvas. */
class Cloud {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.home();
  }

  home() {
    Object.assign(this, { yaw: 0.5, pitch: 0.35, zoom: 1, panX: 0, panY: 0 });
  }

  load(data) {
    this.data = data;
    const n = data.tokens;
    this.world = [0, 1, 2].map(() => new Float32Array(n));
    this.x = new Float32Array(n);
    this.y = new Float32Array(n);
    this.depth = new Float32Array(n); // -1 near, 1 far, relative to the reach
    this.order = new Int32Array(n); // of the tokens that are drawn, from far to near
    this.stands = new Int32Array(n); // the token that is drawn in place of each
    this.counts = new Int32Array(n); // in place of how many a token is drawn
    this.dot = n > 4000 ? 1.5 : n > 1000 ? 2.2 : n > 300 ? 3 : 4;
  }

  turn(dx, dy) {
    this.yaw += dx;
    this.pitch = Math.max(-Math.PI / 2, Math.min(Math.PI / 2, this.pitch + dy));
  }

  scaleBy(factor) {
    this.zoom = Math.max(0.2, Math.min(200, this.zoom * factor));
  }

  /** Prepare a projection of points in the trace's units to pixels. */
  aim(moment, fits) {
    const { width, height } = this.size;
    const frame = Math.floor(moment);
    const own = this.data.reachAt(frame);
    const next = this.data.reachAt(Math.min(frame + 1, this.data.frames - 1));
    const reach = fits ? own + (moment - frame) * (next - own) : this.data.reach;
    this.scaleLength = reach || this.data.reach || 1;
    this.pixels = (0.46 * Math.min(width, height) * this.zoom) / this.scaleLength; // of one unit, at the centroid
    const [sy, cy] = [Math.sin(this.yaw), Math.cos(this.yaw)];
    const [sp, cp] = [Math.sin(this.pitch), Math.cos(this.pitch)];
    this.turned = [cy, 0, sy, sy * sp, cp, -cy * sp, -sy * cp, sp, cy * cp]; // right, up, towards the viewer
    this.centerX = width / 2 + this.panX;
    this.centerY = height / 2 + this.panY;
  }

  /** Project one point; return [x, y, depth]. */
  project(x, y, z) {
    const m = this.turned;
    const depth = -(m[6] * x + m[7] * y + m[8] * z) / this.scaleLength;
    const pixels = (this.pixels * 4) / Math.max(0.5, 4 + depth);
    const right = m[0] * x + m[1] * y + m[2] * z;
    const up = m[3] * x + m[4] * y + m[5] * z;
    return [this.centerX + right * pixels, this.centerY - up * pixels, depth];
  }

  get size() {
    return { width: this.canvas.clientWidth, height: this.canvas.clientHeight };
  }

  /**
   * Draw the cloud.
   *
   * `view` has the moment, a frame number that may lie between two; `fits`, whether the scale follows the cloud;
   * `trails`; the tokens `selected` and `hovered`, or -1; `colors`, a color number for each token; `palette`, a list of
   * [r, g, b]; and `theme`, colors of the rest.
   */
  draw(view) {
    const ratio = fitCanvas(this.canvas);
    const context = this.context;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.size.width, this.size.height);
    this.aim(view.moment, view.fits);
    this.place(view.moment);
    this.shades = view.palette.map((color) => shadesOf(color, view.theme.background));
    if (view.trails) this.drawTrails(view);
    this.drawAxes(view);
    this.drawDots(view);
    this.drawMarks(view);
    this.drawScale(view);
  }

  /** Compute where all tokens are, their depth order, and which of them stand for others. */
  place(moment) {
    const { data, world, x, y, depth } = this;
    for (let axis = 0; axis < 3; axis++) data.coordinates(moment, axis, world[axis]);
    const frame = Math.floor(moment);
    const next = Math.min(moment > frame ? frame + 1 : frame, data.frames - 1);
    const bin = new Uint8Array(data.tokens);
    const ends = new Int32Array(BINS + 1);
    this.counts.fill(0);
    for (let token = 0; token < data.tokens; token++) {
      const first = data.cellOf(frame, token);
      const stand = data.cellOf(next, token) === data.cellOf(next, first) ? first : token;
      this.stands[token] = stand;
      if (stand === token) {
        [x[token], y[token], depth[token]] = this.project(world[0][token], world[1][token], world[2][token]);
        bin[token] = Math.max(0, Math.min(BINS - 1, (0.5 - depth[token] / 3.6) * BINS));
        ends[bin[token] + 1]++;
      } else {
        [x[token], y[token], depth[token]] = [x[stand], y[stand], depth[stand]];
      }
      this.counts[stand] += Number.isFinite(x[stand]);
    }
    for (let i = 0; i < BINS; i++) ends[i + 1] += ends[i];
    this.drawn = ends[BINS];
    for (let token = 0; token < data.tokens; token++) {
      if (this.stands[token] === token) this.order[ends[bin[token]]++] = token;
    }
  }

  drawDots({ colors, theme }) {
    const { context, x, y, depth, counts } = this;
    const holes = [];
    for (let i = 0; i < this.drawn; i++) {
      const token = this.order[i];
      if (counts[token] === 0) continue;
      const radius = this.dotRadius(token);
      context.fillStyle = this.shades[colors[token]][shadeOf(depth[token])];
      if (radius < 2) {
        context.fillRect(x[token] - radius, y[token] - radius, 2 * radius, 2 * radius);
      } else {
        context.beginPath();
        context.arc(x[token], y[token], radius, 0, 2 * Math.PI);
        context.fill();
      }
      if (counts[token] > 1) holes.push(token);
    }
    context.font = "600 12px system-ui, sans-serif";
    context.lineWidth = 1.5;
    const labeled = []; // only where no larger hole is labeled
    for (const token of holes.sort((a, b) => counts[b] - counts[a])) {
      if (labeled.length === LABELS) break;
      if (labeled.some((other) => Math.abs(x[other] - x[token]) < 48 && Math.abs(y[other] - y[token]) < 18)) continue;
      labeled.push(token);
      context.strokeStyle = theme.text;
      context.beginPath();
      context.arc(x[token], y[token], this.dotRadius(token) + 2.5, 0, 2 * Math.PI);
      context.stroke();
      this.label(count(counts[token]), x[token] + this.dotRadius(token) + 7, y[token], theme);
    }
  }

  label(text, x, y, theme) {
    this.context.textBaseline = "middle";
    this.context.lineWidth = 3;
    this.context.strokeStyle = theme.background;
    this.context.strokeText(text, x, y);
    this.context.fillStyle = theme.text;
    this.context.fillText(text, x, y);
    this.context.lineWidth = 1.5;
  }

  /** Black holes are larger, by the logarithm of their count. */
  dotRadius(token) {
    const nearness = 4 / Math.max(0.5, 4 + this.depth[token]);
    return this.dot * nearness * (1 + 0.35 * Math.log2(Math.max(1, this.counts[token])));
  }

  drawMarks({ selected, hovered, theme }) {
    for (const [token, color] of [
      [hovered, theme.faint],
      [selected, theme.accent],
    ]) {
      if (token < 0 || !Number.isFinite(this.x[token])) continue;
      const context = this.context;
      const radius = this.dotRadius(this.stands[token]) + 6;
      context.strokeStyle = color;
      context.lineWidth = 2;
      context.beginPath();
      context.arc(this.x[token], this.y[token], radius, 0, 2 * Math.PI);
      context.stroke();
      context.font = "600 13px system-ui, sans-serif";
      const name = this.data.info.names[token];
      this.label(
        name.length > 24 ? `${name.slice(0, 23)}…` : name,
        this.x[token] + radius - 4,
        this.y[token] - radius - 4,
        theme,
      );
    }
  }

  drawTrails({ moment, selected, colors }) {
    const { context, data } = this;
    const end = Math.floor(moment);
    const length = Math.max(2, Math.min(60, Math.floor(TRAIL_POINTS / data.tokens)));
    context.lineWidth = 1;
    context.globalAlpha = 0.45;
    for (let i = 0; i < this.drawn; i++) {
      const token = this.order[i];
      if (this.counts[token] === 0 || token === selected) continue;
      this.trail(token, Math.max(0, end - length), end, this.shades[colors[token]][shadeOf(this.depth[token])]);
    }
    context.globalAlpha = 1;
    context.lineWidth = 2;
    if (selected >= 0) this.trail(selected, 0, end, this.shades[colors[selected]][0]);
  }

  /** Draw the path of a token through frames, up to where it is now. */
  trail(token, begin, end, color) {
    const { context, data } = this;
    context.strokeStyle = color;
    context.beginPath();
    for (let frame = begin; frame <= end; frame++) {
      const [x, y] = this.project(
        data.channel(frame, 0, token),
        data.channel(frame, 1, token),
        data.channel(frame, 2, token),
      );
      context.lineTo(x, y);
    }
    context.lineTo(this.x[token], this.y[token]);
    context.stroke();
  }

  /** Draw the directions of the axes in the corner. */
  drawAxes({ theme }) {
    const { context } = this;
    const [x0, y0, length] = [40, this.size.height - 44, 26];
    const m = this.turned;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "center";
    this.data.info.axes.forEach((name, axis) => {
      if (!name) return;
      context.strokeStyle = context.fillStyle = theme.faint;
      context.lineWidth = 1.5;
      context.beginPath();
      context.moveTo(x0, y0);
      context.lineTo(x0 + length * m[axis], y0 - length * m[3 + axis]);
      context.stroke();
      const label = name.startsWith("dimension") ? name.slice(10) : String(axis + 1);
      context.fillText(label, x0 + (length + 9) * m[axis], y0 - (length + 9) * m[3 + axis]);
    });
    context.textAlign = "start";
  }

  /** Draw a bar with its length in the units of the vectors. */
  drawScale({ theme }) {
    const { context } = this;
    const { width, height } = this.size;
    const room = 110 / this.pixels;
    const power = 10 ** Math.floor(Math.log10(room));
    const length = [5, 2, 1].map((n) => n * power).find((n) => n <= room) || power;
    const [right, y] = [width - 14, height - 16];
    context.strokeStyle = context.fillStyle = theme.faint;
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(right - length * this.pixels, y);
    context.lineTo(right, y);
    context.stroke();
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "right";
    context.fillText(short(length), right, y - 10);
    context.textAlign = "start";
  }

  /** The token at a place on the canvas, or -1. */
  pick(x, y) {
    let best = -1;
    let least = PICK ** 2;
    for (let i = 0; i < this.drawn; i++) {
      const token = this.order[i];
      const apart = (this.x[token] - x) ** 2 + (this.y[token] - y) ** 2;
      if (this.counts[token] && apart <= least) [best, least] = [token, apart];
    }
    return best;
  }
}

/** Give a canvas as many pixels as the screen has where it lies; return how many for each CSS pixel. */
function fitCanvas(canvas) {
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  return ratio;
}

function shadeOf(depth) {
  return Math.max(0, Math.min(SHADES - 1, Math.round(((depth + 1.2) / 2.4) * (SHADES - 1))));
}

/** A color, and how it fades into the background. */
function shadesOf([r, g, b], background) {
  const back = background.match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16));
  return Array.from({ length: SHADES }, (_, i) => {
    const fade = (0.55 * i) / (SHADES - 1);
    return `rgb(${[r, g, b].map((x, k) => Math.round(x + fade * (back[k] - x))).join()})`;
  });
}
