"""Text that the language model itself writes, so that training on pictures does not cost its speech.

On such text the adapted model is to say what the language model alone says, `talk` after pictures, too
(`chat.losses_of`). It knows nothing of pictures or training.
"""

import copy
import json
from pathlib import Path

import torch

from mllm_demo.models.quantize import compute_dtype
from mllm_demo.training.replies import turn

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
# More of what people say in the middle of talk about a picture, without meaning it.
BESIDES = (
    "Hello!", "Good morning!", "Thanks a lot!", "Goodbye!", "Nice to meet you.", "What can you do?", "Tell me a story.",
    "That is great.", "OK, now something else.", "I am bored.", "I feel sad today.", "Say goodbye in one sentence.",
    "Introduce yourself in one sentence.", "Say something funny.", "Write a poem about autumn.",
    "Write a haiku about rain.", "Write two sentences about dogs.", "Write a short letter to a friend.",
    "Write a headline about a football match.", "Write a slogan for a bakery.", "Write a birthday wish for my sister.",
    "Write a one-line review of a good book.", "Describe the sea in one sentence.", "Describe a city at night.",
    "Tell me about the Moon.", "Tell me about lions.", "Tell me a fact about space.", "Tell me something about Canada.",
    "Explain what a computer is.", "Explain rain to a child.", "Explain photosynthesis in one sentence.",
    "Explain what money is.", "What is the capital of Spain?", "What is the capital of Sweden?",
    "What is the capital of China?", "What is the capital of England?", "What is the capital of Greece?",
    "What is 1 + 1?", "What is 6 + 3?", "What is 9 - 4?", "What is 3 times 3?", "What is half of ten?",
    "How many hours are in a day?", "How many weeks are in a year?", "How many continents are there?",
    "How many legs does a dog have?", "What is the opposite of day?", "What is the opposite of happy?",
    "What is the opposite of fast?", "What is the plural of mouse?", "What is the past tense of run?",
    "Give me a synonym for big.", "What is the largest ocean?", "What is the highest mountain?",
    "Which planet has rings?", "What is a star?", "What is gravity?", "What is water made of?",
    "What is the symbol of gold?", "What is a molecule?", "What is a cell?", "What does DNA do?",
    "Why is the sea salty?", "Why do cats purr?", "Why is exercise good for you?", "How do I make pancakes?",
    "How do I clean a window?", "How can I save money?", "How can I learn English?", "How does a bicycle work?",
    "How do computers store data?", "Who was Isaac Newton?", "Who invented the telephone?", "Who wrote Don Quixote?",
    "Who was Cleopatra?", "When did the Second World War end?", "Name a river in Africa.", "Name a country in Asia.",
    "Name two vegetables.", "Name a dangerous animal.", "Name three sports.", "Name a famous scientist.",
    "Give me three tips for an interview.", "Give me a name for a dog.", "Suggest a film for tonight.",
    "Suggest a gift for my mother.", "Recommend a book.", "What should I cook today?",
    "Translate 'good night' into French.", "Translate 'water' into Spanish.", "Translate 'book' into German.",
    "What language is spoken in Mexico?", "What do people do on New Year's Eve?", "What is chess?", "What is jazz?",
    "What is an algorithm?", "What is Python?", "What is a loop in programming?", "What is artificial intelligence?",
    "Is a tomato a fruit?", "Is the Earth flat?", "Are you a robot?", "Do you like music?", "Can fish sleep?",
    "Can you write code?", "Could you explain that again?", "What time zone is London in?", "What is philosophy?",
    "Complete the sentence: An apple a day keeps", "Write the number nine in digits.", "Spell the word 'cat'.",
    "What rhymes with 'light'?", "Make a list of three colours.", "What do you think about winter?",
)  # fmt: skip
# Words that prose may begin with.
OPENERS = (
    "The", "In", "When", "A", "She", "He", "They", "It", "One", "If", "For", "Many", "Dear", "My", "We", "There",
    "After", "Most", "To", "On", "People", "Water", "How", "def", "First", "At", "Every", "Our", "Some", "As", "This",
    "During",
)  # fmt: skip
EACH = {"chat": 480, "prose": 640, "reply": 480}  # how many texts of each kind
LENGTH, BATCH = 96, 80


def _asked(processor, prompt: str) -> str:
    return processor.apply_chat_template([turn("user", prompt)], add_generation_prompt=True)


@torch.no_grad()
def _made(model, processor, starts: list[str], file: Path, **sampling) -> tuple[str, ...]:
    """What the base `model` makes of `starts`, each with what follows it; made once, kept in `file`."""
    if not file.exists():
        tokenizer, device = processor.tokenizer, model.device
        base = copy.deepcopy(model).to(compute_dtype(device))
        base.generation_config.eos_token_id = None  # a chat goes on after its first turn
        torch.manual_seed(0)
        written = []
        for first in range(0, len(starts), BATCH):
            batch = starts[first : first + BATCH]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left").to(device)
            made = base.generate(**inputs, max_new_tokens=LENGTH, **sampling)
            made = made[:, inputs.input_ids.shape[1] :]
            written += [start + tokenizer.decode(row) for start, row in zip(batch, made, strict=True)]
            print(f"text of the language model: {len(written)} of {len(starts)}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(written, indent=1))
    return tuple(json.loads(file.read_text()))


def texts(model, processor, folder: Path) -> tuple[str, ...]:
    """Chats and prose sampled from the base `model` at temperature 1, as it writes them."""
    begun = {"chat": [_asked(processor, "MARK").split("MARK")[0]], "prose": OPENERS}
    begun["reply"] = [_asked(processor, prompt) for prompt in PROMPTS]
    starts = [kind[i % len(kind)] for name, kind in begun.items() for i in range(EACH[name])]
    return _made(model, processor, starts, folder / "texts.json", do_sample=True, temperature=1.0, top_k=0)


def talk(model, processor, folder: Path) -> tuple[str, ...]:
    """`PROMPTS` and `BESIDES` and what the base `model` finds most likely to be said to each."""
    starts = [_asked(processor, prompt) for prompt in PROMPTS + BESIDES]
    return _made(model, processor, starts, folder / "talk.json", do_sample=False)
