"""The two synthetic corpora and their tasks: a small closed world in prose, and worked arithmetic.

"web" replaces C4, and "arithmetic" replaces MATH and GSM8K; both are made here from a seed, offline.
Two things are held out of every training document, so that the tasks test more than recall:

* the *open question* about some facts, although prose states these facts, see `never_asked`;
* the *operand tuples* of the test problems, see `draw_problem`: no training document has them as operands, or adds
  or subtracts them in a worked step.
"""

import json
import operator
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The closed world: people, sentences and questions for each fact, procedures of six steps with a tool {t} and a material {m},
# stories whose ending names the first (0) or the second (1) person of their beginning, and kinds of problems, each with
# its question and its steps ("=" stands for the last result).
WORDS = json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf-8"))
PEOPLE, TOOLS, MATERIALS, THINGS = (WORDS[name].split() for name in ("people", "tools", "materials", "things"))
RELATIONS, PROCEDURES, KINDS, DRILLS = WORDS["relations"], WORDS["procedures"], WORDS["problems"], WORDS["drills"].split()
VALUES = {name: relation["values"].split() for name, relation in RELATIONS.items()}
SUBJECTS = {name: PEOPLE if relation["of"] == "people" else VALUES["town"] for name, relation in RELATIONS.items()}
OF_PEOPLE, OF_TOWNS = ([name for name in RELATIONS if RELATIONS[name]["of"] == who] for who in ("people", "towns"))
_draw = random.Random(7).choice
FACTS = {name: {subject: _draw(VALUES[name]) for subject in SUBJECTS[name]} for name in RELATIONS}


def _bucket(*key: object, of: int) -> int:
    """A stable pseudo-random number in [0, of) for a key, so that held-out items do not depend on a seed or an order."""
    return zlib.crc32(repr(key).encode()) % of


def never_asked(relation: str, subject: str) -> bool:
    """Whether training never asks for this fact in an open question, though prose states it (two facts in five)."""
    return _bucket(relation, subject, of=5) < 2


def _prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _tell(rng: random.Random, subject: str, relations: list[str]) -> list[str]:
    """A sentence for each fact."""
    return [rng.choice(RELATIONS[name]["prose"]).format(p=subject, v=FACTS[name][subject]) for name in relations]


def _wrong(rng: random.Random, relation: str, subject: str, count: int = 1) -> list[str]:
    """`count` different wrong values for a fact."""
    return rng.sample([v for v in VALUES[relation] if v != FACTS[relation][subject]], count)


def _profile(rng: random.Random) -> str:
    person = rng.choice(PEOPLE)
    lines = _tell(rng, person, rng.sample(OF_PEOPLE, rng.randint(3, 5)))
    if not never_asked("walk", person):
        place = FACTS["place"][FACTS["town"][person]]
        lines.insert(rng.randint(1, len(lines)), rng.choice(WORDS["walks"]).format(p=person, v=place))
    return " ".join(lines)


def _town(rng: random.Random) -> str:
    town = rng.choice(VALUES["town"])
    lines = _tell(rng, town, rng.sample(OF_TOWNS, len(OF_TOWNS)))
    cause, effect = rng.choice(WORDS["causes"])
    lines.append(f"When {cause} in {town}, {effect}.")
    for person in rng.sample(PEOPLE, 20):
        lines += _tell(rng, person, ["town"] if FACTS["town"][person] == town else [])
    return " ".join(lines)


def _procedure(rng: random.Random) -> str:
    goal, person, tool, material = rng.choice(sorted(PROCEDURES)), rng.choice(PEOPLE), rng.choice(TOOLS), rng.choice(MATERIALS)
    lines = [f"With the {tool} and some {material} {person} wants to {goal}."]
    for ordinal, step in zip(WORDS["ordinals"], PROCEDURES[goal], strict=True):
        lines.append(f"{ordinal}, {person} {step.format(t=tool, m=material)}.")
    return " ".join(lines)


