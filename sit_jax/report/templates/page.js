"use strict";
(() => {
  document.documentElement.classList.add("js");
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  // Pixels that fit on A4 and on letter paper between margins.
  const PAPER_WIDTH = 640;
  let printing = false;
  const dashes = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

  // Colours are the style sheet's, so that charts follow the light and the dark page, and paper.
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function themed(figure) {
    const line = colour("line");
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
    const data = figure.data.map((trace, index) => {
      const { series = index, muted = false } = trace.meta ?? {};
      const own = colour(muted ? "muted" : `series-${(series % 6) + 1}`);
      const dash = dashes[series % dashes.length];
      return trace.type === "bar"
        ? { ...trace, marker: { color: own } }
        : {
            ...trace,
            line: { dash, width: 2, ...trace.line, color: own },
            marker: { size: 6, ...trace.marker, color: own },
            error_y: { ...trace.error_y, color: own },
          };
    });
    const layout = {
      ...figure.layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("text"), family: "system-ui, sans-serif", size: 13 },
      hoverlabel: { bgcolor: colour("raised"), bordercolor: line, font: { color: colour("text") } },
      xaxis: { ...axis, ...figure.layout.xaxis },
      yaxis: { ...axis, ...figure.layout.yaxis },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("link") },
      // On a touch screen a finger on a chart scrolls the page; the buttons zoom.
      dragmode: coarse.matches ? false : "zoom",
      ...(printing ? { width: PAPER_WIDTH } : {}),
    };
    return { data, layout };
  }

  const options = {
    responsive: true,
    displaylogo: false,
    scrollZoom: false,
    displayModeBar: coarse.matches ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  const plots = [...document.querySelectorAll("[data-figure]")];

  function draw(plot) {
    const { data, layout } = themed(figures[plot.dataset.figure]);
    Plotly.react(plot, data, layout, options);
  }

  function zoom(plot, factor, shift) {
    const [from, to] = plot.layout.xaxis.range;
    const middle = (from + to) / 2 + shift * (to - from);
    const half = (factor * (to - from)) / 2;
    Plotly.relayout(plot, { "xaxis.range": [middle - half, middle + half] });
  }

  function addButtons(plot) {
    const holder = document.querySelector(`[data-for="${plot.id}"]`);
    const whole = { "xaxis.autorange": true, "yaxis.autorange": true };
    const actions = [
      ["Zoom in", () => zoom(plot, 0.5, 0)],
      ["Zoom out", () => zoom(plot, 2, 0)],
      ["Earlier", () => zoom(plot, 1, -0.25)],
      ["Later", () => zoom(plot, 1, 0.25)],
      ["Whole", () => Plotly.relayout(plot, whole)],
    ];
    for (const [text, action] of actions) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.setAttribute("aria-label", `${text}: ${holder.dataset.title}`);
      button.addEventListener("click", action);
      holder.append(button);
    }
  }

  const redraw = () => plots.filter((plot) => plot.data).forEach(draw);

  if (window.Plotly) {
    for (const plot of plots) {
      const hidden = plot.closest("details:not([open])");
      if (figures[plot.dataset.figure].layout.xaxis.title.text === "step") addButtons(plot);
      if (hidden) hidden.addEventListener("toggle", () => draw(plot), { once: true });
      else draw(plot);
    }
    dark.addEventListener("change", redraw);
    matchMedia("print").addEventListener("change", redraw);
  }

  // One slider for all images of a run.
  for (const slider of document.querySelectorAll(".slider input")) {
    const titles = JSON.parse(slider.dataset.titles);
    const stages = document.getElementById(slider.getAttribute("aria-controls")).querySelectorAll(".stage");
    const title = slider.parentElement.querySelector(".stage-title");
    const show = () => {
      slider.setAttribute("aria-valuetext", titles[slider.value]);
      title.textContent = titles[slider.value];
      for (const stage of stages) stage.classList.toggle("current", stage.dataset.stage === slider.value);
    };
    slider.addEventListener("input", show);
    slider.parentElement.hidden = false;
    show();
  }

  // Paper has no lids to open.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.printed:not([open])")];
    for (const lid of opened) lid.open = true;
    printing = true;
    redraw();
  });
  addEventListener("afterprint", () => {
    for (const lid of opened) lid.open = false;
    printing = false;
    redraw();
  });
})();
