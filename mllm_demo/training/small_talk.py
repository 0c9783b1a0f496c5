"""Text-only questions whose answers the base model itself writes, so that training on pictures does not cost its chat.

It knows nothing of pictures or training.
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


INVENTED = 256  # prompts that the base model asks itself
TEMPERATURE, BATCH = 0.9, 64


@torch.no_grad()
def replies(model, processor, file: Path, max_new_tokens: int = 48) -> tuple[tuple[str, str], ...]:
    """(prompt, the base model's own greedy reply) pairs that ended at a sentence; kept in `file`.

    Beside the prompts above the base model invents some: what follows an opened user turn, sampled.
    """
    if not file.exists():
        tokenizer, device = processor.tokenizer, model.device
        base = copy.deepcopy(model).to(compute_dtype(device))

        def generate(texts: list[str], **how) -> list[str]:
            made = []
            for start in range(0, len(texts), BATCH):
                inputs = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True, padding_side="left")
                new = base.generate(**inputs.to(device), **how)[:, inputs.input_ids.shape[1] :]
                made += tokenizer.batch_decode(new, skip_special_tokens=True)
                print(f"small talk: {len(made)} of {len(texts)}", flush=True)
            return made

        def asked(prompt: str) -> str:
            message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
            return processor.apply_chat_template([message], add_generation_prompt=True)

        opened = asked("MARK").split("MARK")[0]
        torch.manual_seed(0)
        sampled = generate([opened] * INVENTED, max_new_tokens=40, do_sample=True, temperature=TEMPERATURE)
        invented = [text.strip() for text in sampled if text.strip().endswith(("?", ".")) and len(text) < 160]
        prompts = [*PROMPTS, *dict.fromkeys(invented)]
        answers = generate([asked(prompt) for prompt in prompts], max_new_tokens=max_new_tokens, do_sample=False)
        pairs = [(p, reply[: reply.rfind(".") + 1].strip()) for p, reply in zip(prompts, answers, strict=True)]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([pair for pair in pairs if pair[1]], indent=1))
    return tuple((prompt, reply) for prompt, reply in json.loads(file.read_text()))
