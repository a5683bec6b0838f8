"""A generated corpus of questions in the six classes of TREC, for runs that need no data files.

A small grammar: a class is drawn, then one of its templates, then the words of its slots. What makes it
worth learning from: the noun after "what" decides the class, the last one of a compound ("city judge", "judge
city"), and its rare values are seen a few times or never; names are made up; some templates belong to two
classes (who somebody is may ask for a name or for a description); and 2% of the labels are wrong in every
split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice

import torch

LABELS = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
_PRIOR = (24, 24, 6, 20, 13, 13)  # percent
_LABEL_NOISE = 2  # percent
_SIZES = (2000, 250, 500)  # of train, dev and test
_SLOT = re.compile(r"\{(\w+)\}")

_SLOTS = {
    "hum": """actor president author king singer inventor queen poet explorer general painter composer scientist coach
        player architect founder senator director philosopher chemist emperor astronaut pope dancer governor pilot
        sculptor admiral physicist surgeon novelist monk golfer judge prophet tenor magician jockey outlaw skater pirate
        drummer botanist swimmer playwright comedian boxer economist team company band tribe family university group
        club gang committee""",
    "enty": """animal book color disease movie language sport car dog plant game song food drink ship instrument bird
        religion flower metal currency fish novel product tree newspaper gas weapon element drug fruit cheese vitamin
        letter word insect dance magazine opera fabric gem machine tool spice toy wine mineral symbol organ poem muscle
        computer cereal snake whale statue mushroom sauce motorcycle satellite award breed liquid crop dinosaur flag""",
    "loc": """city country state river island mountain continent lake town ocean desert planet county village street
        capital park peninsula volcano valley canyon sea airport stadium bay colony castle prison museum port province
        waterfall cathedral hotel bridge swamp galaxy harbor palace region""",
    "num": """year date number population speed distance height age price weight length temperature percentage salary
        size depth cost width rate zip area diameter code score odds""",
    "desc": """origin meaning purpose definition difference function cause reason effect history process method nature
        significance role theory structure basis description importance symptom advantage content style tale motto""",
    "country": """France China Spain Italy Brazil India Mexico Canada Egypt Japan Russia Kenya Peru Greece Turkey Norway
        Chile Cuba Poland Ireland Vietnam Austria Iran Portugal Morocco Nepal Iceland Ghana Malta Fiji""",
    "event": """war Olympics election revolution festival race battle eclipse earthquake trial strike flood parade
        marathon treaty crusade plague fair""",
    "thing": """rainbow battery telescope engine yogurt volcano thermometer virus glacier piano compass tornado laser
        penicillin submarine tax cloud satellite violin diamond mortgage microscope bagel comet zipper paprika magnet
        hologram typhoon turbine marble saxophone quark calorie aspirin iceberg parachute barometer tundra""",
    "act": """built discovered invented won visited painted designed sold crossed destroyed founded ruled named recorded
        explored bought filmed translated guarded restored""",
    "verb": "like buy visit paint sell find study lose describe own guard copy sketch praise",
    "adj": """first largest oldest greatest fastest smallest longest best tallest only last richest highest rarest
        deadliest heaviest coldest""",
    "degree": "long old tall far deep fast high large heavy cold rich",
    "unit": """miles people men women feet days pounds countries players calories bones hours dollars gallons moons
        teeth votes""",
    "first": """John Mary Karel Anna Peter Irma Louis Vera Hugo Clara Otto Nora Felix Ida Boris Lena Marco Olga Simon
        Greta Pavel Rosa Viktor Elsa Jonas""",
    "start": "Bra Kel Mor Tan Vel Dor Sal Hin Lor Gar Pem Ros Tib Wen Zol Fer Cas Nev Rud Bel",
    "middle": "a en il o ar em i ot un el",
    "end": "son ski ton man berg well ford ley ner by",
    "land": "ia stan ville burg land ona mere port",
    "letter": "A B C D E F G H I L M N O P R S T U V W",
    "noun": "{hum}|{enty}|{loc}",
    "who": "{hum}|{noun} {hum}|{thing} {hum}",
    "what": "{enty}|{noun} {enty}|{thing} {enty}",
    "where": "{loc}|{noun} {loc}|{thing} {loc}",
    "count": "{num}|{noun} {num}|{thing} {num}",
    "person": "{first} {start}{middle}{end}|{start}{end}|{first} {start}{end}",
    "place": "{country}|{country}|{start}{middle}{land}",
    "acronym": "{letter}{letter}{letter}|{letter}{letter}{letter}{letter}",
    "tail": """{act} by {person}|in {place}|of {place}|that was {act} in {place}|with the {adj} {thing}|
        from the {event}|that {person} {act}|known for the {thing}|of the {adj} {event}""",
    "clause": """was {act} by {person}|is in {place}|was {act} in {place}|has the {adj} {thing}|
        started the {event}|came after the {event}|became the {adj} of {place}|{person} {act}|
        does {person} {verb} {when}""",
    "when": "in {place}|before the {event}|during the {event}|in the world|in history",
}

# Per class: (weight, template). A template of two classes is ambiguous in the ratio of weight times prior.
_TEMPLATES: tuple[tuple[tuple[int, str], ...], ...] = (
    (  # DESC
        (8, "What is the {desc} of the {thing} ?"),
        (6, "What is the {desc} {tail} ?"),
        (3, "What is a {thing} ?"),
        (3, "How does a {thing} work ?"),
        (4, "Why is the {noun} {tail} so {degree} ?"),
        (3, "Why did {person} {verb} the {thing} {when} ?"),
        (2, "How do you make a {thing} {when} ?"),
        (2, "What caused the {event} {when} ?"),
        (2, "What does the {noun} {tail} do ?"),
        (2, "Who was {person} ?"),
        (1, "What is {acronym} ?"),
        (2, "Tell me about the {noun} {tail} ."),
        (1, "What is {place} known for ?"),
    ),
    (  # ENTY
        (14, "What {what} {clause} ?"),
        (8, "What is the {adj} {what} {when} ?"),
        (6, "Name the {what} {tail} ."),
        (4, "Which {what} did {person} {verb} {when} ?"),
        (2, "What did {person} bring to the {event} ?"),
        (2, "What is the {thing} {tail} called ?"),
        (1, "What is a {thing} ?"),
        (1, "What is {place} known for ?"),
    ),
    (  # ABBR
        (4, "What does {acronym} stand for ?"),
        (2, "What does {acronym} mean {when} ?"),
        (2, "What is {acronym} ?"),
        (2, "What is the abbreviation for the {noun} of {place} ?"),
        (1, "What is {acronym} short for {when} ?"),
    ),
    (  # HUM
        (8, "Who {act} the {thing} {when} ?"),
        (6, "Who was the {adj} {who} {tail} ?"),
        (14, "What {who} {clause} ?"),
        (4, "What is the name of the {adj} {who} {when} ?"),
        (5, "Name the {who} {tail} ."),
        (1, "Who was {person} ?"),
        (3, "Which {who} did {person} {verb} {when} ?"),
    ),
    (  # LOC
        (6, "Where is the {noun} {tail} ?"),
        (4, "Where did {person} {verb} the {thing} ?"),
        (12, "What {where} {clause} ?"),
        (5, "What is the {adj} {where} {when} ?"),
        (4, "Name the {where} {tail} ."),
        (2, "Which {where} did {person} {verb} {when} ?"),
    ),
    (  # NUM
        (7, "How many {unit} are there {when} ?"),
        (4, "How {degree} is the {noun} {tail} ?"),
        (5, "When was the {noun} {tail} {act} ?"),
        (8, "What {count} does the {noun} {tail} have ?"),
        (7, "What is the {count} of the {noun} {when} ?"),
        (3, "What was the {adj} {count} {when} ?"),
        (3, "How many {unit} did {person} {verb} {when} ?"),
    ),
)


def generate() -> tuple[tuple[list[str], list[int]], ...]:
    """(texts, labels) of train, dev and test, always the same; labels index `LABELS`. No question occurs twice."""
    draw = _drawer()
    texts: dict[str, int] = {}
    while len(texts) < sum(_SIZES):
        label = _weighted(_PRIOR, draw)
        weights = [weight for weight, _ in _TEMPLATES[label]]
        text = _fill(_TEMPLATES[label][_weighted(weights, draw)][1], draw)
        if draw(100) < _LABEL_NOISE:
            label = (label + 1 + draw(len(LABELS) - 1)) % len(LABELS)
        texts.setdefault(text, label)
    pairs = iter(texts.items())
    parts = [dict(islice(pairs, size)) for size in _SIZES]
    return tuple((list(part), list(part.values())) for part in parts)


def _drawer() -> Callable[[int], int]:
    """draw(n): a uniform integer below n."""
    generator = torch.Generator().manual_seed(0)
    block: list[int] = []

    def draw(n: int) -> int:
        if not block:
            block.extend(torch.randint(2**31, (4096,), device="cpu", generator=generator).tolist())
        return block.pop() % n  # n is a few hundred at most: the bias is below 1e-6

    return draw


def _weighted(weights: Sequence[int], draw: Callable[[int], int]) -> int:
    rest = draw(sum(weights))
    for index, weight in enumerate(weights):
        rest -= weight
        if rest < 0:
            return index
    raise AssertionError  # unreachable: draw(n) < n


def _choices(slot: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in slot.split("|")) if "{" in slot else tuple(slot.split())


_CHOICES = {name: _choices(slot) for name, slot in _SLOTS.items()}


def _fill(template: str, draw: Callable[[int], int]) -> str:
    def value(match: re.Match[str]) -> str:
        choices = _CHOICES[match[1]]
        if "{" in choices[0]:
            return _fill(choices[draw(len(choices))], draw)
        # The smaller of two draws: words at the end of a list are rare.
        return choices[min(draw(len(choices)), draw(len(choices)))]

    return _SLOT.sub(value, template)
