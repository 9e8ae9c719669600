"""The two synthetic corpora and their tasks: a small closed world in prose, and worked arithmetic.

"web" replaces C4, and "arithmetic" replaces MATH and GSM8K; both are made here from a seed, offline.
Two things are held out of every training document, so that the tasks test more than recall:

* the *open question* about some facts, although prose states these facts, see `never_asked`;
* the *operand tuples* of the test problems, see `operands_held_out`: no training document has them as operands, or adds
  or subtracts them in a worked step.
"""

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The closed world: people, sentences and questions for each fact, procedures of six steps with a tool {t} and a material {m},
# stories whose ending names the first (0) or the second (1) person of their beginning, and kinds of problems, each with
# its question and its steps ("=" stands for the last result).
WORDS = json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf-8"))
PEOPLE, TOOLS, MATERIALS, THINGS = (WORDS[name].split() for name in ("people", "tools", "materials", "things"))
RELATIONS, PROCEDURES, KINDS = WORDS["relations"], WORDS["procedures"], WORDS["problems"]
VALUES = {name: relation["values"].split() for name, relation in RELATIONS.items()}
OF_PEOPLE, OF_TOWNS = ([name for name in RELATIONS if RELATIONS[name]["of"] == who] for who in ("people", "towns"))


def _bucket(*key: object, of: int) -> int:
    """A stable pseudo-random number in [0, of) for a key, so that held-out items do not depend on a seed or an order."""
    return zlib.crc32(repr(key).encode()) % of


def _draw_facts(rng: random.Random) -> dict[str, dict[str, str]]:
    subjects = {name: PEOPLE if name in OF_PEOPLE else VALUES["town"] for name in RELATIONS}
    return {name: {subject: rng.choice(VALUES[name]) for subject in subjects[name]} for name in RELATIONS}


FACTS = _draw_facts(random.Random(7))  # relation -> subject -> value


def never_asked(relation: str, subject: str) -> bool:
    """Whether training never asks for this fact in an open question, though prose states it (two facts in five)."""
    return _bucket(relation, subject, of=5) < 2


def _tell(rng: random.Random, relation: str, subject: str) -> str:
    return rng.choice(RELATIONS[relation]["prose"]).format(p=subject, v=FACTS[relation][subject])


def _wrong(rng: random.Random, relation: str, subject: str, count: int = 1) -> list[str]:
    """`count` different wrong values for a fact."""
    return rng.sample([v for v in VALUES[relation] if v != FACTS[relation][subject]], count)


def _walk(person: str) -> str:
    """Two facts chained: person, town, and the place that the town is built beside."""
    return FACTS["place"][FACTS["town"][person]]


# --- web documents --------------------------------------------------------------------------------------------------


def _profile(rng: random.Random) -> str:
    person = rng.choice(PEOPLE)
    lines = [_tell(rng, r, person) for r in rng.sample(OF_PEOPLE, rng.randint(3, 5))]
    if not never_asked("walk", person):
        lines.insert(rng.randint(1, len(lines)), rng.choice(WORDS["walks"]).format(p=person, v=_walk(person)))
    return " ".join(lines)


def _town(rng: random.Random) -> str:
    town = rng.choice(VALUES["town"])
    lines = [_tell(rng, r, town) for r in rng.sample(OF_TOWNS, len(OF_TOWNS))]
    cause, effect = rng.choice(WORDS["causes"])
    lines.append(f"When {cause} in {town}, {effect}.")
    lines += [_tell(rng, "town", p) for p in rng.sample(PEOPLE, 20) if FACTS["town"][p] == town]
    return " ".join(lines)


def _procedure(rng: random.Random) -> str:
    goal, person, tool, material = rng.choice(sorted(PROCEDURES)), rng.choice(PEOPLE), rng.choice(TOOLS), rng.choice(MATERIALS)
    lines = [f"With the {tool} and some {material} {person} wants to {goal}."]
    for ordinal, step in zip(WORDS["ordinals"], PROCEDURES[goal], strict=True):
        lines.append(f"{ordinal}, {person} {step.format(t=tool, m=material)}.")
    return " ".join(lines)


def _exchanges(rng: random.Random, count: int = 2) -> tuple[str, list[tuple[str, str]], list[str]]:
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
    begun, endings, _ = _exchanges(rng)
    return " ".join([begun, *(f"{ending} {name}." for ending, name in endings)])


def _question(relation: str, subject: str) -> str:
    return f"Question: {RELATIONS[relation]['question'].format(p=subject)}\nAnswer:"


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
    told = [_tell(rng, relation, person) for person in people for relation in relations]
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
    return f"Question: {RELATIONS[relation]['yes_no'].format(p=subject, v=value)}\nAnswer:", answer


def _yes_no(rng: random.Random) -> str:
    """A passage and four questions on it, so that a document teaches more than one bit."""
    passage, people, relations = _passage(rng)
    return "\n".join([passage, *(" ".join(_asked(rng, people, relations)) for _ in range(4))])


