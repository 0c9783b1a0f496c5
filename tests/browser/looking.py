"""How the browser tests find things on the page: by role and name, as a person would."""

import re
from collections.abc import Callable

from playwright.sync_api import Page, expect

EXAMPLE = re.compile("Select example 1")


def answers(page: Page):
    return page.get_by_role("log").locator(".bot-row .message")


def ask(page: Page, text: str) -> None:
    box = page.get_by_placeholder("Ask about a picture")
    box.fill(text)
    box.press("Enter")


def attach(page: Page, *paths) -> None:
    page.locator("#ask input[type=file]").set_input_files([str(path) for path in paths])
    expect(page.get_by_role("listitem", name="File thumbnail")).to_have_count(len(paths))


def wait_for_answer(page: Page) -> None:
    expect(page.get_by_role("region", name="Routing").get_by_text("your answer")).to_be_visible()
    expect(page.get_by_role("button", name="Submit").last).to_be_visible()


def ask_example(page: Page) -> None:
    page.get_by_role("button", name=EXAMPLE).click()
    wait_for_answer(page)


def until(page: Page, true: Callable[[], bool], seconds: float = 20) -> None:
    """Waits for something that happens on the server's side."""
    for _ in range(round(seconds * 10)):
        if true():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"did not happen within {seconds} s")


def selection(page: Page):
    """The sentence that names the selected token, layer, router and expert."""
    return page.get_by_role("status", name="Selection")


def pressed(page: Page, region: str):
    """The selected element of one view."""
    return page.get_by_role("region", name=region).get_by_role("group").locator("button[aria-pressed=true]")


def words(page: Page):
    return page.get_by_role("region", name="Words view").get_by_role("button", name=re.compile("^token "))


def patch(page: Page, row: int, column: int):
    return page.get_by_role("button", name=f"patch row {row} column {column}", exact=True)


def the_map(page: Page):
    return page.get_by_role("application", name=re.compile("Tokens by layers"))
