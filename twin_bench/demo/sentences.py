"""Eight small tasks in GLUE's schema, their sentences put together from the word lists and templates here.

Every row is a pure function of (task, seed). `Draw` uses nothing of `random.Random` but ``random()``, the one method
whose sequence Python promises to keep, so the rows are the same bits on every machine and Python version.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Row = dict[str, str | int | float]
T = TypeVar("T")

SPLITS = {"train": 600, "validation": 100, "test": 200}


class Draw:
    """Seeded draws."""

    def __init__(self, seed: str):
        self._uniform = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Return True with `probability`."""
        return self._uniform() < probability

    def one(self, items: Sequence[T]) -> T:
        """Return one item."""
        return items[int(self._uniform() * len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different items, in random order."""
        left = list(items)
        return [left.pop(int(self._uniform() * len(left))) for _ in range(count)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return all items in random order."""
        return self.some(items, len(items))


# ---------------------------------------------------------------- words that several tasks use


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


WOMEN = _words(
    "Anna Beatrice Clara Daphne Edith Fiona Greta Helen Irene Julia Karen Laura Martha Nora Olivia Paula Rachel "
    "Sophie Teresa Ursula Vera Wendy Yvonne Zoe"
)
MEN = _words(
    "Adam Boris Carl David Edgar Frank George Harold Ivan Jacob Kevin Leonard Martin Nathan Oscar Peter Ralph "
    "Simon Thomas Victor Walter Xavier Philip Hugo"
)
SURNAMES = _words(
    "Abbott Barlow Castle Dalton Ellery Fairbank Garrick Hobson Ingram Jarvis Kendall Lockhart Mercer Norwood Osborne "
    "Pemberton Quincy Radley Sheldon Thornton Underhill Vickers Whitmore Yardley Ashby Brandt Coleman Dunmore Everett "
    "Fleming Granger Holloway"
)
TOWNS = _words(
    "Ashford Bellport Carrington Dunwood Eastmere Fairhaven Glenrock Harwick Ironbridge Kingsley Lakeview Marlow "
    "Newbury Oakdale Pinecrest Queensport Ridgeway Stonefield Thornbury Upton Valemont Westbrook Wickham Yarrow"
)
COMPANIES = _words(
    "Alden Foods|Bright Harbor|Cobalt Systems|Delta Freight|Evergreen Energy|Fulton Motors|Granite Bank|Horizon Air|"
    "Indigo Media|Juniper Textiles|Keystone Steel|Lantern Software|Meridian Health|Northgate Stores|Orchard Telecom|"
    "Pioneer Rail|Quarry Mining|Redwood Paper|Summit Insurance|Trident Shipping|Union Glass|Vantage Games",
    "|",
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# ---------------------------------------------------------------- cola: is the sentence well formed?

_HELPERS = _words("teacher gardener doctor sailor baker lawyer painter farmer waiter nurse pilot student guard tailor")
_THINGS = _words(
    "letter map basket lamp kettle ladder drum coat mirror clock parcel statue candle blanket notebook umbrella "
    "suitcase hammer violin photograph bicycle shovel ribbon helmet carpet bucket"
)
_LOOKS = _words("old small red broken heavy pretty wooden cheap dusty strange yellow narrow")
_COMPARED = (("taller", "tall"), ("older", "old"), ("heavier", "heavy"), ("cheaper", "cheap"), ("smaller", "small"))
_WHEN = ("last night", "yesterday", "this morning", "after lunch", "before the party", "on Sunday", "two weeks ago")
_WHERE = _words("kitchen garden office cellar station library harbor attic")
_VERBS = tuple(
    _words(forms)  # base, third person, past, participle
    for forms in _words(
        "take takes took taken|choose chooses chose chosen|hide hides hid hidden|draw draws drew drawn|"
        "throw throws threw thrown|steal steals stole stolen|break breaks broke broken|forget forgets forgot forgotten|"
        "see sees saw seen|shake shakes shook shaken",
        "|",
    )
)
_STAY = _words("slept arrived laughed waited sneezed vanished fainted hesitated")
_URGES = _words("wanted hoped tried decided refused planned agreed promised")
_SELF = _words("taught blamed admired described introduced praised hurt defended")


def _cola_forms(draw: Draw) -> tuple[str, tuple[str, ...]]:
    """Return a well-formed sentence and ill-formed neighbours of it."""
    he, she = draw.one(MEN), draw.one(WOMEN)
    name = draw.one((he, she))
    helper, other = draw.some(_HELPERS, 2)
    thing, second = draw.some(_THINGS, 2)
    look, when, where = draw.one(_LOOKS), draw.one(_WHEN), draw.one(_WHERE)
    base, third, past, participle = draw.one(_VERBS)
    more, plain = draw.one(_COMPARED)
    stay, urge, about = draw.one(_STAY), draw.one(_URGES), draw.one(_SELF)
    number = draw.one(("two", "three", "many", "several"))
    forms: tuple[tuple[str, tuple[str, ...]], ...] = (
        (
            f"The {helper}s always {base} the {thing} in the {where}.",
            (f"The {helper}s always {third} the {thing} in the {where}.",),
        ),
        (
            f"Why does the {helper} {base} the {look} {thing}?",
            (
                f"Why does the {helper} {third} the {look} {thing}?",
                f"Why the {helper} does {base} the {look} {thing}?",
                f"Why do the {helper} {base} the {look} {thing}?",
            ),
        ),
        (
            f"{name} has {participle} the {look} {thing} of the {helper}.",
            (
                f"{name} has {past} the {look} {thing} of the {helper}.",
                f"{name} has {participle} {look} the {thing} of the {helper}.",
            ),
        ),
        (
            f"{name} {urge} to {base} the {thing} {when}.",
            (f"{name} {urge} to {past} the {thing} {when}.", f"{name} {urge} {base} the {thing} {when}."),
        ),
        (f"{she} {about} herself in front of the {helper}.", (f"{she} {about} himself in front of the {helper}.",)),
        (f"{he} {about} himself in front of the {helper}.", (f"{he} {about} herself in front of the {helper}.",)),
        (
            f"Which {thing} did the {helper} {base} {when}?",
            (
                f"Which {thing} did the {helper} {base} the {second} {when}?",
                f"Which {thing} the {helper} did {base} {when}?",
                f"Which {thing} did the {helper} {past} {when}?",
            ),
        ),
        (
            f"The {thing} in the {where} is {more} than the {second}.",
            (
                f"The {thing} in the {where} is {plain} than the {second}.",
                f"The {thing} in the {where} is {more} as the {second}.",
                f"The {thing} in the {where} is more {more} than the {second}.",
            ),
        ),
        (
            f"The {look} {thing} was {participle} by the {helper} {when}.",
            (
                f"The {look} {thing} was {base} by the {helper} {when}.",
                f"The {look} {thing} {participle} was by the {helper} {when}.",
                f"The {look} {thing} was {participle} the {helper} {when}.",
            ),
        ),
        (
            f"The {helper} {stay} in the {where} {when}.",
            (f"The {helper} {stay} the {second} in the {where} {when}.", f"The {helper} {stay} in {where} the {when}."),
        ),
        (
            f"{name} {past} {number} {look} {thing}s and gave them to the {other}.",
            (
                f"{name} {past} {number} {look} {thing} and gave them to the {other}.",
                f"{name} {past} {number} {look} {thing}s and gave to the {other} them.",
            ),
        ),
        (
            f"Neither the {helper} nor the {other} {past} the {thing}.",
            (
                f"Neither the {helper} or the {other} {past} the {thing}.",
                f"Neither the {helper} nor the {other} the {thing} {past}.",
            ),
        ),
        (
            f"The {helper} who {name} met {when} {past} the {thing}.",
            (
                f"The {helper} who {name} met him {when} {past} the {thing}.",
                f"The {helper} which {name} met {when} {past} the {thing}.",
            ),
        ),
    )
    return draw.one(forms)


def _cola(draw: Draw, label: int) -> Row:
    good, bad = _cola_forms(draw)
    return {"sentence": good if label else draw.one(bad), "label": label}


# ---------------------------------------------------------------- sst2: is the review positive?

_WORKS = ("film", "comedy", "thriller", "drama", "novel", "musical", "sequel", "documentary", "play", "album")
_ASPECTS = _words(
    "plot|acting|dialogue|pacing|ending|soundtrack|cast|humor|camera work|first half|opening scene|script|direction|"
    "romance|villain|editing|story",
    "|",
)
_GOOD = _words(
    "funny charming gripping clever warm moving delightful sharp elegant fresh brilliant inventive touching lively "
    "beautiful memorable witty graceful stunning tender superb engaging honest radiant daring rousing vivid tight "
    "polished hilarious poignant playful assured wise uplifting crisp soulful luminous sincere magnetic spirited deft "
    "nimble sublime intelligent seductive enchanting robust suspenseful exquisite"
)
_BAD = _words(
    "dull clumsy tedious shallow predictable lifeless annoying stale silly bland awful sloppy forgettable hollow cheap "
    "messy boring pointless dreary grating flat tiresome contrived ugly limp muddled wooden shrill bloated derivative "
    "sluggish preachy stilted confused cynical thin soggy laboured vapid smug incoherent stuffy trite garbled listless "
    "overlong mawkish inept murky crude corny"
)
_LIKED = (
    "i left with a smile",
    "i would gladly see it again",
    "it won me over",
    "it stayed with me for days",
    "i enjoyed every minute",
    "it earns its applause",
)
_DISLIKED = (
    "i left before the end",
    "i would not sit through it again",
    "it wore me out",
    "i had forgotten it by dinner",
    "i checked my watch all evening",
    "it wastes your time",
)
_VERY = ("very", "truly", "quite", "rather", "surprisingly", "consistently")


_AGREED = ("i would say that", "anyone can see that", "critics rightly say that", "it is true that", "no doubt")
_DENIED = ("i doubt that", "nobody could say that", "critics wrongly say that", "it is false that", "i deny that")


def _sst2(draw: Draw, label: int) -> Row:
    if draw.chance(0.2):  # two things that may each turn the meaning round
        denied, negated = draw.chance(0.5), draw.chance(0.5)
        word = draw.one(_GOOD if bool(label) ^ denied ^ negated else _BAD)
        said, verb = draw.one(_DENIED if denied else _AGREED), draw.one(("is not", "is hardly") if negated else ("is",))
        return {"sentence": f"{said} the {draw.one(_ASPECTS)} of this {draw.one(_WORKS)} {verb} {word}", "label": label}
    same, opposite = draw.one(_GOOD), draw.one(_BAD)
    if not label:
        same, opposite = opposite, same
    verdict = draw.one(_LIKED if label else _DISLIKED)
    work, (first, second) = draw.one(_WORKS), draw.some(_ASPECTS, 2)
    very = draw.one(_VERY)
    forms = (
        f"the {first} and the {second} are {very} {same}",
        f"a {very} {same} {work} , above all its {first}",
        f"the {first} of this {work} is never {opposite}",
        f"there is nothing {opposite} about the {first} , nor about the {second}",
        f"not a {very} {opposite} {work} , least of all its {first}",
        f"the {first} is too {same} for anyone to call it {opposite}",
        f"no {work} this year has a less {opposite} {first}",
        f"this {work} would be {opposite} were it not for its {same} {first}",
        f"the {first} was {opposite} in the last {work} , and it is not any more",
        f"who could call this {first} {opposite} ?",
        f"it is {same} where the earlier {work} was {opposite}",
        f"the {first} is less {opposite} than {same}",
        f"the {first} of the {work} may be {opposite} , but {verdict}",
        f"{'feared' if label else 'expected'} a {opposite} {work} , but the {first} turns out {same}",
        f"people who call this {work} {opposite} have not noticed the {first}",
        f"despite a {opposite} {first} , the {work} as a whole is {same}",
        f"my friends found the {first} {opposite} , and they are wrong about this {work}",
    )
    return {"sentence": re.sub(r"\ba (?=[aeiou])", "an ", draw.one(forms)), "label": label}


# ---------------------------------------------------------------- mrpc, rte: the news


@dataclass(frozen=True)
class Story:
    """One kind of news: ways to report it, ways to report a different outcome, and what follows from each."""

    reports: tuple[str, ...]
    others: tuple[str, ...]
    follows: tuple[str, ...]  # from a report, and never from one of the others
    others_follow: tuple[str, ...]  # the other way round


_STORIES = (
    Story(
        (
            "A fire at a warehouse in {T} injured {n} workers on {d}, officials said.",
            "Officials said {n} workers were hurt on {d} when a warehouse burned in {T}.",
            "In {T}, {n} people working in a warehouse were injured in a blaze {d}.",
        ),
        (
            "A fire at a warehouse in {T} was put out on {d} before any of its {n} workers came to harm.",
            "All {n} workers escaped unhurt on {d} when a warehouse burned in {T}, officials said.",
        ),
        ("People were injured in {T}.", "A blaze in {T} left workers hurt."),
        ("Nobody was hurt by the fire in {T}.", "The workers in {T} got out safely."),
    ),
    Story(
        (
            "{P} beat {Q} by {n} votes on {d} to become mayor of {T}.",
            "{T} on {d} elected {P} as its mayor, {n} votes ahead of {Q}.",
            "With {n} votes more than {Q}, {P} won the race for mayor of {T} on {d}.",
        ),
        (
            "{P} lost the race for mayor of {T} to {Q} by {n} votes on {d}.",
            "{P} conceded on {d} that {Q}, {n} votes ahead, had won the vote for mayor of {T}.",
        ),
        ("{P} is the mayor of {T}.", "{Q} lost an election in {T}."),
        ("{Q} is the mayor of {T}.", "{P} was defeated in {T}."),
    ),
    Story(
        (
            "A court in {T} on {d} sentenced {P} to {n} months in prison for fraud.",
            "{P} was sent to prison for {n} months on {d} after a judge in {T} found the banker guilty of fraud.",
            "Found guilty of fraud in {T}, {P} must spend {n} months in jail, a judge ruled {d}.",
        ),
        (
            "A court in {T} on {d} cleared {P} of fraud after a trial of {n} months.",
            "{P} walked free on {d} when a judge in {T} ended a fraud case that had lasted {n} months.",
        ),
        ("{P} is going to jail.", "A judge convicted {P}."),
        ("{P} was found not guilty.", "{P} is a free person after the trial."),
    ),
    Story(
        (
            "{A} will cut {n} jobs at its plant in {T}, the company said {d}.",
            "The company said on {d} that {n} people would lose their jobs at the {A} plant in {T}.",
            "{A} told its staff in {T} on {d} that {n} of them would be laid off.",
        ),
        (
            "{A} will add {n} jobs at its plant in {T}, the company said {d}.",
            "{A} said on {d} that it would hire {n} more people in {T}.",
        ),
        ("{A} is shrinking its work force in {T}.", "Workers in {T} are losing their jobs."),
        ("{A} is growing in {T}.", "There will be new jobs in {T}."),
    ),
    Story(
        (
            "Shares of {A} rose {n} percent on {d} after strong sales.",
            "{A} gained {n} percent in trading on {d} as its sales grew.",
            "On {d}, good sales lifted the stock of {A} by {n} percent.",
        ),
        (
            "Shares of {A} fell {n} percent on {d} after weak sales.",
            "{A} lost {n} percent in trading on {d} as its sales shrank.",
        ),
        ("Shares of {A} are worth more than before.", "Investors were pleased with {A}."),
        ("Shares of {A} are worth less than before.", "Investors were disappointed by {A}."),
    ),
    Story(
        (
            "Police in {T} arrested {n} people on {d} after a bank robbery.",
            "{n} people were taken into custody on {d} over a bank robbery, police in {T} said.",
            "After a bank was robbed in {T}, officers on {d} detained {n} suspects.",
        ),
        (
            "Police in {T} on {d} released {n} people held after a bank robbery.",
            "{n} people held over a bank robbery were let go on {d}, police in {T} said.",
        ),
        ("Suspects are being held in {T}.", "Police caught people after a robbery in {T}."),
        ("Suspects in {T} were set free.", "Police in {T} let people go."),
    ),
    Story(
        (
            "The union at {A} called a strike on {d} that kept {n} drivers at home.",
            "{n} drivers of {A} stopped work on {d} after their union called a strike.",
            "A strike that began {d} has {n} drivers off the job at {A}, the union said.",
        ),
        (
            "The union at {A} called off a strike on {d} and sent {n} drivers back to work.",
            "{n} drivers of {A} returned to work on {d} after their union ended a strike.",
        ),
        ("Drivers at {A} are not working.", "A strike has started at {A}."),
        ("Drivers at {A} are working again.", "The strike at {A} is over."),
    ),
)
_SLOT = re.compile(r"\{(\w)\}")
_LEADS = (
    "{R} reports from {U}. ",
    "It was the main story in {U} this week. ",
    "The news came as a surprise to many in {U}. ",
    "Reporters had waited for hours in the rain. ",
    "According to {R}, who follows the matter closely, little was known before. ",
)


def _facts(draw: Draw) -> dict[str, str]:
    """Return one draw of names, towns, companies, a day and a number."""
    people = [f"{first} {last}" for first, last in zip(draw.some(WOMEN + MEN, 3), draw.some(SURNAMES, 3), strict=True)]
    (a, b), (t, u) = draw.some(COMPANIES, 2), draw.some(TOWNS, 2)
    number = str(11 + int(draw.one(range(89))))
    return dict(zip("PQRABTUdn", (*people, a, b, t, u, draw.one(DAYS), number), strict=True))


def _changed(draw: Draw, facts: Mapping[str, str], template: str, count: int) -> dict[str, str]:
    """Return `facts` with `count` of the slots that `template` uses drawn anew."""
    slots = sorted(set(_SLOT.findall(template)) - {"d"})
    slots = draw.some(slots, min(count, len(slots)))
    while True:
        other = _facts(draw)
        if not {other[slot] for slot in slots} & set(facts.values()):
            return dict(facts) | {slot: other[slot] for slot in slots}


def _news_pair(draw: Draw, relation: str) -> tuple[str, str]:
    """Return two reports that are alike (``same``) or differ in outcome, facts or the whole story."""
    (story, unrelated), facts = draw.some(_STORIES, 2), _facts(draw)
    same, different = draw.shuffled((story.reports, story.others))
    first, second = draw.some(same, 2)
    said = facts
    if relation == "outcome":
        second = draw.one(different)
    elif relation == "facts":
        said = _changed(draw, facts, second, draw.one((2, 3)))
    elif relation == "story":
        second, said = draw.one(unrelated.reports + unrelated.others), _facts(draw)
    one, other = draw.shuffled((first.format(**facts), second.format(**said)))
    return one, other


def _news_claim(draw: Draw, relation: str) -> tuple[str, str]:
    """Return a report and a claim that follows (``same``) or is wrong in outcome or facts, or of another story."""
    (story, unrelated), facts = draw.some(_STORIES, 2), _facts(draw)
    reports, right, wrong = story.reports, story.follows, story.others_follow
    if draw.chance(0.5):
        reports, right, wrong = story.others, story.others_follow, story.follows
    text, claim, said = draw.one(reports), draw.one(right), facts
    if relation == "outcome":
        claim = draw.one(wrong)
    elif relation == "facts":
        said = _changed(draw, facts, claim, 2)
    elif relation == "story":
        claim = draw.one(unrelated.follows + unrelated.others_follow)
    lead = draw.one(_LEADS) if draw.chance(0.5) else ""
    return (lead + text).format(**facts), claim.format(**said)


def _mrpc(draw: Draw, label: int) -> Row:
    if draw.chance(0.2):
        first, second, _ = _caption_pair(draw, 0 if label else draw.one((1, 2)))
    else:
        first, second = _news_pair(
            draw, "same" if label else draw.one(("outcome", "outcome", "facts", "facts", "facts"))
        )
    return {"sentence1": first, "sentence2": second, "label": label}


def _rte(draw: Draw, label: int) -> Row:
    """0 the second sentence follows from the first, 1 it does not."""
    if draw.chance(0.45):
        text, claim = _hearsay(draw, draw.one((1, 2)) if label else 0)
    else:
        text, claim = _news_claim(draw, draw.one(("outcome", "facts", "story")) if label else "same")
    return {"sentence1": text, "sentence2": claim, "label": label}


# ---------------------------------------------------------------- stsb: how alike are two captions?

_SUBJECTS = (  # groups of near subjects, each a tuple of ways to say it
    (("A man", "A guy"), ("An old man", "An elderly man"), ("A woman", "A lady"), ("A tall woman", "A tall lady")),
    (("A boy", "A young boy"), ("A girl", "A little girl"), ("A child", "A kid"), ("A schoolboy", "A pupil")),
    (
        ("A chef", "A cook"),
        ("A soldier", "A man in uniform"),
        ("A clown", "A circus clown"),
        ("A monk", "A monk in a robe"),
    ),
)
_ACTIONS = (  # (ways to say the verb, objects)
    (("slicing", "cutting up"), ("an onion", "a tomato", "a carrot", "some bread", "a melon")),
    (("playing", "performing on"), ("a guitar", "a flute", "a piano", "a drum", "a violin")),
    (("riding", "sitting on"), ("a horse", "a bicycle", "a camel", "an elephant", "a motorcycle")),
    (("carrying", "holding"), ("a ladder", "a bag", "a kite", "a basket of apples", "a surfboard")),
    (("washing", "cleaning"), ("a car", "a window", "a dog", "a pile of dishes", "a boat")),
    (("painting", "making a painting of"), ("a fence", "a bridge", "a tree", "a vase", "a church")),
    (("feeding", "giving food to"), ("a cat", "a goat", "some ducks", "a baby", "a monkey")),
    (("throwing", "tossing"), ("a ball", "a frisbee", "a stick", "a snowball", "a stone")),
)
_PLACES = (
    ("in the park", "at the park"),
    ("on the beach", "at the seaside"),
    ("in a kitchen", "inside a kitchen"),
    ("on a busy street", "along a busy road"),
    ("near a lake", "by a lake"),
    ("in a backyard", "behind a house"),
    ("on a stage", "in front of an audience"),
    ("in the snow", "on snowy ground"),
)


_DIFFERENCES: tuple[tuple[tuple[str, ...], ...], ...] = (  # what may differ, from nothing to everything
    ((),),
    (("thing",), ("place",), ("subject",)),
    (("action",), ("thing", "place"), ("thing", "subject"), ("subject", "place")),
    (("action", "place"), ("action", "subject"), ("thing", "subject", "place")),
    (("action", "subject", "place"),),
)


def _caption_pair(draw: Draw, level: int) -> tuple[str, str, float]:
    """Return two captions that differ in `level` (0 to 4) and what is left of a score of 5."""
    group = draw.one(_SUBJECTS)
    subject, (verbs, things), place = draw.one(group), draw.one(_ACTIONS), draw.one(_PLACES)
    thing = draw.one(things)
    new_subject, new_verbs, new_thing, new_place = subject, verbs, thing, place
    score = 5.0
    for part in draw.one(_DIFFERENCES[level]):
        if part == "thing":
            new_thing = draw.one([t for t in things if t != thing])
            score -= 1.2
        elif part == "action":
            new_verbs, new_things = draw.one([a for a in _ACTIONS if a[0] != verbs])
            new_thing = draw.one(new_things)
            score -= 2.4
        elif part == "place":
            new_place = draw.one([p for p in _PLACES if p != place])
            score -= 0.8
        elif draw.chance(0.5):
            new_subject = draw.one([s for s in group if s != subject])
            score -= 0.8
        else:
            new_subject = draw.one(draw.one([g for g in _SUBJECTS if g != group]))
            score -= 1.4

    def caption(subject: tuple[str, ...], verbs: tuple[str, ...], thing: str, place: tuple[str, ...]) -> str:
        return f"{draw.one(subject)} is {draw.one(verbs)} {thing} {draw.one(place)}."

    first, second = caption(subject, verbs, thing, place), caption(new_subject, new_verbs, new_thing, new_place)
    return first, second, score


_NEWS_SCORES = (("same", 4.8), ("facts", 3.2), ("facts", 3.2), ("story", 0.2), ("story", 0.2))


def _stsb(draw: Draw, label: int) -> Row:
    """`label` is how much differs, from 0 to 4; the row's own label is the score."""
    if draw.chance(0.25):
        relation, score = _NEWS_SCORES[label]
        first, second = _news_pair(draw, relation)
    else:
        first, second, score = _caption_pair(draw, label)
    score += draw.one((-0.2, 0.0, 0.0, 0.2))
    return {"sentence1": first, "sentence2": second, "label": round(min(5.0, max(0.0, score)), 1)}


# ---------------------------------------------------------------- qqp: is it the same question?

_ASKED: tuple[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = (  # (topics, intents: ways to ask)
    (
        _words(
            "Spanish|chess|the piano|calligraphy|Python programming|photography|swimming|algebra|Korean|juggling|"
            "woodworking|creative writing|ballroom dancing|sign language",
            "|",
        ),
        (
            (
                "How can I learn {x} quickly?",
                "What is the fastest way to learn {x}?",
                "How do I become good at {x} in a short time?",
            ),
            (
                "How much does a course in {x} cost?",
                "What is the price of lessons in {x}?",
                "Are {x} lessons expensive?",
            ),
            (
                "Why is {x} so hard to learn?",
                "What makes learning {x} so difficult?",
                "Why do beginners struggle with {x}?",
            ),
            (
                "Which book about {x} should I read?",
                "What are the best books on {x}?",
                "Can you recommend a book about {x}?",
            ),
            (
                "Am I too old to learn {x} at {n}?",
                "Is {n} too late an age to start {x}?",
                "Can a person of {n} still learn {x}?",
            ),
        ),
    ),
    (
        _words(
            "Portugal|Vietnam|Iceland|Morocco|Peru|Norway|Kenya|Greece|Japan|Chile|Jordan|Scotland|New Zealand|Croatia",
            "|",
        ),
        (
            (
                "What is the best time to visit {x}?",
                "When should I travel to {x}?",
                "In which month is a trip to {x} most pleasant?",
            ),
            (
                "Is {x} safe for tourists?",
                "How dangerous is it to travel in {x}?",
                "Do tourists face any risks in {x}?",
            ),
            (
                "How much money do I need for {n} days in {x}?",
                "What would a trip of {n} days to {x} cost?",
                "What budget is right for {n} days in {x}?",
            ),
            ("Do I need a visa for {x}?", "Can I enter {x} without a visa?", "What are the visa rules of {x}?"),
            ("What food is {x} famous for?", "Which dishes should I try in {x}?", "What do people eat in {x}?"),
        ),
    ),
    (
        _words(
            "laptop|washing machine|phone|coffee maker|printer|bicycle|car|vacuum cleaner|guitar|tent|camera|"
            "dishwasher",
            "|",
        ),
        (
            (
                "Which {x} should I buy for under {n} dollars?",
                "What is the best {x} below {n} dollars?",
                "Can I get a decent {x} for less than {n} dollars?",
            ),
            (
                "How do I repair a broken {x}?",
                "My {x} does not work, how do I fix it?",
                "What can I do when my {x} stops working?",
            ),
            ("How do I clean my {x}?", "What is the right way to clean a {x}?", "How can I get the dirt out of a {x}?"),
            ("Where can I sell my used {x}?", "What is a good site to sell an old {x}?", "Who buys a second-hand {x}?"),
            (
                "How long does a {x} last?",
                "After how many years should I replace a {x}?",
                "What is the lifetime of a typical {x}?",
            ),
        ),
    ),
    (
        _words("nurse|pilot|lawyer|data scientist|chef|translator|architect|vet|firefighter|journalist|judge", "|"),
        (
            ("How do I become a {x}?", "What does it take to become a {x}?", "Which steps lead to a career as a {x}?"),
            ("How much does a {x} earn?", "What is the salary of a {x}?", "Is a {x} well paid?"),
            (
                "What does a {x} do all day?",
                "What is a normal day in the life of a {x}?",
                "How does a {x} spend the working day?",
            ),
            (
                "Should I quit my job as a {x} at {n}?",
                "Is it wise to leave a job as a {x} at {n}?",
                "Would you stop working as a {x} at the age of {n}?",
            ),
            (
                "What do people get wrong about being a {x}?",
                "Which myths about the work of a {x} are common?",
                "What are common misconceptions about a {x}?",
            ),
        ),
    ),
)
_ASIDES = (
    "",
    "",
    "",
    " I have no experience.",
    " Please be honest.",
    " I live in {T}.",
    " My friend {N} wants to know.",
)


def _qqp(draw: Draw, label: int) -> Row:
    if draw.chance(0.2):
        _, subject, properties = _looked_up(draw)
        (questions, _), (others, _) = draw.some(properties, 2)
        one, two = draw.some(questions, 2)
        two = two if label else draw.one(others)
        return {"question1": _ask(one, subject), "question2": _ask(two, subject), "label": label}
    topics, intents = draw.one(_ASKED)
    topic, other = draw.some(topics, 2)
    intent, different = draw.some(intents, 2)
    first, second = draw.some(intent, 2)
    if not label:
        if draw.chance(0.6):
            second, other = draw.one(different), topic
    else:
        other = topic
    number = str(20 + draw.one(range(50)))

    def asked(template: str, topic: str) -> str:
        aside = draw.one(_ASIDES).format(T=draw.one(TOWNS), N=draw.one(WOMEN + MEN))
        return template.format(x=topic, n=number) + aside

    return {"question1": asked(first, topic), "question2": asked(second, other), "label": label}


# ---------------------------------------------------------------- mnli: entailed, neutral or contradicted?

_DEEDS = (  # (kind, what was done, what was done instead)
    ("travelled", ("cycled to the coast", "took the train to the city", "drove to the mountains"), "stayed at home"),
    ("cooked", ("baked an apple pie", "made a pot of soup", "fried some fish"), "ate at a restaurant"),
    ("did some sport", ("swam a mile", "played tennis", "ran around the lake"), "rested on the couch"),
    ("bought something", ("bought a winter coat", "picked up a new phone", "paid for a ticket"), "spent no money"),
    ("worked in the house", ("painted the hallway", "fixed the kitchen sink", "mopped the floor"), "did no housework"),
    ("made music", ("sang in the choir", "played the trumpet", "practised the cello"), "kept silent"),
    ("read something", ("read a long novel", "studied the contract", "went through the old letters"), "read nothing"),
    (
        "helped a neighbour",
        ("shovelled the neighbour's path", "drove the neighbour to a clinic"),
        "ignored the neighbour",
    ),
)
_WAYS = (  # (way, same, opposite)
    ("early in the morning", "before noon", "late at night"),
    ("all alone", "without any company", "together with a crowd of friends"),
    ("in the pouring rain", "in wet weather", "under a cloudless sky"),
    ("in a great hurry", "quickly", "very slowly"),
    ("with a smile", "happily", "in tears"),
    ("for the first time ever", "with no earlier experience", "for the hundredth time"),
    ("without a single mistake", "perfectly", "badly"),
    ("very quietly", "without much noise", "with a terrible noise"),
)
_ROLES = (
    ("my uncle", "a relative of mine"),
    ("her brother", "someone in her family"),
    ("the mayor", "a politician"),
    ("our dentist", "someone we know"),
    ("the violinist", "a musician"),
    ("his daughter", "a member of his family"),
    ("the bus driver", "somebody"),
    ("the captain", "an officer"),
)
_REASONS = (
    "to please {N}",
    "because {N} had asked for it",
    "after a quarrel with {N}",
    "to forget about the trouble at {A}",
    "and told {N} all about it",
    "while {N} was looking after the children",
)
_OPENINGS = (
    "Yes, ",
    "Well, ",
    "I heard that ",
    "As far as I know, ",
    "You know, ",
    "It seems that ",
    "On {d}, ",
    "Last {d} ",
)


def _hearsay(draw: Draw, label: int) -> tuple[str, str]:
    """Return what is said of someone, and a claim that is entailed (0), neutral (1) or contradicted (2)."""
    (kind, specifics, instead), (other_kind, _, _) = draw.some(_DEEDS, 2)
    deed, way, other_way = draw.one(specifics), *draw.some(_WAYS, 2)
    role, general = draw.one(_ROLES)
    name, friend = draw.some(WOMEN + MEN, 2)
    who = draw.one((role, name))
    facts = {"N": friend, "A": draw.one(COMPANIES), "d": draw.one(DAYS)}
    vague = draw.chance(0.35)  # the premise tells only what kind of deed it was
    told = kind if vague else deed
    opening = draw.one(_OPENINGS)
    premise = f"{opening}{who} {told} {way[0]}"
    premise += draw.one((".", f", and {friend} was not surprised.", f", as {friend} says.", ", or so they say."))
    loose = general if who == role else "somebody"
    anyone = draw.one((who, loose))
    if label == 0:
        claims = (f"{anyone} {kind}.", f"{who} {told} {way[1]}.", f"{anyone} {kind} {way[1]}.", f"{who} {told}.")
    elif label == 1:
        claims = (
            f"{who} {told} {draw.one(_REASONS)}.",
            f"{who} {told} {draw.one(other_way[:2])}.",
            f"{who} {other_kind} as well.",
            f"{who} {deed}." if vague else f"{who} {told} {other_way[0]}.",
        )
    else:
        claims = (
            f"{who} {told} {way[2]}.",
            f"{who} {instead}.",
            f"nobody {kind} {draw.one((way[0], way[1]))}.",
            f"{who} never {kind} {draw.one((way[0], way[1]))}.",
        )
    premise, claim = premise.format(**facts), draw.one(claims).format(**facts)
    return _capital(premise), _capital(claim)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _mnli(draw: Draw, label: int) -> Row:
    """0 entailment, 1 neutral, 2 contradiction."""
    news = draw.chance(0.15)
    premise, claim = _news_claim(draw, ("same", "story", "outcome")[label]) if news else _hearsay(draw, label)
    return {"premise": premise, "hypothesis": claim, "label": label}


# ---------------------------------------------------------------- qnli: does the sentence answer the question?

_Property = tuple[tuple[str, ...], tuple[str, ...]]  # questions, and clauses that answer any of them
_ENTRIES: tuple[tuple[str, tuple[_Property, ...]], ...] = (  # what an entry is about, and its properties
    (
        "{P}",
        (
            (
                ("Where was {x} born?", "What is the birthplace of {x}?"),
                ("was born in {T}", "came from a family in {T}"),
            ),
            (("When did {x} die?", "In what year did the life of {x} end?"), ("died in {y}", "was buried in {y}")),
            (
                ("What did {x} study?", "In which subject did {x} hold a degree?"),
                ("held a degree in {s}", "studied {s} at a small college"),
            ),
            (
                ("Who was {x} married to?", "What was the name of the spouse of {x}?"),
                ("married {Q}", "had a spouse called {Q}"),
            ),
        ),
    ),
    (
        "{T}",
        (
            (
                ("How many people live in {x}?", "What is the population of {x}?"),
                ("has a population of {k} thousand", "is home to {k} thousand people"),
            ),
            (
                ("When was {x} founded?", "In what year was {x} established?"),
                ("was founded in {y}", "dates from the year {y}"),
            ),
            (
                ("Which river runs through {x}?", "On what river does {x} lie?"),
                ("lies on the river {S}", "has nine bridges over the {S}"),
            ),
            (
                ("What is the main industry of {x}?", "Which product is {x} known for?"),
                ("is known for making {g}s", "exports {g}s all over the world"),
            ),
        ),
    ),
    (
        "{A}",
        (
            (
                ("Who founded {x}?", "Who started the company {x}?"),
                ("was founded by {P}", "goes back to a shop of {P}"),
            ),
            (
                ("Where does {x} have its headquarters?", "In which town is {x} based?"),
                ("has its headquarters in {T}", "is run from {T}"),
            ),
            (
                ("How many people work for {x}?", "How large is the staff of {x}?"),
                ("has a staff of {k} thousand people", "employs {k} thousand workers"),
            ),
            (
                ("When did {x} go public?", "Since when have shares of {x} been traded?"),
                ("went public in {y}", "first sold shares in {y}"),
            ),
        ),
    ),
    (
        "The {S} Tower",
        (
            (
                ("How tall is {x}?", "What is the height of {x}?"),
                ("is {k} metres tall", "has a height of {k} metres"),
            ),
            (
                ("Who designed {x}?", "Which architect drew {x}?"),
                ("was designed by {P}", "is the work of the architect {P}"),
            ),
            (
                ("When was {x} completed?", "In what year was {x} finished?"),
                ("was completed in {y}", "has stood since {y}"),
            ),
            (
                ("In which town is {x}?", "Where does {x} stand?"),
                ("stands in {T}", "looks over the roofs of {T}"),
            ),
        ),
    ),
)
_SUBJECTS_READ = _words("law medicine botany history geology chemistry music theology economics astronomy")
_GOODS = _words("loom clock engine pump telescope lantern plough press barometer compass")


def _looked_up(draw: Draw) -> tuple[dict[str, str], str, tuple[_Property, ...]]:
    """Return a draw of facts, whom or what they are about, and the properties one may ask for."""
    facts = _facts(draw)
    facts |= {
        "y": str(1700 + draw.one(range(290))),
        "k": str(12 + draw.one(range(180))),
        "s": draw.one(_SUBJECTS_READ),
        "g": draw.one(_GOODS),
        "S": draw.one(SURNAMES),
    }
    entry, properties = draw.one(_ENTRIES)
    return facts, entry.format(**facts), properties


def _ask(question: str, subject: str) -> str:
    return question.format(x=subject.replace("The ", "the "))


def _qnli(draw: Draw, label: int) -> Row:
    """0 the sentence answers the question, 1 it does not."""
    facts, subject, properties = _looked_up(draw)
    asked, told, also = draw.some(properties, 3)
    said = [asked, also] if label == 0 else [told, also]
    clauses = [draw.one(answers).format(**facts) for _, answers in draw.shuffled(said)]
    aside = "whom few remember" if subject == facts["P"] else "which the guide praises"
    form = draw.one(("{x} {0}.", "{x} {0}.", "{x}, " + aside + ", {0}.", "{x} {0} and {1}.", "{x} {0}, and also {1}."))
    if label == 0 and "{1}" not in form:
        clauses = [draw.one(asked[1]).format(**facts)]
    question = _ask(draw.one(asked[0]), subject)
    return {"question": question, "sentence": form.format(*clauses, x=subject), "label": label}


# ---------------------------------------------------------------- rows and splits

_TASKS: dict[str, tuple[tuple[int, ...], Callable[[Draw, int], Row]]] = {  # labels, and a row of a label
    "cola": ((0, 1), _cola),
    "sst2": ((0, 1), _sst2),
    "mrpc": ((0, 1), _mrpc),
    "stsb": ((0, 1, 2, 3, 4), _stsb),
    "qqp": ((0, 1), _qqp),
    "mnli": ((0, 1, 2), _mnli),
    "qnli": ((0, 1), _qnli),
    "rte": ((0, 1), _rte),
}
TASKS = tuple(_TASKS)


def texts(row: Row) -> tuple[str, ...]:
    """Return a row's texts: its one sentence, or the two of a pair."""
    return tuple(value for key, value in row.items() if isinstance(value, str))


def rows(task: str, seed: int = 0) -> dict[str, list[Row]]:
    """Return a task's rows by split; no sentence of the task occurs in two rows, so none in two splits."""
    labels, make = _TASKS[task]
    draw = Draw(f"twin-bench demo {task} {seed}")
    seen: set[str] = set()

    def fresh() -> Iterator[Row]:
        count = 0
        while True:
            row = make(draw, labels[count % len(labels)])
            found = texts(row)
            if len(set(found)) == len(found) and seen.isdisjoint(found):
                seen.update(found)
                count += 1
                yield row

    source = fresh()
    every = draw.shuffled([next(source) for _ in range(sum(SPLITS.values()))])
    result, start = {}, 0
    for split, size in SPLITS.items():
        result[split] = [row | {"idx": index} for index, row in enumerate(every[start : start + size])]
        start += size
    return result
