"""Charts as a plotting library draws them: the test style of charts, never trained on.

Matplotlib's own axes, ticks, frames, font and colours, where `training.charts` has one manner of its own. It knows
nothing of questions or models.
"""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mllm_demo.training.charts import TOPS, slices, spaced
from mllm_demo.training.things import Chart, Scene

# Those of matplotlib's default cycle that have one of our colours' names.
PALETTE = ("blue", "orange", "green", "red", "purple")
SIDES = ((6.4, 4.8), (5.0, 5.0), (6.0, 4.0))  # inches of 100 pixels; the first is matplotlib's own
FONT_SIZES = (10.0, 20.0)  # points; 10 is matplotlib's own


def render(words: tuple[str, ...], seed: int, index: int, kind: str) -> Scene:
    """Chart number `index` with labels out of `words`; `kind`: bar, line or pie. Labels are known in small letters."""
    rng = np.random.default_rng((seed, index))
    count = int(rng.integers(2, 6))
    picked = [str(word) for word in rng.choice([word for word in words if len(word) <= 5], count + 1, replace=False)]
    title, *labels = [word.capitalize() for word in picked] if rng.random() < 0.5 else picked
    size = rng.uniform(*FONT_SIZES)
    figure = Figure(figsize=SIDES[rng.integers(len(SIDES))], dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    if rng.random() < 0.5:
        axes.set_title(title, fontsize=1.2 * size)
    varied = kind == "pie" or (kind == "bar" and rng.random() < 0.6)
    colours = [str(c) for c in rng.permutation(PALETTE)[:count]] if varied else [PALETTE[0]] * count
    shades = [f"tab:{colour}" for colour in colours]
    if kind == "pie":
        values, top = slices(rng, count), 100
        percent = "%d%%" if rng.random() < 0.5 else None
        axes.pie(values, labels=labels, colors=shades, autopct=percent, textprops={"fontsize": size})
    else:
        values = spaced(rng, count, int(rng.choice(TOPS)))
        if kind == "bar":
            bars = axes.bar(labels, values, color=shades, width=rng.uniform(0.5, 0.8))
            if rng.random() < 0.3:
                axes.bar_label(bars, fontsize=size)
        else:
            axes.plot(labels, values, marker="o", color=shades[0])
            axes.set_ylim(0, None)
        axes.tick_params(labelsize=size)
        axes.grid(visible=rng.random() < 0.3, axis="y")
        if rng.random() < 0.3:
            axes.spines[["top", "right"]].set_visible(False)
        top = int(np.ceil(axes.get_ylim()[1]))
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    names = tuple(label.lower() for label in labels)
    # Where its parts lie is nobody's question here.
    chart = Chart(kind, names, tuple(values), tuple(colours) if varied else (None,) * count, top, ())
    return Scene(image, (), names, chart, "chart")