def _stories(rng: random.Random, count: int = 2) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Interleaved stories: the text of their beginnings, each ending with its right name, and all names."""
    people, tools = rng.sample(PEOPLE, 2 * count), rng.sample(TOOLS, count)
    begun, endings = [], []
    for i, (beginning, ending, who) in enumerate(rng.sample(WORDS["exchanges"], count)):
        pair = people[2 * i : 2 * i + 2]
        begun.append(beginning.format(a=pair[0], b=pair[1], t=tools[i]))
        endings.append((ending.format(t=tools[i]), pair[who]))
    rng.shuffle(endings)
    return " ".join(begun), endings, people


def _exchange(rng: random.Random) -> str:
    begun, endings, _ = _stories(rng)
    return " ".join([begun, *(f"{ending} {name}." for ending, name in endings)])


def _question(relation: str, subject: str) -> str:
    return _prompt(RELATIONS[relation]["question"].format(p=subject))


def _questions(rng: random.Random) -> str:
    lines = []
    while len(lines) < 5:
        relation = rng.choice(sorted(RELATIONS))
        subject = rng.choice(sorted(FACTS[relation]))
        if not never_asked(relation, subject):
            lines.append(f"{_question(relation, subject)} {FACTS[relation][subject]}")
    return "\n\n".join(lines)


def _passage(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """Sentences with one or two facts about each of two people, shuffled; the people; the relations."""
    people, relations = rng.sample(PEOPLE, 2), rng.sample(OF_PEOPLE, rng.randint(1, 2))
    told = [sentence for person in people for sentence in _tell(rng, person, relations)]
    rng.shuffle(told)
    return " ".join(told), people, relations


def _asked(rng: random.Random, people: list[str], relations: list[str]) -> tuple[str, str]:
    """A yes/no question on a passage, and its answer. A wrong value may be the other person's."""
    subject, other = rng.sample(people, 2)
    relation = rng.choice(relations)
    value, answer = FACTS[relation][subject], "yes"
    if rng.random() < 0.5:
        theirs, answer = FACTS[relation][other], "no"
        swap = theirs != value and rng.random() < 0.5
        value = theirs if swap else _wrong(rng, relation, subject)[0]
    return _prompt(RELATIONS[relation]["yes_no"].format(p=subject, v=value)), answer


def _yes_no(rng: random.Random) -> str:
    """A passage and four questions on it, so that a document teaches more than one bit."""
    passage, people, relations = _passage(rng)
    return "\n".join([passage, *(" ".join(_asked(rng, people, relations)) for _ in range(4))])


class Problem(NamedTuple):
    """A word problem, its steps such as "12 + 5 = 17", one on a line, and the last result."""

    question: str
    worked: str
    answer: int

    @property
    def solution(self) -> str:
        return f"{self.worked}\n#### {self.answer}"

    @property
    def text(self) -> str:
        return f"{_prompt(self.question)}\n{self.solution}"


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
RANGES = {"m": (2, 9), "k": (2, 9), "c": (2, 30), "d": (2, 30), "e": (2, 30), "a": (11, 99), "b": (11, 88)}


def _steps(recipe: str, numbers: dict[str, int]) -> list[tuple[int, str, int, int]]:
    """The steps of a problem as (a, operator, b, result)."""
    steps = []
    for left, sign, right in recipe.split():
        a, b = steps[-1][3] if left == "=" else numbers[left], numbers[right]
        steps.append((a, sign, b, OPERATORS[sign](a, b)))
    return steps


def draw_problem(rng: random.Random, kind: str | None = None, *, held_out: bool = False) -> Problem:
    """A problem of a kind (None: of any), all results in 1..99.

    One tuple of operands in eight, in any order, is held out for the tests. A test problem has such operands; a training
    problem has none, also not in its sums and differences (times tables are shared).
    """
    question, recipe = KINDS[kind or rng.choice(sorted(KINDS))]
    while True:
        numbers = {letter: rng.randint(*bounds) for letter, bounds in RANGES.items()}
        numbers["g"] = numbers["m"] * numbers["k"]
        p, q = rng.sample(PEOPLE, 2)
        told, steps = question.format(p=p, q=q, t=rng.choice(THINGS), **numbers), _steps(recipe, numbers)
        used = [[number for letter, number in numbers.items() if f"{{{letter}}}" in question]]
        used += [(a, b) for a, sign, b, _ in steps if sign in "+-"]
        reserved = [_bucket(sorted(operands), of=8) == 0 for operands in used]
        if all(1 <= result <= 99 for *_, result in steps) and (reserved[0] if held_out else not any(reserved)):
            return Problem(told, "\n".join(f"{a} {sign} {b} = {result}" for a, sign, b, result in steps), steps[-1][3])


def _problems(rng: random.Random) -> str:
    kinds = [rng.choice(sorted(KINDS)) for _ in range(3)]
    return "\n\n".join(draw_problem(rng, kind).text for kind in kinds)


