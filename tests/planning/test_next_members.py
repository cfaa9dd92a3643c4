"""Who is a member of a generation: laws of the decision, which each process makes from what it has seen."""

from hypothesis import given
from hypothesis import strategies as st

from resist.planning.generations import Bounds, Generation, Silence, difference, first_members, next_members, too_few

NUMBERS = st.lists(st.integers(1, 30), unique=True, max_size=8)
SETS = st.sets(st.integers(1, 30))
BOUNDS = st.tuples(st.integers(1, 6), st.integers(0, 6)).map(lambda pair: Bounds(pair[0], sum(pair)))


@given(NUMBERS, SETS, SETS, NUMBERS, BOUNDS)
def test_who_goes_on(members: list[int], arrived: set[int], lost: set[int], others: list[int], bounds: Bounds) -> None:
    members = members[: bounds.most]
    waiting = [number for number in others if number not in members]
    chosen = next_members(members, arrived, lost, waiting, bounds)
    if chosen is None:
        assert {*members} - arrived - lost, "only somebody who lives is waited for"
        return
    assert {*members} <= arrived | lost
    assert not lost & {*chosen}
    assert {*chosen} <= arrived | {*waiting}
    assert len(chosen) == len({*chosen}) <= (bounds.most or 99)
    staying = [number for number in members if number not in lost]
    assert [*chosen[: len(staying)]] == staying, "nobody who lives is pushed out, and the order stays"
    assert [*chosen[len(staying) :]] == [number for number in waiting if number in chosen]
    full = len(chosen) == bounds.most
    assert full or {*waiting} - lost <= {*chosen}
    assert bool(too_few(chosen, bounds)) == (len(chosen) < bounds.least)


@given(NUMBERS, SETS, NUMBERS, BOUNDS)
def test_more_knowledge_of_losses_never_makes_it_wait(
    members: list[int], arrived: set[int], waiting: list[int], bounds: Bounds
) -> None:
    assert next_members(members, arrived, {*members}, waiting, bounds) is not None
    assert next_members(members, {*members}, set(), waiting, bounds) is not None


@given(NUMBERS, st.integers(1, 8), BOUNDS, st.booleans())
def test_who_founds_a_run(waiting: list[int], expected: int, bounds: Bounds, patient: bool) -> None:
    chosen = first_members(waiting, max(expected, bounds.least), bounds, patient=patient)
    enough = len(waiting) >= (max(expected, bounds.least) if patient else bounds.least)
    assert (chosen is not None) == enough
    if chosen is not None:
        assert [*chosen] == waiting[: len(chosen)]
        assert bounds.least <= len(chosen) <= (bounds.most or 99)


@given(st.lists(st.dictionaries(st.sampled_from([1, 2, 3]), st.booleans()), max_size=40), st.integers(1, 6))
def test_silence_is_a_run_of_looks_without_anything_new(looks: list[dict[int, bool]], bound: int) -> None:
    silence, beats = Silence(bound), {1: 0, 2: 0, 3: 0}
    unchanged: dict[int, int | None] = {}
    for look in looks:
        for number, beating in look.items():
            beats[number] += beating
        silence.look({number: str(beats[number]) for number in look})
        for number in (1, 2, 3):
            if number not in look:
                unchanged.pop(number, None)
            elif look[number] or number not in unchanged:
                unchanged[number] = 0
            else:
                unchanged[number] += 1
        assert silence.silent() == {number for number, times in unchanged.items() if times >= bound}


@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.text()))
def test_a_difference_is_named_on_one_line_with_both_values(run: dict[str, str], own: dict[str, str]) -> None:
    assert difference(run, dict(reversed(run.items()))) == ""
    different = [name for name in {**run, **own} if run.get(name, "none") != own.get(name, "none")]
    text = difference(run, own)
    assert bool(text) == bool(different)
    if different:
        assert text.startswith(f"{different[0]} is ")
    assert difference({"a": "1"}, {"a": "2"}) == "a is 2 here and 1 in the run"
    assert len(difference({"a": "x" * 999}, {"a": "y" * 999})) < 200


@given(NUMBERS, st.text())
def test_a_generation_is_read_as_it_was_written(members: list[int], text: str) -> None:
    facts = tuple({"round": number, "name": text} for number in members)
    generation = Generation(3, tuple(members), facts, {"version": text}, (7,), text)
    assert Generation.from_text(generation.to_text()) == generation
