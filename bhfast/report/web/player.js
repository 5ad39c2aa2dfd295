"use strict";

const DURATION = 24; // seconds of a whole run at speed 1
const SPEEDS = [0.25, 0.5, 1, 2, 4];

/** The player of a trace. `load` gives it data, and may be called again when there is more. */
class Player {
  constructor(root) {
    this.root = root;
    this.data = null;
    this.moment = 0; // a frame number; between two while it plays
    this.selected = -1;
    this.hovered = -1;
    this.isPlaying = false;
    this.version = 0; // changes with whatever the diagrams depend on
    this.build();
    this.cloud = new Cloud(this.canvas);
    this.plots = [new LossPlot(), new RadiusPlot(), new DistinctPlot(), new LatticePlot()];
    this.plots.forEach((plot) => this.diagrams.append(plot.figure));
    this.listen();
  }

  /**
   * Show data, as PlayerData.pack() makes it: bytes. It begins at the last record. With newer data the view, the
   * selection and the settings stay, and so does the step, unless it was the last one.
   */
  async load(packed) {
    const data = await PlayerData.decode(packed);
    const before = this.data;
    const isAtEnd = !before || this.moment >= before.frames - 1;
    const row = before && this.selected >= 0 ? before.rows[this.selected] : -1;
    this.data = data;
    this.cloud.load(data);
    this.selected = data.rows.indexOf(row);
    this.hovered = -1;
    this.moment = isAtEnd ? data.frames - 1 : data.frameAt(before.steps[Math.floor(this.moment)]);
    for (const option of this.coloring.options) option.disabled = !COLORINGS[option.value].fits(data);
    if (this.coloring.selectedOptions[0].disabled) this.coloring.value = "radius";
    for (const plot of this.plots) plot.figure.hidden = !plot.fits(data);
    this.notes.replaceChildren(...data.info.notes.map((note) => element("p", {}, note)));
    this.axes.textContent = data.info.axes
      .filter(Boolean)
      .map((name) => name.replace(/^axis (\d)/, "$1"))
      .join(" · ");
    this.root.hidden = false;
    this.changed();
  }

  // -------------------------------------------------------------------------------------------------------------------
  // The document

  build() {
    const button = (text, label) => element("button", { type: "button", "aria-label": label, title: label }, text);
    const options = (names, chosen) =>
      names.map((name) =>
        element("option", { value: name, ...(name === chosen ? { selected: "" } : {}) }, String(name)),
      );
    const labeled = (text, control) => element("label", {}, element("span", {}, text), control);
    this.canvas = element("canvas", {
      tabindex: "0",
      role: "application",
      "aria-label":
        "The cloud of vectors. Arrow keys change the step, with Shift they turn the cloud; plus and minus zoom; space plays.",
    });
    this.tip = element("div", { class: "tip", hidden: "" });
    this.readout = element("output", { class: "readout", "aria-live": "off" });
    this.legend = element("div", { class: "legend" });
    this.axes = element("div", { class: "axes" });
    this.stage = element("div", { class: "stage" }, this.canvas, this.readout, this.legend, this.axes, this.tip);
    this.slider = element("input", { type: "range", min: "0", max: "1", step: "any", "aria-label": "step" });
    this.playButton = button("▶", "play");
    this.backButton = button("‹", "one shown record back");
    this.forwardButton = button("›", "one shown record forward");
    const bar = element("div", { class: "bar" }, this.playButton, this.backButton, this.slider, this.forwardButton);
    this.speed = element(
      "select",
      {},
      ...SPEEDS.map((speed) =>
        element("option", { value: speed, ...(speed === 1 ? { selected: "" } : {}) }, `${speed}×`),
      ),
    );
    this.scale = element("select", {}, ...options(["log of step", "step"], "log of step"));
    this.coloring = element("select", {}, ...options(Object.keys(COLORINGS), "class"));
    this.trails = element("input", { type: "checkbox" });
    this.fits = element("input", { type: "checkbox" });
    this.search = element("input", {
      type: "search",
      placeholder: "token or row",
      "aria-label": "search for a token",
      spellcheck: "false",
      autocapitalize: "off",
      autocomplete: "off",
    });
    this.found = element("span", { class: "found", role: "status" });
    this.homeButton = button("reset view", "reset view");
    const controls = element(
      "div",
      { class: "controls" },
      labeled("speed", this.speed),
      labeled("time", this.scale),
      labeled("color", this.coloring),
      labeled("trails", this.trails),
      labeled("scale to fit", this.fits),
      this.homeButton,
      element("div", { class: "search" }, this.search, this.found),
    );
    this.details = element("div", { class: "details" });
    this.diagrams = element("div", { class: "diagrams" });
    this.notes = element("div", { class: "notes" });
    this.root.classList.add("player");
    this.root.append(this.stage, bar, controls, this.details, this.diagrams, this.notes);
  }

