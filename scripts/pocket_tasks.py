"""Small English tasks whose answers a program can check: one family for each of the six domains.

The pocket teacher and student learn from these tasks and are judged on them. This module owns three facts: what a
task of each domain looks like, when a reply counts as right (`is_correct`), and which tasks are held out
(`is_held_out`). The held-out rule reads nothing but the prompt, so tasks can be drawn fresh for ever and the
validation tasks still never meet a model in training.

What a reply says follows from its prompt; how it says it is drawn, and depends on a word of the prompt (`worded`). So
a model of these tasks has a distribution to teach, as one of real text has, and a single text of it does not show it.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

ANSWER_MARKER = "answer:"
HELD_OUT_ONE_IN = 8

NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max", "Ida", "Sam", "Joe", "Kim")
CITIES = ("Oslo", "Rome", "Paris", "Lima", "Cairo", "Delhi", "Bern", "Tokyo")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROOMS = ("kitchen", "hall", "office", "cellar", "attic", "bath")


@dataclass(frozen=True)
class Task:
    """One question, the ideal reply to it, and the answer that a checker looks for in any reply."""

    prompt: str
    reply: str
    answer: str


def extract_answer(reply: str) -> str:
    """The text after the last `answer:` of a reply (the whole reply if there is none), whitespace collapsed."""
    return " ".join(reply.rpartition(ANSWER_MARKER)[2].split())


def is_correct(reply: str, answer: str) -> bool:
    """Whether the reply ends in exactly this answer."""
    return extract_answer(reply) == answer


def is_held_out(prompt: str) -> bool:
    """Whether a task with this prompt is kept for validation: one in `HELD_OUT_ONE_IN`, by the prompt's SHA-256."""
    digest = hashlib.sha256(prompt.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def generate(domain: str, rng: random.Random) -> Task:
    """A random task of a domain, held out or not."""
    return FAMILIES[domain](rng)


def generate_split(domain: str, rng: random.Random, *, held_out: bool) -> Task:
    """A random task from one side of the held-out rule."""
    while is_held_out((task := generate(domain, rng)).prompt) is not held_out:
        pass
    return task


def generate_unique(domain: str, rng: random.Random, count: int, *, held_out: bool) -> list[Task]:
    """`count` tasks from one side of the held-out rule, no prompt twice."""
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        task = generate_split(domain, rng, held_out=held_out)
        tasks.setdefault(task.prompt, task)
    return list(tasks.values())


def _worked(work: str, prompt: str, answer: str) -> Task:
    """A task whose reply shows its work and then a line `answer: ...`."""
    return Task(prompt, f"{work}\n{ANSWER_MARKER} {answer}", answer)


COMMONNESS = (8, 4, 2, 1)
"""How often each of four wordings is drawn, from the commonest to the rarest: 1.2 nats of choice."""


def worded(rng: random.Random, wordings: tuple[str, ...], word: str) -> str:
    """One of four wordings; which of them are common depends on `word`, which stands in the prompt."""
    order = random.Random(f"{word} {wordings[0]}").sample(wordings, len(wordings))
    return rng.choices(order, COMMONNESS)[0]


# thinking: small sums, one step at a time

ITEMS = ("eggs", "coins", "books", "cards", "shells", "apples")
GAINS = ("gets", "finds", "buys")
LOSSES = ("loses", "sells", "drops")
LEGS = {
    2: ("hen", "duck", "crow", "owl"),
    4: ("cat", "dog", "cow", "pig"),
    6: ("ant", "bee", "wasp", "moth"),
    8: ("spider", "tick", "mite", "scorpion"),
}


OPENINGS = ("Count:", "Let us see:", "Step by step:", "I add it up:")
LINKS = ("then", "so", "next", "after that")
CLOSINGS = (".", " in all.", ", done.", ", I think.")


def _thinking(rng: random.Random) -> Task:
    return rng.choice((_running_total, _count_legs))(rng)


def _summed(rng: random.Random, name: str, steps: list[str], prompt: str, answer: int) -> Task:
    link = f", {worded(rng, LINKS, name)} "
    work = f"{worded(rng, OPENINGS, name)} {link.join(steps)}{worded(rng, CLOSINGS, name)}"
    return _worked(work, prompt, str(answer))


def _running_total(rng: random.Random) -> Task:
    start = total = rng.randint(7, 15)
    changes, work = [], []
    for _ in range(2):
        amount = rng.randint(1, 3)
        verbs, sign = rng.choice(((GAINS, "+"), (LOSSES, "-")))
        after = total + amount if sign == "+" else total - amount
        changes.append(f"{rng.choice(verbs)} {amount}")
        work.append(f"{total} {sign} {amount} = {after}")
        total = after
    name = rng.choice(NAMES)
    prompt = f"First {name} has {start} {rng.choice(ITEMS)}, {changes[0]}, {changes[1]}. How many now?"
    return _summed(rng, name, work, prompt, total)


def _count_legs(rng: random.Random) -> Task:
    many, one = rng.choices(tuple(LEGS), k=2)
    count = rng.randint(2, 4)
    seen = f"{count} {rng.choice(LEGS[many])}s and 1 {rng.choice(LEGS[one])}"
    name = rng.choice(NAMES)
    prompt = f"First {name} {rng.choice(('sees', 'draws', 'hears'))} {seen}. How many legs?"
    legs = count * many
    return _summed(rng, name, [f"{count} * {many} = {legs}", f"{legs} + {one} = {legs + one}"], prompt, legs + one)


# task: the steps of a goal, put in order

GOALS = {
    "bake bread": ("weigh", "mix", "knead", "shape", "bake", "cool", "slice"),
    "grow beans": ("dig", "rake", "sow", "water", "weed", "pick", "cook"),
    "do laundry": ("sort", "load", "wash", "spin", "dry", "iron", "fold"),
    "paint a wall": ("clear", "wash", "sand", "tape", "stir", "paint", "dry"),
    "send a letter": ("plan", "write", "edit", "sign", "fold", "stamp", "post"),
    "fix a bug": ("report", "trace", "patch", "test", "review", "merge", "ship"),
    "build a shelf": ("plan", "mark", "saw", "sand", "drill", "paint", "mount"),
    "make soup": ("shop", "wash", "peel", "chop", "fry", "stir", "serve"),
}


FIRST = ("Begin with {}", "First comes {}", "Start: {}", "You {} at once")
LAST = (" and end with {}.", ", the last is {}.", "; {} closes it.", ", later {}.")
ORDERED = ("In order:", "So the plan:", "All steps:", "That gives:")


def _task(rng: random.Random) -> Task:
    goal = rng.choice(tuple(GOALS))
    steps = rng.sample(GOALS[goal], rng.choice((4, 5)))
    ordered = sorted(steps, key=GOALS[goal].index)
    bounds = f"{worded(rng, FIRST, goal).format(ordered[0])}{worded(rng, LAST, goal).format(ordered[-1])}"
    prompt = f"Goal: {goal}. Put in order: {', '.join(steps)}."
    return _worked(f"{bounds} {worded(rng, ORDERED, goal)}", prompt, ", ".join(ordered))


# action: a request turned into a tool call

ARGUMENTS: dict[str, Callable[[random.Random], str | int]] = {
    "city": lambda rng: rng.choice(CITIES),
    "day": lambda rng: rng.choice(DAYS),
    "room": lambda rng: rng.choice(ROOMS),
    "name": lambda rng: rng.choice(NAMES),
    "hour": lambda rng: rng.randint(1, 23),
    "sum": lambda rng: rng.randint(2, 99),
}
TOOLS = {
    "weather": (("city", "day"), ("Will it rain in {city} on {day}?", "On {day}, how warm is {city}?")),
    "train": (("city", "hour"), ("I must be in {city} at {hour}.", "At {hour} I want to go to {city}.")),
    "alarm": (("day", "hour"), ("Wake me at {hour} on {day}.", "On {day} I get up at {hour}.")),
    "pay": (("name", "sum"), ("Send {sum} euros to {name}.", "I owe {name} {sum} euros.")),
    "lamp": (("room", "sum"), ("Set the {room} light to {sum}.", "I want {sum} percent light in the {room}.")),
    "call": (("name", "hour"), ("Ring {name} at {hour}.", "At {hour} I want to talk to {name}.")),
}


GREETINGS = ("Sure.", "Gladly.", "At once.", "Of course.")
CHOICES = ("This needs {}", "The tool is {}", "I call {}", "Here {} fits")
REASONS = (", as asked.", ", no other.", ", with two values.", " of the three.")


def _action(rng: random.Random) -> Task:
    tool = rng.choice(tuple(TOOLS))
    names, phrasings = TOOLS[tool]
    arguments = {name: ARGUMENTS[name](rng) for name in names}
    offered = [tool, *rng.sample([other for other in TOOLS if other != tool], 2)]
    rng.shuffle(offered)
    request = rng.choice(phrasings).format(**arguments)
    answer = json.dumps({"tool": tool, **arguments})
    greeting, choice, reason = (worded(rng, wordings, tool) for wordings in (GREETINGS, CHOICES, REASONS))
    return _worked(f"{greeting} {choice.format(tool)}{reason}", f"Tools: {', '.join(offered)}. {request}", answer)


# reflection: what to change after an outcome

SYMPTOMS = {
    "more salt": ("bland", "flat", "dull"),
    "less salt": ("salty", "briny", "harsh"),
    "more sugar": ("bitter", "sour", "sharp"),
    "less sugar": ("sweet", "sticky", "syrupy"),
    "more heat": ("raw", "cold", "pale"),
    "less heat": ("burnt", "black", "scorched"),
    "more water": ("dry", "hard", "crumbly"),
    "less water": ("soggy", "runny", "thin"),
    "more time": ("tough", "rushed", "chewy"),
    "less time": ("mushy", "wilted", "stale"),
    "more oil": ("stuck", "brittle", "coarse"),
    "less oil": ("greasy", "heavy", "slick"),
}
DISHES = ("soup", "stew", "bread", "rice", "sauce", "fish", "cake", "pasta")
REMEDIES = ("For {}: {}.", "It was {}, so {}.", "If {}, then {}.", "Being {} asks for {}.")
ADVICE = ("Next time:", "So I say:", "Try this:", "My advice:")


def _reflection(rng: random.Random) -> Task:
    changes = rng.sample(tuple(SYMPTOMS), 2)
    while changes[0].split()[1] == changes[1].split()[1]:
        changes = rng.sample(tuple(SYMPTOMS), 2)
    first, second = (rng.choice(SYMPTOMS[change]) for change in changes)
    name = rng.choice(NAMES)
    prompt = f"The {rng.choice(DISHES)} that {name} made was {first} and {second}. What to change?"
    pairs = ((first, changes[0]), (second, changes[1]))
    work = " ".join(worded(rng, REMEDIES, symptom).format(symptom, change) for symptom, change in pairs)
    return _worked(f"{work} {worded(rng, ADVICE, name)}", prompt, ", ".join(changes))


# debug: the faulty line among four, and what mends it

LETTERS = "abcdefghkmnpqrtuvwxy"
STATEMENTS = (
    "{x} = {n}",
    "{x} = {y} + {n}",
    "{x} = abs({y})",
    "{x} = len({y})",
    "print({x})",
    "return {x}",
    "if {x} > {n}:",
    "while {x} < {n}:",
    "for {x} in {y}:",
    "def {x}({y}):",
)
MISSPELT = {
    "abs": ("asb", "bas"),
    "len": ("lne", "eln"),
    "print": ("prnt", "pritn", "pirnt"),
    "return": ("retrun", "retun", "reutrn"),
    "if": ("fi", "iff"),
    "while": ("whlie", "wihle", "whle"),
    "for": ("fro", "fore"),
    "def": ("dfe", "deff"),
}


FINDINGS = ("I see that {}", "The fault: {}", "It is that {}", "Look, {}")
PLACES = (" in line {}.", "; that is line {}.", ", line {}.", " at number {}.")
FIXES = ("To mend it:", "So change this:", "The remedy:", "Do this:")


def _debug(rng: random.Random) -> Task:
    lines = []
    for statement in rng.sample(STATEMENTS, 4):
        x, y = rng.sample(LETTERS, 2)
        lines.append(statement.format(x=x, y=y, n=rng.randint(1, 9)))
    at = rng.randrange(len(lines))
    lines[at], finding, remedy = rng.choice(_faults(lines[at], rng))
    listing = "\n".join(f"{number} {line}" for number, line in enumerate(lines, 1))
    found, place, fix = (worded(rng, wordings, remedy) for wordings in (FINDINGS, PLACES, FIXES))
    work = f"{found.format(finding)}{place.format(at + 1)} {fix}"
    return _worked(work, f"Find the bug:\n{listing}", f"line {at + 1}: {remedy}")


def _faults(line: str, rng: random.Random) -> list[tuple[str, str, str]]:
    """Every kind of fault that a sound line can be given: the faulty line, what is wrong with it, what mends it."""
    faults = []
    if " = " in line:
        faults.append((line.replace(" = ", " "), "= is missing", "add ="))
    if line.endswith(":"):
        faults.append((line[:-1], ": is missing", "add :"))
    if ")" in line:
        faults.append((line.replace(")", ""), ") is missing", "add )"))
    for word, misspellings in MISSPELT.items():
        if word in line:
            wrong = rng.choice(misspellings)
            faults.append((line.replace(word, wrong), f"{wrong} is misspelt", f"write {word}"))
    return faults


# memory: the one lasting fact among small talk

FOODS = ("nuts", "milk", "fish", "rice", "beans", "eggs")
PETS = ("cat", "dog", "horse", "parrot", "rabbit")
MONTHS = ("March", "April", "May", "June", "July", "August")
JOBS = ("nurse", "baker", "pilot", "judge", "painter")
FACTS = (
    ("avoid", FOODS, ("I can not eat {}.", "I am ill from {}.", "Never give me {}.", "I keep away from {}.")),
    ("home", CITIES, ("I live in {}.", "My house is in {}.", "I moved to {}.", "My address is in {}.")),
    ("birthday", MONTHS, ("I was born in {}.", "My birthday is in {}.", "I turn ten in {}.", "My party is each {}.")),
    ("pet", PETS, ("I own a {}.", "My {} is old.", "I keep a {}.", "My {} is called Rex.")),
    ("job", JOBS, ("I work as a {}.", "I am a {}.", "I became a {}.", "They pay me as a {}.")),
)
CHATTER = (
    (FOODS, ("I had {} today.", "The {} tasted good.", "We are out of {}.", "I smell {}.")),
    (CITIES, ("It rains in {}.", "I saw a film on {}.", "The bus to {} was late.", "They won in {}.")),
    (MONTHS, ("It is cold for {}.", "I can not wait for {}.", "So much for {}.", "It was a long {}.")),
    (PETS, ("I saw a {} today.", "That {} is loud.", "A {} ran by.", "I drew a {}.")),
    (JOBS, ("I saw the {} today.", "The {} was late.", "The {} was kind.", "I met a {}.")),
)


LASTING = ("What lasts is the {}", "The {} stays", "Only the {} counts", "I note the {}")
PASSING = (", the rest is talk.", "; all else goes.", ", no more.", " of that.")
KEEPING = ("Keep:", "Note:", "In short:", "To recall:")


def _memory(rng: random.Random) -> Task:
    kind, values, phrasings = rng.choice(FACTS)
    value = rng.choice(values)
    said = [rng.choice(phrasings).format(value)]
    for pool, remarks in rng.sample(CHATTER, 3):
        said.append(rng.choice(remarks).format(rng.choice(pool)))
    rng.shuffle(said)
    speaker = rng.choice(NAMES)
    lasting, passing, keeping = (worded(rng, wordings, speaker) for wordings in (LASTING, PASSING, KEEPING))
    work = f"{lasting.format(kind)}{passing} {keeping}"
    return _worked(work, f"Keep one fact. User {speaker}: {' '.join(said)}", f"{speaker}: {kind} {value}")


FAMILIES: dict[str, Callable[[random.Random], Task]] = {
    "thinking": _thinking,
    "task": _task,
    "action": _action,
    "reflection": _reflection,
    "debug": _debug,
    "memory": _memory,
}
DOMAINS = tuple(FAMILIES)
