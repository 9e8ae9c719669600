"""The two synthetic corpora and their tasks: a closed little world told as prose, and worked arithmetic.

"web" stands in for C4 and "arithmetic" for MATH and GSM8K; both are made here from a seed, offline.
Two things are held out of every training document, so that the tasks test more than recall:

* the *open question* about some facts (they are still told in prose), see `World.held_out`;
* the *operand tuples* of the test problems, see `operands_held_out`: no training document, in any kind of
  problem, drill or mixed story, uses them, nor adds or subtracts them in a worked step.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

PEOPLE = (
    "Ada Bram Cleo Dov Elsa Finn Greta Hugo Ines Jonas Kira Lars Mina Nils Olga Piet Rosa Sven Tilda Ulf "
    "Vera Walt Xenia Yara Zeno Alma Boris Carla Dario Edda Felix Gwen Hanna Ivo Julia Karl Lena Milo Nora Otto "
    "Paula Quinn Ruth Samir Tessa Uri Viola Wim Xaver Yusuf Zora Anton Berta Ciro Delia Emil Flora Goran Hilda Igor "
    "Jana Kemal Luisa Marek"
).split()
TOWNS = "Oakton Millbrook Harwick Stonford Elmsea Rivermouth Kestrel Dunmore Ashby Larkhill Norwood Wexley".split()
JOBS = "baker tailor miller fisher potter weaver smith gardener teacher painter doctor mason".split()
PETS = "cat goat horse parrot rabbit turtle donkey goose hamster sheep".split()
FOODS = "soup bread cheese plums honey rice pancakes carrots dumplings olives".split()
INSTRUMENTS = "drum flute violin harp trumpet guitar piano lute".split()
PLACES = "river harbour forest windmill castle lake bridge orchard".split()
GOODS = "wool salt glass timber copper apples candles paper".split()
COLOURS = "red blue white green yellow grey".split()

# Each relation: the values it draws from, prose phrasings, question, and yes/no question.
RELATIONS = {
    "town": (TOWNS, ["{p} lives in {v}.", "The home of {p} is in {v}.", "{p} has a small house in {v}."],
             "Where does {p} live?", "Does {p} live in {v}?"),
    "job": (JOBS, ["{p} works as a {v}.", "{p} earns a living as a {v}.", "For many years {p} has been a {v}."],
            "What is the job of {p}?", "Does {p} work as a {v}?"),
    "pet": (PETS, ["{p} keeps a {v}.", "{p} is fond of animals and owns a {v}.", "At night the {v} of {p} sleeps by the door."],
            "Which animal does {p} keep?", "Does {p} keep a {v}?"),
    "food": (FOODS, ["{p} likes to eat {v}.", "On a holiday {p} always asks for {v}.", "Nothing pleases {p} more than {v}."],
             "What does {p} like to eat?", "Does {p} like to eat {v}?"),
    "instrument": (INSTRUMENTS, ["{p} plays the {v}.", "In the evening {p} practises the {v}.", "{p} has learned to play the {v}."],
                   "What does {p} play?", "Does {p} play the {v}?"),
    "place": (PLACES, ["{p} is built beside a {v}.", "Visitors to {p} first see the {v}.", "Close to {p} there is an old {v}."],
              "What is {p} built beside?", "Is {p} built beside a {v}?"),
    "goods": (GOODS, ["{p} is known for its {v}.", "Traders come to {p} for {v}.", "The market of {p} sells {v}."],
              "What is {p} known for?", "Is {p} known for its {v}?"),
    "roofs": (COLOURS, ["The roofs of {p} are {v}.", "From afar {p} is a patch of {v} roofs.", "Every roof in {p} is painted {v}."],
              "Which colour are the roofs of {p}?", "Are the roofs of {p} {v}?"),
}  # fmt: skip
OF_PEOPLE, OF_TOWNS = ["town", "job", "pet", "food", "instrument"], ["place", "goods", "roofs"]

ORDINALS = ["First", "Next", "Then", "After that", "Later", "Finally"]
# Six steps each, with one tool and one material that come back in the later steps.
PROCEDURES = {
    "make a meal": ["fills a {t} with water", "washes the {m}", "puts the {m} into the {t}", "sets the {t} over the fire",
                    "tastes the {m}", "carries the {t} to the table"],
    "mend a fence": ["looks for the {t}", "counts the broken posts", "cuts a piece of {m}", "holds the {m} against the post",
                     "uses the {t} until all is firm", "puts away the {t} and the rest of the {m}"],
    "plant a garden": ["digs the ground with a {t}", "buys seeds of {m}", "cleans the {t}", "lays the {m} in rows",
                       "covers the {m} with earth", "hangs the {t} in the shed"],
    "make a gift": ["picks a {t} from the shelf", "measures the {m}", "shapes the {m} with the {t}", "lets the {m} dry",
                    "returns the {t}", "wraps the {m} in cloth"],
    "load a cart": ["rolls the cart to the door", "ties the {m} with a cord", "lifts the {m} onto the cart",
                    "lays the {t} on top", "covers the {t} and the {m}", "drives off before noon"],
    "clean a boat": ["pulls the boat ashore", "empties the {t}", "scrubs the deck with {m}", "rinses off the {m}",
                     "fills the {t} again", "pushes the boat back"],
}  # fmt: skip
TOOLS = "kettle hammer spade knife bucket basket ladder lantern".split()
MATERIALS = "beans clay leather barley pine wax linen turnips".split()
# Events and what follows from them, told with a town's name.
CAUSES = [
    ("it rained for three days", "the meadows were under water"), ("the sun burned all week", "the wells ran dry"),
    ("a storm came from the north", "many roofs lost their tiles"), ("the first snow fell", "the children built a fort"),
    ("the bridge broke", "the traders took the long road"), ("a fair was held", "the inns were full"),
    ("the harvest was rich", "the price of bread fell"), ("thick fog rose", "the boats stayed at home"),
    ("the bell rang at midnight", "everyone ran into the street"), ("the road was paved", "the carts arrived sooner"),
    ("a wolf was seen", "the shepherds lit fires"), ("the mill stood still", "flour became dear"),
]  # fmt: skip
# Who has it in the end: stories in which the last name follows from the earlier ones (0: giver, 1: taker).
EXCHANGES = [
    ("{a} lent the {t} to {b}. {x} When the work was done, the {t} was returned to {last}.", 0),
    ("{a} sold the {t} to {b}. {x} Since that day the {t} has belonged to {last}.", 1),
    ("{a} asked {b} for the {t}. {x} In the end the {t} was handed over by {last}.", 1),
    ("{a} lost the {t} and {b} found it. {x} The one who thanked the other was {last}.", 0),
    ("{a} taught {b} how to use the {t}. {x} The pupil was {last}.", 1),
    ("{a} waited with the {t} until {b} came. {x} The one who arrived late was {last}.", 1),
    ("{a} carried the {t} for {b}. {x} The one with tired arms was {last}.", 0),
    ("{a} hid the {t} from {b}. {x} The one who searched in vain was {last}.", 1),
]
ASIDES = ["The day was warm.", "{c} watched them from the window.", "Nobody else was there.", "{c} came by with a {t2}."]


def _bucket(*key: object, of: int) -> int:
    """A stable pseudo-random number in [0, of) for a key: what is held out never depends on a seed or an order."""
    return zlib.crc32(repr(key).encode()) % of


@dataclass
class World:
    """Who lives where and likes what: `facts[relation][subject] -> value`, drawn once from `seed`."""

    seed: int = 7
    facts: dict[str, dict[str, str]] = field(init=False)

    def __post_init__(self):
        rng = random.Random(self.seed)
        subjects = {name: PEOPLE if name in OF_PEOPLE else TOWNS for name in RELATIONS}
        self.facts = {name: {s: rng.choice(RELATIONS[name][0]) for s in subjects[name]} for name in RELATIONS}

    def held_out(self, relation: str, subject: str) -> bool:
        """Whether training never asks for this fact openly, though prose tells it (two facts in five)."""
        return _bucket(relation, subject, of=5) < 2

    def tell(self, rng: random.Random, relation: str, subject: str) -> str:
        return rng.choice(RELATIONS[relation][1]).format(p=subject, v=self.facts[relation][subject])

    def other(self, rng: random.Random, relation: str, subject: str, count: int = 1) -> list[str]:
        """`count` different wrong values for a fact."""
        return rng.sample([v for v in RELATIONS[relation][0] if v != self.facts[relation][subject]], count)

    def walk(self, subject: str) -> str:
        """Two facts chained: a person's town, and the place that town is built beside."""
        return self.facts["place"][self.facts["town"][subject]]


