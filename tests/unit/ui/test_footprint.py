"""What a model would take is said on the page before anything is loaded, and plainly where it does not fit."""

from dataclasses import replace

from mllm_demo.chat.events import Footprint, FootprintPart
from mllm_demo.errors import DownloadError
from mllm_demo.settings import Settings
from mllm_demo.ui.callbacks import Callbacks, footprint

EXPERTS = FootprintPart("experts", 10**9, 10**9, 2 * 10**9, 512 * 10**6, 5 * 10**8)
REST = FootprintPart("rest", 10**9, 0, 2 * 10**9, 2 * 10**9, 0)
SEEN = Footprint("<b>Model</b>", "nf4", "cpu", (EXPERTS, REST), 134 * 10**6, 3 * 10**9, 16 * 10**9, (640, 480), 81)


def test_parts_totals_and_shares_are_in_the_table():
    shown = footprint(SEEN)
    for said in ("experts", "everything else", "512 MB", "100 %", "50 %", "2.0 B", "81 tokens", "3.0 GB"):
        assert said in shown
    assert "A graphics card of 8 GB holds it." in shown and "does not fit" not in shown


def test_what_does_not_fit_is_said_with_what_is_free():
    assert "does not fit here: 1.0 GB is free on the CPU" in footprint(replace(SEEN, free_bytes=10**9))
    assert "Choose a smaller model." in footprint(replace(SEEN, free_bytes=10**9))
    assert "Choose a smaller model or nf4." in footprint(replace(SEEN, free_bytes=10**9, quantization="none"))
    assert "No graphics card of up to 24 GB" in footprint(replace(SEEN, needs_bytes=60 * 10**9))


def test_a_model_known_by_its_total_only_has_no_table():
    assert "<table" not in footprint(replace(SEEN, parts=())) and "needs 3.0 GB" in footprint(replace(SEEN, parts=()))


def test_what_cannot_be_known_is_a_sentence():
    class Engine:
        def footprint(self, choice):
            assert (choice.model, choice.adapter, choice.quantization) == ("owner/name", None, "nf4")
            raise DownloadError("<owner/name> could not be fetched.")

    callbacks = Callbacks(Engine(), Settings(), None)
    said = callbacks.foreseen("owner/name", " ", "nf4")
    callbacks.sessions.close()
    assert "&lt;owner/name&gt; could not be fetched." in said


def test_sizes_are_decimal_as_in_the_catalogue():
    """16.3 GB is said so, and fits no card of 16 GB."""
    shown = footprint(replace(SEEN, needs_bytes=16_300_000_000, free_bytes=24 * 10**9))
    assert "it needs 16.3 GB. A graphics card of 24 GB holds it." in shown
