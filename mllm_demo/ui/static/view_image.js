// The picture with one button per image token, tinted by expert; knows nothing of the other views.

// Tokens whose boxes do not overlap form one pass; tiled models see a picture in several passes.
function passesOf(tokens) {
  const passes = [];
  for (const token of tokens) {
    const [x0, y0, x1, y1] = token.box;
    const [x, y] = [(x0 + x1) / 2, (y0 + y1) / 2];
    const last = passes[passes.length - 1];
    const size = (x1 - x0) * (y1 - y0);
    const alike = last && size < 4 * last.size && size > last.size / 4;
    const inside = alike && last.tokens.some(({ box: [a, b, c, d] }) => x > a && x < c && y > b && y < d);
    if (alike && !inside) last.tokens.push(token);
    else passes.push({ size, tokens: [token] });
  }
  return passes.map((pass) => pass.tokens);
}

// Row and column of each token of one pass, counted from the distinct box edges.
function gridOf(tokens) {
  const ranks = (edge) => {
    const sorted = [...new Set(tokens.map((token) => Math.round(token.box[edge])))].sort((a, b) => a - b);
    return new Map(sorted.map((value, i) => [value, i]));
  };
  const [columns, rows] = [ranks(0), ranks(1)];
  return tokens.map((token) => [rows.get(Math.round(token.box[1])), columns.get(Math.round(token.box[0]))]);
}

function createImageView(root, view) {
  const stage = root.querySelector(".rv-image .rv-stage");
  const picks = root.querySelector(".rv-image .rv-pick");
  let built = "";
  let buttons = new Map();
  let shown = { image: 0, pass: 0 };
  let passes = [];

  function structure() {
    passes = view.trace.images.map((_, image) =>
      passesOf(view.trace.tokens.filter((token) => token.image === image && token.box)));
  }

  function placeOf(index) {
    const token = view.trace.tokens[index];
    if (token.image === null || !token.box) return null;
    const pass = passes[token.image].findIndex((tokens) => tokens.includes(token));
    return pass < 0 ? null : { image: token.image, pass };
  }

  function drawPicks() {
    const focused = [...picks.children].indexOf(document.activeElement);
    const scrolled = picks.scrollTop;
    picks.replaceChildren();
    const add = (label, pressed, onclick) => {
      const button = make("button", "rv-chip", label);
      button.type = "button";
      button.setAttribute("aria-pressed", String(pressed));
      button.onclick = onclick;
      picks.append(button);
    };
    if (passes.length > 1) passes.forEach((_, image) =>
      add(capital(view.trace.imageName(image)), image === shown.image, () => { shown = { image, pass: 0 }; draw(); }));
    const here = passes[shown.image] || [];
    if (here.length > 1) here.forEach((tokens, pass) =>
      add(`${tokens.length} patches`, pass === shown.pass, () => { shown = { ...shown, pass }; draw(); }));
    picks.scrollTop = scrolled;
    if (picks.children[focused]) picks.children[focused].focus({ preventScroll: true });
    const [box, on] = [picks, picks.children[shown.image]].map((node) => node && node.getBoundingClientRect());
    if (on && (on.top < box.top || on.bottom > box.bottom)) picks.scrollTop += on.top - box.top - box.height / 2;
  }

  function draw() {
    const picture = view.trace.images[shown.image];
    const tokens = (passes[shown.image] || [])[shown.pass] || [];
    const wanted = `${view.trace.key}/${shown.image}/${shown.pass}/${tokens.length}`;
    if (wanted !== built) {
      built = wanted;
      buttons = new Map();
      stage.replaceChildren();
      if (!picture) {
        stage.append(make("p", "rv-nothing", "No picture in this conversation."));
      } else {
        stage.append(frameOf(picture, tokens));
      }
    }
    drawPicks();
    paint();
  }

  function frameOf(picture, tokens) {
    const frame = make("div", "rv-frame");
    frame.style.aspectRatio = `${picture.width} / ${picture.height}`;
    frame.style.setProperty("--ratio", picture.width / picture.height);
    if (picture.src) {
      const img = make("img");
      img.src = picture.src;
      img.alt = `${capital(view.trace.imageName(shown.image))} of the conversation`;
      frame.append(img);
    }
    const grid = gridOf(tokens);
    const group = make("div", "rv-patches");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", `Patches of ${view.trace.imageName(shown.image)}`);
    tokens.forEach((token, i) => {
      const [x0, y0, x1, y1] = token.box;
      const button = make("button", "rv-patch");
      button.type = "button";
      button.tabIndex = -1;
      button.setAttribute("aria-label", `patch row ${grid[i][0] + 1} column ${grid[i][1] + 1}`);
      button.dataset.token = token.index;
      button.style.left = `${(100 * x0) / picture.width}%`;
      button.style.top = `${(100 * y0) / picture.height}%`;
      button.style.width = `${(100 * (x1 - x0)) / picture.width}%`;
      button.style.height = `${(100 * (y1 - y0)) / picture.height}%`;
      buttons.set(token.index, { button, row: grid[i][0], column: grid[i][1] });
      group.append(button);
    });
    group.onclick = (event) => {
      const button = event.target.closest(".rv-patch");
      if (button) view.select({ token: Number(button.dataset.token) });
    };
    group.onkeydown = (event) => move(event);
    view.hover(group, ".rv-patch");
    frame.append(group);
    return frame;
  }

  function move(event) {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    const from = buttons.get(Number(event.target.dataset.token));
    if (!step || !from) return;
    event.preventDefault();
    let best = null;
    for (const [index, to] of buttons) {
      const ahead = (to.row - from.row) * step[0] + (to.column - from.column) * step[1];
      const aside = Math.abs((to.row - from.row) * step[1]) + Math.abs((to.column - from.column) * step[0]);
      if (ahead > 0 && (!best || ahead + 3 * aside < best.cost)) best = { index, cost: ahead + 3 * aside };
    }
    if (best) {
      view.select({ token: best.index });
      buttons.get(best.index).button.focus();
    }
  }

  function paint() {
    const whole = view.site().granularity === "sequence";
    const stop = buttons.has(view.token) ? view.token : buttons.keys().next().value;
    for (const [index, { button }] of buttons) {
      const on = index === view.token;
      button.style.backgroundColor = whole ? "transparent" : view.tint(index, 0.68);
      button.setAttribute("aria-pressed", String(on));
      button.tabIndex = index === stop ? 0 : -1;
    }
  }

  return {
    rebuild(from) {
      if (from === 0) { structure(); shown = { image: 0, pass: 0 }; }
      const place = placeOf(view.token);
      if (place) shown = place;
      draw();
    },
    select() {
      const place = placeOf(view.token);
      if (place && (place.image !== shown.image || place.pass !== shown.pass)) { shown = place; draw(); } else paint();
    },
    paint,
    image: () => shown.image,
  };
}