WORLD = World()
WALKS = ["On Sunday {p} left the house and walked to the {v}.", "From home {p} can see the {v}."]


# --- web documents --------------------------------------------------------------------------------------------------


def _profile(rng: random.Random) -> str:
    person = rng.choice(PEOPLE)
    lines = [WORLD.tell(rng, r, person) for r in rng.sample(OF_PEOPLE, rng.randint(3, 5))]
    if not WORLD.held_out("walk", person):
        lines.insert(rng.randint(1, len(lines)), rng.choice(WALKS).format(p=person, v=WORLD.walk(person)))
    return " ".join(lines)


def _town(rng: random.Random) -> str:
    town = rng.choice(TOWNS)
    lines = [WORLD.tell(rng, r, town) for r in rng.sample(OF_TOWNS, len(OF_TOWNS))]
    cause, effect = rng.choice(CAUSES)
    lines.append(f"When {cause} in {town}, {effect}.")
    lines += [WORLD.tell(rng, "town", p) for p in rng.sample(PEOPLE, 20) if WORLD.facts["town"][p] == town]
    return " ".join(lines)


def _procedure_steps(rng: random.Random) -> tuple[str, str, list[str], dict[str, str]]:
    goal, person = rng.choice(sorted(PROCEDURES)), rng.choice(PEOPLE)
    slots = {"t": rng.choice(TOOLS), "m": rng.choice(MATERIALS)}
    steps = [f"{o}, {person} {s.format(**slots)}." for o, s in zip(ORDINALS, PROCEDURES[goal], strict=True)]
    return goal, person, steps, slots


