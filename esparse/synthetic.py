"""The two synthetic corpora and their tasks: a closed little world told as prose, and worked arithmetic.

"web" stands in for C4 and "arithmetic" for MATH and GSM8K; both are made here from a seed, offline.
Two things are held out of every training document, so that the tasks test more than recall:

* the *open question* about some facts (they are still told in prose), see `World.held_out`;
* the *operand tuples* of the test problems, see `operands_held_out`: no training document, in any kind of
  problem, drill or mixed story, uses them, nor adds or subtracts them in a worked step.
"""

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# The closed world, in words: who there is, how each fact is told and asked, procedures of six steps with a tool {t} and
# a material {m}, stories whose last name is the first (0) or the second (1) of their beginning, and problem kinds, each
# with its question and its steps ("=" stands for the last result).
WORDS = json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf-8"))
PEOPLE, TOOLS, MATERIALS, THINGS = (WORDS[name].split() for name in ("people", "tools", "materials", "things"))
RELATIONS, PROCEDURES, KINDS = WORDS["relations"], WORDS["procedures"], WORDS["problems"]
VALUES = {name: relation["values"].split() for name, relation in RELATIONS.items()}
OF_PEOPLE, OF_TOWNS = ([name for name in RELATIONS if RELATIONS[name]["of"] == who] for who in ("people", "towns"))


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
        subjects = {name: PEOPLE if name in OF_PEOPLE else VALUES["town"] for name in RELATIONS}
        self.facts = {name: {s: rng.choice(VALUES[name]) for s in subjects[name]} for name in RELATIONS}

    def held_out(self, relation: str, subject: str) -> bool:
        """Whether training never asks for this fact openly, though prose tells it (two facts in five)."""
        return _bucket(relation, subject, of=5) < 2

    def tell(self, rng: random.Random, relation: str, subject: str) -> str:
        return rng.choice(RELATIONS[relation]["prose"]).format(p=subject, v=self.facts[relation][subject])

    def other(self, rng: random.Random, relation: str, subject: str, count: int = 1) -> list[str]:
        """`count` different wrong values for a fact."""
        return rng.sample([v for v in VALUES[relation] if v != self.facts[relation][subject]], count)

    def walk(self, subject: str) -> str:
        """Two facts chained: a person's town, and the place that town is built beside."""
        return self.facts["place"][self.facts["town"][subject]]


WORLD = World()


# --- web documents --------------------------------------------------------------------------------------------------


def _profile(rng: random.Random) -> str:
    person = rng.choice(PEOPLE)
    lines = [WORLD.tell(rng, r, person) for r in rng.sample(OF_PEOPLE, rng.randint(3, 5))]
    if not WORLD.held_out("walk", person):
        lines.insert(rng.randint(1, len(lines)), rng.choice(WORDS["walks"]).format(p=person, v=WORLD.walk(person)))
    return " ".join(lines)


def _town(rng: random.Random) -> str:
    town = rng.choice(VALUES["town"])
    lines = [WORLD.tell(rng, r, town) for r in rng.sample(OF_TOWNS, len(OF_TOWNS))]
    cause, effect = rng.choice(WORDS["causes"])
    lines.append(f"When {cause} in {town}, {effect}.")
    lines += [WORLD.tell(rng, "town", p) for p in rng.sample(PEOPLE, 20) if WORLD.facts["town"][p] == town]
    return " ".join(lines)


def _procedure_steps(rng: random.Random) -> tuple[str, str, list[str], dict[str, str]]:
    goal, person = rng.choice(sorted(PROCEDURES)), rng.choice(PEOPLE)
    slots = {"t": rng.choice(TOOLS), "m": rng.choice(MATERIALS)}
    steps = [f"{o}, {person} {s.format(**slots)}." for o, s in zip(WORDS["ordinals"], PROCEDURES[goal], strict=True)]
    return goal, person, steps, slots


def _procedure(rng: random.Random) -> str:
    goal, person, steps, slots = _procedure_steps(rng)
    return " ".join([_aim(goal, person, slots), *steps])


def _aim(goal: str, person: str, slots: dict[str, str]) -> str:
    return f"With the {slots['t']} and some {slots['m']} {person} wants to {goal}."


