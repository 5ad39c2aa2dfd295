"use strict";

const COLORS = 24; // of a continuous scale
const INFERNO = [
  [252, 255, 164], [249, 176, 40], [229, 92, 48], [175, 45, 90], [106, 23, 110], [40, 11, 84],
]; // prettier-ignore
const PHASES = ["early", "midlife", "late", "frozen"];

/** What tokens can be colored by: `fits` says whether the data has it, `number` gives a token's color number. */
const COLORINGS = {
  class: {
    fits: (data) => data.info.groups.length > 1,
    legend: (data) => data.info.groups,
    number: (data, frame, token) => data.group[token],
  },
  radius: {
    fits: () => true,
    range: (data) => [
      0,
      Math.max(
        ...Array.from(
          { length: data.frames },
          (_, frame) => data.ranges[2 * (frame * 5 + RADIUS)] + data.ranges[2 * (frame * 5 + RADIUS) + 1],
        ),
      ),
    ],
    number: (data, frame, token, [, high]) => (COLORS - 1) * (data.channel(frame, RADIUS, token) / (high || 1)),
  },
  "displacement (ulp)": {
    fits: (data) => data.frames > 1,
    range: (data) => [
      0,
      Float32Array.from(data.displacement, bfloat16).reduce(
        (most, x) => (Number.isFinite(x) && x > most ? x : most),
        0,
      ),
    ],
    number: (data, frame, token, [, high]) =>
      (COLORS - 1) * (Math.log1p(data.moved(frame, token) || 0) / Math.log1p(high || 1)),
    isLog: true,
  },
  "phase of life": {
    fits: (data) => Boolean(data.life),
    legend: () => PHASES,
    number: (data, frame, token) => data.phase(frame, token),
  },
};

/** A coloring of some data: a palette, and the color number of each token. */
function painting(coloring, data, theme) {
  const names = coloring.legend?.(data);
  const range = coloring.range?.(data);
  const palette = !names ? theme.ramp : names === PHASES ? theme.phases : theme.groupColors;
  const out = new Uint8Array(data.tokens);
  const numbers = (frame) => {
    for (let token = 0; token < out.length; token++) {
      out[token] = Math.max(
        0,
        Math.min(palette.length - 1, Math.round(coloring.number(data, frame, token, range) || 0)),
      );
    }
    if (names) outvote(out, data, frame, names.length);
    return out;
  };
  return { names, range, palette, numbers, isLog: coloring.isLog };
}

/** Give the token that stands for a black hole the number that most of its tokens have. */
function outvote(numbers, data, frame, choices) {
  const votes = new Int32Array(numbers.length * choices);
  for (let token = 0; token < numbers.length; token++) votes[data.cellOf(frame, token) * choices + numbers[token]]++;
  for (let token = 0; token < numbers.length; token++) {
    if (data.cellOf(frame, token) !== token) continue;
    const own = votes.subarray(token * choices, (token + 1) * choices);
    for (let i = 0; i < choices; i++) if (own[i] > own[numbers[token]]) numbers[token] = i;
  }
}

/** What there is to say about a token in a frame, line by line. */
function describe(data, frame, token) {
  const { info } = data;
  const row = `row ${data.rows[token]}`;
  const group = info.groups.length > 1 ? info.groups[data.group[token]] : "";
  const who = [info.names[token] === row ? "" : row, group].filter(Boolean).join(", ");
  const lines = who ? [who] : [];
  lines.push(
    `norm ${short(data.channel(frame, NORM, token))}, ${short(data.channel(frame, RADIUS, token))} from the centroid`,
  );
  const moved = data.moved(frame, token);
  if (!Number.isNaN(moved))
    lines.push(moved ? `moved ${short(moved)} ulp in this record` : "did not move in this record");
  const last = data.lastMove(token);
  if (last !== null) {
    const end =
      last >= info.last_step
        ? "still moved in the last step"
        : last
          ? `frozen after step ${count(last)}`
          : "never moved";
    lines.push(`${PHASES[data.phase(frame, token)]}; ${end}`);
  }
  const others = data.multiplicities(frame)[data.cellOf(frame, token)] - 1;
  if (others) lines.push(`one vector with ${count(others)} other${others > 1 ? "s" : ""}`);
  const near = data.neighboursOf(frame, token);
  if (near?.length)
    lines.push(`nearest: ${near.map(([other, apart]) => `${info.names[other]} (${short(apart)})`).join(", ")}`);
  return lines;
}

/** Colors from the style sheet. */
function readTheme(root, data) {
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const stops = isDark ? INFERNO.slice(0, 5).reverse() : INFERNO.slice(1);
  const ramp = Array.from({ length: COLORS }, (_, i) => {
    const at = (i / (COLORS - 1)) * (stops.length - 1);
    const [a, b] = [stops[Math.floor(at)], stops[Math.min(Math.floor(at) + 1, stops.length - 1)]];
    return a.map((x, k) => Math.round(x + (at % 1) * (b[k] - x)));
  });
  const groupColor = (name) => color(name) || color("all");
  const groups = data.info.groups.map(groupColor);
  return {
    ...Object.fromEntries(
      ["background", "text", "faint", "line", "accent", "plus", "minus"].map((name) => [name, color(name)]),
    ),
    groups,
    groupColor,
    ramp,
    groupColors: groups.map(rgb),
    phases: PHASES.map((name) => rgb(color(name))),
  };
}

function rgb(hex) {
  return hex.match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16));
}
