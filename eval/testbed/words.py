"""The closed world of the embedded models: colours, values, places, and the word-level vocabulary.

Everything here is frozen: the token ids of the shipped models follow from the order of these tuples.
"""

from __future__ import annotations

from vlmprune.embedded import COLOURS

COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
DIGITS: tuple[str, ...] = tuple(str(d) for d in range(10))
#: What an object can be: a shape or a handwritten digit.
VALUES: tuple[str, ...] = SHAPES + DIGITS
#: Index = 2 * (lower half) + (right half).
PLACES: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")

#: Colour x value pairs which no training picture, caption or question ever mentions.
UNSEEN_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {("red", "cross"), ("blue", "triangle"), ("yellow", "circle"), ("green", "square")}
)

#: What asks for a caption: a short one, and the long one that `scene-llava-long` was taught.
CAPTION, DESCRIBE = "describe the picture .", "describe the objects in the picture ."

CATEGORIES: tuple[str, ...] = ("exist", "colour", "shape", "where", "count", "digit", "relation")

SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = (
    "user: assistant: ? . , is there a an what colour shape which digit where how many objects object are "
    "the in picture describe left right above below of top bottom yes no nothing none shapes digits"
).split()
#: The whole vocabulary, special tokens first.
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys((*SPECIAL_TOKENS, *_WORDS, *COLOUR_NAMES, *VALUES, *(s + "s" for s in SHAPES)))
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'user: ' if message['role'] == 'user' else 'assistant: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

#: scene-qwen's: the same, and the marks around its pictures.
QWEN_VOCABULARY: tuple[str, ...] = (*VOCABULARY, "<vision>", "</vision>", "<video>")
QWEN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "{% if part['type'] == 'image' %}<image> {% endif %}",
    "{% if part['type'] in ('image', 'video') %}<vision> <{{ part['type'] }}> </vision> {% endif %}",
)
