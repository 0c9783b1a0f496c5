// Payload in, typed arrays and answers about them out. Knows nothing of the page.

function decodeBytes(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes.buffer;
}

function joinArrays(Type, chunks) {
  const all = new Type(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  let at = 0;
  for (const chunk of chunks) { all.set(chunk, at); at += chunk.length; }
  return all;
}

const MODALITY = { i: "image", t: "text", s: "special" };
const ROLE = { y: "system", u: "you", a: "answer" };

class Trace {
  constructor(payload) {
    this.key = payload.key;
    this.ids = [];
    this.starts = [];
    this.tokens = [];
    this.sites = payload.sites;
    this.columns = payload.sites.map(() => ({ probs: [], selected: [], weights: [], rest: [] }));
    this.read(payload);
  }

  // Takes over what is new in `payload`; returns the first position that changed.
  read(payload) {
    Object.assign(this, { colors: payload.colors, scale: payload.scale, kinds: payload.kinds });
    Object.assign(this, { images: payload.images, live: payload.live, kind: payload.kind, note: payload.note });
    this.imageNames = Trace.namesOf(payload.images);
    let same = 0;
    while (same < this.ids.length && same < payload.parts.length && this.ids[same] === payload.parts[same].id) same++;
    const from = same < this.ids.length ? this.starts[same] : this.tokens.length;
    this.tokens.length = from;
    this.ids.length = this.starts.length = same;
    for (const column of this.columns) for (const name in column) column[name].length = same;
    for (const part of payload.parts.slice(same)) this.append(part);
    this.answerAt = this.tokens.findIndex((token) => token.decoded);
    this.arrays = this.columns.map((column) => ({
      probs: joinArrays(Uint16Array, column.probs),
      selected: joinArrays(Uint16Array, column.selected),
      weights: joinArrays(Float32Array, column.weights),
      rest: joinArrays(Float32Array, column.rest),
    }));
    this.strong = this.sites.map((site, s) => (this.many(s) ? this.strongWeight(s) : 1));
    return from;
  }

  append(part) {
    const start = this.tokens.length;
    this.ids.push(part.id);
    this.starts.push(start);
    part.text.forEach((text, i) => this.tokens.push({
      index: start + i, text, modality: MODALITY[part.modality[i]], role: ROLE[part.role[i]],
      decoded: part.phase[i] === "d", image: null, box: null,
    }));
    for (const [offset, image, ...box] of part.places) {
      const token = this.tokens[start + offset];
      token.image = image;
      token.box = box.length ? box : null;
    }
    this.columns.forEach((column, s) => {
      column.probs.push(new Uint16Array(decodeBytes(part.probs[s])));
      column.selected.push(new Uint16Array(decodeBytes(part.selected[s])));
      column.weights.push(new Float32Array(decodeBytes(part.weights[s])));
      column.rest.push(new Float32Array(decodeBytes(part.rest[s])));
    });
  }

  // "image 2", or, of a moving picture, "frame 2 of 4, 0.8 s"; numbered where two would otherwise be called alike.
  static namesOf(images) {
    const labels = images.map(({ label }) => label).filter(Boolean);
    const alike = new Set(labels).size < labels.length;
    return images.map(({ label }, i) => (label && !alike ? label : [`image ${i + 1}`, label].filter(Boolean).join(", ")));
  }

  imageName(image) { return image === null ? "unknown image" : this.imageNames[image]; }

  // Row of `token` in the arrays of site `s`: a sequence-level choice has one row for the prompt, one for the answer.
  row(s, token) {
    if (this.sites[s].granularity !== "sequence") return token;
    return this.tokens[token].decoded ? this.arrays[s].probs.length / this.sites[s].listed - 1 : 0;
  }

  // Whether site `s` chose once for the prompt and again, differently, for the answer.
  choseTwice(s) {
    if (this.sites[s].granularity !== "sequence" || this.answerAt < 0) return false;
    const [prompt, answer] = [this.shares(s, 0), this.shares(s, this.answerAt)];
    return prompt.some(([expert, prob], i) => expert !== answer[i][0] || prob !== answer[i][1]);
  }

  // Whether some of the experts are not named one by one.
  many(s) { return this.sites[s].listed < this.sites[s].experts; }

  // How many numbers of experts one choice takes: the selected, and in a large router the next best.
  stride(s) { return this.many(s) ? this.sites[s].listed : this.sites[s].k; }

  // The selected experts with their weights, strongest first.
  chosen(s, token) {
    const { k } = this.sites[s];
    const row = this.row(s, token);
    const [at, from] = [row * this.stride(s), row * k];
    const found = [];
    for (let i = 0; i < k; i++) found.push([this.arrays[s].selected[at + i], this.arrays[s].weights[from + i]]);
    return found.sort((a, b) => b[1] - a[1]);
  }

  // The first of `chosen`, without sorting: a map asks for it tens of thousands of times.
  strongest(s, token) {
    const { k } = this.sites[s];
    const { weights, selected } = this.arrays[s];
    const row = this.row(s, token);
    let best = 0;
    for (let i = 1; i < k; i++) if (weights[row * k + i] > weights[row * k + best]) best = i;
    return [selected[row * this.stride(s) + best], weights[row * k + best]];
  }

  // The weight that one choice in ten gives its strongest expert, or a larger one: a scale that no outlier sets.
  strongWeight(s) {
    const { k } = this.sites[s];
    const { weights } = this.arrays[s];
    const tops = new Float32Array(weights.length / k);
    for (let at = 0; at < weights.length; at++) tops[Math.floor(at / k)] = Math.max(tops[Math.floor(at / k)], weights[at]);
    return tops.sort()[Math.floor(0.9 * tops.length)] || 1;
  }

  // Pairs of expert and probability by number: all experts of a small router, the strongest of a large one.
  shares(s, token) {
    const { listed } = this.sites[s];
    const at = this.row(s, token) * listed;
    const { probs, selected } = this.arrays[s];
    const pairs = Array.from(probs.subarray(at, at + listed), (prob, i) => [this.many(s) ? selected[at + i] : i, prob / 65535]);
    return pairs.sort((a, b) => a[0] - b[0]);
  }

  // What the experts that `shares` leaves out sum to.
  rest(s, token) { return this.many(s) ? this.arrays[s].rest[2 * this.row(s, token)] : 0; }

  // Experts of site `s` with how many tokens chose them, the most used first.
  used(s) {
    const counts = new Array(this.sites[s].experts).fill(0);
    const { selected } = this.arrays[s];
    for (let at = 0; at < selected.length; at += this.stride(s))
      for (let i = 0; i < this.sites[s].k; i++) counts[selected[at + i]]++;
    return counts.map((count, expert) => [expert, count]).sort((a, b) => b[1] - a[1]);
  }

  // 0 (sure) to 1 (all experts alike).
  entropy(s, token) {
    if (this.many(s)) return Math.max(0, Math.min(1, this.arrays[s].rest[2 * this.row(s, token) + 1]));
    const probs = this.shares(s, token).map(([, prob]) => prob);
    const total = probs.reduce((sum, p) => sum + p, 0) || 1;
    const nats = probs.reduce((sum, p) => (p > 0 ? sum - (p / total) * Math.log(p / total) : sum), 0);
    return probs.length > 1 ? Math.max(0, Math.min(1, nats / Math.log(probs.length))) : 0;
  }

  // The first word of the answer, else the last word of the prompt, else the last position.
  defaultToken() {
    const word = (token) => token.modality === "text" && /[\p{L}\p{N}]/u.test(token.text);
    const answer = this.tokens.find((token) => token.decoded && word(token));
    const prompt = this.tokens.filter((token) => !token.decoded && word(token)).pop();
    return (answer || prompt || this.tokens[this.tokens.length - 1]).index;
  }

  // As short as an axis needs it; a router that stands beside the layers has no number.
  layerMark(s) {
    const { layer, block } = this.sites[s];
    return layer < 0 ? (block === "model" ? "all" : "–") : String(layer);
  }

  layerName(s) {
    const { layer, block } = this.sites[s];
    return layer < 0 ? (block === "model" ? "whole model" : block) : `layer ${layer}`;
  }
}

// Colours as [r, g, b].
function hexToRgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function mix(under, over, alpha) {
  return under.map((value, i) => Math.round(value + (over[i] - value) * alpha));
}

function css(rgb) { return `rgb(${rgb[0]} ${rgb[1]} ${rgb[2]})`; }

function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Ink that reads best on `rgb`.
function inkOn(rgb) { return luminance(rgb) > 0.2 ? "#14161a" : "#ffffff"; }

function scaleColor(stops, at) {
  const x = Math.max(0, Math.min(1, at)) * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(x));
  return mix(hexToRgb(stops[i]), hexToRgb(stops[i + 1]), x - i);
}

function capital(text) { return text[0].toUpperCase() + text.slice(1); }

// A token's text with the invisible made visible; for drawing through textContent only.
function visible(text) {
  if (text === "") return "∅";
  if (/^ +$/.test(text)) return "␣".repeat(Math.min(4, text.length));
  return text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");
}

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}
