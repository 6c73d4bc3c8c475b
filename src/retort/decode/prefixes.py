"""Kept copies of prompt prefixes, so that rows that begin alike (a system prompt) read it once.

Prefixes lie in a tree whose nodes are blocks of 16 tokens. Attention rows keep each block's keys
and values, and start anywhere along a known path. A recurrent row starts only where a state was
kept: at blocks where a slice of the prompt ended, or where an earlier prompt went another way, for
which the scheduler ends a slice there [our choice: a state for each block would cost a pass for
each block]. A row that starts from a copy has the bits that it would have computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from retort.cache.rows import Parked, RowCache
from retort.decode.request import Request
from retort.errors import ConfigurationError

BLOCK = 16

Block = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    """One block of a known prefix.

    Attributes:
        piece: what the cache keeps of it, see `RowCache.piece`; None where only the tokens are
            known.
    """

    parent: _Node | None = None
    block: Block = ()
    piece: Any = None
    children: dict[Block, _Node] = field(default_factory=dict)


class PrefixCache:
    """The kept prefixes of one row cache, least recently used blocks first to go.

    Prefixes are shared within a request's ``prefix_group`` only: whether a prefix is known shows
    in the time of an answer, so that groups that must not learn of each other get their own.

    Args:
        cache: of the engine's target.
        max_tokens: tokens of all kept blocks together; 0 keeps nothing.

    Raises:
        ConfigurationError: a negative number, or a cache whose rows cannot be copied.
    """

    def __init__(self, cache: RowCache, max_tokens: int = 0) -> None:
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 0:
            raise ConfigurationError(
                f"prefix_cache_tokens={max_tokens!r} must be a whole number, 0 for none"
            )
        if max_tokens and not cache.shares_prefixes:
            raise ConfigurationError(f"{type(cache).__name__} cannot keep prefixes of its rows")
        self._cache, self._most = cache, max_tokens // BLOCK
        self._roots: dict[str, _Node] = {}
        self._used: OrderedDict[_Node, None] = OrderedDict()  # a node comes before its parents

    @property
    def enabled(self) -> bool:
        """Whether anything is kept."""
        return self._most > 0

    @property
    def tokens(self) -> int:
        """Tokens of all kept blocks."""
        return len(self._used) * BLOCK

    def clear(self) -> None:
        """Forget everything, for instance because the model's weights changed."""
        self._roots.clear()
        self._used.clear()

    def find(self, request: Request) -> Parked | None:
        """The longest kept prefix of a request's tokens, its last token excluded, or None.

        Sets ``request.pause`` where it should stop for a moment, so that its state can be kept.
        """
        path = self._walk(request.prefix_group, request.tokens[:-1])
        self._touch(path)
        if not self._cache.divisible:
            request.pause = len(path) * BLOCK
            while path and path[-1].piece is None:
                path.pop()
        if not path:
            return None
        return self._cache.parked(len(path) * BLOCK, [node.piece for node in path])

    def keep(self, request: Request) -> None:
        """Keep what a row has read so far."""
        if not self.enabled:
            return
        length = self._cache.length(request.row)
        path = self._grow(request.prefix_group, request.tokens[:length][: self._most * BLOCK])
        if self._cache.divisible:
            for i, node in enumerate(path):
                if node.piece is None:
                    node.piece = self._cache.piece(request.row, i * BLOCK, (i + 1) * BLOCK)
        elif path and path[-1].piece is None and length == len(path) * BLOCK:
            path[-1].piece = self._cache.piece(request.row, 0, length)
        self._touch(path)
        self._evict()

    def keep_finished(self, request: Request) -> None:
        """Keep the text of a row that is about to be freed: a chat's next turn begins with it."""
        if not self.enabled:
            return
        whole = self._cache.length(request.row) // BLOCK * BLOCK
        if not self._cache.divisible and whole >= self._cache.earliest(request.row):
            self._cache.rewind(request.row, whole)
        self.keep(request)

    def _walk(self, group: str, tokens: Sequence[int]) -> list[_Node]:
        """The known nodes along ``tokens``."""
        path, node = list[_Node](), self._roots.get(group)
        for block in _blocks(tokens):
            node = None if node is None else node.children.get(block)
            if node is None:
                break
            path.append(node)
        return path

    def _grow(self, group: str, tokens: Sequence[int]) -> list[_Node]:
        """The nodes along ``tokens``, new ones where there were none."""
        path, node = list[_Node](), self._roots.setdefault(group, _Node())
        for block in _blocks(tokens):
            if block not in node.children:
                node.children[block] = _Node(node, block)
            node = node.children[block]
            path.append(node)
        return path

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._used[node] = None
            self._used.move_to_end(node)

    def _evict(self) -> None:
        while len(self._used) > self._most:
            node, _ = self._used.popitem(last=False)
            if node.parent is not None:
                del node.parent.children[node.block]
        self._roots = {group: root for group, root in self._roots.items() if root.children}


def _blocks(tokens: Sequence[int]) -> Iterable[Block]:
    ends = range(BLOCK, len(tokens) + 1, BLOCK)
    return (tuple(tokens[end - BLOCK : end]) for end in ends)
