// Curves drawn upright: z grows upwards beside the strips, body height to the right.

const TOP = 8, AXIS = 34, LABEL = 20, TALLEST = 620, SHORTEST = 300, MM = 1.0;

// light-dark() is not resolved in a custom property; an element that wears it tells.
const resolved = (() => {
  const probe = document.createElement("i");
  probe.hidden = true;
  document.body.append(probe);
  return (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
})();

const colours = () => Object.fromEntries(
  ["text", "soft", "line", "first", "second", "mark", "band0", "band1", "shade"]
    .map((name) => [name, resolved(`--${name}`)]));

function drawBands(u, data, paint) {
  const { ctx } = u, { left, width } = u.bbox;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, u.bbox.top, width, u.bbox.height);
  ctx.clip();
  data.bands.forEach((band, k) => {
    const top = u.valToPos(band.high, "x", true), bottom = u.valToPos(band.low, "x", true);
    ctx.fillStyle = paint[`band${k % 2}`];
    ctx.fillRect(left, top, width, bottom - top);
  });
  ctx.restore();
}

function drawNames(u, data, paint) {
  const { ctx } = u, { left, top, width, height } = u.bbox;
  ctx.save();
  ctx.font = `${12 * devicePixelRatio}px system-ui, "DejaVu Sans", sans-serif`;
  ctx.fillStyle = paint.soft;
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  for (const band of data.bands) {
    const ends = [band.high, band.low].map((z) => u.valToPos(z, "x", true));
    const y = (Math.max(ends[0], top) + Math.min(ends[1], top + height)) / 2;
    if (ends[1] - ends[0] > 14 * devicePixelRatio)
      ctx.fillText(band.name, left + width - 6 * devicePixelRatio, y);
  }
  ctx.restore();
}

// Where the curve of the prior may lie: moved by up to 1.645 sigma either way.
function drawWithin(u, data, paint) {
  const moved = data.curves[1];
  if (!moved || !data.within) return;
  const { ctx } = u, n = moved.z.length;
  const at = (k, side) => [
    u.valToPos(moved.height[k], "y", true),
    u.valToPos(moved.z[k] + moved.shift + side * data.within, "x", true),
  ];
  ctx.save();
  ctx.beginPath();
  for (let k = 0; k < n; k++) ctx.lineTo(...at(k, 1));
  for (let k = n - 1; k >= 0; k--) ctx.lineTo(...at(k, -1));
  ctx.closePath();
  ctx.fillStyle = paint.shade;
  ctx.fill();
  ctx.restore();
}

function drawMark(u, z, paint) {
  if (z === null) return;
  const { ctx } = u, y = u.valToPos(z, "x", true);
  ctx.save();
  ctx.strokeStyle = paint.mark;
  ctx.lineWidth = 1.5 * devicePixelRatio;
  ctx.setLineDash([]);
  ctx.beginPath();
  ctx.moveTo(u.bbox.left, y);
  ctx.lineTo(u.bbox.left + u.bbox.width, y);
  ctx.stroke();
  ctx.restore();
}

/**
 * Draw curves into an element. `pointed` is told z where the pointer is; `placed`, where the plot
 * lies in the element and how high it is, in CSS pixels.
 */
export function chart(element, data, pointed, placed) {
  let paint = colours(), mark = null, plot = null;
  const tables = data.curves.map((c) => [c.z.map((z) => z + (c.shift ?? 0)), c.height]);
  const values = tables.length > 1 ? uPlot.join(tables) : tables[0];
  const inner = Math.min(Math.max((data.high - data.low) * MM, SHORTEST), TALLEST);
  const axis = { stroke: () => paint.text, grid: { stroke: () => paint.line, width: 1 },
    ticks: { stroke: () => paint.line, width: 1 },
    font: '12px system-ui, "DejaVu Sans", sans-serif', labelFont: '12px system-ui, "DejaVu Sans", sans-serif' };
  const minus = (u, ticks) => ticks.map((t) => String(t).replace("-", "−"));
  const options = {
    width: Math.max(element.clientWidth, 180),
    height: inner + TOP + AXIS + LABEL,
    padding: [TOP, 12, 0, 0],
    scales: {
      x: { time: false, ori: 1, dir: 1, range: [data.low, data.high] },
      y: { ori: 0, dir: 1, range: (u, low, high) => [low - 15, high + 15] },
    },
    axes: [
      { ...axis, scale: "x", side: 3, size: 50, label: "z, mm", labelSize: LABEL, values: minus },
      { ...axis, scale: "y", side: 2, size: AXIS, space: 64, label: "body height, mm", labelSize: LABEL, values: minus },
    ],
    series: [
      { label: "z, mm" },
      ...data.curves.map((c, k) => ({
        label: c.name, scale: "y", width: 2, spanGaps: true, points: { show: false },
        stroke: () => paint[k ? "second" : "first"], dash: k ? [6, 4] : undefined,
      })),
    ],
    legend: { show: false },
    cursor: { x: false, y: false, points: { show: false }, drag: { x: false, y: false, setScale: false } },
    hooks: {
      ready: [(u) => placed(u.over.offsetTop, u.over.offsetHeight)],
      drawClear: [(u) => drawBands(u, data, paint)],
      draw: [
        (u) => drawNames(u, data, paint),
        (u) => drawWithin(u, data, paint),
        (u) => drawMark(u, mark, paint),
      ],
    },
  };
  plot = new uPlot(options, values, element);
  plot.over.addEventListener("pointermove", (e) => {
    const box = plot.over.getBoundingClientRect();
    pointed(plot.posToVal(e.clientY - box.top, "x"));
  });
  new ResizeObserver(() => {
    const width = Math.max(element.clientWidth, 180);
    if (width !== plot.width) plot.setSize({ width, height: plot.height });
  }).observe(element);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    paint = colours();
    plot.redraw(false, true);
  });
  return {
    mark(z) {
      mark = z;
      plot.redraw(false, false);
    },
    share: (z) => (data.high - z) / (data.high - data.low),
  };
}