def _procedure(rng: random.Random) -> str:
    goal, person, steps, _ = _procedure_steps(rng)
    return f"This is how {person} wants to {goal}. " + " ".join(steps)


def _exchange_parts(rng: random.Random) -> tuple[str, str, str]:
    """A story up to its last word, the right name and the wrong one."""
    a, b, c = rng.sample(PEOPLE, 3)
    tool, other = rng.sample(TOOLS, 2)
    story, who = rng.choice(EXCHANGES)
    text = story.format(a=a, b=b, t=tool, x=rng.choice(ASIDES).format(c=c, t2=other), last="{last}")
    return text[: text.index(" {last}")], (a, b)[who], (b, a)[who]


def _exchange(rng: random.Random) -> str:
    stories = [_exchange_parts(rng) for _ in range(rng.randint(1, 3))]
    return " ".join(f"{context} {right}." for context, right, _ in stories)


def _question(relation: str, subject: str) -> str:
    return f"Question: {RELATIONS[relation][2].format(p=subject)}\nAnswer:"


def _questions(rng: random.Random) -> str:
    lines = []
    while len(lines) < 5:
        relation = rng.choice(sorted(RELATIONS))
        subject = rng.choice(sorted(WORLD.facts[relation]))
        if not WORLD.held_out(relation, subject):
            lines.append(f"{_question(relation, subject)} {WORLD.facts[relation][subject]}")
    return "\n\n".join(lines)


def _yes_no_parts(rng: random.Random) -> tuple[str, str]:
    """A passage about two people and a question on one of them; a wrong value may be the other person's."""
    people = rng.sample(PEOPLE, 2)
    relation, subject = rng.choice(OF_PEOPLE), people[0]
    told = [WORLD.tell(rng, r, p) for p in people for r in [relation, *rng.sample(OF_PEOPLE, 1)]]
    rng.shuffle(told)
    value, answer = WORLD.facts[relation][subject], "yes"
    if rng.random() < 0.5:
        answer, theirs = "no", WORLD.facts[relation][people[1]]
        swap = theirs != value and rng.random() < 0.5
        value = theirs if swap else WORLD.other(rng, relation, subject)[0]
    question = RELATIONS[relation][3].format(p=subject, v=value)
    return f"{' '.join(told)}\nQuestion: {question}\nAnswer:", answer


def _yes_no(rng: random.Random) -> str:
    return "\n\n".join(" ".join(_yes_no_parts(rng)) for _ in range(2))


WEB_DOCUMENTS = [(_profile, 5), (_town, 2), (_procedure, 3), (_exchange, 3), (_questions, 3), (_yes_no, 4)]


# --- arithmetic -----------------------------------------------------------------------------------------------------


def operands_held_out(*operands: int) -> bool:
    """Whether problems on these operands, in any order, are kept for the tests: one tuple in eight."""
    return _bucket(sorted(operands), of=8) == 0


@dataclass
class Problem:
    """A word problem: its `operands`, text, worked `steps` as (a, operator, b) and the answer."""

    operands: tuple[int, ...]
    question: str
    steps: list[tuple[int, str, int]]

    @property
    def worked(self) -> str:
        return "\n".join(f"{a} {op} {b} = {_apply(a, op, b)}" for a, op, b in self.steps)

    @property
    def answer(self) -> int:
        return _apply(*self.steps[-1])

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        return f"{self.prompt}\n{self.worked}\n#### {self.answer}"

    def trainable(self) -> bool:
        """No held-out tuple among its operands or in a step that adds or subtracts (times tables are shared)."""
        sums = [(a, b) for a, op, b in self.steps if op in "+-"]
        return not any(operands_held_out(*t) for t in [self.operands, *sums])


