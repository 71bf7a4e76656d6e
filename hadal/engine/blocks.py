"""The page allocator and the prefix cache: who owns which page of the key/value cache. No tensors.

The cache is cut into pages of `page_size` tokens; a sequence owns a list of them. A page is in exactly one
state:

    in use   reference count ≥ 1: some sequences hold it (several, when they share a prefix)
    cached   count 0, but its content is known by its hash: it is kept until its room is needed, oldest first
    blank    count 0, content worthless

Page 0 is in none of them: it is scratch for the padding rows of static-shape steps. A full page is known by
a chained hash of its tokens and all before them (`Request.hashes`), so that equal hashes mean equal keys,
and sharing needs no copy: a shared page is full, and full pages are never written again. (As vLLM's
automatic prefix caching, https://docs.vllm.ai/en/latest/design/prefix_caching.html; salted against timing
probes, CVE-2025-46570.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

SCRATCH_PAGE = 0


class IntegrityError(AssertionError):
    """The books of pages or requests do not add up: a bug in this room."""


class PageAllocator:
    """Reference-counted pages 1 … num_pages − 1, with reuse of full pages by hash."""

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = True) -> None:
        """Raises ValueError when there is not even one page to give out."""
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"the cache needs ≥ 2 pages of ≥ 1 token, not {num_pages} pages of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self._count = [0] * num_pages
        self._hash: list[bytes | None] = [None] * num_pages
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(range(num_pages - 1, 0, -1))  # a stack: low page numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free pages with content, oldest first

    @property
    def capacity(self) -> int:
        """Pages that can be given out in all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that can be given out now (blank, or cached and unused)."""
        return len(self._blank) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold, 0 … 1."""
        return 1.0 - self.num_free / self.capacity

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Pages of the longest known prefix of a hash chain. Takes nothing; see `share`."""
        pages: list[int] = []
        if self.prefix_caching:
            for digest in hashes:
                page = self._by_hash.get(digest)
                if page is None:
                    break
                pages.append(page)
        return pages

    def num_unused(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds: sharing them lowers `num_free` by so many."""
        return sum(self._count[page] == 0 for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages that `match` found."""
        for page in pages:
            if self._count[page] == 0:
                del self._cached[page]
            self._count[page] += 1

    def allocate(self, number: int) -> list[int] | None:
        """`number` blank pages, each held once; None (and nothing taken) when fewer are free."""
        if number > self.num_free:
            return None
        pages = []
        for _ in range(number):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._count[page] = 1
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """`page`, in use, is full now and has this hash. A second page of equal content stays private."""
        if self._count[page] < 1:
            raise IntegrityError(f"page {page} is registered while nobody holds it")
        if self.prefix_caching and self._hash[page] is None and digest not in self._by_hash:
            self._hash[page] = digest
            self._by_hash[digest] = page

    def release(self, pages: Sequence[int]) -> None:
        """Give back one hold on each page. A sequence's end ages first: prefixes are likelier to be asked
        again."""
        for page in reversed(pages):
            if self._count[page] < 1:
                raise IntegrityError(f"page {page} is released while nobody holds it")
            self._count[page] -= 1
            if self._count[page] == 0:
                if self._hash[page] is None:
                    self._blank.append(page)
                else:
                    self._cached[page] = None

    def unregister(self, pages: Iterable[int]) -> None:
        """Nobody may find these pages again: what they hold is not to be trusted. Holders keep them."""
        for page in pages:
            self._forget(page)
            if page in self._cached:
                del self._cached[page]
                self._blank.append(page)

    def forget_prefixes(self) -> None:
        """Drop every hash (the weights changed, or the content was lost). Pages in use stay with their
        owners."""
        for page in list(self._by_hash.values()):
            self._forget(page)
        self._blank.extend(self._cached)
        self._cached.clear()

    def _forget(self, page: int) -> None:
        digest = self._hash[page]
        if digest is not None:
            del self._by_hash[digest]
            self._hash[page] = None

    def check_integrity(self, holdings: Iterable[Sequence[int]]) -> None:
        """`holdings`: the pages of each sequence. Raises IntegrityError unless each page is in exactly one
        state."""
        counts = Counter(page for pages in holdings for page in pages)
        for page in range(self.num_pages):
            if self._count[page] != counts[page]:
                raise IntegrityError(
                    f"page {page} counts {self._count[page]} holders, but {counts[page]} hold it"
                )
        states = (
            [page for page in range(1, self.num_pages) if self._count[page]]
            + self._blank
            + list(self._cached)
        )
        if sorted(states) != list(range(1, self.num_pages)):
            raise IntegrityError("some page is lost, or in two states at once")
        known = {page: digest for page, digest in enumerate(self._hash) if digest is not None}
        if known != {page: digest for digest, page in self._by_hash.items()}:
            raise IntegrityError("the hash table and the pages' hashes disagree")
        for page in self._cached:
            if self._hash[page] is None:
                raise IntegrityError(f"page {page} is kept as cached without a hash")
        for page in self._blank:
            if self._hash[page] is not None:
                raise IntegrityError(f"page {page} is blank and has a hash")
