// A Series or a pair: chart, strips and slices follow one slider, which keys, pointer and wheel move.
import { chart } from "./chart.js";

const WIDTH_MM = 448, WIDEST = 230, PAGE = 10;

const data = JSON.parse(document.getElementById("chart-data").textContent);
const slider = document.getElementById("slice");
const [first, second] = data.curves;
const minus = (text) => text.replace("-", "−");

function nearest(z, values) {
  let best = 0;
  values.forEach((value, k) => {
    if (Math.abs(value - z) < Math.abs(values[best] - z)) best = k;
  });
  return best;
}

/** One slice after the other into an image: of those asked for while one is on its way, the last. */
function stack(image, curve) {
  let busy = false, wanted = null;
  const next = () => {
    busy = false;
    if (wanted !== null) show(wanted);
  };
  const show = (k) => {
    if (!curve.slices) return;
    if (busy) {
      wanted = k;
      return;
    }
    wanted = null;
    const address = `${curve.slices}${k}.png?r=${curve.revision}`;
    busy = true;
    image.onload = () => {
      image.dataset.slice = k;
      next();
    };
    image.onerror = next;
    image.src = address;
  };
  return show;
}

const images = data.curves.map((curve, k) => document.getElementById(`preview-${k}`));
const shows = data.curves.map((curve, k) => stack(images[k], curve));
const said = data.curves.map((curve, k) => document.getElementById(`said-${k}`));

const describe = (curve, k) =>
  `slice ${k + 1} of ${curve.z.length}, z ${minus(curve.z[k].toFixed(1))} mm, ` +
  `body height ${minus(curve.height[k].toFixed(0))} mm`;

const strips = [...document.querySelectorAll(".strip")];
const lines = strips.map((strip) => {
  const image = strip.querySelector("img"), line = document.createElement("div");
  line.className = "at";
  strip.append(line);
  strip.addEventListener("pointermove", (e) => {
    const box = image.getBoundingClientRect();
    const share = (e.clientY - box.top) / box.height;
    set(nearest(data.high - share * (data.high - data.low), first.z));
  });
  return line;
});
let tall = 0;

// Strips take the place and the height of the plot, so that they share its axis.
function place(top, height) {
  tall = height;
  const wide = (height * WIDTH_MM) / (data.high - data.low);
  for (const strip of strips) {
    const image = strip.querySelector("img");
    strip.style.marginTop = `${top}px`;
    image.style.height = `${height}px`;
    if (matchMedia("(min-width: 60rem)").matches) image.style.width = `${Math.min(wide, WIDEST)}px`;
  }
}

const begin = (top, height) => {
  place(top, height);
  set(Number(slider.value));
  document.body.dataset.ready = "yes";
};
const plot = chart(
  document.getElementById("chart"), data, (z) => set(nearest(z, first.z)),
  (top, height) => queueMicrotask(() => begin(top, height)),
);

function set(k) {
  k = Math.min(Math.max(k, 0), first.z.length - 1);
  slider.value = k;
  slider.setAttribute("aria-valuetext", describe(first, k));
  const z = first.z[k];
  plot.mark(z);
  for (const line of lines) line.style.top = `${plot.share(z) * tall - 1}px`;
  shows[0](k);
  said[0].textContent = describe(first, k);
  if (!second) return;
  const other = data.map[k];
  images[1].parentElement.classList.toggle("none", other < 0);
  if (other >= 0) shows[1](other);
  said[1].textContent = other >= 0 ? describe(second, other) : "does not reach here";
  images[1].dataset.matched = other;
}

slider.addEventListener("input", () => set(Number(slider.value)));
slider.addEventListener("keydown", (e) => {
  const step = { PageUp: PAGE, PageDown: -PAGE }[e.key];
  if (step === undefined) return;
  e.preventDefault();
  set(Number(slider.value) + step);
});
for (const image of images) {
  image.addEventListener("wheel", (e) => {
    e.preventDefault();
    set(Number(slider.value) - Math.sign(e.deltaY));
  }, { passive: false });
}
for (const button of document.querySelectorAll("[data-slice]")) {
  button.addEventListener("click", () => {
    set(Number(button.dataset.slice));
    slider.focus();
  });
}
