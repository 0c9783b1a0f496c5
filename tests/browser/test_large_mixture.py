"""A trace of a model with 128 experts, eight of them chosen for each token, can be opened and read."""

import re

from playwright.sync_api import expect

from tests.browser import looking
from tests.large_trace import large_trace


def test_a_large_trace_opens_and_a_patch_shows_its_experts(visit, staged, tmp_path):
    trace = large_trace()
    path = tmp_path / "large.safetensors"
    trace.save(path)
    page = visit(staged()[0])
    page.locator("input[type=file][accept*=safetensors]").set_input_files(str(path))
    expect(page.get_by_text("opened file")).to_be_visible()
    looking.patch(page, 10, 12).click()

    layer = int(page.get_by_role("slider", name="Layer").get_attribute("aria-valuetext").removeprefix("layer "))
    token = 1 + 9 * 28 + 11  # the one special token, nine rows of patches, eleven patches
    site = trace.sites[layer]
    chosen = trace.selected_experts[site.name][token]
    weights = trace.routing_weights[site.name][token]
    for expert, weight in zip(chosen, weights, strict=True):
        expect(looking.selection(page)).to_contain_text(f"expert {expert} (weight {float(weight):.2f})")

    rows = page.get_by_role("list", name=f"Probabilities in layer {layer}").get_by_role("listitem")
    shown = [int(found[1]) for row in rows.all_inner_texts() if (found := re.match(r"expert (\d+)", row))]
    assert set(shown[:8]) == set(chosen.tolist())
    expect(rows.last).to_contain_text("116 other experts share")
    legend = page.get_by_role("list", name="Colours of the experts")
    expect(legend.get_by_role("listitem")).to_have_count(9)
    expect(legend).to_contain_text("+120 more")
