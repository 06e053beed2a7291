"""What the sample image model can draw, and the sentences that ask for it."""

import random

# Our word for each picture -> its Unicode CLDR short name, which finds the art.
LABELS = {
    "lion": "lion",
    "cat": "cat face",
    "dog": "dog face",
    "panda": "panda",
    "fox": "fox",
    "frog": "frog",
    "octopus": "octopus",
    "tiger": "tiger face",
    "koala": "koala",
    "pig": "pig face",
    "cow": "cow face",
    "rabbit": "rabbit face",
    "monkey": "monkey face",
    "unicorn": "unicorn",
    "penguin": "penguin",
    "owl": "owl",
    "bear": "bear",
    "turtle": "turtle",
    "whale": "spouting whale",
    "tropical fish": "tropical fish",
    "crab": "crab",
    "butterfly": "butterfly",
    "ladybug": "lady beetle",
    "snail": "snail",
    "bee": "honeybee",
    "elephant": "elephant",
    "sunflower": "sunflower",
    "rose": "rose",
    "tulip": "tulip",
    "cactus": "cactus",
    "mushroom": "mushroom",
    "palm tree": "palm tree",
    "christmas tree": "Christmas tree",
    "red apple": "red apple",
    "green apple": "green apple",
    "banana": "banana",
    "lemon": "lemon",
    "watermelon": "watermelon",
    "strawberry": "strawberry",
    "pineapple": "pineapple",
    "grapes": "grapes",
    "avocado": "avocado",
    "carrot": "carrot",
    "pizza": "pizza",
    "hamburger": "hamburger",
    "doughnut": "doughnut",
    "ice cream": "soft ice cream",
    "cupcake": "cupcake",
    "red heart": "red heart",
    "blue heart": "blue heart",
    "green heart": "green heart",
    "yellow heart": "yellow heart",
    "rocket": "rocket",
    "car": "automobile",
    "balloon": "balloon",
    "star": "star",
    "sun": "sun with face",
    "moon": "crescent moon",
    "rainbow": "rainbow",
    "umbrella": "umbrella with rain drops",
    "soccer ball": "soccer ball",
    "basketball": "basketball",
    "house": "house",
    "ghost": "ghost",
}

# Other words for the same picture; training uses them in a third of the captions.
SYNONYMS = {
    "red apple": ["apple"],
    "red heart": ["heart"],
    "hamburger": ["burger"],
    "doughnut": ["donut"],
    "soccer ball": ["football"],
    "tropical fish": ["fish"],
    "ladybug": ["ladybird"],
    "rabbit": ["bunny"],
    "car": ["automobile"],
    "moon": ["crescent moon"],
}

# Background word -> sRGB.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (22, 22, 26),
    "red": (212, 58, 58),
    "green": (92, 176, 96),
    "blue": (80, 138, 224),
    "yellow": (250, 214, 88),
    "pink": (246, 168, 200),
    "purple": (148, 108, 200),
}

_PHRASES = [
    "a 3d emoji of {a_label}, {colour} background",
    "a 3d emoji of {a_label} on {a_colour} background",
    "{a_label} on {a_colour} background",
    "{a_label}, {colour} background",
    "{label} emoji, {colour} background",
    "a 3d emoji of {label}, {colour} background",
    "{label} on {colour}",
]
_PHRASES_WITHOUT_BACKGROUND = ["a 3d emoji of {a_label}", "{a_label}", "{label}"]

# Words that a prompt may contain and the picture should ignore.
_FILLERS = [
    *("cute", "shiny", "glossy", "small", "big", "happy", "lovely", "nice", "beautiful"),
    *("simple", "colourful", "icon", "sticker", "picture", "drawing", "photo", "render"),
    *("illustration", "please", "one", "single", "plain", "bright", "soft", "detailed"),
]


def with_article(noun):
    """``"owl"`` -> ``"an owl"``; plural nouns get none."""
    if noun == "grapes":
        return noun
    return ("an " if noun[0] in "aeio" or noun == "umbrella" else "a ") + noun


def caption(label, background, phrase=_PHRASES[0]):
    """One caption; the default phrase is the one the documentation uses."""
    return phrase.format(
        label=label,
        a_label=with_article(label),
        colour=background,
        a_colour=with_article(background),
    )


def random_caption(label, background, rng: random.Random):
    """A caption in one of several phrasings, so that natural prompts work later."""
    if label in SYNONYMS and rng.random() < 1 / 3:
        label = rng.choice(SYNONYMS[label])
    phrases = _PHRASES
    if background == "white" and rng.random() < 0.3:
        phrases = _PHRASES_WITHOUT_BACKGROUND
    text = caption(label, background, rng.choice(phrases))
    if rng.random() < 0.1:
        words = text.split()
        words.insert(rng.randrange(len(words)), rng.choice(_FILLERS))
        text = " ".join(words)
    return text


def tokenizer_corpus(other_words):
    """Texts for fitting the tokenizer: every caption, the fillers, and ``other_words`` once."""
    names = list(LABELS) + [word for words in SYNONYMS.values() for word in words]
    texts = [caption(name, colour, p) for name in names for colour in BACKGROUNDS for p in _PHRASES]
    return texts + _FILLERS * 20 + list(other_words)
