"""Three-hop questions: how many distinct questions a model needs to learn to combine facts (Ouro paper 6.2, B.3).

There are 500 people in 5 layers of 100, and 20 relations. Each relation maps each person to one person of the next
layer, drawn once from the seed `world`. A question starts at a person of the first layer, so there are 100 x 20^3 =
800,000 questions:

    Who is the instructor of the teacher of the friend of Bob ? Answer: Eve

The innermost relation is applied first. Only the answer is a target. The paper specifies neither the layers at which
questions start (the first layer here, which gives the paper's number of questions) nor the wording for three relations.

`questions` of the questions, drawn from the world's seed, are used for training, and 3,000 others are held out. Neither
set depends on the seed of the stream.

With `fewest`, training follows a curriculum that small models need: the number of hops is uniform in fewest..3. Shorter
questions are drawn from all that exist and end no deeper than a three-hop question; with one hop, they are the facts
themselves. There are still only `questions` training questions with three hops.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int64

from looplm_jax.data._examples import Example
from looplm_jax.data.tasks._base import Problems, generator
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.errors import UserError

# The sizes of the paper.
_HOPS = 3
_LAYERS = 5
_END = "<end>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreeHop:
    """The three-hop task and its generator. Every problem is a pure function of (world, seed, index).

    Attributes:
      questions: the number of distinct three-hop questions in training.
      people: the number of people in a layer.
      relations: the number of relations.
      world: the seed of the facts and of the division of questions.
      fewest: the smallest number of hops in training.
      validation_items: the number of held-out questions.
    """

    questions: int = 100_000
    people: int = 100
    relations: int = 20
    world: int = 0
    fewest: int = _HOPS  # hops of the shortest questions in training
    validation_items: int = 3_000

    def __post_init__(self) -> None:
        for name, least in (("questions", 1), ("people", 2), ("relations", 1), ("validation_items", 0)):
            if getattr(self, name) < least:
                raise UserError(f"threehop.{name} must be at least {least}, not {getattr(self, name)}")
        if not 1 <= self.fewest <= _HOPS:
            raise UserError(f"threehop.fewest must be from 1 to {_HOPS}, not {self.fewest}")
        if self.questions + self.validation_items > self.pool:
            raise UserError(
                f"threehop.questions={self.questions} and {self.validation_items} held out are more than the "
                f"{self.pool} that there are; lower them, or raise people or relations"
            )

    @property
    def pool(self) -> int:
        """The number of existing questions: one for each person of the first layer and each triple of relations."""
        return self.people * self.relations**_HOPS

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """The vocabulary: the words of the question, the relations and the people."""
        # People of all layers have different symbols, so that a symbol alone tells the layer.
        words = ("Who", "is", "the", "of", "?", "Answer:")
        people = range(_LAYERS * self.people)
        return SymbolTokenizer([_END, *words, *(f"r{n}" for n in range(self.relations)), *(f"p{n}" for n in people)])

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a question and its answer."""
        # `<bos> Who is`, `the r of` for each hop, and `p ? Answer: p`.
        return 3 + 3 * _HOPS + 4

    @property
    def chance(self) -> float:
        """The accuracy of a uniform guess at a person of the correct layer."""
        return 1 / self.people

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns problems `start` to `start + count` of the training stream of a seed."""
        return Problems.of(self.train_example(seed, index) for index in range(start, start + count))

    def train_example(self, seed: int, index: int) -> Example:
        """Returns question `index` of the training stream.

        All seeds have the same set of questions, in different orders.
        """
        if self.fewest < _HOPS:
            draws = generator("threehop-fewer", seed, index)
            hops = int(draws.integers(self.fewest, _HOPS + 1))
            if hops < _HOPS:
                # Any layer from which `hops` hops end in one of the first four layers.
                person = int(draws.integers((_HOPS + 1 - hops) * self.people))
                return self._asked(person, tuple(draws.integers(self.relations, size=hops).tolist()))

        # An epoch is a permutation of the training questions.
        epoch, place = divmod(index, self.questions)
        return self._example(int(self._order[self.validation_items + _shuffled(self.questions, seed, epoch)[place]]))

    def validation_example(self, index: int) -> Example:
        """Returns held-out question `index`."""
        return self._example(int(self._order[index]))

    def answer(self, person: int, relations: tuple[int, ...]) -> int:
        """Returns the person to whom the relations lead, applied from the last to the first.

        People count over all layers.
        """
        for relation in reversed(relations):
            person = int(self._facts[person, relation])
        return person

    @functools.cached_property
    def _facts(self) -> Int64[np.ndarray, "people relations"]:
        """The person to whom each relation leads each person of every layer but the last."""
        # The people of the last layer have no relations.
        shape = (_LAYERS - 1, self.people, self.relations)
        within = generator("threehop-world", self.world).integers(self.people, size=shape)
        next_layer = self.people * np.arange(1, _LAYERS)
        return (within + next_layer[:, None, None]).reshape(-1, self.relations)

    @functools.cached_property
    def _order(self) -> Int64[np.ndarray, "pool"]:
        """A permutation of all questions: the held-out ones first, then those used for training."""
        return generator("threehop-questions", self.world).permutation(self.pool)

    def _example(self, question: int) -> Example:
        """Returns a question by its number: the lowest three digits, in base `relations`, are the relations."""
        relations = []
        for _ in range(_HOPS):
            question, relation = divmod(question, self.relations)
            relations.append(relation)
        return self._asked(question, tuple(relations))

    def _asked(self, person: int, relations: tuple[int, ...]) -> Example:
        """Returns a question as tokens, with the answer as the only target."""
        names = " of ".join(f"the r{relation}" for relation in relations)
        answer = self.answer(person, relations)
        asked = self.tokenizer.encode(f"Who is {names} of p{person} ? Answer: p{answer}")

        tokens = [self.tokenizer.bos_id, *asked]
        return Example.of(tokens, [False] * (len(tokens) - 1) + [True])


@functools.lru_cache(maxsize=4)
def _shuffled(questions: int, seed: int, epoch: int) -> Int64[np.ndarray, "questions"]:
    """Returns the order of questions in an epoch. Cached, because consecutive examples need the same order."""
    return generator("threehop-epoch", seed, epoch).permutation(questions)