def _drill(rng: random.Random) -> str:
    """Many sums. Half of the kinds are subtractions, which are hardest for the model."""
    return "\n".join(draw_problem(rng, rng.choice(DRILLS)).worked for _ in range(8))


def _mixed(rng: random.Random) -> str:
    """Both corpora in one document: facts about a person, then a problem about that person, worked and answered."""
    problem = draw_problem(rng)
    person = problem.question.split()[0]
    return "\n".join([" ".join(_tell(rng, person, rng.sample(OF_PEOPLE, 2))), problem.text])


DOCUMENTS = {  # kinds of documents, with their weights
    "web": {_profile: 5, _town: 1, _procedure: 6, _exchange: 5, _questions: 3, _yes_no: 5},
    "arithmetic": {_problems: 6, _drill: 4},
}


def documents(corpus: str, seed: int) -> Iterator[str]:
    """An endless stream of training documents of "web" or "arithmetic"; one in eight mixes the two."""
    makers = [make for make, weight in DOCUMENTS[corpus].items() for _ in range(weight)]
    rng = random.Random(f"{corpus}/{seed}")
    while True:
        yield _mixed(rng) if rng.random() < 1 / 8 else rng.choice(makers)(rng)


def _item(rng: random.Random, query: str, right: str, wrong: list[str]) -> dict:
    options = rng.sample([right, *wrong], len(wrong) + 1)
    return {"query": query, "choices": options, "label": options.index(right)}


def _fact_item(rng: random.Random) -> dict:
    relation = rng.choice(sorted(RELATIONS))
    subject = rng.choice([s for s in sorted(FACTS[relation]) if never_asked(relation, s)])
    return _item(rng, _question(relation, subject), FACTS[relation][subject], _wrong(rng, relation, subject, 3))


def _walk_item(rng: random.Random) -> dict:
    """Two facts chained, the person's town and the place beside it, for a person whose chain training never states."""
    person = rng.choice([p for p in PEOPLE if never_asked("walk", p)])
    town = FACTS["town"][person]
    wrong = _wrong(rng, "place", town, 3)
    context = rng.choice(WORDS["walks"])[: -len(" {v}.")].format(p=person)
    told = " ".join(_tell(rng, person, rng.sample(OF_PEOPLE, 2)))
    return _item(rng, f"{told} {context}", FACTS["place"][town] + ".", [w + "." for w in wrong])


def _reference_item(rng: random.Random) -> dict:
    """Three interleaved stories (training has two). The answers: the right name, its partner, and two others."""
    begun, endings, people = _stories(rng, count=3)
    ending, right = endings[0]
    partner = people[people.index(right) ^ 1]
    others = rng.sample([p for p in people if p not in (right, partner)], 2)
    return _item(rng, f"{begun} {ending}", right + ".", [f"{p}." for p in (partner, *others)])


def _result_item(rng: random.Random) -> dict:
    """A worked problem up to its last sum. The answers: the right result, near misses and a digit swap."""
    problem = draw_problem(rng, held_out=True)
    near = [n for n in {problem.answer + step for step in (-1, 1, -10, 10, -2, 2)} if 1 <= n <= 99]
    query = f"{_prompt(problem.question)}\n{problem.worked.rsplit(' ', 1)[0]}"
    return _item(rng, query, str(problem.answer), [str(n) for n in rng.sample(sorted(near), 3)])


def _generation_item(problem: Problem) -> dict:
    return {"query": _prompt(problem.question), "answer": problem.solution}


TASKS = {
    "web_facts": _fact_item,
    "web_walks": _walk_item,
    "web_reference": _reference_item,
    "arithmetic_result": _result_item,
    "arithmetic_problems": lambda rng: _generation_item(draw_problem(rng, held_out=True)),
}


def task_items(task: str, count: int, seed: int) -> list[dict]:
    """`count` different items of a task of `TASKS`."""
    rng, items = random.Random(f"{task}/{seed}"), {}
    while len(items) < count:
        item = TASKS[task](rng)
        items.setdefault(str(sorted(item.items())), item)
    return list(items.values())


def example_problems(count: int, seed: int) -> list[dict]:
    """Worked training problems: the fixed examples of the few-shot prompt."""
    rng = random.Random(f"examples/{seed}")
    return [_generation_item(draw_problem(rng, kind)) for kind in rng.sample(sorted(KINDS), count)]
