"""The built-in instruction data set: seeded, varied, answerable by rule; for machines without access to a hub.

Its purpose is to show that a cluster trains, not to produce a useful assistant: every answer follows
from its question or from a small table, so that even a tiny model's loss falls, and the lengths are
distributed as in instruction data (most short, a long tail). Pure: the same count and seed give the
same rows on every machine.
"""

from __future__ import annotations

import datetime as dt
import json
import random
from collections.abc import Callable, Iterator

# Increase it with any change to the rows below: it is part of the cache key of prepared data.
VERSION = 1

Row = dict[str, str]  # Alpaca's fields: instruction, input, output


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> dict[str, str]:
    """`a:b,c:d` as a table."""
    return dict(pair.split(":", 1) for pair in text.split(","))


_PEOPLE = _words(
    "Ada Alan Amara Anders Aiko Bruno Carla Chen Daiki Elena Emeka Fatima Farah Grace Hana Henrik Ines Ivan "
    "Jonas Kavya Kenji Lars Leila Liam Lucia Mateo Mei Miriam Nadia Noah Olga Omar Paolo Priya Ravi Rosa Sana "
    "Sofia Tomas Uma Victor Wanda Yara Yuki Zoe"
)
_CITIES = _words(
    "Accra Athens Auckland Bergen Bogotá Cairo Chennai Dakar Dublin Fukushima Geneva Hanoi Helsinki Istanbul "
    "Jakarta Kyoto Lagos Lima Lisbon Montréal Nairobi Osaka Porto Québec Reykjavík Sapporo Sendai Seville Tallinn "
    "Tunis Utrecht Valencia Warsaw Zürich"
)
_JOBS = _words(
    "architect baker carpenter chemist dentist designer doctor economist editor electrician engineer farmer "
    "geologist historian journalist lawyer librarian mechanic musician nurse painter pharmacist photographer pilot "
    "plumber programmer sailor surveyor tailor teacher translator"
)
_WORDS = _words(
    "amber anchor apple arrow autumn badge balance bamboo basket beacon blanket bottle branch bridge brother butter "
    "cabin camera candle carpet castle cedar chapter cherry circle clock cloud coffee copper corner cotton cradle "
    "crystal curtain desert diamond dinner dragon eagle engine evening fabric falcon feather fiddle finger flower "
    "forest fountain garden ginger glacier granite guitar hammer harbor harvest helmet honey horizon island ivory "
    "jacket jungle kettle kitchen ladder lantern leather lemon letter lighthouse magnet maple marble meadow melon "
    "mirror monsoon mountain needle nutmeg ocean olive orange orchard oyster paddle paper pebble pencil pepper "
    "pillow planet pocket pottery prairie pumpkin puzzle rabbit rainbow ribbon river rocket saddle saffron sailor "
    "salmon satchel shadow silver spider spoon spring stable station summer sunset table teapot temple thunder "
    "ticket timber tunnel turtle valley velvet village violin walnut water whistle willow window winter wizard "
    "yellow zephyr"
)
_GOODS = _words(
    "apples batteries books bricks cables candles coins cups envelopes erasers fans folders gloves keys lamps "
    "magnets marbles mugs nails notebooks oranges pears pencils plates ropes screws shells stamps tiles tickets"
)
_CAPITALS = _pairs(
    "Argentina:Buenos Aires,Australia:Canberra,Austria:Vienna,Belgium:Brussels,Brazil:Brasília,Canada:Ottawa,"
    "Chile:Santiago,China:Beijing,Colombia:Bogotá,Croatia:Zagreb,Cuba:Havana,Czechia:Prague,Denmark:Copenhagen,"
    "Egypt:Cairo,Ethiopia:Addis Ababa,Finland:Helsinki,France:Paris,Germany:Berlin,Ghana:Accra,Greece:Athens,"
    "Hungary:Budapest,Iceland:Reykjavík,India:New Delhi,Indonesia:Jakarta,Iraq:Baghdad,Ireland:Dublin,Italy:Rome,"
    "Japan:Tokyo,Jordan:Amman,Kenya:Nairobi,Lebanon:Beirut,Malaysia:Kuala Lumpur,Mexico:Mexico City,"
    "Morocco:Rabat,Nepal:Kathmandu,Netherlands:Amsterdam,New Zealand:Wellington,Nigeria:Abuja,Norway:Oslo,"
    "Pakistan:Islamabad,Peru:Lima,Philippines:Manila,Poland:Warsaw,Portugal:Lisbon,Romania:Bucharest,"
    "Senegal:Dakar,Slovakia:Bratislava,South Korea:Seoul,Spain:Madrid,Sweden:Stockholm,Switzerland:Bern,"
    "Thailand:Bangkok,Tunisia:Tunis,Türkiye:Ankara,Ukraine:Kyiv,Uruguay:Montevideo,Vietnam:Hanoi"
)
_ELEMENTS = _pairs(
    "Hydrogen:H,Helium:He,Lithium:Li,Beryllium:Be,Boron:B,Carbon:C,Nitrogen:N,Oxygen:O,Fluorine:F,Neon:Ne,"
    "Sodium:Na,Magnesium:Mg,Aluminium:Al,Silicon:Si,Phosphorus:P,Sulfur:S,Chlorine:Cl,Argon:Ar,Potassium:K,"
    "Calcium:Ca,Scandium:Sc,Titanium:Ti,Vanadium:V,Chromium:Cr,Manganese:Mn,Iron:Fe,Cobalt:Co,Nickel:Ni,"
    "Copper:Cu,Zinc:Zn"
)
_JAPANESE = _pairs(
    "water:水,fire:火,mountain:山,river:川,tree:木,forest:森,sun:太陽,moon:月,star:星,rain:雨,snow:雪,wind:風,"
    "sea:海,sky:空,flower:花,bird:鳥,dog:犬,cat:猫,fish:魚,horse:馬,book:本,car:車,train:電車,school:学校,"
    "house:家,town:町,door:ドア,window:窓,morning:朝,night:夜"
)
_UNITS = (  # from, to, factor
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("feet", "inches", 12),
    ("gigabytes", "megabytes", 1000),
    ("gibibytes", "mebibytes", 1024),
    ("bytes", "bits", 8),
)
_FEELINGS = {
    "positive": _words("wonderful delightful excellent charming superb lovely brilliant cheerful"),
    "negative": _words("dreadful boring awful disappointing terrible noisy miserable broken"),
}
_PLANS: dict[str, list[str]] = {  # the long answers: any number of these steps, in this order
    "replace a failed network card": [
        "Drain the node so that the scheduler starts nothing new on it.",
        "Wait until the jobs that are running have ended, or move them.",
        "Shut the operating system down and switch the power supplies off.",
        "Slide the chassis out, and ground yourself before you open it.",
        "Take the old card out and note its serial number.",
        "Seat the new card firmly and fasten its screw.",
        "Connect both cables to the ports they came from.",
        "Start the node and read the firmware version of the card.",
        "Install the firmware that the other nodes have.",
        "Measure the bandwidth to a neighbour in both directions.",
        "Compare the result with the last good measurement.",
        "Return the node to the scheduler and close the ticket.",
    ],
    "bake a simple loaf of bread": [
        "Weigh five hundred grams of flour into a large bowl.",
        "Stir in the salt and the dry yeast.",
        "Pour in warm water and mix until no dry flour is left.",
        "Knead the dough on the table for ten minutes.",
        "Cover the bowl and let the dough rise for an hour.",
        "Fold the dough twice and shape it into a ball.",
        "Heat the oven to two hundred and thirty degrees.",
        "Let the loaf rest while the oven becomes hot.",
        "Cut the top with a sharp knife.",
        "Bake for thirty-five minutes until the crust is brown.",
        "Knock on the bottom: a hollow sound means that it is done.",
        "Leave the bread on a rack until it has cooled.",
    ],
    "prepare for a long hike": [
        "Read the map and choose a path that suits the slowest walker.",
        "Look at the weather for the whole day.",
        "Tell a friend where you go and when you will be back.",
        "Pack water, more than you think you need.",
        "Add bread, nuts and fruit for two meals.",
        "Take a warm jacket even in summer.",
        "Put plasters and a bandage into a small bag.",
        "Charge the telephone and pack a spare battery.",
        "Wear shoes that you have walked in before.",
        "Start early so that daylight is left at the end.",
        "Rest every hour and check the map again.",
        "Turn back when the weather changes.",
    ],
}
_ROMAN: tuple[tuple[int, str], ...] = (
    *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL")),
    *((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
)


def _row(instruction: str, output: str, context: str = "") -> Row:
    return {"instruction": instruction, "input": context, "output": output}


def _arithmetic(rng: random.Random) -> Row:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    sign, value = rng.choice([("+", a + b), ("-", a - b), ("*", a * b)])
    ask = rng.choice(["What is {}?", "Compute {}.", "Work out the value of {}.", "Calculate {} and give the result."])
    return _row(ask.format(f"{a} {sign} {b}"), f"{a} {sign} {b} = {value}")


def _word_problem(rng: random.Random) -> Row:
    (who, other), what = rng.sample(_PEOPLE, 2), rng.choice(_GOODS)
    boxes, each, given = rng.randint(2, 12), rng.randint(3, 20), rng.randint(1, 5)
    total = boxes * each
    return _row(
        f"{who} has {boxes} boxes with {each} {what} in each and gives {given} {what} to {other}. "
        f"How many {what} does {who} keep? Explain each step.",
        f"First count everything: {boxes} boxes with {each} {what} each make {boxes} * {each} = {total} {what}.\n"
        f"Then take away what {other} gets: {total} - {given} = {total - given}.\n"
        f"{who} keeps {total - given} {what}.",
    )


def _sort(rng: random.Random) -> Row:
    if rng.random() < 0.5:
        items = rng.sample(_WORDS, rng.randint(3, 12))
        return _row("Sort these words alphabetically.", ", ".join(sorted(items)), ", ".join(items))
    numbers = [rng.randint(0, 999) for _ in range(rng.randint(3, 15))]
    down = rng.random() < 0.5
    answer = sorted(numbers, reverse=down)
    ask = f"Sort the numbers in {'descending' if down else 'ascending'} order."
    return _row(ask, " ".join(map(str, answer)), " ".join(map(str, numbers)))


def _text(rng: random.Random) -> Row:
    word, other = rng.sample(_WORDS, 2)
    vowels = sum(letter in "aeiou" for letter in word)
    return rng.choice(
        [
            _row("Write the word backwards.", word[::-1], word),
            _row("Write the word in capital letters.", word.upper(), word),
            _row("Spell the word letter by letter.", "-".join(word), word),
            _row(f"How many letters has the word '{word}'?", f"The word '{word}' has {len(word)} letters."),
            _row(f"Count the vowels in '{word}'.", f"There are {vowels} vowels in '{word}'."),
            _row(f"Join '{word}' and '{other}' with an underscore.", f"{word}_{other}"),
            _row("Repeat the word three times.", f"{word} {word} {word}", word),
        ]
    )


def _units(rng: random.Random) -> Row:
    big, small, factor = rng.choice(_UNITS)
    n = rng.randint(2, 60)
    ask = rng.choice(["Convert {} {} to {}.", "Express {} {} in {}.", "How much are {} {} in {}?"])
    return _row(ask.format(n, big, small), f"{n} {big} are {n * factor} {small}.")


def _facts(rng: random.Random) -> Row:
    country, element = rng.choice(sorted(_CAPITALS)), rng.choice(sorted(_ELEMENTS))
    capital, symbol = _CAPITALS[country], _ELEMENTS[element]
    return rng.choice(
        [
            _row(f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
            _row(
                "Name the country of which this city is the capital.",
                f"{capital} is the capital of {country}.",
                capital,
            ),
            _row(f"Give the chemical symbol of {element.lower()}.", f"The symbol of {element.lower()} is {symbol}."),
            _row("Which element has this symbol?", f"{symbol} stands for {element.lower()}.", symbol),
        ]
    )


def _dates(rng: random.Random) -> Row:
    day = dt.date(2000, 1, 1) + dt.timedelta(days=rng.randrange(12000))
    span = rng.randint(2, 90)
    after = day + dt.timedelta(days=span)
    return rng.choice(
        [
            _row("Write the date in words.", f"{day:%A}, {day.day} {day:%B} {day.year}", day.isoformat()),
            _row(f"Which date is {span} days after {day}?", f"{span} days after {day} comes {after}."),
            _row(f"On which weekday falls {day}?", f"{day} falls on a {day:%A}."),
            _row("Is this a leap year?", _leap(day.year), str(day.year)),
        ]
    )


def _leap(year: int) -> str:
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return f"{year} is {'a' if leap else 'not a'} leap year: it has {366 if leap else 365} days."


def _roman(rng: random.Random) -> Row:
    n = rest = rng.randint(1, 2999)
    text = ""
    for value, letters in _ROMAN:
        text += letters * (rest // value)
        rest %= value
    if rng.random() < 0.5:
        return _row(f"Write {n} in Roman numerals.", text)
    return _row("Which number is this?", str(n), text)


def _extract(rng: random.Random) -> Row:
    people, sentences = [], []
    for _ in range(rng.randint(1, 5)):
        name, age, job, city = rng.choice(_PEOPLE), rng.randint(18, 80), rng.choice(_JOBS), rng.choice(_CITIES)
        people.append({"name": name, "age": age, "job": job, "city": city})
        article = "an" if job[0] in "aeiou" else "a"
        sentences.append(f"{name}, {age} years old, works as {article} {job} in {city}.")
    prose = " ".join(sentences)
    data = json.dumps(people, ensure_ascii=False)
    if rng.random() < 0.6:
        return _row("Extract the people in the text as JSON.", data, prose)
    return _row("Write one sentence for each person in the data.", prose, data)


def _sequence(rng: random.Random) -> Row:
    start, step = rng.randint(0, 50), rng.randint(1, 12)
    n = 3 + rng.randrange(rng.choice((6, 12, 12, 24, 48, 140)))
    numbers = ", ".join(str(start + step * k) for k in range(n))
    return _row(f"Start at {start} and count in steps of {step}. Write {n} numbers.", numbers)


def _table(rng: random.Random) -> Row:
    n, rows = rng.randint(2, 19), rng.randint(3, 15)
    lines = "\n".join(f"{n} x {k} = {n * k}" for k in range(1, rows + 1))
    return _row(f"Write the first {rows} lines of the multiplication table of {n}.", lines)


def _translate(rng: random.Random) -> Row:
    words = rng.sample(sorted(_JAPANESE), rng.randint(1, 6))
    if rng.random() < 0.5:
        return _row("Translate into Japanese.", "、".join(_JAPANESE[w] for w in words), ", ".join(words))
    return _row("Translate into English.", ", ".join(words), "、".join(_JAPANESE[w] for w in words))


def _sentiment(rng: random.Random) -> Row:
    mood = rng.choice(sorted(_FEELINGS))
    first, second = rng.sample(_FEELINGS[mood], 2)
    place, noun = rng.choice(_CITIES), rng.choice(["concert", "hotel", "journey", "museum", "restaurant", "train ride"])
    text = f"The {noun} in {place} was {first}, and {rng.choice(_PEOPLE)} found it {second} as well."
    return _row("Is the opinion in this text positive or negative?", mood, text)


def _code(rng: random.Random) -> Row:
    name, other = rng.sample(_WORDS, 2)
    sign, verb = rng.choice([("+", "adds"), ("-", "subtracts"), ("*", "multiplies")])
    limit = rng.randint(2, 99)
    return rng.choice(
        [
            _row(
                f"Write a Python function named {name} that {verb} its two arguments.",
                f"def {name}(a, b):\n    return a {sign} b",
            ),
            _row(
                f"Write a Python function named {name} that keeps the values of a list above {limit}.",
                f"def {name}(values):\n    return [value for value in values if value > {limit}]",
            ),
            _row(
                f"Write a Python class {name.title()} with one field named {other}.",
                f"class {name.title()}:\n    def __init__(self, {other}):\n        self.{other} = {other}\n",
            ),
        ]
    )


def _plan(rng: random.Random) -> Row:
    goal = rng.choice(sorted(_PLANS))
    steps = _PLANS[goal]
    chosen = sorted(rng.sample(range(len(steps)), rng.randint(3, len(steps))))
    lines = "\n".join(f"{k}. {steps[index]}" for k, index in enumerate(chosen, 1))
    return _row(f"Explain in {len(chosen)} steps how to {goal}.", lines)


def _report(rng: random.Random) -> Row:
    nodes = sorted(rng.sample(range(1, 65), rng.randint(2, 16)))
    speeds = [rng.randint(80, 99) if rng.random() < 0.8 else rng.randint(20, 60) for _ in nodes]
    slow = [f"node{node:03d}" for node, speed in zip(nodes, speeds, strict=True) if speed < 70]
    table = "\n".join(f"node{node:03d} {speed} GB/s" for node, speed in zip(nodes, speeds, strict=True))
    lines = [
        f"node{node:03d} reaches {speed} GB/s: {'slow' if speed < 70 else 'as expected'}."
        for node, speed in zip(nodes, speeds, strict=True)
    ]
    end = f"Look at {', '.join(slow)}." if slow else "No node is slow."
    return _row("Which of these nodes is slower than 70 GB/s? Comment on every line.", "\n".join([*lines, end]), table)


_TASKS: dict[Callable[[random.Random], Row], int] = {  # with the weight of each
    _arithmetic: 12,
    _word_problem: 8,
    _sort: 9,
    _text: 12,
    _units: 8,
    _facts: 14,
    _dates: 9,
    _roman: 4,
    _extract: 7,
    _sequence: 6,
    _table: 5,
    _translate: 5,
    _sentiment: 6,
    _code: 7,
    _plan: 6,
    _report: 4,
}


def generate(samples: int, seed: int) -> Iterator[Row]:
    """`samples` rows with Alpaca's fields; a longer set of the same seed starts with the shorter one."""
    rng = random.Random(seed)
    tasks, weights = list(_TASKS), list(_TASKS.values())
    for _ in range(samples):
        yield rng.choices(tasks, weights)[0](rng)