  listen() {
    const redraw = () => this.changed();
    for (const control of [this.scale, this.coloring, this.trails, this.fits])
      control.addEventListener("change", redraw);
    this.slider.addEventListener("input", () => this.seekStep(this.time.step(Number(this.slider.value))));
    this.playButton.addEventListener("click", () => this.play(!this.isPlaying));
    this.backButton.addEventListener("click", () => this.advance(-1));
    this.forwardButton.addEventListener("click", () => this.advance(1));
    this.homeButton.addEventListener("click", () => (this.cloud.home(), this.redraw()));
    this.search.addEventListener("input", () => this.searchFor(0));
    this.search.addEventListener("keydown", (event) => this.searchKey(event));
    this.root.addEventListener("keydown", (event) => this.key(event));
    for (const plot of this.plots) this.scrubs(plot);
    this.pointers();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    new ResizeObserver(() => this.redraw()).observe(this.root);
  }

  scrubs(plot) {
    const seek = (event) => {
      if (event.buttons) this.seekStep(plot.stepAt(event.offsetX, this.time));
    };
    plot.canvas.addEventListener("pointerdown", (event) => {
      plot.canvas.setPointerCapture(event.pointerId);
      seek(event);
    });
    plot.canvas.addEventListener("pointermove", seek);
  }