def _apply(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]


THINGS = "apples eggs coins books nails shells stamps marbles buttons pears".split()
# Each kind: how the numbers are drawn (a, b, c), the question, and the steps ("=" is the last result).
KINDS = {
    "more": ("{p} has {a} {t} and gets {b} more. How many {t} does {p} have now?", "a+b"),
    "less": ("{p} has {a} {t} and gives away {b}. How many {t} are left?", "a-b"),
    "compare": ("{p} has {a} {t} and {q} has {b}. How many more {t} does {p} have than {q}?", "a-b"),
    "both": ("{p} has {a} {t} and {q} has {b}. How many {t} do they have together?", "a+b"),
    "bags_more": ("{p} fills {m} bags with {k} {t} each and finds {c} more. How many {t} are there?", "m*k =+c"),
    "bags_less": ("{p} fills {m} bags with {k} {t} each and then loses {c}. How many {t} remain?", "m*k =-c"),
    "gain_loss": ("{p} has {a} {t}, buys {b} and sells {c}. How many {t} does {p} have now?", "a+b =-c"),
    "two_losses": ("{p} has {a} {t}, sells {c} on Monday and {d} on Friday. How many {t} are left?", "a-c =-d"),
    "three": ("{p} finds {c} {t}, then {d}, then {e}. How many {t} is that?", "c+d =+e"),
    "share": ("{p} has {g} {t} and shares them among {m} friends. How many does each get?", "g/m"),
}  # fmt: skip


def _numbers(rng: random.Random) -> dict[str, int]:
    m, k = rng.randint(2, 9), rng.randint(2, 9)
    small = {name: rng.randint(2, 30) for name in "cde"}
    return {"a": rng.randint(11, 99), "b": rng.randint(11, 88), "m": m, "k": k, "g": m * k, **small}


def _draw_steps(recipe: str, numbers: dict[str, int]) -> list[tuple[int, str, int]]:
    steps = []
    for part in recipe.split():
        left = _apply(*steps[-1]) if part[0] == "=" else numbers[part[0]]
        steps.append((left, part[1], numbers[part[2]]))
    return steps


def draw_problem(rng: random.Random, kind: str, *, held_out: bool) -> Problem:
    """A problem of a kind whose results all lie in 1..99; `held_out` says from which side of the split.

    A held-out problem has its whole operand tuple held out; a training problem shares no such tuple.
    """
    question, recipe = KINDS[kind]
    while True:
        numbers = _numbers(rng)
        steps = _draw_steps(recipe, numbers)
        operands = tuple(numbers[letter] for letter in "abcdegmk" if f"{{{letter}}}" in question)
        p, q = rng.sample(PEOPLE, 2)
        problem = Problem(operands, question.format(p=p, q=q, t=rng.choice(THINGS), **numbers), steps)
        if not all(1 <= _apply(*step) <= 99 for step in steps):
            continue
        if operands_held_out(*operands) if held_out else problem.trainable():
            return problem


def _problems(rng: random.Random) -> str:
    kinds = [rng.choice(sorted(KINDS)) for _ in range(3)]
    return "\n\n".join(draw_problem(rng, kind, held_out=False).text for kind in kinds)


# Drills are dense in sums: subtraction, the hardest for the model, takes half of them.
DRILLS = ["less", "less", "less", "more", "more", "bags_more", "bags_less", "share"]


def _drill(rng: random.Random) -> str:
    problems = [draw_problem(rng, rng.choice(DRILLS), held_out=False) for _ in range(8)]
    return "\n".join(problem.worked for problem in problems)


ARITHMETIC_DOCUMENTS = [(_problems, 6), (_drill, 4)]


def _mixed(rng: random.Random) -> str:
    """Both corpora in one document: a person of the world, then a problem about them, worked and answered."""
    problem = draw_problem(rng, rng.choice(sorted(KINDS)), held_out=False)
    person = problem.question.split()[0]
    told = " ".join(WORLD.tell(rng, r, person) for r in rng.sample(OF_PEOPLE, 2))
    return f"{told}\n{problem.text}"


def documents(corpus: str, seed: int) -> Iterator[str]:
    """An endless stream of training documents of "web" or "arithmetic"; one in eight mixes both."""
    kinds = {"web": WEB_DOCUMENTS, "arithmetic": ARITHMETIC_DOCUMENTS}[corpus]
    makers = [make for make, weight in kinds for _ in range(weight)]
    rng = random.Random(f"{corpus}/{seed}")
    while True:
        yield _mixed(rng) if rng.random() < 1 / 8 else rng.choice(makers)(rng)


