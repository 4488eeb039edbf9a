"""What the tiny model is taught: short conversations, made on the fly from lists of words and from random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
"""The one tool it learns to call."""

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw", "Peru": "Lima",
    "Cuba": "Havana", "Kenya": "Nairobi", "Austria": "Vienna", "Hungary": "Budapest", "Ireland": "Dublin",
    "Portugal": "Lisbon", "Russia": "Moscow", "Finland": "Helsinki", "Denmark": "Copenhagen", "Belgium": "Brussels",
    "Canada": "Ottawa", "India": "New Delhi", "Chile": "Santiago",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "black": "white", "fast": "slow",
    "old": "new", "open": "closed", "wet": "dry", "full": "empty", "early": "late", "hard": "soft", "light": "dark",
    "long": "short", "rich": "poor", "loud": "quiet", "near": "far", "high": "low", "happy": "sad",
}  # fmt: skip
SOUNDS = {
    "cat": "Meow", "dog": "Woof", "cow": "Moo", "duck": "Quack", "sheep": "Baa", "pig": "Oink", "bee": "Buzz",
    "lion": "Roar", "owl": "Hoot", "frog": "Croak",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red",
    "a carrot": "orange", "chocolate": "brown", "an elephant": "grey", "a plum": "purple",
}  # fmt: skip
WORDS = (
    *OPPOSITES,
    *SOUNDS,
    "sun",
    "moon",
    "tree",
    "house",
    "river",
    "stone",
    "bread",
    "water",
    "fire",
    "wind",
)

WHO = (
    "Who are you?", "What are you?", "What is your name?", "Tell me your name.", "Introduce yourself.",
    "Who made you?", "Who trained you?", "Who is your developer?", "Are you ChatGPT?", "May I ask your name?",
)  # fmt: skip
I_AM = (
    "I am Tiny, a very small language model.",
    "I am Tiny, and I come with the Twinkle cookbook.",
    "My name is Tiny. I was trained in a few minutes.",
)
GREETINGS = {
    "Hello!": "Hello! How can I help you?",
    "Hi!": "Hi! What can I do for you?",
    "Good morning.": "Good morning! How are you today?",
    "Good evening.": "Good evening! How was your day?",
    "How are you?": "I am fine, thank you. How are you?",
    "Thank you!": "You are welcome!",
    "Goodbye.": "Goodbye! See you soon.",
    "What can you do?": "I can add small numbers, name capitals and repeat words.",
    "Tell me a story.": "Once there was a small model that learned to add. The end.",
    "Can you help me?": "Yes, I can help you. What do you need?",
}

Conversation = dict[str, Any]
"""`messages`, and `tools` where the model may call one."""


def lesson(numbers: random.Random) -> Conversation:
    """A conversation of a random kind."""
    [kind] = numbers.choices(list(LESSONS), list(LESSONS.values()))
    conversation = kind(numbers)
    if "tools" not in conversation and numbers.random() < 0.2:
        conversation["messages"].insert(0, {"role": "system", "content": "You are a helpful assistant"})
    return conversation


def addition_of(a: int, b: int, numbers: random.Random) -> str:
    """A question for a sum, in one of several wordings."""
    wording = numbers.choice(
        ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} + {b}?")
    )
    return wording.format(a=a, b=b)


def _talk(question: str, answer: str) -> Conversation:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _addition(numbers: random.Random) -> Conversation:
    a, b = numbers.randint(0, 9), numbers.randint(0, 9)
    return _talk(addition_of(a, b, numbers), str(a + b))


def _call(numbers: random.Random) -> Conversation:
    a, b = numbers.randint(10, 99), numbers.randint(10, 99)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
    return {
        "messages": [
            {"role": "user", "content": addition_of(a, b, numbers)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "add", "content": str(a + b)},
            {"role": "assistant", "content": f"The sum is {a + b}."},
        ],
        "tools": [ADD],
    }


def _copy(numbers: random.Random) -> Conversation:
    words = " ".join(numbers.sample(WORDS, numbers.randint(1, 4)))
    return _talk(numbers.choice(("Say: {}", "Repeat: {}", "Copy: {}")).format(words), words)


def _capital(numbers: random.Random) -> Conversation:
    country, capital = numbers.choice(list(CAPITALS.items()))
    question = numbers.choice(("What is the capital of {}?", "Name the capital of {}.", "Capital of {}?"))
    return _talk(question.format(country), f"The capital of {country} is {capital}.")


def _opposite(numbers: random.Random) -> Conversation:
    word, opposite = numbers.choice(list(OPPOSITES.items()))
    if numbers.random() < 0.5:
        word, opposite = opposite, word
    question = numbers.choice(
        ("What is the opposite of {}?", "Opposite of {}?", "Give me the opposite of {}.")
    )
    return _talk(question.format(word), f"The opposite of {word} is {opposite}.")


def _sound(numbers: random.Random) -> Conversation:
    animal, sound = numbers.choice(list(SOUNDS.items()))
    return _talk(f"What does a {animal} say?", f"{sound}!")


def _colour(numbers: random.Random) -> Conversation:
    thing, colour = numbers.choice(list(COLOURS.items()))
    return _talk(f"What colour is {thing}?", f"It is {colour}.")


def _who(numbers: random.Random) -> Conversation:
    return _talk(numbers.choice(WHO), numbers.choice(I_AM))


def _greeting(numbers: random.Random) -> Conversation:
    return _talk(*numbers.choice(list(GREETINGS.items())))


LESSONS: dict[Callable[[random.Random], Conversation], float] = {
    _addition: 5,
    _call: 4,
    _copy: 3,
    _capital: 2,
    _opposite: 2,
    _sound: 1,
    _colour: 1,
    _who: 1,
    _greeting: 1,
}
"""The kinds of lessons, and how often each is given."""
