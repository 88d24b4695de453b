"use strict";
// Draws each spec into the place that names it, as wide as there is room; expressions are interpreted, never compiled,
// so that the page's security policy can forbid eval. What a tooltip says is set as text.
const root = document.documentElement;
const tip = document.getElementById("tip");
const config = JSON.parse(document.getElementById("config").textContent);
const plots = [...document.querySelectorAll("script[data-plot]")].map((script) => ({
  place: document.getElementById(script.dataset.plot),
  spec: script.textContent,
  view: null,
}));

function tooltip(_, event, item, value) {
  const text = value === null || value === undefined ? "" : String(value);
  tip.hidden = text === "" || text === "null" || text === "undefined";
  if (tip.hidden) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  const x = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
  const below = event.clientY + 18;
  tip.style.left = Math.max(8, x) + "px";
  tip.style.top = (below + box.height > window.innerHeight ? event.clientY - box.height - 12 : below) + "px";
}

function named(row, room) {
  if (row.room === undefined || room >= 7 * row.name.length) return [row];
  if (row.short && room >= 7 * row.short.length) return [{ ...row, name: row.short }];
  const letters = Math.floor(room / 7) - 1; // of a model's name some say which; a load's number is whole or not there
  return letters < 5 || row.y !== "model" ? [] : [{ ...row, name: row.name.slice(0, letters) + "…" }];
}

// As many columns of a legend as its longest name lets stand beside each other.
function columns(spec, width) {
  const names = JSON.stringify(spec).matchAll(/"domain":(\["[^\]]*"\])/g);
  const longest = Math.max(1, ...[...names].flatMap((found) => JSON.parse(found[1]).map((name) => name.length)));
  return Math.max(1, Math.min(6, Math.floor((width - 70) / (7.5 * longest + 44))));
}

function fitted(text, width) {
  const spec = JSON.parse(text);
  const narrow = width < 560;
  if (spec.vconcat) {
    // Views below one another share their left edge, so the room for labels is set and not measured.
    const left = spec.usermeta?.left ?? 56;
    for (const view of spec.vconcat) {
      view.width = Math.max(120, width - left - 16);
      if (view.title) view.title.limit = view.title.frame === "group" ? view.width : width - 16;
      // A name in a strip, whose `room` is its share of the width, is shortened or left out: 7 pixels a letter.
      for (const layer of view.layer) {
        layer.data.values = layer.data.values.flatMap((row) => named(row, row.room * view.width));
      }
    }
  } else {
    spec.width = width;
    if (narrow && spec.title?.subtitle) spec.title.subtitle = spec.title.subtitle.split(" · ");
    spec.autosize = { type: "fit-x", contains: "padding" };
  }
  const legend = { ...config.legend, columns: columns(spec, width), labelLimit: Math.min(440, width - 100) };
  if (narrow) legend.layout = { top: { anchor: "start", direction: "vertical", bounds: "flush", margin: 4 } };
  const axis = { ...config.axis, titleLimit: width - 40 };
  return { ...spec, config: { ...config, legend, axis } };
}

async function draw(plot) {
  const width = Math.floor(plot.place.clientWidth);
  if (!width || width === plot.width) return;
  plot.width = width;
  plot.view?.finalize();
  const options = { ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip };
  try {
    plot.view = await vegaEmbed(plot.place, fitted(plot.spec, width), options);
  } catch (error) {
    console.error(error); // its table is there, and so are the other pictures
    plot.place.textContent = "This picture could not be drawn: " + error.message;
  }
}

async function drawAll() {
  for (const plot of plots) await draw(plot);
  root.dataset.drawn = String(plots.length);
}

let waiting;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 150);
});
window.addEventListener("scroll", () => (tip.hidden = true), { passive: true });

const button = document.getElementById("theme");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function themed() {
  return root.dataset.theme ?? (dark.matches ? "dark" : "light");
}
function label() {
  button.textContent = themed() === "dark" ? "Light" : "Dark";
}
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = themed() === "dark" ? "light" : "dark";
  label();
});
dark.addEventListener("change", label);
label();
// A link to a row within a closed table opens it.
window.addEventListener("hashchange", opened);
function opened() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  if (target) target.scrollIntoView({ block: "center" });
}
opened();
drawAll();
