"""The endpoint for programs, through the same two doors that the README names."""

import json

import httpx
import pytest
from gradio_client import Client, handle_file

from mllm_demo.routing.trace import RoutingTrace

pytestmark = pytest.mark.browser


@pytest.fixture
def client(url, tmp_path):
    return Client(url, verbose=False, download_files=tmp_path)


def test_ask_returns_the_answer_and_a_trace_that_opens(client, picture):
    answer, trace = client.predict(
        image=handle_file(str(picture)), question="What is in the picture?", max_new_tokens=8, api_name="/ask"
    )
    assert answer.strip()
    assert any(token.modality == "image" for token in RoutingTrace.load(trace).tokens)


def test_ask_is_the_only_endpoint_that_is_offered(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/ask"]


def test_only_picture_and_question_are_required(client):
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/ask"]["parameters"]
    needed = {p["parameter_name"]: not p["parameter_has_default"] for p in parameters}
    assert needed == {"image": True, "question": True, "max_new_tokens": False, "temperature": False, "seed": False}


def test_a_file_that_is_no_picture_is_refused_in_one_sentence(client, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("hello")
    with pytest.raises(Exception, match="notes.png is not a picture"):
        client.predict(image=handle_file(str(path)), question="?", api_name="/ask")


def test_a_setting_out_of_range_is_refused_in_one_sentence(client, picture):
    with pytest.raises(Exception, match="Temperature must be 0"):
        client.predict(image=handle_file(str(picture)), question="?", temperature=9, api_name="/ask")


def test_plain_http_can_ask_too(url, picture):
    base = f"{url}gradio_api"
    with httpx.Client(timeout=240) as http:
        path = http.post(f"{base}/upload", files={"files": picture.read_bytes()}).json()[0]
        body = {
            "image": {"path": path, "meta": {"_type": "gradio.FileData"}},
            "question": "What is in the picture?",
            "max_new_tokens": 4,
        }
        event = http.post(f"{base}/call/v2/ask", json=body).json()["event_id"]
        lines = http.get(f"{base}/call/v2/ask/{event}").text.splitlines()
    done = lines[lines.index("event: complete") + 1].removeprefix("data: ")
    answer, trace = json.loads(done)
    assert answer.strip()
    assert trace["url"].startswith(url)
