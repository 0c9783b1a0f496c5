"""Whether a model that learned to see still speaks as its language model did: text alone, adapter on and off.

    python -m mllm_demo.training.language
    python -m mllm_demo.training.language --quantization none --show
    python -m mllm_demo.training.language --picture assets/examples/things.png     # and after talk of a picture

Perplexity of passages that were written for this measurement, and short instructions whose answers can be checked.
Switching the adapter off leaves the same language model in the same quantization, so the adapter is all that differs.
With a picture, the same instructions once more where a conversation began with it. It knows nothing of what pictures
show.
"""

import argparse
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional

from mllm_demo.models.loading import LoadedModel
from mllm_demo.settings import QUANTIZATIONS
from mllm_demo.training.replies import PICTURE, replies, turn
from mllm_demo.training.trained import HELP, load_trained

PASSAGES = (
    "The kitchen was quiet except for the clock. Maria put the kettle on, cut two slices of bread, and looked out "
    "at the garden, where the last apples of the year were still hanging on the tree. Her brother had promised to "
    "pick them before the first frost, but he had promised many things that autumn, and the ladder was still in "
    "the shed.",
    "Water moves in a cycle. The sun warms the sea and the land, and some of the water there becomes vapour. High "
    "in the air the vapour cools and turns into tiny drops, which we see as clouds. When the drops grow heavy "
    "enough, they fall as rain or snow, run into rivers, and return to the sea, where the cycle begins again.",
    "To make a simple vegetable soup, chop an onion, two carrots and a stick of celery. Cook them slowly in a "
    "little oil until they are soft. Add a litre of stock, a chopped potato and a bay leaf, and simmer for twenty "
    "minutes. Season with salt and pepper. If you like it smooth, use a blender before you serve it.",
    "A good password is long, hard to guess, and used in one place only. Names of pets and birthdays are poor "
    "choices, because other people can find them. A sentence of four or five unrelated words is easy to remember "
    "and takes a very long time to guess. A password manager can keep all of them for you.",
    "In 1903 two brothers flew a machine of wood, wire and cloth over a beach in North Carolina. The longest "
    "flight of that day took less than one minute. Within ten years, pilots were crossing the English Channel, and "
    "within seventy, people had walked on the Moon and come home again.",
    "Dear Mr. Alvarez, thank you for your letter of 3 May. We are sorry that the lamp you ordered arrived broken. "
    "A new one was sent this morning and should reach you by Friday. You need not return the old one. As an "
    "apology, we have added a voucher that you can use with your next order. Kind regards, Hannah Lowe, customer "
    "service.",
    "The heart is a muscle about as large as a fist. It pumps blood through two loops: one to the lungs, where the "
    "blood takes up oxygen, and one to the rest of the body, where it gives the oxygen away. Valves between its "
    "chambers make sure that the blood moves in one direction only.",
    "def average(numbers):\n    total = 0\n    for number in numbers:\n        total = total + number\n    return "
    "total / len(numbers)\n\nThis function adds all numbers in a list and divides the sum by how many there are. "
    "It fails when the list is empty, because dividing by zero is not allowed.",
    "Nobody in the village believed that the old bridge would last another winter. Every spring the river rose a "
    "little higher, and every spring the mayor said that next year there would be money for a new one. When it "
    "finally fell, on a clear day in June without any wind, no one was on it but a dog, and the dog could swim.",
    "Bees tell each other where flowers are by dancing. A bee that has found a good place returns to the hive and "
    "walks in the shape of an eight. The direction of the middle line shows the angle to the sun, and the longer "
    "the bee shakes on its way, the farther the flowers are.",
    "The price of a thing depends on how many people want it and how much of it there is. If the harvest of "
    "oranges is small, shops pay more for each of them and so do their customers. Some customers then buy apples "
    "instead, and the price of apples rises too.",
    "Learning an instrument takes patience. Ten minutes every day are worth more than two hours on Sunday, because "
    "the hands remember what they do often. Begin with pieces that are slightly too easy, play them slowly, and "
    "repeat the bar in which you stumble rather than the whole piece.",
    "Question: Why do leaves change their colour in autumn? Answer: In summer, leaves are full of a green "
    "substance that catches sunlight. When the days grow short, the tree stops making it. The green fades, and "
    "yellow and orange substances that were there all along can be seen.",
    "The train to the coast leaves at ten past eight from platform four. It stops at every station, so the journey "
    "takes nearly three hours, but the view over the bay makes up for it. Sit on the left side, bring something to "
    "eat, and do not leave your umbrella at home, whatever the forecast says.",
    "Glass is made from sand, soda and lime, which are melted together at more than a thousand degrees. While it "
    "is soft it can be blown, pressed or drawn into sheets. Old glass can be melted again and again without "
    "becoming any worse, which is why bottles are worth collecting.",
    "She opened the letter twice before she understood it. The house was hers: the roof that leaked, the roses "
    "that nobody had cut for years, and the piano that her aunt had played every evening with the windows open. "
    "She had never wanted a house. By the end of the summer she could not imagine living anywhere else.",
)