# --- tasks ----------------------------------------------------------------------------------------------------------


def _choices(rng: random.Random, right: str, wrong: list[str]) -> dict:
    options = rng.sample([right, *wrong], len(wrong) + 1)
    return {"choices": options, "label": options.index(right)}


def _fact_item(rng: random.Random) -> dict:
    relation = rng.choice(sorted(RELATIONS))
    subject = rng.choice([s for s in sorted(WORLD.facts[relation]) if WORLD.held_out(relation, s)])
    wrong = WORLD.other(rng, relation, subject, 3)
    return {"query": _question(relation, subject), **_choices(rng, WORLD.facts[relation][subject], wrong)}


def _continuation_item(rng: random.Random) -> dict:
    """The next step of a procedure against the wrong step, the wrong tool or material, and both."""
    goal, person, steps, slots = _procedure_steps(rng)
    known = [i for i in range(2, 6) if "{" in PROCEDURES[goal][i]]
    at = rng.choice(known)
    other = {"t": rng.choice([t for t in TOOLS if t != slots["t"]]), "m": rng.choice([m for m in MATERIALS if m != slots["m"]])}
    foreign = PROCEDURES[rng.choice([g for g in sorted(PROCEDURES) if g != goal])][at]
    later = PROCEDURES[goal][rng.choice([i for i in range(6) if i != at])]
    wrong = [PROCEDURES[goal][at].format(**other), later.format(**slots), foreign.format(**slots)]
    context = f"This is how {person} wants to {goal}. " + " ".join(steps[:at])
    query = f"{context} {ORDINALS[at]}, {person}"
    return {"query": query, **_choices(rng, PROCEDURES[goal][at].format(**slots) + ".", [w + "." for w in wrong])}


def _walk_item(rng: random.Random) -> dict:
    """Two facts chained for a person of whom this was never told."""
    person = rng.choice([p for p in PEOPLE if WORLD.held_out("walk", p)])
    right = WORLD.walk(person)
    wrong = rng.sample([v for v in PLACES if v != right], 3)
    context = rng.choice(WALKS)[: -len(" {v}.")].format(p=person)
    told = " ".join(WORLD.tell(rng, r, person) for r in rng.sample(OF_PEOPLE, 2))
    return {"query": f"{told} {context}", **_choices(rng, right + ".", [w + "." for w in wrong])}


def _reference_item(rng: random.Random) -> dict:
    context, right, wrong = _exchange_parts(rng)
    return {"query": context, **_choices(rng, right + ".", [wrong + "."])}


def _yes_no_item(rng: random.Random) -> dict:
    query, answer = _yes_no_parts(rng)
    return {"query": query, "choices": ["no", "yes"], "label": int(answer == "yes")}


def _result_item(rng: random.Random) -> dict:
    """A worked problem up to its last sum: the right result against near misses and a digit swap."""
    problem = draw_problem(rng, rng.choice(sorted(KINDS)), held_out=True)
    right = problem.answer
    near = [n for n in {right - 1, right + 1, right - 10, right + 10, right - 2, right + 2} if 1 <= n <= 99]
    query = f"{problem.prompt}\n{problem.worked.rsplit(' ', 1)[0]}"
    return {"query": query, **_choices(rng, str(right), [str(n) for n in rng.sample(sorted(near), 3)])}


def _generation_item(rng: random.Random) -> dict:
    problem = draw_problem(rng, rng.choice(sorted(KINDS)), held_out=True)
    return {"question": problem.question, "answer": f"{problem.worked}\n#### {problem.answer}"}


TASKS = {
    "web_facts": _fact_item,
    "web_continuation": _continuation_item,
    "web_walks": _walk_item,
    "web_reference": _reference_item,
    "web_yes_no": _yes_no_item,
    "arithmetic_result": _result_item,
    "arithmetic_problems": _generation_item,
}


def task_items(task: str, count: int, seed: int) -> list[dict]:
    """`count` different items of a task of `TASKS`."""
    rng, items = random.Random(f"{task}/{seed}"), {}
    while len(items) < count:
        item = TASKS[task](rng)
        items.setdefault(str(sorted(item.items())), item)
    return list(items.values())


def example_problems(count: int, seed: int) -> list[dict]:
    """Worked training problems, the fixed examples of the few-shot prompt."""
    rng = random.Random(f"examples/{seed}")
    problems = [draw_problem(rng, kind, held_out=False) for kind in rng.sample(sorted(KINDS), count)]
    return [{"question": p.question, "answer": f"{p.worked}\n#### {p.answer}"} for p in problems]
