"""Page allocator: one state a page, sharing without copies, oldest cached page reused first."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hadal.engine.blocks import SCRATCH_PAGE, IntegrityError, PageAllocator


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_scratch_page_is_never_handed_out() -> None:
    pages = PageAllocator(9, 4)
    assert pages.capacity == pages.num_free == 8
    taken = pages.allocate(8)
    assert taken is not None and sorted(taken) == list(range(1, 9)) and SCRATCH_PAGE not in taken
    assert pages.allocate(1) is None and pages.usage == 1.0


def test_allocate_is_all_or_nothing() -> None:
    pages = PageAllocator(5, 4)
    assert pages.allocate(5) is None
    assert pages.num_free == 4
    pages.check_integrity([])


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 4), (0, 4), (5, 0)])
def test_useless_sizes_are_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="the cache needs"):
        PageAllocator(num_pages, page_size)


def test_match_stops_at_the_first_unknown_page() -> None:
    pages = PageAllocator(9, 4)
    held = pages.allocate(3) or []
    for page, number in zip(held, (1, 2, 3), strict=True):
        pages.register(page, digest(number))
    assert pages.match([digest(1), digest(2), digest(9), digest(3)]) == held[:2]
    assert pages.match([digest(9), digest(1)]) == []


def test_shared_pages_outlive_their_first_owner() -> None:
    pages = PageAllocator(5, 4)
    first = pages.allocate(2) or []
    pages.register(first[0], digest(1))
    found = pages.match([digest(1)])
    pages.share(found)
    pages.release(first)
    pages.check_integrity([found])
    assert pages.num_free == 3
    assert pages.allocate(4) is None
    pages.release(found)
    assert pages.match([digest(1)]) == found  # unused, still known
    pages.check_integrity([])


def test_blank_pages_go_before_cached_and_the_oldest_cached_first() -> None:
    pages = PageAllocator(6, 4)
    held = [pages.allocate(1) or [] for _ in range(4)]  # page 5 stays blank
    for number, page in enumerate(held):
        pages.register(page[0], digest(number))
    for number in (2, 0, 3, 1):
        pages.release(held[number])
    taken = [pages.allocate(1) for _ in range(5)]
    assert taken == [[5], held[2], held[0], held[3], held[1]]


def test_the_end_of_a_sequence_ages_before_its_beginning() -> None:
    pages = PageAllocator(4, 4)
    held = pages.allocate(3) or []
    for number, page in enumerate(held):
        pages.register(page, digest(number))
    pages.release(held)
    pages.allocate(1)
    assert pages.match([digest(0), digest(1), digest(2)]) == held[:2]


def test_sharing_refreshes_age() -> None:
    pages = PageAllocator(3, 4)
    a, b = pages.allocate(1) or [], pages.allocate(1) or []
    pages.register(a[0], digest(1))
    pages.register(b[0], digest(2))
    pages.release(a)
    pages.release(b)
    pages.share(a)
    pages.release(a)
    assert pages.allocate(1) == b


def test_equal_content_twice_keeps_the_first() -> None:
    pages = PageAllocator(5, 4)
    a, b = pages.allocate(1) or [], pages.allocate(1) or []
    pages.register(a[0], digest(1))
    pages.register(b[0], digest(1))
    assert pages.match([digest(1)]) == a
    pages.release(b)
    pages.release(a)
    pages.check_integrity([])


def test_forget_prefixes_keeps_owners() -> None:
    pages = PageAllocator(5, 4)
    a, b = pages.allocate(1) or [], pages.allocate(1) or []
    pages.register(a[0], digest(1))
    pages.register(b[0], digest(2))
    pages.release(b)
    pages.forget_prefixes()
    assert pages.match([digest(1)]) == pages.match([digest(2)]) == []
    pages.check_integrity([a])
    pages.release(a)
    pages.check_integrity([])


def test_without_prefix_caching_nothing_is_found() -> None:
    pages = PageAllocator(5, 4, prefix_caching=False)
    held = pages.allocate(1) or []
    pages.register(held[0], digest(1))
    assert pages.match([digest(1)]) == []


def test_misuse_is_caught() -> None:
    pages = PageAllocator(5, 4)
    held = pages.allocate(1) or []
    with pytest.raises(IntegrityError, match="holders"):
        pages.check_integrity([])
    pages.release(held)
    with pytest.raises(IntegrityError, match="released while nobody"):
        pages.release(held)
    with pytest.raises(IntegrityError, match="registered while nobody"):
        pages.register(held[0], digest(1))


@settings(max_examples=150, stateful_step_count=60)
class AllocatorMachine(RuleBasedStateMachine):
    """Random use, against a model that knows only who holds what and what was written where."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(8, 2)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(number=st.integers(0, 9))
    def allocate(self, number: int) -> None:
        free = 7 - len({page for pages in self.held for page in pages})
        taken = self.pages.allocate(number)
        assert (taken is None) == (number > free)
        if taken:
            assert not set(taken) & {page for pages in self.held for page in pages}
            for page in taken:
                self.content.pop(page, None)
            self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pages.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), number=st.integers(0, 5))
    def register(self, data: st.DataObject, number: int) -> None:
        page = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
        if page not in self.content:
            self.pages.register(page, digest(number))
            self.content[page] = digest(number)

    @rule(numbers=st.lists(st.integers(0, 5), max_size=4))
    def share(self, numbers: list[int]) -> None:
        found = self.pages.match([digest(number) for number in numbers])
        for page, number in zip(found, numbers, strict=False):
            assert self.content[page] == digest(number)
        unused = self.pages.num_unused(set(found))
        before = self.pages.num_free
        self.pages.share(found)
        assert self.pages.num_free == before - unused
        if found:
            self.held.append(found)

    @invariant()
    def books_add_up(self) -> None:
        self.pages.check_integrity(self.held)


TestAllocatorMachine = AllocatorMachine.TestCase