# Prompt, and what the answer must hold; none of them is among those that training takes its small talk from.
INSTRUCTIONS = (
    ("What is the capital of Italy?", r"\brome\b"),
    ("What is the capital of Japan?", r"\btokyo\b"),
    ("What is the capital of Germany?", r"\bberlin\b"),
    ("Which planet is known as the red planet?", r"\bmars\b"),
    ("What is 3 + 4?", r"\b(7|seven)\b"),
    ("What is 10 - 6?", r"\b(4|four)\b"),
    ("What is 5 times 2?", r"\b(10|ten)\b"),
    ("How many legs does a spider have?", r"\b(8|eight)\b"),
    ("How many months are in a year?", r"\b(12|twelve)\b"),
    ("How many minutes are in an hour?", r"\b(60|sixty)\b"),
    ("What is the opposite of up?", r"\bdown\b"),
    ("What is the opposite of cold?", r"\b(hot|warm)\b"),
    ("What is the opposite of big?", r"\b(small|little|tiny)\b"),
    ("What is the plural of child?", r"\bchildren\b"),
    ("What is the past tense of go?", r"\bwent\b"),
    ("What gas do people need to breathe?", r"\boxygen\b"),
    ("What is the chemical symbol of water?", r"h2o|h₂o"),
    ("Who painted the Mona Lisa?", r"\bleonardo|\bda vinci"),
    ("Who wrote Romeo and Juliet?", r"\bshakespeare\b"),
    ("Which ocean lies between Europe and America?", r"\batlantic\b"),
    ("On which continent is Egypt?", r"\bafrica\b"),
    ("What language is spoken in Brazil?", r"\bportuguese\b"),
    ("What do bees make?", r"\bhoney\b"),
    ("What do cows drink?", r"\b(water|milk)\b"),
    ("What color is a banana?", r"\byellow\b"),
    ("What color is grass?", r"\bgreen\b"),
    ("What is the freezing point of water in degrees Celsius?", r"\b(0|zero)\b"),
    ("What is the first letter of the English alphabet?", r"['\"]a['\"]|\bis a\W*$|^a\W*$"),
    ("What day comes after Monday?", r"\btuesday\b"),
    ("What month comes after June?", r"\bjuly\b"),
    ("Name an animal that can fly.", r"\b(bird|eagle|bat|owl|hawk|butterfl|bee|parrot|hummingbird|penguin)"),
    ("Name a fruit that is red.", r"\b(apple|strawberr|cherr|raspberr|tomato|watermelon|pomegranate)"),
    ("Name a country in South America.", r"\b(brazil|argentina|chile|peru|colombia|bolivia|ecuador|uruguay|venezuela)"),
    ("Name a musical instrument.", r"\b(guitar|piano|violin|drum|flute|trumpet|cello|harp|saxophone)"),
    ("Translate 'thank you' into French.", r"\bmerci\b"),
    ("Translate 'hello' into Spanish.", r"\bhola\b"),
    ("Is the sun a star or a planet?", r"\bstar\b"),
    ("Is a whale a fish or a mammal?", r"\bmammal\b"),
    ("Complete the sentence: Roses are red, violets are", r"\bblue\b"),
    ("Write the number seven in digits.", r"\b7\b"),
)  # fmt: skip


@torch.inference_mode()
def perplexity(loaded: LoadedModel) -> float:
    """exp of the mean cross entropy over every token of `PASSAGES` but the first of each."""
    tokenizer, total, count = loaded.processor.tokenizer, 0.0, 0
    for passage in PASSAGES:
        ids = tokenizer(passage, return_tensors="pt").input_ids.to(loaded.device)
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def after(loaded: LoadedModel, picture: Image.Image) -> list[dict]:
    """How a conversation about `picture` begins: a question, and what the model answers."""
    asked = turn("user", "What is in the picture?", PICTURE)
    return [asked, turn("assistant", replies(loaded, [[asked]], [picture])[0])]


def followed(said: list[str]) -> list[bool]:
    """Which of `INSTRUCTIONS` the replies answer."""
    return [bool(re.search(wanted, reply.lower())) for (_, wanted), reply in zip(INSTRUCTIONS, said, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="nf4")
    parser.add_argument("--bundle", type=Path, help=HELP)
    parser.add_argument("--picture", type=Path, help="ask the instructions after talk of this picture, too")
    parser.add_argument("--show", action="store_true", help="print the replies that differ in being right")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    loaded = load_trained(options.quantization, options.bundle)
    prompts, found, right = [prompt for prompt, _ in INSTRUCTIONS], {}, {}
    for name in ("language model alone", "with the adapter"):
        with loaded.model.disable_adapter() if name == "language model alone" else nullcontext():
            said = replies(loaded, [[turn("user", prompt)] for prompt in prompts])
            right[name] = list(zip(followed(said), said, strict=True))
            found[name] = {"perplexity": round(perplexity(loaded), 2), "right": sum(ok for ok, _ in right[name])}
        print(f"{name}: perplexity {found[name]['perplexity']}, {found[name]['right']} of {len(prompts)} instructions")
    alone, adapted = (each["perplexity"] for each in found.values())
    print(f"perplexity {adapted / alone - 1:+.1%}")
    if options.show:
        for prompt, (was, old), (now, new) in zip(prompts, *right.values(), strict=True):
            if was != now:
                print(f"    {prompt} → {old!r}, now {new!r}")
    if options.picture:
        picture = Image.open(options.picture).convert("RGB")
        begun = after(loaded, picture)
        said = replies(loaded, [[*begun, turn("user", prompt)] for prompt in prompts], [picture] * len(prompts))
        found["after a picture"] = {"right": sum(followed(said))}
        print(f"after a picture: {found['after a picture']['right']} of {len(prompts)} instructions")
        for prompt, reply in zip(prompts, said, strict=True) if options.show else ():
            print(f"    {prompt} → {reply!r}")
    if options.out:
        options.out.write_text(json.dumps(found | {"quantization": options.quantization}, indent=1) + "\n")


if __name__ == "__main__":
    main()
