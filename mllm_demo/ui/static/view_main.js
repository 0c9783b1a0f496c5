// Joins the views: one selection (token, layer, router) drives them all. `element`, `props` and `watch` come from Gradio.

const LEGEND_EXPERTS = 8;
const TIP_EXPERTS = 4;

function createRoutingView(element, props, watch) {
  const root = element.querySelector(".rv");
  const find = (selector) => root.querySelector(selector);
  const parts = { body: find(".rv-body"), empty: find(".rv-empty"), now: find(".rv-now"), tip: find(".rv-tip") };
  const slider = find(".rv-layer input");
  const play = find(".rv-play");
  let theme = null;
  let playing = null;
  let picked = false;
  let rgb = [];
  let due = null;
  let free = 0;

  const view = {
    trace: null, token: 0, layer: 0, router: "", mode: "expert",
    routerKind() { return view.trace.kinds.find((kind) => kind.label === view.router) || view.trace.kinds[0]; },
    sites() { return view.routerKind().sites; },
    siteIndex() { return view.sites()[view.layer]; },
    site() { return view.trace.sites[view.siteIndex()]; },
    // Whether routers of this kind chose once for the prompt and again for the answer.
    twice() { return view.sites().some((s) => view.trace.choseTwice(s)); },
    color(expert) { return view.trace.colors[expert]; },
    paper: () => theme.paper,
    ink: () => theme.ink,
    // The colour of `token` at site `s` and how strongly it shows, 0 to 1.
    shade(token, s = view.siteIndex()) {
      if (view.mode === "entropy") return [scaleColor(view.trace.scale, view.trace.entropy(s, token)), 1];
      const [expert, weight] = view.trace.strongest(s, token);
      return [rgb[expert], 0.18 + 0.82 * Math.max(0, Math.min(1, weight / view.trace.strong[s]))];
    },
    blend(token, strength, s) {
      const [color, alpha] = view.shade(token, s);
      return mix(theme.paper, color, alpha * strength);
    },
    tint(token, strength) {
      const [color, alpha] = view.shade(token);
      return `rgb(${color[0]} ${color[1]} ${color[2]} / ${(alpha * strength).toFixed(3)})`;
    },
    select(change) {
      const last = view.trace.tokens.length - 1;
      if (change.token !== undefined) view.token = Math.max(0, Math.min(last, change.token));
      if (change.token !== undefined) picked = true;
      if (change.layer !== undefined) view.layer = Math.max(0, Math.min(view.sites().length - 1, change.layer));
      controls();
      views.forEach((one) => one.select());
    },
    describe(token, s, most = Infinity) {
      const { block, granularity } = view.trace.sites[s];
      const { text, modality, image, index } = view.trace.tokens[token];
      const patch = view.trace.images.length > 1 ? `patch of ${view.trace.imageName(image)}` : "patch";
      const name = modality === "image" ? patch : `“${visible(text)}”`;
      const half = view.trace.tokens[token].decoded ? "whole answer" : "whole prompt";
      const whole = view.trace.choseTwice(s) ? half : "whole conversation";
      const who = granularity === "sequence" ? whole : `token ${index} ${name}`;
      const experts = view.trace.chosen(s, token).map(([expert, weight]) => `expert ${expert} (weight ${weight.toFixed(2)})`);
      if (experts.length > most) experts.splice(most - 1, Infinity, `${experts.length - most + 1} more`);
      const label = view.trace.kinds.find((kind) => kind.sites.includes(s)).label;
      const where = view.trace.layerName(s);
      return [who, where, ...(where === `whole ${label}` ? [] : [label || block]), experts.join(" + ")].join(" · ");
    },
    tip(event, token, s) {
      parts.tip.hidden = !event;
      if (!event) return;
      parts.tip.textContent = view.describe(token, s, TIP_EXPERTS);
      const box = parts.body.getBoundingClientRect();
      const x = Math.min(event.clientX - box.left + 12, box.width - parts.tip.offsetWidth - 4);
      parts.tip.style.left = `${Math.max(0, x)}px`;
      parts.tip.style.top = `${event.clientY - box.top + 18}px`;
    },
    hover(node, selector) {
      node.addEventListener("mousemove", (event) => {
        const target = event.target.closest(selector);
        view.tip(target ? event : null, target ? Number(target.dataset.token) : 0, view.trace ? view.siteIndex() : 0);
      });
      node.addEventListener("mouseleave", () => view.tip(null));
    },
  };

  const layers = createLayersView(root, view);
  const views = [createImageView(root, view), createTokenView(root, view), createWordsView(root, view), layers];
  const repaint = () => views.forEach((one) => one.paint());

  function readTheme() {
    const dark = document.body.classList.contains("dark");
    const [paper, ink] = dark ? [[24, 25, 29], "#eceef2"] : [[255, 255, 255], "#1b1d22"];
    theme = { paper, ink };
  }

  function radios(holder, name, options, current, onpick) {
    const wanted = options.join("|");
    if (holder.dataset.options !== wanted) {
      holder.dataset.options = wanted;
      holder.replaceChildren(...options.map((option) => {
        const label = make("label");
        const input = make("input");
        Object.assign(input, { type: "radio", name: `${name}-${element.id}`, value: option });
        input.onchange = () => onpick(option);
        label.append(input, make("span", "", option));
        return label;
      }));
    }
    for (const input of holder.querySelectorAll("input")) input.checked = input.value === current;
  }

  function controls() {
    const kinds = view.trace.kinds.map((kind) => kind.label);
    radios(find(".rv-router .rv-seg"), "router", kinds, view.routerKind().label, pickRouter);
    radios(find(".rv-mode .rv-seg"), "mode", ["expert", "entropy"], view.mode, (mode) => { view.mode = mode; controls(); repaint(); });
    const name = view.trace.layerName(view.siteIndex());
    slider.max = view.sites().length - 1;
    slider.value = view.layer;
    slider.disabled = play.disabled = view.sites().length < 2;
    slider.setAttribute("aria-valuetext", name);
    find(".rv-layer-value").textContent = view.trace.layerMark(view.siteIndex());
    parts.now.textContent = view.describe(view.token, view.siteIndex());
    const whole = view.site().granularity === "sequence";
    root.dataset.whole = String(whole);
    root.dataset.long = String(view.site().k > 1 || view.trace.images.length > 1);
    const choices = view.twice() ? "two choices in each layer: for the prompt and for the answer"
      : "one choice in each layer, for the whole conversation";
    find(".rv-layers .rv-hint").textContent = whole ? choices : "tokens from left to right, layers from top to bottom";
    const note = find(".rv-note");
    note.textContent = noteFor();
    note.hidden = !note.textContent;
    legend();
  }

  function noteFor() {
    const { granularity } = view.site();
    if (granularity === "modality")
      return "This router sends tokens by kind alone: all image tokens to one expert, all text tokens to another.";
    if (granularity !== "sequence") return "";
    const s = view.siteIndex();
    const said = (token) => {
      const named = view.trace.chosen(s, token).map(([expert, weight]) => `expert ${expert}, weight ${weight.toFixed(2)}`);
      return named.join(" + ");
    };
    const nobody = "No single patch or word chose, so none is coloured.";
    if (view.trace.choseTwice(s))
      return `This router makes two choices in ${view.trace.layerName(s)}: one for the whole prompt (${said(0)}), and, `
        + `when the answer begins, another for the whole answer (${said(view.trace.answerAt)}). ${nobody}`;
    return `This router makes one choice for the whole conversation: ${said(view.token)} of `
      + `${view.trace.layerName(s)}. ${nobody}`;
  }

  function legend() {
    const entropy = view.mode === "entropy";
    const list = find(".rv-legend-experts");
    const count = Math.max(...view.sites().map((s) => view.trace.sites[s].experts));
    list.hidden = list.previousElementSibling.hidden = entropy;
    const s = view.siteIndex();
    const many = view.trace.many(s);
    const key = many ? [view.trace.key, s, view.trace.tokens.length].join() : [view.trace.key, count].join();
    find(".rv-legend > .rv-label").textContent = many ? "Most used here" : "Experts";
    if (list.dataset.key !== key) {
      list.dataset.key = key;
      const shown = many ? view.trace.used(s).slice(0, LEGEND_EXPERTS).map(([expert]) => expert)
        : Array.from({ length: count }, (_, expert) => expert);
      list.replaceChildren(...shown.map((expert) => {
        const item = make("li");
        const swatch = make("span", "rv-swatch");
        swatch.style.backgroundColor = view.color(expert);
        item.setAttribute("aria-label", `expert ${expert}`);
        item.append(swatch, make("span", "", String(expert)));
        return item;
      }));
      if (many) list.append(make("li", "rv-label", `+${view.trace.sites[s].experts - shown.length} more`));
    }
    const scale = find(".rv-legend-scale");
    scale.hidden = !entropy;
    if (entropy) {
      const canvas = scale.querySelector("canvas");
      const pen = canvas.getContext("2d");
      for (let x = 0; x < canvas.width; x++) {
        pen.fillStyle = css(scaleColor(view.trace.scale, x / (canvas.width - 1)));
        pen.fillRect(x, 0, 1, canvas.height);
      }
    }
    const said = entropy
      ? "Entropy of the router's probabilities before the choice."
      : (many ? `Colour of the strongest of ${view.site().k} chosen experts, full from a weight of `
          + `${view.trace.strong[s].toFixed(2)} on, which one token in ten reaches in this layer. Among ${view.site().experts} `
          + "experts several colours look alike: the numbers tell them apart. " : "Stronger colour: larger routing weight. ") + "A colour names an expert's number within its layer: "
        + "expert 2 of one layer and expert 2 of another are different experts.";
    const shared = " Every token also passes through a shared expert, which no router chooses.";
    find(".rv-legend-text").textContent = said + (view.site().shared ? shared : "");
  }

  function pickRouter(label) {
    const before = view.site().layer;
    view.router = label;
    const near = view.sites().map((s, i) => [Math.abs(view.trace.sites[s].layer - before), i]).sort((a, b) => a[0] - b[0]);
    view.layer = near[0][1];
    controls();
    repaint();
  }

  function togglePlay(on) {
    clearInterval(playing);
    playing = on ? setInterval(() => view.select({ layer: (view.layer + 1) % view.sites().length }), 350) : null;
    play.setAttribute("aria-pressed", String(on));
  }

  function header() {
    const badge = find(".rv-badge");
    const { kind, live, note } = view.trace;
    badge.hidden = false;
    badge.textContent = live ? "live" : { sample: "recorded example", file: "opened file" }[kind] || "your answer";
    badge.dataset.kind = live ? "live" : kind;
    find(".rv-source").textContent = note || "";
  }

  function show(payload) {
    const drawable = payload && payload.parts && payload.parts.length && payload.sites.length;
    parts.empty.hidden = Boolean(drawable);
    parts.body.hidden = !drawable;
    root.dataset.state = drawable ? "drawn" : "empty";
    if (!drawable) {
      togglePlay(false);
      view.trace = null;
      find(".rv-badge").hidden = true;
      find(".rv-source").textContent = "";
      if (payload && payload.empty) find(".rv-empty-text").textContent = payload.empty;
      return;
    }
    const known = view.trace && view.trace.key === payload.key;
    const from = known ? view.trace.read(payload) : 0;
    if (!known) {
      view.trace = new Trace(payload);
      picked = false;
      const mlp = view.trace.kinds.find((kind) => kind.block === "mlp");
      if (!view.trace.kinds.some((kind) => kind.label === view.router)) {
        view.router = (mlp || view.trace.kinds[0]).label;
        view.layer = Math.floor(view.sites().length / 2);
      }
      view.layer = Math.min(view.layer, view.sites().length - 1);
    }
    rgb = view.trace.colors.map(hexToRgb);
    if (!picked || view.token >= view.trace.tokens.length) view.token = view.trace.defaultToken();
    header();
    controls();
    views.forEach((one) => one.rebuild(from));
  }

  // Draws the newest value, and on a slow machine seldom enough that clicks still get through.
  function showSoon() {
    if (due) return;
    due = setTimeout(() => {
      const start = performance.now();
      due = null;
      show(props.value);
      free = performance.now() + 3 * (performance.now() - start);
    }, Math.max(0, free - performance.now()));
  }

  readTheme();
  slider.oninput = () => view.select({ layer: Number(slider.value) });
  play.onclick = () => togglePlay(!playing);
  new MutationObserver(() => { readTheme(); if (view.trace) repaint(); })
    .observe(document.body, { attributes: true, attributeFilter: ["class"] });
  new ResizeObserver(() => { if (view.trace) layers.rebuild(); }).observe(find(".rv-map"));
  watch("value", showSoon);
  show(props.value);
}

createRoutingView(element, props, watch);
