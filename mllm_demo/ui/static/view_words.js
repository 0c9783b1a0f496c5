// Prompt and answer as tinted words, image tokens folded into a strip; knows nothing of the other views.

function createWordsView(root, view) {
  const flow = root.querySelector(".rv-words .rv-flow");
  let items = [];
  let byToken = [];
  let turn = null;
  let strip = null;

  function add(token) {
    if (!turn || turn.role !== token.role) {
      const block = make("div", `rv-turn rv-turn-${token.role}`);
      block.append(make("span", "rv-role", token.role));
      const line = make("div", "rv-line");
      block.append(line);
      flow.append(block);
      turn = { role: token.role, line };
      strip = null;
    }
    if (token.modality === "image") return addToStrip(token);
    strip = null;
    // The space before a word becomes a margin, so that the tint hugs the word.
    const spaced = /^ \S/.test(token.text);
    const button = make("button", token.modality === "special" ? "rv-word rv-special" : "rv-word");
    button.type = "button";
    button.tabIndex = -1;
    button.classList.toggle("rv-spaced", spaced);
    button.textContent = visible(spaced ? token.text.slice(1) : token.text);
    button.setAttribute("aria-label", `token ${token.index} “${visible(token.text)}”`);
    button.dataset.token = token.index;
    turn.line.append(button);
    const item = { button, tokens: [token.index], special: token.modality === "special" };
    items.push(item);
    byToken[token.index] = item;
    if (/\n$/.test(token.text)) turn.line.append(make("br"));
  }

  function addToStrip(token) {
    if (!strip || strip.image !== token.image) {
      const button = make("button", "rv-strip");
      button.type = "button";
      button.tabIndex = -1;
      const picture = view.trace.images[token.image];
      if (picture && picture.src) {
        const img = make("img");
        img.src = picture.src;
        img.alt = "";
        button.append(img);
      }
      const label = make("span");
      const canvas = make("canvas");
      canvas.setAttribute("aria-hidden", "true");
      button.append(label, canvas);
      turn.line.append(button);
      strip = { button, label, canvas, image: token.image, tokens: [] };
      items.push(strip);
    }
    strip.tokens.push(token.index);
    strip.button.dataset.token = strip.tokens[0];
    const count = `${view.trace.imageName(token.image)} · ${strip.tokens.length} tokens`;
    strip.label.textContent = count;
    strip.button.setAttribute("aria-label", count);
    byToken[token.index] = strip;
  }

  function paint() {
    const whole = view.site().granularity === "sequence";
    const current = byToken[view.token];
    for (const item of items) {
      if (item.canvas) paintStrip(item, whole);
      else {
        const rgb = whole ? null : view.blend(item.tokens[0], item.special ? 0.35 : 0.9);
        item.button.style.backgroundColor = rgb ? css(rgb) : "";
        item.button.style.color = rgb ? inkOn(rgb) : "";
      }
      item.button.setAttribute("aria-pressed", String(item === current));
      item.button.tabIndex = item === current ? 0 : -1;
    }
  }

  function paintStrip(item, whole) {
    const { canvas, tokens } = item;
    canvas.width = tokens.length;
    canvas.height = 1;
    const pen = canvas.getContext("2d");
    tokens.forEach((token, i) => {
      pen.fillStyle = css(whole ? view.paper() : view.blend(token, 0.95));
      pen.fillRect(i, 0, 1, 1);
    });
  }

  function reveal() {
    const item = byToken[view.token];
    if (!item || !flow.clientHeight) return;
    const top = item.button.getBoundingClientRect().top - flow.getBoundingClientRect().top;
    if (top < 0 || top > flow.clientHeight - 28) flow.scrollTop += top - flow.clientHeight / 2;
  }

  function go(to, focus) {
    if (!to) return;
    view.select({ token: to.tokens[0] });
    if (focus) to.button.focus({ preventScroll: true });
  }

  flow.onclick = (event) => {
    const item = byToken[Number((event.target.closest("button") || { dataset: {} }).dataset.token)];
    if (!item) return;
    if (item.canvas && event.target === item.canvas) {
      const box = item.canvas.getBoundingClientRect();
      const at = Math.floor(((event.clientX - box.left) / box.width) * item.tokens.length);
      view.select({ token: item.tokens[Math.max(0, Math.min(item.tokens.length - 1, at))] });
    } else if (!item.tokens.includes(view.token)) go(item, false);
  };

  flow.onkeydown = (event) => {
    const at = items.findIndex((item) => item.button === event.target.closest("button"));
    if (at < 0) return;
    let to = null;
    if (event.key === "ArrowRight") to = items[at + 1];
    else if (event.key === "ArrowLeft") to = items[at - 1];
    else if (event.key === "Home") to = items[0];
    else if (event.key === "End") to = items[items.length - 1];
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") to = nextLine(at, event.key === "ArrowDown" ? 1 : -1);
    else return;
    event.preventDefault();
    go(to, true);
  };

  // The item straight above or below, as a reader would expect of wrapped text.
  function nextLine(at, way) {
    const from = items[at].button.getBoundingClientRect();
    let best = null;
    for (let i = at + way; items[i]; i += way) {
      const box = items[i].button.getBoundingClientRect();
      if (Math.abs(box.top - from.top) < from.height / 2) continue;
      if (best && Math.abs(box.top - best.top) > box.height / 2) break;
      const cost = Math.abs(box.left - from.left);
      if (!best || cost < best.cost) best = { cost, top: box.top, item: items[i] };
    }
    return best && best.item;
  }

  view.hover(flow, ".rv-word");

  return {
    rebuild(from) {
      if (from === 0 || byToken.length > from) {
        flow.replaceChildren();
        items = [];
        byToken = [];
        turn = strip = null;
        from = 0;
      }
      for (let i = from; i < view.trace.tokens.length; i++) add(view.trace.tokens[i]);
      paint();
      if (view.trace.live) flow.scrollTop = flow.scrollHeight;
      else reveal();
    },
    select() { paint(); reveal(); },
    paint,
  };
}
