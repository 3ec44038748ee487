const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

async function draw() {
  const ink = dark.matches ? "#ececf1" : "#1b1b1f";
  const line = dark.matches ? "#3a3d45" : "#d4d7dd";
  const config = {
    background: "transparent",
    font: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    title: {color: ink, anchor: "start", fontSize: 13},
    axis: {labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line},
    legend: {labelColor: ink, titleColor: ink, labelLimit: 300},
    rule: {color: ink},
    view: {stroke: null},
  };
  for (const [name, spec] of Object.entries(charts)) {
    await vegaEmbed(`#${name}`, spec, {actions: false, renderer: "svg", config});
  }
  document.body.dataset.drawn = "yes";
}

dark.addEventListener("change", draw);
// Charts take the width of their place, which is known once the page is laid out.
addEventListener("load", draw);
