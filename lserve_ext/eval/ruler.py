"""Tasks that are made up, with known answers: RULER's synthetic ones under the names that lm-eval-harness gives them
(Hsieh et al., 2024), a pass key, and records to be written as JSON.

All are plain completions: a prompt ends where the answer begins. What hides needles is `long_text`, or another.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from . import tasks
from .tasks import encode

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = ("amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "loud")
NOUNS = ("anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle")
CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Dublin", "Vienna", "Tunis", "Lima", "Prague")
JOBS = ("baker", "pilot", "nurse", "painter", "farmer", "teacher", "lawyer", "sailor", "tailor", "miner")
MOST_NEW_TOKENS = 120
"""Of any task."""
PEOPLE = ("Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to be gone on with."""

    ids: torch.Tensor
    """[1, tokens]."""
    answers: tuple[str, ...]
    """What should stand in what comes next."""
    new_tokens: int
    """That are enough for them."""

    def score(self, output: str) -> float:
        """The share of the answers that an output has, in any case of letters (RULER's string_match_all)."""
        return sum(answer.lower() in output.lower() for answer in self.answers) / len(self.answers)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a prompt is made.

    Args:
        tokenizer: the model's.
        length: the most tokens.
        depth: where a single needle stands, from 0 (the beginning) to 1 (the end).
        rng: draws all else.
        text: what needles lie in.
    """

    tokenizer: Any
    length: int
    depth: float
    rng: random.Random
    text: str

    def hide(self, head: str, facts: Sequence[str], end: str, hay: str | None = None) -> torch.Tensor:
        """Token ids [1, length]: facts between the paragraphs of the text, or of other hay."""
        depths = [self.depth] if len(facts) == 1 else sorted(self.rng.random() for _ in facts)
        needles = [(at, encode(self.tokenizer, f"{fact}\n\n")) for at, fact in zip(depths, facts, strict=True)]
        ids = tasks.hide(self.tokenizer, self.length, needles, encode(self.tokenizer, end), self.rng, hay or self.text,
                         head=head)  # fmt: skip
        return torch.tensor([ids])

    def longest(self, made: Callable[[int], str], most: int) -> torch.Tensor:
        """Token ids [1, at most length] of the longest of the texts that are made of 0, 1, ... most things."""
        low, high = 0, most + 1
        found = self.tokenizer(made(0)).input_ids
        if len(found) > self.length:
            raise ValueError(f"length: expected at least {len(found)} tokens for this task, got {self.length}")
        while high - low > 1:
            middle = (low + high) // 2
            ids = self.tokenizer(made(middle)).input_ids
            low, high, found = (middle, high, ids) if len(ids) <= self.length else (low, middle, found)
        return torch.tensor([found])


Task = Callable[[Setting], Prompt]


def passkey(setting: Setting) -> Prompt:
    """A pass key that is said twice where it stands, so that models too small for RULER's needles can find it."""
    ids, key = tasks.passkey_prompt(
        setting.tokenizer, setting.length, depth=setting.depth, seed=setting.rng.randrange(2**32), text=setting.text
    )
    return Prompt(ids, (key,), 8)


def niah(
    kind: Literal["number", "uuid"] = "number",
    hay: Literal["noise", "text", "needles"] = "text",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Task:
    """Needles in a haystack: so many keys of so many values each, of which some keys are asked for."""

    def make(setting: Setting) -> Prompt:
        rng = setting.rng

        def fact(key: str, value: str) -> str:
            return f"One of the special magic {kind}s for {key} is: {value}."

        def draw() -> str:
            return str(rng.randrange(10**6, 10**7)) if kind == "number" else str(uuid.UUID(int=rng.getrandbits(128)))

        names = rng.sample([f"{a}-{b}" for a in ADJECTIVES for b in NOUNS], keys)
        drawn = {name: [draw() for _ in range(values)] for name in names}
        facts = [fact(name, value) for name, of_name in drawn.items() for value in of_name]
        rng.shuffle(facts)
        asked = names[:queries]
        answers = tuple(value for name in asked for value in drawn[name])
        hays = {"text": lambda: setting.text, "noise": lambda: _noise(setting)}
        hays["needles"] = lambda: "\n\n".join(
            fact(f"{a}-{b}", draw()) for _ in range(setting.length // 2000 + 1) for a in ADJECTIVES for b in PEOPLE
        )
        plural, verb = ("", "is") if len(answers) == 1 else ("s", "are")
        head = f"Some special magic {kind}s are hidden within the following text. Make sure to memorize them.\n\n"
        end = f"\n\nThe special magic {kind}{plural} for {_and(asked)} mentioned in the provided text {verb}:"
        ids = setting.hide(head, facts, end, hays[hay]())
        return Prompt(ids, answers, (12 if kind == "number" else 40) * len(answers))

    return make


def variable_tracking(setting: Setting) -> Prompt:
    """A value that is handed through a chain of five variables."""
    rng = setting.rng
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = rng.randrange(10_000, 100_000)
    facts = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names))]
    head = "Memorize and track the chain of variable assignments hidden in the following text.\n\n"
    end = f"\n\nAccording to the chain in the text above, 5 variables are assigned the value {value}, they are:"
    return Prompt(setting.hide(head, facts, end, _noise(setting)), tuple(names), 40)


