"""The one set of colours for experts, chosen to stay apart under colour blindness, and the scale for entropy.

It knows nothing of traces or pages. A colour stands for an expert's index within its own layer, nothing more.
"""

import colorsys

# Okabe & Ito, "Color Universal Design" (2008); black is replaced by grey because it vanishes on a dark page.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C")

# Seven stops of cividis (Nunez, Anderton & Renslow, 2018), dark = low entropy, light = high.
CIVIDIS = ("#00224E", "#2A3F6D", "#575C6D", "#7D7C78", "#A59C74", "#D2C060", "#FEE838")

# From more experts than this on, colours look alike and a row for each of them is too long to read.
MANY_EXPERTS = 16

_GOLDEN_ANGLE = 137.508 / 360
_LIGHTNESS = (0.42, 0.62, 0.52, 0.74)


def expert_colors(num_experts: int) -> tuple[str, ...]:
    """`num_experts` hex colours: Okabe-Ito first, then hues a golden angle apart in four lightnesses."""
    extra = (
        colorsys.hls_to_rgb((0.05 + i * _GOLDEN_ANGLE) % 1.0, _LIGHTNESS[i % len(_LIGHTNESS)], 0.55)
        for i in range(max(0, num_experts - len(OKABE_ITO)))
    )
    return OKABE_ITO[:num_experts] + tuple(
        "#" + "".join(f"{round(channel * 255):02X}" for channel in rgb) for rgb in extra
    )
