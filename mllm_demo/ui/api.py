"""The one endpoint for programs, `/ask`: a picture and a question in, the answer and its routing trace out.

It knows nothing of the page. With `gradio_client`:

    from gradio_client import Client, handle_file

    client = Client("http://127.0.0.1:7860")
    answer, trace = client.predict(
        image=handle_file("picture.png"), question="What is in the picture?", api_name="/ask"
    )

With curl (upload, ask, read):

    BASE=http://127.0.0.1:7860/gradio_api
    FILE=$(curl -s -F files=@picture.png $BASE/upload | sed 's/[]["]//g')
    ID=$(curl -s $BASE/call/v2/ask -H 'Content-Type: application/json' -d '{
      "image": {"path": "'$FILE'", "meta": {"_type": "gradio.FileData"}},
      "question": "What is in the picture?", "max_new_tokens": 64}' | sed 's/.*: *"\\(.*\\)".*/\\1/')
    curl -sN $BASE/call/v2/ask/$ID

The trace is null when the model has no routers.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import gradio as gr

from mllm_demo.chat.events import Engine, Finished
from mllm_demo.chat.messages import Message
from mllm_demo.errors import DemoError
from mllm_demo.settings import Sampling, Settings
from mllm_demo.ui import words
from mllm_demo.ui.sessions import Sessions

log = logging.getLogger(__name__)


def add_ask_endpoint(engine: Engine, settings: Settings, sessions: Sessions, read: Callable) -> None:
    """Adds `/ask` to the page under construction; its components are never shown."""
    default = settings.sampling

    def ask(image, question, max_new_tokens, temperature, seed, request: gr.Request):
        """Asks the model about a picture. Returns the answer and the routing trace, a .safetensors file."""
        key = str(request.session_hash)
        stop = sessions.begin(key)
        try:
            if not image:
                raise DemoError(words.NO_FILE)
            if not (question or "").strip():
                raise DemoError(words.NOTHING_ASKED)
            sampling = Sampling(int(max_new_tokens), float(temperature), seed=int(seed))
            message = Message("user", (*read(image, Path(image).name), question.strip()))
            for event in engine.answer((message,), sampling, stop):
                if isinstance(event, Finished):
                    path = event.trace and str(sessions.save_trace(key, event.trace))
                    return event.text, path
        except DemoError as error:
            raise gr.Error(words.sentence(error), print_exception=False) from error
        except Exception as error:
            log.exception("/ask failed")
            raise gr.Error(words.UNEXPECTED, print_exception=False) from error
        raise gr.Error(words.UNEXPECTED, print_exception=False)

    with gr.Row(visible=False):
        inputs = [
            gr.File(label="image", type="filepath"),
            gr.Textbox(label="question"),
            gr.Number(default.max_new_tokens, label="max_new_tokens", precision=0),
            gr.Number(default.temperature, label="temperature"),
            gr.Number(default.seed, label="seed", precision=0),
        ]
        outputs = [gr.Textbox(label="answer"), gr.File(label="trace")]
        gr.Button("ask").click(ask, inputs, outputs, api_name="ask", concurrency_limit=None)
