"use strict";
// Point at a cell: what it is, and the tokens it received. Point at a token: the cells it chose.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const svg = get("heat"), here = get("here"), chosen = get("chosen"), readout = get("readout");
  const tokens = get("text") ? [...get("text").children] : [];
  const hint = readout.textContent;
  const number = new Intl.NumberFormat("en");
  const arrays = { 1: Uint8Array, 2: Uint16Array, 4: Int32Array };
  for (const layer of data.layers) {
    const bytes = Uint8Array.from(atob(layer.ids), (c) => c.charCodeAt(0));
    layer.ids = new arrays[layer.width](bytes.buffer);
  }
  let pinned = false;

  const column = (expert, layer) => expert < layer.experts ? expert : expert - layer.experts + data.apart;
  const box = (x, y) => `M${x} ${y}h1v1h-1z`;

  function cellAt(event) {
    const frame = svg.getBoundingClientRect();
    const x = Math.floor((event.clientX - frame.left) / frame.width * data.columns);
    const row = Math.floor((event.clientY - frame.top) / frame.height * data.layers.length);
    const layer = data.layers[row];
    if (!layer) return null;
    const expert = x < layer.experts ? x : x - data.apart + layer.experts;
    const exists = x < layer.experts || (x >= data.apart && expert < layer.counts.length);
    return exists ? { row, layer, expert } : null;
  }

  function show(cell) {
    here.setAttribute("d", cell ? box(column(cell.expert, cell.layer), cell.row) : "");
    chosen.setAttribute("d", "");
    if (!cell) readout.textContent = hint;
    else {
      const { layer, expert } = cell;
      const slots = layer.counts[expert];
      const total = layer.counts.reduce((a, b) => a + b, 0) || 1;
      const computing = layer.counts.slice(0, layer.experts).reduce((a, b) => a + b, 0) / layer.experts;
      const kind = expert < layer.experts ? "expert" : "no-compute expert";
      const relative = computing ? (slots / computing).toFixed(2) : "0";
      readout.textContent = `layer ${layer.label} · ${kind} ${expert} · ${number.format(slots)} slots · ` +
        `${(100 * slots / total).toFixed(2)} % of the layer · ${relative} × mean`;
    }
    const k = cell ? cell.layer.top_k : 0;
    tokens.forEach((span, t) => {
      const ids = cell ? cell.layer.ids.subarray(t * k, t * k + k) : [];
      span.classList.toggle("on", cell !== null && ids.includes(cell.expert));
    });
  }

  svg.addEventListener("pointermove", (event) => { if (!pinned) show(cellAt(event)); });
  svg.addEventListener("pointerleave", () => { if (!pinned) show(null); });
  svg.addEventListener("click", (event) => {
    const cell = cellAt(event);
    pinned = cell !== null && !(pinned && here.getAttribute("d") === box(column(cell.expert, cell.layer), cell.row));
    show(cell);
  });
  if (tokens.length) get("text").addEventListener("pointerover", (event) => {
    const t = tokens.indexOf(event.target);
    if (t < 0) return chosen.setAttribute("d", "");
    const cells = data.layers.flatMap((layer, row) =>
      [...layer.ids.subarray(t * layer.top_k, (t + 1) * layer.top_k)].map((e) => box(column(e, layer), row)));
    chosen.setAttribute("d", cells.join(""));
  });
  if (tokens.length) get("text").addEventListener("pointerleave", () => chosen.setAttribute("d", ""));
})();