def common_words(setting: Setting) -> Prompt:
    """Ten words of a numbered list that come 30 times, others 3 times; below 4,096 tokens 10 times and once."""
    rng, (often, seldom) = setting.rng, (30, 3) if setting.length >= 4096 else (10, 1)
    words = rng.sample(_words(setting.text), 1500)
    common, others = words[:10], words[10:]

    def made(count: int) -> str:
        listed = common * often + others[:count] * seldom
        random.Random(0).shuffle(listed)
        rows = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        head = "Below is a numbered list of words. Memorize the ones that appear most often.\n\n"
        return f"{head}{rows}\n\nThe top 10 words that appear most often in the list are: 1."

    return Prompt(setting.longest(made, len(others)), tuple(common), 60)


def frequent_words(setting: Setting) -> Prompt:
    """The three most frequent words of a coded text, whose word k comes in proportion to k ** -2; the first is dots."""
    rng = setting.rng
    words = ["...", *("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(500))]

    def made(count: int) -> str:
        coded = [word for k, word in enumerate(words, 1) for _ in range(round(count * 0.6 * k**-2))]
        random.Random(0).shuffle(coded)
        head = "Read the following coded text and track the frequency of each coded word.\n\n"
        end = "According to the coded text above, the three most frequently appeared words, but for dots, are:"
        return f"{head}{' '.join(coded)}\n\n{end}"

    return Prompt(setting.longest(made, setting.length), tuple(words[1:4]), 40)


def json_records(setting: Setting) -> Prompt:
    """Facts on six people, to be gathered as JSON (after the task that LServe calls Text2JSON); two are done."""
    rng, names = setting.rng, setting.rng.sample(PEOPLE, 6)
    found = {name: (rng.choice(CITIES), rng.randrange(1920, 2005), rng.choice(JOBS)) for name in names}
    facts = [f"{name} was born in {city} in {year} and works as a {job}." for name, (city, year, job) in found.items()]

    def record(name: str) -> str:
        city, year, job = found[name]
        return f'{{"name": "{name}", "city": "{city}", "year": {year}, "job": "{job}"}}'

    rows = [record(name) for name in names]
    end = (
        "\n\nThe people in the text above, as JSON:\n\n" + "\n".join(rows[:2]) + f'\n{{"name": "{names[2]}", "city": "'
    )
    answers = tuple(row.split('"city": "')[1] for row in rows[2:])
    return Prompt(setting.hide("", facts, end), answers, MOST_NEW_TOKENS)


TASKS: dict[str, Task] = {
    "passkey": passkey,
    "niah_single_1": niah(hay="noise"),
    "niah_single_2": niah(),
    "niah_single_3": niah("uuid"),
    "niah_multikey_1": niah(keys=4),
    "niah_multikey_2": niah(hay="needles"),
    "niah_multikey_3": niah("uuid", hay="needles"),
    "niah_multivalue": niah(values=4),
    "niah_multiquery": niah(keys=4, queries=4),
    "ruler_vt": variable_tracking,
    "ruler_cwe": common_words,
    "ruler_fwe": frequent_words,
    "json": json_records,
}


def prompt(
    task: str, tokenizer: Any, length: int, *, depth: float = 0.5, seed: int = 0, text: str | None = None
) -> Prompt:
    """One prompt of a task, the same for the same arguments.

    Args:
        task: of `TASKS`.
        length: the most tokens.
        depth: where a single needle stands, from 0 (the beginning) to 1 (the end).
        seed: of all else.
        text: what needles lie in; by default `tasks.long_text`.

    Raises:
        ValueError: no such task; a length that it does not fit in, or that the text does not fill.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    rng = random.Random(f"{task} {length} {depth} {seed}")
    return TASKS[task](Setting(tokenizer, length, depth, rng, text or tasks.long_text()))


def _noise(setting: Setting) -> str:
    return "\n\n".join([NOISE] * (setting.length // 8 + 1))


def _words(text: str) -> list[str]:
    """Words of a text, each once."""
    found = {
        word for word in text.split() if word.isascii() and word.isalpha() and word.islower() and 4 <= len(word) <= 9
    }
    return sorted(found)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
