// The selected token at the selected layer: every expert's probability in figures; knows nothing of the other views.

const LISTED_EXPERTS = 8;

function createTokenView(root, view) {
  const body = root.querySelector(".rv-token-body");

  function heading(token) {
    const head = make("div", "rv-token-head");
    const picture = token.image === null ? null : view.trace.images[token.image];
    if (picture && picture.src && token.box) head.append(cropOf(picture, token.box));
    const words = make("div", "rv-token-words");
    words.append(make("div", "rv-token-text", token.modality === "image" ? "image patch" : `“${visible(token.text)}”`));
    const kind = token.modality === "image" && view.trace.images.length > 1 ? view.trace.imageName(token.image) : token.modality;
    const about = [`token ${token.index}`, kind, token.decoded ? "written by the model" : token.role === "answer" ? "earlier answer" : token.role];
    words.append(make("div", "rv-token-about", about.join(" · ")));
    head.append(words);
    return head;
  }

  function cropOf(picture, [x0, y0, x1, y1]) {
    const crop = make("div", "rv-crop");
    crop.setAttribute("role", "img");
    crop.setAttribute("aria-label", "the selected patch");
    const side = 64;
    const zoom = side / Math.max(x1 - x0, y1 - y0);
    crop.style.width = `${(x1 - x0) * zoom}px`;
    crop.style.height = `${(y1 - y0) * zoom}px`;
    crop.style.backgroundImage = `url("${picture.src}")`;
    crop.style.backgroundSize = `${picture.width * zoom}px ${picture.height * zoom}px`;
    crop.style.backgroundPosition = `${-x0 * zoom}px ${-y0 * zoom}px`;
    return crop;
  }

  function row(expert, prob, weight, full) {
    const item = make("li", weight === undefined ? "rv-row" : "rv-row rv-row-on");
    const swatch = make("span", "rv-swatch");
    swatch.style.backgroundColor = view.color(expert);
    const bar = make("span", "rv-bar");
    const fill = make("span");
    fill.style.width = `${(100 * prob) / full}%`;
    fill.style.backgroundColor = view.color(expert);
    bar.append(fill);
    item.append(swatch, make("span", "rv-row-name", `expert ${expert}`), bar, make("span", "rv-row-prob", prob.toFixed(2)));
    item.append(make("span", "rv-row-weight", weight === undefined ? "" : `weight ${weight.toFixed(2)}`));
    return item;
  }

  function paint() {
    const s = view.siteIndex();
    const token = view.trace.tokens[view.token];
    const chosen = new Map(view.trace.chosen(s, view.token));
    const { experts } = view.trace.sites[s];
    const shares = view.trace.shares(s, view.token);
    const listed = experts <= LISTED_EXPERTS ? shares
      : shares.sort((a, b) => chosen.has(b[0]) - chosen.has(a[0]) || b[1] - a[1])
        .slice(0, view.trace.many(s) ? shares.length : LISTED_EXPERTS);
    // Bars of a large router would be hairs if a full one meant certainty.
    const full = view.trace.many(s) ? Math.max(...listed.map(([, prob]) => prob)) || 1 : 1;
    const list = make("ul", "rv-rows");
    list.setAttribute("aria-label", `Probabilities in ${view.trace.layerName(s)}`);
    for (const [expert, prob] of listed) list.append(row(expert, prob, chosen.get(expert), full));
    if (experts > listed.length) {
      const sum = (rows) => rows.reduce((total, [, prob]) => total + prob, 0);
      const rest = sum(view.trace.shares(s, view.token)) - sum(listed) + view.trace.rest(s, view.token);
      list.append(make("li", "rv-rest", `${experts - listed.length} other experts share ${Math.max(0, rest).toFixed(2)}`));
    }
    const percent = Math.round(100 * view.trace.entropy(s, view.token));
    const sure = make("p", "rv-token-about", `entropy: ${percent} % of the most it could be`);
    body.replaceChildren(heading(token), list, sure);
  }

  return { rebuild: paint, select: paint, paint };
}
