"""The tasks by brute force: every label follows from the definition, and no shortcut tells it."""

from collections import Counter, defaultdict

import pytest
import torch

from lib.data.tasks import ASK, EVEN, IGNORED, MARK, NOTHING, ONE, RECALL_CONTEXT, TASKS, distinct

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def drawn(task, difficulty, batch=64, seed=0):
    return task.draw(torch.Generator().manual_seed(seed), batch, difficulty)


def answers(name, ids):
    """The label of each position by the task's definition, read by a person's loop: {position: answer}."""
    if name in ("recall", "recall_rewritten"):
        end = max(place for place, token in enumerate(ids) if token >= 128) + 1
        known = {ids[place]: ids[place + 1] for place in range(0, end, 2)}  # a later writing replaces an earlier
        return {place: known[ids[place]] for place in range(end, len(ids)) if ids[place] != NOTHING}
    if name == "parity":
        return {len(ids) - 1: EVEN + ids.count(ONE) % 2}
    if name == "induction":
        return {len(ids) - 1: ids[ids.index(MARK) + 1]}
    key = ids[-1] if name == "lookup_key_behind" else ids[0]
    string = ids[:-2] if name == "lookup_key_behind" else ids[2:-1]
    return {len(ids) - 1: string[string.index(key) + 1]}


@every_task
def test_each_label_follows_from_the_definition(task):
    for difficulty in (*task.trained_on[:3], *task.tested_on):
        for ids, labels in zip(*(x.tolist() for x in drawn(task, difficulty)), strict=True):
            asked = {place: label for place, label in enumerate(labels) if label != IGNORED}
            assert asked == answers(task.name, ids) and asked
            assert min(ids) >= 0 and max(*ids, *asked.values()) < task.vocabulary


@every_task
def test_the_docstring_s_example_is_of_the_task(task):
    lines = [line.split() for line in task.draw.__doc__.splitlines() if line.strip().startswith(("ids", "labels"))]
    (_, *ids), (_, *labels) = lines
    ids = [0 if token == "." else int(token) for token in ids]
    asked = {place: int(label) for place, label in enumerate(labels) if label != "-"}
    assert len(ids) == len(labels) and asked == answers(task.name, ids)


@every_task
def test_the_same_seed_gives_the_same_and_another_seed_another(task):
    one, same, other = (drawn(task, task.tested_on[0], seed=seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, one, same)) and not torch.equal(one[0], other[0])


@every_task
def test_the_difficulty_is_what_it_says(task):
    for difficulty in task.tested_on:
        ids, labels = drawn(task, difficulty)
        asked = (labels != IGNORED).sum(1)
        assert (asked == (difficulty if task.name.startswith("recall") else 1)).all()
        length = {"parity": difficulty, "induction": difficulty, "lookup_key_behind": difficulty + 2}
        length |= {"lookup_key_before": difficulty + 3}
        assert ids.shape[1] == length.get(task.name, RECALL_CONTEXT) == task.context(difficulty)


@every_task
def test_the_most_frequent_answer_is_no_better_than_guessing(task):
    """But for the noise of so many; and every answer that there is comes."""
    _, labels = drawn(task, task.tested_on[0], batch=4000)
    found, chance = Counter(labels[labels != IGNORED].tolist()), task.chance(task.tested_on[0])
    assert max(found.values()) / found.total() < chance + 4 * (chance / found.total()) ** 0.5
    assert len(found) == {"parity": 2, "induction": MARK - 1}.get(task.name, 128 if "recall" in task.name else ASK - 1)


def majority(seen, asked):
    """Accuracy of a table that says, of a feature, the answer that it was seen with most often."""
    table = defaultdict(Counter)
    for feature, answer in seen:
        table[feature][answer] += 1
    said = [table[feature].most_common(1)[0][0] == answer if feature in table else False for feature, answer in asked]
    return sum(said) / len(said)


@every_task
@pytest.mark.parametrize("feature", ["the token", "the last two", "the bag of words"])
def test_no_shortcut_tells_the_answer(task, feature):
    """A unigram, a bigram and a bag-of-words table do no better than chance on what they have not seen."""

    def pairs(seed):
        found = []
        for ids, labels in zip(*(x.tolist() for x in drawn(task, task.tested_on[0], 3000, seed)), strict=True):
            place = next(place for place, label in enumerate(labels) if label != IGNORED)
            of = {"the token": ids[place], "the last two": tuple(ids[max(0, place - 1) : place + 1])}
            found.append((of.get(feature, tuple(sorted(ids[: place + 1]))), labels[place]))
        return found

    asked = pairs(1)
    if task.name == "parity" and feature == "the bag of words":
        pytest.skip("the number of ones is the answer: a bag of words of this size is never seen twice, but counts")
    right = majority(pairs(0), asked)
    chance = task.chance(task.tested_on[0])
    assert right < chance + 4 * (chance * (1 - chance) / len(asked)) ** 0.5


def test_a_rewritten_value_is_another_and_the_first_is_no_answer():
    ids, labels = drawn(TASKS["recall_rewritten"], 8, 200)
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        first = {row[place]: row[place + 1] for place in range(0, 16, 2)}
        last = {row[place]: row[place + 1] for place in range(16, 32, 2)}
        assert set(first) == set(last) and all(first[key] != last[key] for key in first)
        assert all(label in (IGNORED, last.get(token)) for token, label in zip(row, asked, strict=True))


def test_the_key_is_known_before_or_behind_the_string():
    behind, _ = drawn(TASKS["lookup_key_behind"], 8, 1)
    before, _ = drawn(TASKS["lookup_key_before"], 8, 1)
    assert behind[0, -2] == ASK and before[0, 1] == ASK == before[0, -1]


def test_distinct_numbers_are_distinct_and_all_come():
    found = distinct(torch.Generator().manual_seed(0), 500, 3, 7)
    assert all(len(set(row)) == 3 for row in found.tolist()) and set(found.flatten().tolist()) == set(range(7))
    assert distinct(torch.Generator().manual_seed(0), 2, 5, 5).sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_scaled_accuracy_is_0_for_guessing_and_1_for_right():
    for task in TASKS.values():
        for difficulty in task.tested_on:
            assert task.scaled(task.chance(difficulty), difficulty) == pytest.approx(0)
            assert task.scaled(1.0, difficulty) == pytest.approx(1)
