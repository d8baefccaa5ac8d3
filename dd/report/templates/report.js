"use strict";

// A finger that drags over a chart scrolls the page.
const touched = matchMedia("(pointer: coarse)").matches;

function draw(chart) {
  const plot = chart.querySelector(".plot");
  const figure = JSON.parse(chart.querySelector("script").textContent);
  if (touched) figure.layout.dragmode = false;
  Plotly.newPlot(plot, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: touched ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  });
  chart.addEventListener("change", () => {
    const shown = (name) =>
      new Set([...chart.querySelectorAll(`[data-${name}]:checked`)].map((box) => box.dataset[name]));
    const groups = shown("group");
    const kinds = shown("kind");
    const visible = figure.data.map(({ meta: [group, kind] }) => groups.has(`${group}`) && kinds.has(kind));
    Plotly.restyle(plot, { visible });
  });
}

document.querySelectorAll("[data-chart]").forEach(draw);
