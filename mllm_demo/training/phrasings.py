"""How every task is asked, in many words; the last phrasings of each are kept for evaluation only.

It knows nothing of scenes or answers.
"""

HELD_OUT_PHRASINGS = 2
PHRASINGS = {
    "naming": (
        "What is in the picture?", "What is this?", "What do you see?", "Name the object.",
        "Which object is shown?", "What does the image show?", "Can you tell me what this is?",
        "What object is in this image?", "Identify the object.", "What's that?", "what is it", "What is shown here?",
        "what is in this image", "Tell me what you see in this picture.", "What is pictured here?",
    ),
    "counting": (
        "Count how many {plural} are shown.", "How many {plural} can be counted?", "Number of {plural}?",
        "Could you count the {plural} for me?", "Are there any {plural}, and how many?",
        "How many {plural} are there?", "How many {plural} do you see?", "Count the {plural}.",
        "How many {plural} are in the picture?", "What is the number of {plural}?", "how many {plural}",
        "How many {plural} can you see in the image?", "Tell me how many {plural} there are.",
        "How many {plural} does the picture show?", "Please count the {plural} in this image.",
    ),
    "colour": (
        "Of what colour is the {name}?", "In which color is the {name} painted?", "Colour of the {name}?",
        "Say what colour the {name} is.", "Do you know the color of the {name}?",
        "What colour is the {name}?", "What color is the {name}?", "Which colour does the {name} have?",
        "Tell me the color of the {name}.", "What is the colour of the {name}?", "what color is the {name}",
        "Name the colour of the {name}.", "Which color is the {name}?", "The {name} has what color?",
    ),
    "shape": (
        "Which figure is {colour}?", "What kind of shape is {colour}?", "The {colour} thing is what shape?",
        "Say which shape is {colour}.", "Tell me what shape the {colour} one is.", "Tell me which shape is {colour}.",
        "Tell me the {colour} shape.", "Which shape does the {colour} one have?",
        "Is the {colour} thing a circle, a square, a triangle or a star?",
        "What form has the {colour} one?", "What does the {colour} shape look like?",
        "What shape is the {colour} thing?", "Which shape is {colour}?", "What is the {colour} shape?",
        "Name the {colour} shape.", "What {colour} shape is there?", "What is the shape of the {colour} figure?",
        "Tell me the shape that is {colour}.", "What shape does the {colour} figure have?",
    ),
    "presence": (
        "Is {a_name} in the picture?", "Is {a_name} shown?", "Can you find {a_name}?", "Do you notice {a_name}?",
        "Does {a_name} appear in the image?", "Is there {a_name} anywhere?",
        "Is there {a_name}?", "Is there {a_name} in the picture?", "Do you see {a_name}?", "Can you see {a_name}?",
        "Does the image show {a_name}?", "Is there {a_name} in this image?", "Does the picture contain {a_name}?",
        "Are you able to spot {a_name} here?", "Can {a_name} be seen in the image?",
    ),
    "relations": (
        "Relative to {the_other}, where is {the_name}?", "Compared with {the_other}, where is {the_name}?",
        "From {the_other}, in which direction is {the_name}?",
        "Looking from {the_other}, where do you find {the_name}?",
        "If you start at {the_other}, where is {the_name}?", "How is {the_name} placed with respect to {the_other}?",
        "Is {the_name} left of, right of, above or below {the_other}?",
        "In which direction from {the_other} is {the_name}?",
        "Where can {the_name} be found, as seen from {the_other}?",
        "Tell me where {the_name} is relative to {the_other}.",
        "How does {the_name} lie relative to {the_other}?", "Describe where {the_name} is, compared to {the_other}.",
        "What is the place of {the_name} in relation to {the_other}?", "Which side of {the_other} is {the_name} on?",
        "where is {the_name} from {the_other}", "With {the_other} as the reference, where is {the_name}?",
        "Where is {the_name} relative to {the_other}?", "Where is {the_name} compared with {the_other}?",
        "What is the position of {the_name} relative to {the_other}?", "On which side of {the_other} is {the_name}?",
        "Where does {the_name} stand in relation to {the_other}?", "Seen from {the_other}, where is {the_name}?",
    ),
    "grounding": (
        "What are the coordinates of {the_name}?", "Give me the coordinates of {the_name}.",
        "Where exactly is {the_name}?",
        "Draw a box around {the_name}.", "Mark {the_name} with a box.", "Point to {the_name}.",
        "Box of {the_name}, please.",
        "In which part of the picture is {the_name}?", "At which place is {the_name}?", "Which box holds {the_name}?",
        "What region does {the_name} cover?", "Return the bounding box for {the_name}.", "Where can I see {the_name}?",
        "Which area of the image shows {the_name}?", "What is the position of {the_name} in the image?",
        "Where is {the_name}?", "Locate {the_name}.", "Find {the_name}.", "Give the box of {the_name}.",
        "Where in the picture is {the_name}?", "where is {the_name}", "Show me where {the_name} is.",
        "What is the bounding box of {the_name}?", "In which place of the image is {the_name}?",
    ),
    "pointing": (
        "What does the region {box} show?", "Identify the thing in {box}.", "What can be seen at {box}?",
        "Say what is at {box}.", "{box}: what is there?",
        "What is at {box}?", "What is in the box {box}?", "Name the thing at {box}.", "What do you see at {box}?",
        "what is inside {box}", "Which thing is at {box}?", "Tell me what is inside the region {box}.",
    ),
    "reading": (
        "What are the words in the picture?", "Could you read that to me?", "What stands there?",
        "What has been written?", "What do you read in the photo?", "Which words does the picture show?",
        "Transcribe the text.",
        "Spell out what is written.", "What is the written text?", "Which text is in the image?", "Can you read this?",
        "Tell me what the text says.", "Read out what you see.", "What do the letters say?",
        "What word or number is this?",
        "What does it say?", "Read the text.", "What is written here?", "Read the word.",
        "What is the text in the picture?", "What text is shown?", "Which word do you see?", "what does the text say",
        "Read this.", "What does the picture say?", "What does this image say?", "What does the photo say?",
        "What does the sign say?", "What does the paper say?", "Say what the image says.", "what does this say",
        "What do the words say?", "Tell me what the picture says.", "What does the writing say?",
        "What does the image say?", "Please read what is written in the picture.",
    ),
    "word": (
        "What is written at {box}?", "Which word is at {box}?", "Read the text in {box}.", "What does {box} say?",
        "What does the text at {box} say?", "what can be read at {box}", "Which text do you see in {box}?",
        "Tell me the word inside {box}.", "Read what stands in the box {box}.", "{box}: what is written there?",
        "Which word stands at {box}?", "Read the word at {box}.",
    ),
    "largest": (
        "Who comes first by value?", "Which {part} beats all the others?", "What is the name of the largest {part}?",
        "Where is the most?", "What is the label of the highest {part}?",
        "Which {part} has the largest value?", "Where is the value highest?", "Which {part} is at the top?",
        "Name the largest {part}.", "What has the highest value?", "Which label is the greatest?",
        "Find the largest {part}.",
        "Which {part} is the largest?", "Which one is the highest?", "What is the largest {part}?",
        "Which label has the highest value?", "Which is the biggest?", "Which {part} has the greatest value?",
        "Name the {part} with the highest value.",
    ),
    "smallest": (
        "Who comes last by value?", "Which {part} is below all the others?", "What is the name of the smallest {part}?",
        "Where is the least?", "What is the label of the lowest {part}?",
        "Which {part} has the lowest value?", "Where is the value lowest?", "Which {part} is at the bottom?",
        "Name the smallest {part}.", "What has the lowest value?", "Which label is the least?",
        "Find the smallest {part}.",
        "Which {part} is the smallest?", "Which one is the lowest?", "What is the smallest {part}?",
        "Which label has the lowest value?", "Which is the least?", "Which {part} has the smallest value?",
        "Name the {part} with the lowest value.",
    ),
    "value": (
        "What amount is shown for {label}?", "What does {label} come to?", "How many does {label} have?",
        "What value do you read at {label}?", "What is drawn for {label}, as a number?", "{label}: what value?",
        "According to the chart, how much is {label}?", "What figure does the picture show for {label}?",
        "Which value belongs to {label}?", "What number does {label} show?", "Give the value of {label}.",
        "What value does the chart show for {label}?", "What does the chart say about {label}?",
        "What does the picture show for {label}?", "Say what {label} is worth.", "Value of {label}?",
        "How large is {label}?",
        "What is {label} worth?",
        "Which number stands at {label}?",
        "What is the value of {label}?", "What value does {label} have?", "How much is {label}?",
        "What is the number for {label}?", "how high is {label}", "Read the value of {label}.",
        "Tell me the value of {label}.", "What does the chart give for {label}?",
    ),
    "comparison": (
        "Is {label} above {second}?", "Is {label} ahead of {second}?", "Is {second} smaller than {label}?",
        "Would you say that {label} is more than {second}?",
        "Does {label} have a larger value than {second}?", "Is {label} greater than {second}?",
        "Does {label} beat {second}?",
        "Is there more of {label} than of {second}?", "Compared with {second}, is {label} larger?",
        "Is {label} larger than {second}?", "Is {label} higher than {second}?", "Does {label} have more than {second}?",
        "Is the value of {label} greater than that of {second}?", "Is {label} bigger than {second}?",
        "Has {label} a higher value than {second}?",
    ),
    "label": (
        "Which label has the {colour} {part}?", "What does the label of the {colour} {part} say?",
        "Read the {colour} {part}'s label.",
        "What is written for the {colour} {part}?", "The {colour} {part} is which one?",
        "Which label belongs to the {colour} {part}?", "What does the {colour} {part} stand for?",
        "What is the label of the {colour} {part}?", "Name the {colour} {part}.",
        "What is the {colour} {part} called?", "Which name does the {colour} {part} have?",
    ),
    "chart colour": (
        "In which colour is {label} drawn?", "Which color is {label}?", "What is the color of {label}'s {part}?",
        "Colour of {label}?", "Name the color of {label}.",
        "What colour is the {part} of {label}?", "What color is {label}?", "Which colour stands for {label}?",
        "What is the colour of {label}?", "Which color does {label} have?", "Tell me the colour of {label}.",
    ),
    "chart kind": (
        "Name the kind of chart.", "Which type of chart do you see?", "What type of diagram is this?",
        "Tell me what kind of chart this is.",
        "What kind of chart is this?", "What type of chart is shown?", "Which kind of diagram is this?",
        "what chart is this", "Is this a bar chart, a line chart, a pie chart or a table?",
        "What sort of chart do you see?", "Name the type of this diagram.",
    ),
    "chart count": (
        "What is the number of {parts}?", "How many {parts} can you see?", "How many {parts} are in the chart?",
        "How many {parts} are there?", "How many {parts} does it have?", "Count the {parts}.",
        "how many {parts} do you see", "How many {parts} are shown?", "Tell me the number of {parts}.",
    ),
    "caption": (
        "What is in this picture? Describe it.", "Give a description of the image.", "Say everything you see.",
        "Describe the picture.", "What can you see?", "List everything in the image.", "Describe this image.",
        "What are the things in the picture?", "Tell me about this picture.",
    ),
    "unanswerable": (
        "What colour is the {name}?", "How many wheels does the {name} have?", "Where is the {name}?",
        "Who made this picture?", "When was this picture taken?", "What is the name of the artist?",
        "What is the weather like tomorrow?", "How much does it cost?", "What is the person thinking?",
        "Who is the owner of the {name}?", "In which city was this taken?", "What happened before this picture?",
        "What is the phone number?", "What does the {name} weigh?", "Who took this picture?", "How old is the {name}?",
    ),
}  # fmt: skip
# Beside the picture's own things: what is asked after a first answer, about the same thing.
FOLLOW_UPS = {
    "colour": ("What colour is it?", "And its colour?", "Which color does it have?"),
    "grounding": ("Where is it?", "And where is it?", "Where exactly?"),
}


# What may stand before any question: a model that met "Tell me the" before few kinds of them took it for one of those.
OPENINGS = (
    "Tell me: {}", "Please tell me: {}", "Please: {}", "Hi! {}", "Hello, {}", "Look at the image. {}", "A question: {}",
    "I would like to know: {}", "Can you say: {}", "Now: {}", "And: {}", "From the picture: {}", "Quick question: {}",
)  # fmt: skip


def phrasings(task: str, held_out: bool) -> tuple[str, ...]:
    known = PHRASINGS[task]
    return known[-HELD_OUT_PHRASINGS:] if held_out else known[:-HELD_OUT_PHRASINGS]