WEB_DOCUMENTS = [(_profile, 5), (_town, 1), (_procedure, 6), (_exchange, 5), (_questions, 3), (_yes_no, 5)]


# --- arithmetic -----------------------------------------------------------------------------------------------------


def operands_held_out(*operands: int) -> bool:
    """Whether these operands, in any order, are reserved for the tests: one tuple in eight."""
    return _bucket(sorted(operands), of=8) == 0


@dataclass
class Problem:
    """A word problem with its operands and its steps (a, operator, b)."""

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
    def solution(self) -> str:
        return f"{self.worked}\n#### {self.answer}"

    @property
    def text(self) -> str:
        return f"{self.prompt}\n{self.solution}"

    def trainable(self) -> bool:
        """Whether no held-out tuple is among its operands or in its sums and differences (times tables are shared)."""
        used = [self.operands, *((a, b) for a, op, b in self.steps if op in "+-")]
        return not any(operands_held_out(*operands) for operands in used)


def _apply(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]


def _numbers(rng: random.Random) -> dict[str, int]:
    m, k = rng.randint(2, 9), rng.randint(2, 9)
    small = {name: rng.randint(2, 30) for name in "cde"}
    return {"a": rng.randint(11, 99), "b": rng.randint(11, 88), "m": m, "k": k, "g": m * k, **small}


def _steps(recipe: str, numbers: dict[str, int]) -> list[tuple[int, str, int]]:
    steps = []
    for left, operator, right in recipe.split():
        steps.append((_apply(*steps[-1]) if left == "=" else numbers[left], operator, numbers[right]))
    return steps


def draw_problem(rng: random.Random, kind: str, *, held_out: bool) -> Problem:
    """A problem of a kind, all results in 1..99, with held-out operands or one that training may see."""
    question, recipe = KINDS[kind]
    while True:
        numbers = _numbers(rng)
        steps = _steps(recipe, numbers)
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


# Drills hold many sums. Half of them are subtractions, which are hardest for the model.
DRILLS = ["less", "less", "less", "more", "more", "bags_more", "bags_less", "share"]


def _drill(rng: random.Random) -> str:
    problems = [draw_problem(rng, rng.choice(DRILLS), held_out=False) for _ in range(8)]
    return "\n".join(problem.worked for problem in problems)


ARITHMETIC_DOCUMENTS = [(_problems, 6), (_drill, 4)]


def _mixed(rng: random.Random) -> str:
    """Both corpora in one document: facts about a person, then a problem about that person, worked and answered."""
    problem = draw_problem(rng, rng.choice(sorted(KINDS)), held_out=False)
    person = problem.question.split()[0]
    told = " ".join(_tell(rng, r, person) for r in rng.sample(OF_PEOPLE, 2))
    return f"{told}\n{problem.text}"


def documents(corpus: str, seed: int) -> Iterator[str]:
    """An endless stream of training documents of "web" or "arithmetic"; one in eight mixes the two."""
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
    subject = rng.choice([s for s in sorted(FACTS[relation]) if never_asked(relation, s)])
    wrong = _wrong(rng, relation, subject, 3)
    return {"query": _question(relation, subject), **_choices(rng, FACTS[relation][subject], wrong)}


def _walk_item(rng: random.Random) -> dict:
    """Two facts chained, for a person whose chain training never states."""
    person = rng.choice([p for p in PEOPLE if never_asked("walk", p)])
    right = _walk(person)
    wrong = rng.sample([v for v in VALUES["place"] if v != right], 3)
    context = rng.choice(WORDS["walks"])[: -len(" {v}.")].format(p=person)
    told = " ".join(_tell(rng, r, person) for r in rng.sample(OF_PEOPLE, 2))
    return {"query": f"{told} {context}", **_choices(rng, right + ".", [w + "." for w in wrong])}


def _reference_item(rng: random.Random) -> dict:
    """Three interleaved stories (training has two). The answers: the right name, its partner, and two others."""
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
    """A worked problem up to its last sum. The answers: the right result, near misses and a digit swap."""
    problem = draw_problem(rng, rng.choice(sorted(KINDS)), held_out=True)
    right = problem.answer
    near = [n for n in {right - 1, right + 1, right - 10, right + 10, right - 2, right + 2} if 1 <= n <= 99]
    query = f"{problem.prompt}\n{problem.worked.rsplit(' ', 1)[0]}"
    return {"query": query, **_choices(rng, str(right), [str(n) for n in rng.sample(sorted(near), 3)])}


def _generation_item(rng: random.Random, kind: str | None = None, held_out: bool = True) -> dict:
    problem = draw_problem(rng, kind or rng.choice(sorted(KINDS)), held_out=held_out)
    return {"question": problem.question, "answer": problem.solution}


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
    """Worked training problems: the fixed examples of the few-shot prompt."""
    rng = random.Random(f"examples/{seed}")
    return [_generation_item(rng, kind, held_out=False) for kind in rng.sample(sorted(KINDS), count)]
