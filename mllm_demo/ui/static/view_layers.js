// Tokens by layers on a canvas, with the selected token's probabilities beside; knows nothing of the other views.

const MAP_HEAD = 26;
const MAP_MIN_CELL = 1.5;
const MAX_CANVAS = 16384;

function createLayersView(root, view) {
  const scroll = root.querySelector(".rv-map-scroll");
  const map = root.querySelector(".rv-map-canvas");
  const axis = root.querySelector(".rv-axis-canvas");
  const bars = root.querySelector(".rv-bars-canvas");
  const cells = document.createElement("canvas");
  let size = { rows: 1, columns: 1, cell: 1, row: 10, width: 1, height: 1 };

  function pen(canvas, width, height) {
    const ratio = Math.min(window.devicePixelRatio || 1, MAX_CANVAS / Math.max(width, 1));
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    return context;
  }

  const whole = () => view.site().granularity === "sequence";
  // A token of each choice that was made for many: the prompt's, and the answer's if it got its own.
  const choices = () => (view.twice() ? [0, view.trace.answerAt] : [0]);
  const half = () => (view.twice() && view.trace.tokens[view.token].decoded ? 1 : 0);

  function measure() {
    const rows = view.sites().length;
    const columns = whole() ? choices().length : view.trace.tokens.length;
    const room = Math.max(60, scroll.clientWidth);
    const cell = whole() ? Math.min(160, room / columns) : Math.max(MAP_MIN_CELL, room / columns);
    const row = Math.max(7, Math.min(20, Math.floor(320 / rows)));
    size = { rows, columns, cell, row, width: cell * columns, height: MAP_HEAD + row * rows };
  }

  // One pixel a cell; scaled up without smoothing it costs the same for ten tokens and for ten thousand.
  function fillCells() {
    cells.width = size.columns;
    cells.height = size.rows;
    const context = cells.getContext("2d");
    const image = context.createImageData(size.columns, size.rows);
    const tokens = whole() ? choices() : null;
    view.sites().forEach((s, y) => {
      for (let x = 0; x < size.columns; x++) {
        const rgb = view.blend(tokens ? tokens[x] : x, 1, s);
        image.data.set([rgb[0], rgb[1], rgb[2], 255], 4 * (y * size.columns + x));
      }
    });
    context.putImageData(image, 0, 0);
  }

  function bands() {
    const found = [];
    view.trace.tokens.forEach((token, x) => {
      const name = token.modality === "image" ? view.trace.imageName(token.image) : token.role;
      const last = found[found.length - 1];
      if (last && last.name === name) last.to = x + 1;
      else found.push({ name, image: token.modality === "image", answer: token.decoded, from: x, to: x + 1 });
    });
    return found;
  }

  function drawMap() {
    const p = pen(map, size.width, size.height);
    const ink = view.ink();
    p.imageSmoothingEnabled = false;
    p.drawImage(cells, 0, MAP_HEAD, size.width, size.row * size.rows);
    p.strokeStyle = css(view.paper());
    p.lineWidth = 1;
    p.beginPath();
    for (let y = 1; y < size.rows; y++) { p.moveTo(0, MAP_HEAD + y * size.row); p.lineTo(size.width, MAP_HEAD + y * size.row); }
    if (size.cell > 5) for (let x = 1; x < size.columns; x++) { p.moveTo(x * size.cell, MAP_HEAD); p.lineTo(x * size.cell, size.height); }
    p.stroke();
    if (whole()) {
      p.fillStyle = ink;
      const names = size.columns > 1 ? ["prompt", "answer"] : ["whole conversation"];
      names.forEach((name, x) => p.fillText(name, x * size.cell + 2, 9));
    } else drawBands(p, ink);
    drawCross(p, ink);
  }

  function drawBands(p, ink) {
    for (const band of bands()) {
      const [x, width] = [band.from * size.cell, (band.to - band.from) * size.cell];
      p.fillStyle = ink;
      p.globalAlpha = band.image ? 0.75 : band.answer ? 0.5 : 0.22;
      p.fillRect(x + 0.5, 19, Math.max(1, width - 1), 4);
      p.globalAlpha = 0.8;
      const start = Math.max(x, Math.min(scroll.scrollLeft, x + width)) + 1;
      const fits = (name) => p.measureText(name).width <= x + width - start - 1;
      const name = [band.name, band.name.split(",")[0]].find(fits);
      if (name) p.fillText(name, start, 9);
      p.globalAlpha = 1;
    }
  }

  function drawCross(p, ink) {
    const x = (whole() ? half() : view.token) * size.cell;
    const y = MAP_HEAD + view.layer * size.row;
    p.fillStyle = ink;
    p.globalAlpha = 0.16;
    if (!whole()) p.fillRect(x, MAP_HEAD, size.cell, size.row * size.rows);
    p.fillRect(0, y, size.width, size.row);
    p.globalAlpha = 1;
    const wide = Math.max(size.cell, 4);
    p.lineWidth = 3.5;
    p.strokeStyle = css(view.paper());
    p.strokeRect(x - (wide - size.cell) / 2, y, wide, size.row);
    p.lineWidth = 1.75;
    p.strokeStyle = ink;
    p.strokeRect(x - (wide - size.cell) / 2, y, wide, size.row);
  }

  function drawAxis() {
    const p = pen(axis, 34, size.height);
    const every = Math.ceil(13 / size.row);
    p.textAlign = "right";
    view.sites().forEach((s, y) => {
      const on = y === view.layer;
      const near = Math.abs(y - view.layer) < every && !on;
      if (!on && (y % every || near)) return;
      p.fillStyle = view.ink();
      p.globalAlpha = on ? 1 : 0.6;
      p.font = `${on ? "700 " : ""}11px system-ui, sans-serif`;
      p.fillText(view.trace.layerMark(s), 28, MAP_HEAD + (y + 0.5) * size.row);
    });
    p.globalAlpha = 1;
    p.font = "11px system-ui, sans-serif";
    p.fillStyle = view.ink();
    p.globalAlpha = 0.6;
    p.fillText("layer", 28, 9);
    p.globalAlpha = 1;
  }

  function drawBars() {
    const width = bars.parentElement.clientWidth;
    const p = pen(bars, width, size.height);
    p.fillStyle = view.ink();
    p.globalAlpha = 0.8;
    p.fillText(width > 120 ? "probability of each expert" : "probability", 1, 9);
    p.globalAlpha = 1;
    view.sites().forEach((s, y) => {
      const shares = view.trace.shares(s, view.token);
      const total = shares.reduce((sum, [, value]) => sum + value, view.trace.rest(s, view.token)) || 1;
      const picked = view.trace.chosen(s, view.token).map(([expert]) => expert);
      const top = MAP_HEAD + y * size.row;
      let x = 0;
      shares.forEach(([expert, value]) => {
        const wide = (value / total) * width;
        p.fillStyle = view.color(expert);
        p.globalAlpha = picked.includes(expert) ? 1 : 0.42;
        p.fillRect(x, top + 0.5, wide, size.row - 1);
        x += wide;
      });
      p.fillStyle = view.ink();
      p.globalAlpha = 0.12;
      if (x < width - 0.5) p.fillRect(x, top + 0.5, width - x, size.row - 1);
      p.globalAlpha = 1;
      if (y === view.layer) {
        p.lineWidth = 1.75;
        p.strokeStyle = view.ink();
        p.strokeRect(1, top, width - 2, size.row);
      }
    });
  }

  function draw() {
    measure();
    fillCells();
    light();
  }

  function light() { drawMap(); drawAxis(); drawBars(); }

  function cellAt(event) {
    const box = map.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / size.cell);
    const y = Math.floor((event.clientY - box.top - MAP_HEAD) / size.row);
    if (y < 0 || y >= size.rows || x < 0 || x >= size.columns) return null;
    if (!whole()) return { token: x, layer: y };
    return x === half() ? { layer: y } : { token: choices()[x], layer: y };
  }

  map.onclick = (event) => { const cell = cellAt(event); if (cell) view.select(cell); };
  map.onmousemove = (event) => {
    const cell = cellAt(event);
    if (cell) view.tip(event, cell.token ?? view.token, view.sites()[cell.layer]);
    else view.tip(null);
  };
  map.onmouseleave = () => view.tip(null);
  map.onkeydown = (event) => {
    const { token, layer } = view;
    const to = {
      ArrowLeft: { token: token - 1 }, ArrowRight: { token: token + 1 }, ArrowUp: { layer: layer - 1 },
      ArrowDown: { layer: layer + 1 }, Home: { token: 0 }, End: { token: view.trace.tokens.length - 1 },
    }[event.key];
    if (!to) return;
    event.preventDefault();
    if (!whole() || !("token" in to)) view.select(to);
    else if (view.twice()) view.select({ token: choices()[to.token < token ? 0 : 1] });
  };
  bars.onclick = (event) => {
    const y = Math.floor((event.clientY - bars.getBoundingClientRect().top - MAP_HEAD) / size.row);
    if (y >= 0 && y < size.rows) view.select({ layer: y });
  };

  scroll.onscroll = () => { if (view.trace) drawMap(); };

  function reveal() {
    const x = view.token * size.cell;
    if (x < scroll.scrollLeft || x > scroll.scrollLeft + scroll.clientWidth - size.cell)
      scroll.scrollLeft = x - scroll.clientWidth / 2;
  }

  return { rebuild: draw, paint: draw, select() { light(); if (!whole()) reveal(); } };
}