def _exchanges(rng: random.Random, count: int = 2) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Stories told one into the other: their beginnings, the endings with the right name each, and all names."""
    people, tools = rng.sample(PEOPLE, 2 * count), rng.sample(TOOLS, count)
    begun, endings = [], []
    for i, (beginning, ending, who) in enumerate(rng.sample(WORDS["exchanges"], count)):
        pair = people[2 * i : 2 * i + 2]
        begun.append(beginning.format(a=pair[0], b=pair[1], t=tools[i]))
        endings.append((ending.format(t=tools[i]), pair[who]))
    rng.shuffle(endings)
    return " ".join(begun), endings, people


def _exchange(rng: random.Random) -> str:
    begun, endings, _ = _exchanges(rng)
    return " ".join([begun, *(f"{ending} {name}." for ending, name in endings)])


def _question(relation: str, subject: str) -> str:
    return f"Question: {RELATIONS[relation]['question'].format(p=subject)}\nAnswer:"


def _questions(rng: random.Random) -> str:
    lines = []
    while len(lines) < 5:
        relation = rng.choice(sorted(RELATIONS))
        subject = rng.choice(sorted(WORLD.facts[relation]))
        if not WORLD.held_out(relation, subject):
            lines.append(f"{_question(relation, subject)} {WORLD.facts[relation][subject]}")
    return "\n\n".join(lines)


def _passage(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """One or two kinds of fact told of two people, shuffled; the people, and the relations."""
    people, relations = rng.sample(PEOPLE, 2), rng.sample(OF_PEOPLE, rng.randint(1, 2))
    told = [WORLD.tell(rng, relation, person) for person in people for relation in relations]
    rng.shuffle(told)
    return " ".join(told), people, relations


def _asked(rng: random.Random, people: list[str], relations: list[str]) -> tuple[str, str]:
    """A yes/no question on a passage and its answer; a wrong value may be the other person's."""
    subject, other = rng.sample(people, 2)
    relation = rng.choice(relations)
    value, answer = WORLD.facts[relation][subject], "yes"
    if rng.random() < 0.5:
        theirs, answer = WORLD.facts[relation][other], "no"
        swap = theirs != value and rng.random() < 0.5
        value = theirs if swap else WORLD.other(rng, relation, subject)[0]
    return f"Question: {RELATIONS[relation]['yes_no'].format(p=subject, v=value)}\nAnswer:", answer


def _yes_no(rng: random.Random) -> str:
    """A passage and four questions on it, so that a document teaches more than one bit."""
    passage, people, relations = _passage(rng)
    return "\n".join([passage, *(" ".join(_asked(rng, people, relations)) for _ in range(4))])


WEB_DOCUMENTS = [(_profile, 5), (_town, 1), (_procedure, 6), (_exchange, 5), (_questions, 3), (_yes_no, 5)]


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


def _walk_item(rng: random.Random) -> dict:
    """Two facts chained for a person of whom this was never told."""
    person = rng.choice([p for p in PEOPLE if WORLD.held_out("walk", p)])
    right = WORLD.walk(person)
    wrong = rng.sample([v for v in VALUES["place"] if v != right], 3)
    context = rng.choice(WORDS["walks"])[: -len(" {v}.")].format(p=person)
    told = " ".join(WORLD.tell(rng, r, person) for r in rng.sample(OF_PEOPLE, 2))
    return {"query": f"{told} {context}", **_choices(rng, right + ".", [w + "." for w in wrong])}


def _reference_item(rng: random.Random) -> dict:
    """Three stories at once, where training had two: the right name, its partner, and two others."""
    begun, endings, people = _exchanges(rng, count=3)
    ending, right = endings[0]
    partner = people[people.index(right) ^ 1]
    others = rng.sample([p for p in people if p not in (right, partner)], 2)
    return {"query": f"{begun} {ending}", **_choices(rng, right + ".", [f"{p}." for p in (partner, *others)])}


def _yes_no_item(rng: random.Random) -> dict:
    passage, people, relations = _passage(rng)
    question, answer = _asked(rng, people, relations)
    return {"query": f"{passage}\n{question}", "choices": ["no", "yes"], "label": int(answer == "yes")}


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
