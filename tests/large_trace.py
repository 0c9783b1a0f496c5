"""A synthetic, repeatable trace of a large mixture of experts: what a 30B-A3B model's routing looks like in size."""

import io

import numpy as np
from PIL import Image, ImageDraw

from mllm_demo.routing.trace import RoutingTrace, Site, Token, TraceImage

WORDS = " The red circle is above a blue square , and below them stands the word CAT .".split(" ")[1:]


def large_trace(experts=128, k=8, layers=48, grid=28, words=216, seed=0) -> RoutingTrace:
    """`grid`² patches and `words` words; image and text prefer different experts, neighbours similar ones."""
    rng = np.random.default_rng(seed)
    side = 12 * grid
    tokens = [Token(1, "<|im_start|>", "special", "user", "prefill")]
    corners = [(12.0 * column, 12.0 * row) for row in range(grid) for column in range(grid)]
    tokens += [Token(9, "<image>", "image", "user", "prefill", 0, (x, y, x + 12, y + 12)) for x, y in corners]
    for n in range(words):
        role, phase = ("user", "prefill") if n < words // 3 else ("assistant", "decode")
        tokens.append(Token(2, " " + WORDS[n % len(WORDS)], "text", role, phase))
    place = np.array([token.box[:2] if token.box else (n * 40.0, 999.0) for n, token in enumerate(tokens)]) / side
    seen = np.concatenate((np.sin(5 * place), np.cos(7 * place), place, np.ones((len(tokens), 1))), axis=1)
    seen[:, :4] += rng.normal(scale=0.3, size=(len(tokens), 4))
    sites, probs, selected, weights = [], {}, {}, {}
    for layer in range(layers):
        site = Site(f"model.language_model.layers.{layer}.mlp.gate", layer, "mlp", experts, k)
        logits = seen @ rng.normal(size=(seen.shape[1], experts)) + rng.normal(scale=0.7, size=(len(tokens), experts))
        prob = np.exp(logits - logits.max(axis=1, keepdims=True))
        prob /= prob.sum(axis=1, keepdims=True)
        order = np.argsort(-prob, axis=1)[:, :k]
        weight = np.take_along_axis(prob, order, axis=1)
        sites.append(site)
        probs[site.name] = prob.astype(np.float16)
        selected[site.name] = order.astype(np.int16)
        weights[site.name] = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float16)
    picture = _picture(side)
    return RoutingTrace(tuple(tokens), tuple(sites), probs, selected, weights, (picture,), {"answer": "synthetic"})


def _picture(side: int) -> TraceImage:
    image = Image.new("RGB", (side, side), "#e8eef5")
    pen = ImageDraw.Draw(image)
    pen.ellipse([0.25 * side, 0.1 * side, 0.7 * side, 0.5 * side], fill="#d33a2c")
    pen.rectangle([0.3 * side, 0.55 * side, 0.7 * side, 0.9 * side], fill="#2b62c9")
    out = io.BytesIO()
    image.save(out, "PNG")
    return TraceImage(out.getvalue(), side, side)
