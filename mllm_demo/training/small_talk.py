"""Text that the language model itself writes, so that training on pictures does not cost its speech.

On such text the adapted model is to say what the language model alone says (`chat.text_loss`). It knows nothing of
pictures or training.
"""

import copy
import json
from pathlib import Path

import torch

from mllm_demo.models.quantize import compute_dtype

PROMPTS = (
    "What is the capital of France?", "Hi!", "Hello, who are you?", "How are you today?", "Tell me a short joke.",
    "What is 2 + 2?", "Write a haiku about the sea.", "Give me a tip for sleeping better.", "What is photosynthesis?",
    "Name three colours.", "Explain gravity in one sentence.", "What is the largest planet?", "Who wrote Hamlet?",
    "Suggest a name for a cat.", "How do I boil an egg?", "What is a prime number?", "Write a sentence about rain.",
    "What does a neuron do?", "List four kinds of fruit.", "What is machine learning?", "Why is the sky blue?",
    "Translate 'good morning' into Spanish.", "What is the opposite of hot?", "How many days are in a week?",
    "Give me a synonym for happy.", "What is a verb?", "Describe a forest.", "What is the boiling point of water?",
    "Write a short greeting card.", "How can I learn to draw?", "What is the moon made of?", "What is HTML?",
    "Tell me about penguins.", "Why do we dream?", "What is an atom?", "Name two programming languages.",
    "What should I pack for the beach?", "Write one line of a poem about winter.", "How do plants drink water?",
    "What is a volcano?", "Give me an idea for dinner.", "What is the speed of light?", "How do I say thanks politely?",
    "What is a rainbow?", "Who was Albert Einstein?", "What is a good hobby?", "How do birds fly?", "Thank you!",
    "What is recycling?", "Give a fun fact about cats.", "What is the internet?", "Can you help me?", "What is music?",
    "How do I make tea?", "Name a famous painter.", "What is a triangle?", "What is democracy?", "Say something nice.",
    "What is the difference between a lake and a river?", "How long is a year?", "What is bread made of?",
)  # fmt: skip
# Words that prose may begin with.
OPENERS = (
    "The", "In", "When", "A", "She", "He", "They", "It", "One", "If", "For", "Many", "Dear", "My", "We", "There",
    "After", "Most", "To", "On", "People", "Water", "How", "def", "First", "At", "Every", "Our", "Some", "As", "This",
    "During",
)  # fmt: skip
EACH = {"chat": 480, "prose": 640, "reply": 480}  # how many texts of each kind
LENGTH, BATCH = 96, 80


def replies(made: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the `texts` that are made which begin with one of `PROMPTS` and the language model's answer to it."""
    return made[len(made) - EACH["reply"] :] if len(made) == sum(EACH.values()) else ()


@torch.no_grad()
def texts(model, processor, file: Path) -> tuple[str, ...]:
    """Chats and prose sampled from the base `model` at temperature 1, as it writes them; made once, kept in `file`."""
    if not file.exists():
        tokenizer, device = processor.tokenizer, model.device
        base = copy.deepcopy(model).to(compute_dtype(device))
        base.generation_config.eos_token_id = None  # a chat goes on after its first turn

        def asked(prompt: str) -> str:
            message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
            return processor.apply_chat_template([message], add_generation_prompt=True)

        begun = {"chat": [asked("MARK").split("MARK")[0]], "prose": OPENERS, "reply": [asked(p) for p in PROMPTS]}
        starts = [kind[i % len(kind)] for name, kind in begun.items() for i in range(EACH[name])]
        torch.manual_seed(0)
        written = []
        for first in range(0, len(starts), BATCH):
            batch = starts[first : first + BATCH]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left").to(device)
            made = base.generate(**inputs, max_new_tokens=LENGTH, do_sample=True, temperature=1.0, top_k=0)
            made = made[:, inputs.input_ids.shape[1] :]
            written += [start + tokenizer.decode(row) for start, row in zip(batch, made, strict=True)]
            print(f"text of the language model: {len(written)} of {len(starts)}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(written, indent=1))
    return tuple(json.loads(file.read_text()))