  pointers() {
    const down = new Map(); // pointers that are down: where they were
    let travelled = 0;
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, [event.offsetX, event.offsetY]);
      travelled = 0;
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const [x, y] = [event.offsetX, event.offsetY];
      const before = down.get(event.pointerId);
      if (!before) return this.hover(x, y);
      const [dx, dy] = [x - before[0], y - before[1]];
      travelled += Math.hypot(dx, dy);
      const other = [...down].find(([id]) => id !== event.pointerId);
      if (other) {
        const apart = (at) => Math.hypot(at[0] - other[1][0], at[1] - other[1][1]);
        this.cloud.scaleBy(apart([x, y]) / Math.max(1, apart(before)));
      }
      if (other || event.shiftKey || event.buttons === 2) {
        this.cloud.panX += dx;
        this.cloud.panY += dy;
      } else this.cloud.turn(0.008 * dx, 0.008 * dy);
      down.set(event.pointerId, [x, y]);
      return this.redraw();
    });
    const up = (event) => {
      if (down.delete(event.pointerId) && travelled < 6 && event.type === "pointerup") {
        this.select(this.cloud.pick(event.offsetX, event.offsetY));
      }
    };
    this.canvas.addEventListener("pointerup", up);
    this.canvas.addEventListener("pointercancel", up);
    this.canvas.addEventListener("pointerleave", () => this.hover(-1e6, 0));
    this.canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    this.canvas.addEventListener(
      "wheel",
      (event) => {
        if (document.activeElement !== this.canvas && !event.ctrlKey) return; // the page scrolls
        event.preventDefault();
        this.cloud.scaleBy(Math.exp(-0.0015 * event.deltaY));
        this.redraw();
      },
      { passive: false },
    );
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.target.matches("select, input[type=search]")) return;
    const turn = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
    const isOnCanvas = event.target === this.canvas;
    if (turn && event.shiftKey) this.cloud.turn(...turn);
    else if (event.key === "ArrowLeft") this.advance(-1);
    else if (event.key === "ArrowRight") this.advance(1);
    else if (event.key === "Home") this.seek(0);
    else if (event.key === "End") this.seek(this.data.frames - 1);
    else if (event.key === " " && !event.target.matches("button, input[type=checkbox]")) this.play(!this.isPlaying);
    else if ((event.key === "+" || event.key === "=") && isOnCanvas) this.cloud.scaleBy(1.2);
    else if (event.key === "-" && isOnCanvas) this.cloud.scaleBy(1 / 1.2);
    else if (event.key === "Escape") this.select(-1);
    else return;
    event.preventDefault();
    this.redraw();
  }

  // -------------------------------------------------------------------------------------------------------------------
  // What is shown

  get frame() {
    return Math.floor(this.moment);
  }

  get time() {
    const { steps } = this.data;
    return new TimeScale(steps[0], steps[steps.length - 1], this.scale.value !== "step");
  }

  /** Show a frame. */
  seek(frame) {
    this.play(false);
    this.moment = Math.max(0, Math.min(this.data.frames - 1, frame));
    this.redraw();
  }

  /** Show the frame nearest to a step on the slider. */
  seekStep(step) {
    const { steps, frames } = this.data;
    const before = this.data.frameAt(step);
    const after = Math.min(before + 1, frames - 1);
    const [place, low, high] = [step, steps[before], steps[after]].map((x) => this.time.place(x));
    this.seek(high - place < place - low ? after : before);
  }

  advance(frames) {
    this.seek(this.frame + frames);
  }

  select(token) {
    this.selected = token;
    this.redraw();
  }

  hover(x, y) {
    const token = this.cloud.pick(x, y);
    if (token === this.hovered && token < 0) return;
    this.hovered = token;
    this.pointer = [x, y];
    this.redraw();
  }

  searchFor(skipped) {
    const text = this.search.value.trim();
    const tokens = this.data.find(text);
    if (tokens.length) this.select(tokens[skipped % tokens.length]);
    this.found.textContent = !text
      ? ""
      : tokens.length > 1
        ? `${(skipped % tokens.length) + 1} of ${count(tokens.length)}; Enter: next`
        : tokens.length
          ? ""
          : "not found";
    this.skipped = skipped;
  }

  searchKey(event) {
    if (event.key === "Enter") this.searchFor(this.skipped + 1);
    if (event.key === "Escape") this.select(-1);
  }

  play(isPlaying) {
    if (isPlaying === this.isPlaying) return;
    this.isPlaying = isPlaying;
    if (isPlaying && this.moment >= this.data.frames - 1) this.moment = 0;
    if (!isPlaying) this.moment = Math.round(this.moment);
    this.playButton.textContent = isPlaying ? "❚❚" : "▶";
    for (const name of ["aria-label", "title"]) this.playButton.setAttribute(name, isPlaying ? "pause" : "play");
    this.ticked = null;
    this.redraw();
  }

  /** Move on while playing: evenly along the slider. */
  tick(now) {
    const { steps, frames } = this.data;
    const passed = this.ticked === null ? 0 : Math.min(0.1, (now - this.ticked) / 1000);
    this.ticked = now;
    const time = this.time;
    const here = this.placeOf(this.moment, time);
    const place = here + (passed * Number(this.speed.value)) / DURATION;
    if (place >= 1) {
      this.moment = frames - 1;
      return this.play(false);
    }
    const step = time.step(place);
    const frame = Math.max(this.frame, Math.min(frames - 2, this.data.frameAt(step)));
    this.moment = Math.max(
      this.moment,
      frame + Math.min(0.999, (step - steps[frame]) / (steps[frame + 1] - steps[frame])),
    );
    return this.redraw();
  }

  /** The place of a moment on the slider. */
  placeOf(moment, time) {
    return time.place(this.stepOf(moment));
  }

  /** The step of a moment, between two frames in proportion. */
  stepOf(moment) {
    const { steps, frames } = this.data;
    const frame = Math.floor(moment);
    return steps[frame] + (moment - frame) * (steps[Math.min(frame + 1, frames - 1)] - steps[frame]);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Drawing

  /** Draw everything anew: data, settings or the theme have changed. */
  changed() {
    if (!this.data) return;
    this.version++;
    this.theme = readTheme(this.root, this.data);
    this.paint = painting(COLORINGS[this.coloring.value], this.data, this.theme);
    this.showLegend();
    this.redraw();
  }

  /** Draw at the next opportunity. */
  redraw() {
    if (!this.data || this.isAwaiting) return;
    this.isAwaiting = true;
    requestAnimationFrame((now) => {
      this.isAwaiting = false;
      if (this.isPlaying) this.tick(now);
      this.draw();
    });
  }

  draw() {
    const { data, frame, theme, moment, selected, hovered } = this;
    const view = {
      data,
      frame,
      theme,
      moment,
      selected,
      hovered,
      step: this.stepOf(moment),
      time: this.time,
      version: this.version,
      fits: this.fits.checked,
      trails: this.trails.checked,
      palette: this.paint.palette,
      colors: this.paint.numbers(frame),
    };
    this.cloud.draw(view);
    for (const plot of this.plots) if (!plot.figure.hidden) plot.draw(view);
    this.slider.value = this.placeOf(moment, view.time);
    this.slider.setAttribute("aria-valuetext", `step ${count(data.steps[frame])}`);
    this.showText();
  }

  showText() {
    const { data, frame } = this;
    this.readout.textContent = `step ${count(data.steps[frame])}`;
    const lines = this.selected < 0 ? [] : describe(data, frame, this.selected);
    const heading = this.selected < 0 ? "" : data.info.names[this.selected];
    this.details.replaceChildren(
      ...(heading
        ? [element("strong", {}, heading), ...lines.map((text) => element("span", {}, text))]
        : [element("span", {}, "Click on a token, or search for one.")]),
    );
    this.tip.hidden = this.hovered < 0 || this.isPlaying;
    if (this.tip.hidden) return;
    this.tip.replaceChildren(
      element("strong", {}, data.info.names[this.hovered]),
      ...describe(data, frame, this.hovered).map((text) => element("div", {}, text)),
    );
    const [x, y] = this.pointer;
    this.tip.style.left = `${Math.max(4, Math.min(x + 16, this.stage.clientWidth - this.tip.offsetWidth - 4))}px`;
    this.tip.style.top = `${Math.max(4, Math.min(y + 16, this.stage.clientHeight - this.tip.offsetHeight - 4))}px`;
  }

  showLegend() {
    const { palette, names, range } = this.paint;
    const css = (color) => `rgb(${color.join()})`;
    const swatch = (color) => {
      const dot = element("i");
      dot.style.background = css(color);
      return dot;
    };
    if (names)
      return this.legend.replaceChildren(...names.map((name, i) => element("span", {}, swatch(palette[i]), name)));
    const bar = element("i", { class: "ramp" });
    bar.style.background = `linear-gradient(to right, ${palette.map(css).join()})`;
    return this.legend.replaceChildren(
      element("span", {}, short(range[0])),
      bar,
      element("span", {}, short(range[1]) + (this.paint.isLog ? " ulp, log scale" : "")),
    );
  }
}
