// The arithmetic of the soak's verdict, and its plot.

/** The q-quantile (nearest rank) of unsorted numbers; NaN of none. */
export function quantile(values, q) {
  const v = Float64Array.from(values).sort();
  return v.length ? v[Math.min(v.length - 1, Math.ceil(q * v.length) - 1)] : NaN;
}

export const mean = (v) => v.reduce((a, b) => a + b, 0) / v.length;

const BLOCKS = 20; // neighbouring samples are not independent: the line is laid through means of blocks
const T_975 = 2.101; // Student's t, two-sided 95 %, BLOCKS - 2 degrees of freedom

/** Least squares through block means: {slope, low, high}, the 95 % interval, in units of y per unit of x. */
export function slope(points) {
  if (points.length < 3 * BLOCKS) return { slope: NaN, low: -Infinity, high: Infinity };
  const blocks = Array.from({ length: BLOCKS }, (_, i) => {
    const part = points.slice(Math.floor((i * points.length) / BLOCKS), Math.floor(((i + 1) * points.length) / BLOCKS));
    return [mean(part.map((p) => p[0])), mean(part.map((p) => p[1]))];
  });
  const [mx, my] = [mean(blocks.map((b) => b[0])), mean(blocks.map((b) => b[1]))];
  const sxx = blocks.reduce((a, [x]) => a + (x - mx) ** 2, 0);
  const b = blocks.reduce((a, [x, y]) => a + (x - mx) * (y - my), 0) / sxx;
  const rest = blocks.reduce((a, [x, y]) => a + (y - my - b * (x - mx)) ** 2, 0);
  const half = T_975 * Math.sqrt(rest / (BLOCKS - 2) / sxx);
  return { slope: b, low: b - half, high: b + half };
}

const [W, H, LEFT, TOP] = [900, 180, 70, 30];
const COLOURS = ['#1f77b4', '#d62728', '#2ca02c'];

/** panels: [{title, unit, lines: [{name, points: [[x seconds, y]]}]}], one below the other. */
export function svg(panels) {
  const width = LEFT + W + 20, height = panels.length * (H + TOP + 30);
  const out = [`<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="sans-serif" font-size="12">`,
    `<rect width="${width}" height="${height}" fill="white"/>`];
  panels.forEach(({ title, unit, lines }, k) => {
    const all = lines.flatMap((l) => l.points).filter((p) => Number.isFinite(p[1]));
    if (!all.length) return;
    const xs = Math.max(1, all.reduce((a, p) => Math.max(a, p[0]), 0));
    const top = 1.1 * all.reduce((a, p) => Math.max(a, p[1]), 0) || 1;
    const y0 = k * (H + TOP + 30) + TOP;
    const at = ([x, y]) => `${(LEFT + (x / xs) * W).toFixed(1)},${(y0 + H - (y / top) * H).toFixed(1)}`;
    out.push(`<text x="${LEFT}" y="${y0 - 10}" font-weight="bold">${title} (${unit})</text>`,
      `<rect x="${LEFT}" y="${y0}" width="${W}" height="${H}" fill="none" stroke="#999"/>`);
    for (const f of [0, 0.5, 1]) {
      out.push(`<text x="${LEFT - 6}" y="${y0 + H - f * H + 4}" text-anchor="end">${(f * top).toPrecision(3)}</text>`,
        `<text x="${LEFT + f * W}" y="${y0 + H + 15}" text-anchor="middle">${((f * xs) / 60).toFixed(1)} min</text>`);
    }
    lines.forEach((l, i) => {
      out.push(`<text x="${LEFT + W - 10}" y="${y0 + 16 + 15 * i}" text-anchor="end" fill="${COLOURS[i]}">${l.name}</text>`,
        `<polyline fill="none" stroke="${COLOURS[i]}" points="${l.points.filter((p) => Number.isFinite(p[1])).map(at).join(' ')}"/>`);
    });
  });
  return out.join('\n') + '\n</svg>\n';
}
