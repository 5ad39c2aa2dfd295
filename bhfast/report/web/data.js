"use strict";

const ARRAYS = { U8: Uint8Array, U16: Uint16Array, I32: Int32Array, F32: Float32Array, BF16: Uint16Array };
const LEVELS = 65534; // of a quantised value
const NOTHING = 65535; // in place of a value that is not finite, or of the number of a token
const RADIUS = 3; // channels of the cloud, after the three coordinates
const NORM = 4;

/** What bhfast.report.player.PlayerData packs; its docstring says what the tensors are. */
class PlayerData {
  /** Decode a packed file, a Uint8Array or ArrayBuffer, compressed or not. */
  static async decode(packed) {
    let bytes = new Uint8Array(packed);
    if (bytes[0] === 0x1f && bytes[1] === 0x8b) {
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    }
    const length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
    return new PlayerData(JSON.parse(header.__metadata__.player), header, bytes.buffer, 8 + length);
  }

  constructor(info, header, buffer, start) {
    this.info = info;
    this.shapes = {};
    for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
      if (name === "__metadata__") continue;
      const size = shape.reduce((product, n) => product * n, 1);
      this[name] = new ARRAYS[dtype](buffer, start + data_offsets[0], size);
      this.shapes[name] = shape;
    }
    this.frames = this.steps.length;
    this.tokens = this.rows.length;
    this.dim = this.shapes.lattice[2];
    this.detailOf = new Map([...this.detailed].map((token, i) => [token, i]));
    this.reach = 0; // how far from the centroid any token is on the three axes
    for (let frame = 0; frame < this.frames; frame++) this.reach = Math.max(this.reach, this.reachAt(frame));
  }

  /** The value of a channel of the cloud; NaN if it is not finite. */
  channel(frame, channel, token) {
    const row = frame * 5 + channel;
    const level = this.cloud[row * this.tokens + token];
    return level === NOTHING ? NaN : this.ranges[2 * row] + (level / LEVELS) * this.ranges[2 * row + 1];
  }

  /** Put the coordinates on one axis at a moment between two frames into `out`. */
  coordinates(moment, axis, out) {
    const before = Math.floor(moment);
    const after = Math.min(before + 1, this.frames - 1);
    for (let token = 0; token < this.tokens; token++) {
      const a = this.channel(before, axis, token);
      out[token] = moment === before ? a : a + (moment - before) * (this.channel(after, axis, token) - a);
    }
  }

  /** The largest magnitude of a coordinate in a frame. */
  reachAt(frame) {
    let reach = 0;
    for (let axis = 0; axis < 3; axis++) {
      const [low, size] = this.ranges.subarray(2 * (frame * 5 + axis));
      reach = Math.max(reach, Math.abs(low), Math.abs(low + size));
    }
    return reach;
  }

  /** The first token with the same vector. */
  cellOf(frame, token) {
    return this.cell[frame * this.tokens + token];
  }

  /** How many tokens have the vector of each token that is the first with it. */
  multiplicities(frame) {
    const counts = new Int32Array(this.tokens);
    for (let token = 0; token < this.tokens; token++) counts[this.cellOf(frame, token)]++;
    return counts;
  }

  /** How far a token moved since the record before, L2 in ulp; NaN if that is not known. */
  moved(frame, token) {
    return bfloat16(this.displacement[frame * this.tokens + token]);
  }

  /** 0 early, 1 midlife, 2 late, 3 frozen; -1 if that is not known. */
  phase(frame, token) {
    if (!this.life) return -1;
    let phase = 0;
    for (let i = 0; i < 3; i++) phase += this.steps[frame] > this.life[i * this.tokens + token];
    return phase;
  }

  /** The last step in which a token moved; null if that is not known. */
  lastMove(token) {
    return this.life ? this.life[2 * this.tokens + token] : null;
  }

  /** The nearest tokens with another vector, as [token, distance]; null if they are not in the data. */
  neighboursOf(frame, token) {
    const detail = this.detailOf.get(token);
    if (detail === undefined) return null;
    const at = (frame * this.detailed.length + detail) * 3;
    return [0, 1, 2]
      .map((i) => [this.neighbours[at + i], this.distances[at + i]])
      .filter(([other]) => other !== NOTHING);
  }

  /** The displacements of a token in ulp, one for each dimension; null if they are not in the data. */
  moves(frame, token) {
    const detail = this.detailOf.get(token);
    if (detail === undefined) return null;
    const at = (detail * this.frames + frame) * this.dim;
    return Float32Array.from(this.lattice.subarray(at, at + this.dim), bfloat16);
  }

  /** The last frame that is not after a step. */
  frameAt(step) {
    let low = 0;
    let high = this.frames - 1;
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (this.steps[middle] <= step) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /** Tokens of that name or row first, then those whose name contains the text. */
  find(text) {
    const { names } = this.info;
    const all = [...names.keys()];
    const exact = all.filter((i) => names[i] === text || names[i] === `'${text}'` || `row ${this.rows[i]}` === text);
    const row = all.filter((i) => String(this.rows[i]) === text);
    const lower = text.toLowerCase();
    const part = all.filter((i) => names[i].toLowerCase().includes(lower));
    return text ? [...new Set([...exact, ...row, ...part])] : [];
  }
}

const BITS = new Uint32Array(1);
const VALUE = new Float32Array(BITS.buffer);

function bfloat16(bits) {
  BITS[0] = bits << 16;
  return VALUE[0];
}

/** Positions of steps on a line from 0 to 1: proportional to the step, or to its logarithm. */
class TimeScale {
  constructor(first, last, isLog) {
    this.first = first;
    this.length = Math.max(1, last - first);
    this.isLog = isLog;
  }

  place(step) {
    const passed = step - this.first;
    return this.isLog ? Math.log1p(passed) / Math.log1p(this.length) : passed / this.length;
  }

  step(place) {
    return this.first + (this.isLog ? Math.expm1(place * Math.log1p(this.length)) : place * this.length);
  }

  ticks() {
    if (!this.isLog) return niceTicks(this.first, this.first + this.length, 5);
    const ticks = [this.first];
    for (let passed = 1; passed <= this.length; passed *= 10) {
      for (const n of this.length < 200 ? [1, 2, 5] : [1])
        if (n * passed <= this.length) ticks.push(this.first + n * passed);
    }
    return ticks;
  }
}

function niceTicks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) || 1;
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + 1e-9 * step; tick += step) ticks.push(tick);
  return ticks;
}

function short(number) {
  if (Number.isNaN(number)) return "–";
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size >= 1e6 || size < 1e-3) return number.toExponential(1).replace("e+", "e");
  return Number(number.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 });
}

function count(number) {
  return number.toLocaleString("en");
}
