"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PALETTE = 8;

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const lineColor = (number) => color("--c" + (number % PALETTE));

  // ---- images: a slider shows one of those already in the page
  const previews = [...document.querySelectorAll("[data-previews]")].map((figure) => ({
    slider: figure.querySelector("input[type=range]"),
    output: figure.querySelector("output"),
    images: [...figure.querySelectorAll("img")],
  }));
  const stepOf = (image) => Number(image.dataset.step);

  const show = (preview, shown) => {
    preview.images.forEach((image, index) => { image.hidden = index !== shown; });
    preview.slider.value = String(shown);
    preview.output.textContent = stepOf(preview.images[shown]).toLocaleString("en");
    preview.slider.setAttribute("aria-valuetext", "step " + stepOf(preview.images[shown]));
  };

  const nearest = (preview, step) => {
    const distances = preview.images.map((image) => Math.abs(stepOf(image) - step));
    return distances.indexOf(Math.min(...distances));
  };

  for (const preview of previews) {
    preview.slider.addEventListener("input", () => {
      const shown = Number(preview.slider.value);
      show(preview, shown);
      if (!document.getElementById("linked")?.checked) { return; }
      for (const other of previews) {
        if (other !== preview) { show(other, nearest(other, stepOf(preview.images[shown]))); }
      }
    });
  }

  const paintSwatches = () => {
    const swatches = document.querySelectorAll(".swatch");
    for (const swatch of swatches) {
      swatch.style.display = swatches.length > 1 ? "" : "none";
      swatch.style.background = lineColor(Number(swatch.dataset.color));
    }
  };
  paintSwatches();

  if (typeof Plotly === "undefined") { return; }

  // ---- charts
  document.documentElement.dataset.charts = "yes"; // gives the plots their room, which Plotly measures
  const byKey = new Map(data.charts.map((chart) => [chart.key, chart]));

  const lineTrace = (trace, paired) => ({
    type: "scatter",
    mode: trace.x.length < 2 ? "markers" : (trace.x.length <= 40 && !trace.faint ? "lines+markers" : "lines"),
    name: trace.name,
    x: trace.x,
    y: trace.y,
    legendgroup: trace.name,
    showlegend: !trace.faint,
    opacity: trace.faint ? 0.35 : 1,
    hoverinfo: trace.faint && paired ? "skip" : "all",
    hovertemplate: trace.faint && paired ? undefined : "%{y:.4g}<extra>%{fullData.name}</extra>",
    marker: { size: 5 },
    line: { color: lineColor(trace.color), width: trace.faint ? 1 : 2, dash: trace.faint ? "solid" : trace.dash },
  });

  const barTrace = (trace) => ({
    type: "bar",
    orientation: "h",
    name: trace.name,
    y: trace.labels,
    x: trace.values,
    error_x: trace.above ? { type: "data", symmetric: false, array: trace.above, arrayminus: trace.below, color: color("--text"), thickness: 1.5 } : undefined,
    hovertemplate: "%{x:.4g}<extra>%{y}</extra>",
    marker: { color: trace.colors.map(lineColor) },
  });

  const axis = () => ({
    exponentformat: "e", gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"), automargin: true,
  });

  const layout = (chart) => {
    const bars = Boolean(chart.bars);
    const logarithmic = chart.wide || (chart.logarithmic && document.getElementById("logarithmic")?.checked);
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: color("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
      margin: { l: 8, r: 12, t: 8, b: 8 },
      hovermode: bars ? "closest" : "x unified",
      hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--text") } },
      showlegend: !bars && (data.runs > 1 ? 2 : 1) * chart.traces.filter((trace) => !trace.faint).length > 1,
      legend: { orientation: "h", x: 0, y: -0.22, yanchor: "top", font: { size: 12 } },
      xaxis: bars
        ? { ...axis(), title: { text: chart.unit, standoff: 6 }, rangemode: "tozero" }
        : { ...axis(), title: { text: "step", standoff: 4 }, range: stepRange(), hoverformat: ",.0f" },
      yaxis: bars ? { ...axis(), autorange: "reversed", dtick: 1 } : { ...axis(), type: logarithmic ? "log" : "linear", nticks: 6, range: valueRange(chart, logarithmic) },
      dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
      shapes: chart.reference == null ? [] : [{
        type: "line", xref: "paper", x0: 0, x1: 1, y0: chart.reference, y1: chart.reference,
        line: { color: color("--quiet"), width: 1, dash: "dot" },
      }],
    };
  };

  const lastStep = Math.max(1, ...data.charts.filter((chart) => !chart.bars).flatMap((chart) => chart.traces.map((trace) => trace.x[trace.x.length - 1])));
  const fromStep = document.getElementById("from-step");
  const toStep = document.getElementById("to-step");
  const stepRange = () => {
    if (!fromStep || (fromStep.value === "" && toStep.value === "")) { return undefined; }
    const low = fromStep.value === "" ? 0 : Number(fromStep.value);
    const high = toStep.value === "" ? lastStep : Number(toStep.value);
    return low < high ? [low, high] : undefined;
  };

  // Plotly fits an axis to all values, whatever steps are shown: the first ones would flatten the rest.
  const valueRange = (chart, logarithmic) => {
    const steps = stepRange();
    if (steps === undefined) { return undefined; }
    const shown = chart.traces.flatMap((trace) => trace.y.filter((value, at) => trace.x[at] >= steps[0] && trace.x[at] <= steps[1]))
      .map((value) => (logarithmic ? Math.log10(value) : value)).filter((value) => Number.isFinite(value));
    if (shown.length === 0) { return undefined; }
    const [low, high] = shown.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [Infinity, -Infinity]);
    const margin = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
    return [low - margin, high + margin];
  };

  const SETTINGS = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  const draw = (place) => {
    const chart = byKey.get(place.dataset.chart);
    if (chart.bars) { place.style.height = Math.max(150, 70 + 24 * chart.traces[0].labels.length) + "px"; }
    const paired = chart.traces.some((trace) => !trace.faint);
    const traces = chart.traces.map((trace) => (chart.bars ? barTrace(trace) : lineTrace(trace, paired)));
    return Plotly.react(place, traces, layout(chart), SETTINGS);
  };
  let drawn = 0;
  const drawAll = () => Promise.all([...document.querySelectorAll(".plot")].map(draw)).then(() => {
    drawn += 1;
    document.documentElement.dataset.drawn = String(drawn); // for whoever waits from outside
  });

  const form = document.getElementById("controls");
  if (form) {
    fromStep.placeholder = "0";
    toStep.placeholder = String(lastStep);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", drawAll);
    form.addEventListener("reset", () => setTimeout(drawAll));
  }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paintSwatches(); drawAll(); });
  drawAll().then(() => { document.documentElement.dataset.ready = String(Math.round(performance.now())); });
})();
