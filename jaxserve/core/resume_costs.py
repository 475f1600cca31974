"""What it takes to have tokens' KV pages again: computing them, or copying them from the host."""

from __future__ import annotations

import dataclasses
from typing import Final, final

from jaxserve.core.cost_model import CostModel, StepFeatures
from jaxserve.core.plan import Bucket
from jaxserve.request import Request

_REFRESH_USES = 256
_BLOCK_BYTES = 32 << 20
_MOST_BLOCK_PAGES = 16
# Blocks that may take device memory beside the pages, on their way to the host and back.
MOST_SAVING = MOST_LOADING = 32
_NOTHING = StepFeatures(0, 0, 0.0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class HostTier:
    """Host memory for the KV pages of preempted requests and cold prefixes.

    Attributes:
        num_blocks: that it holds; 0 for no such tier.
        block_pages: KV pages of a block, which is copied as a whole.
        block_bytes: of a block, all layers together.
        bytes_s: bandwidth of a copy between device and host, one direction.
    """

    num_blocks: int = 0
    block_pages: int = 1
    block_bytes: int = 0
    bytes_s: float = 1.0

    def copy_s(self, num_blocks: int) -> float:
        """Seconds of copying blocks one way."""
        return num_blocks * self.block_bytes / self.bytes_s


NO_HOST: Final = HostTier()


def pages_of_a_block(page_bytes: int) -> int:
    """KV pages that are worth one copy: enough for the link, few enough that little of a block is empty."""
    return max(1, min(_MOST_BLOCK_PAGES, _BLOCK_BYTES // page_bytes))


@final
class ResumeCosts:
    """Seconds to resume a request, from the cost model and the bandwidth to the host.

    Args:
        costs: predicts steps.
        chunk: tokens of the step that computes prompts.
        rows: of its bucket.
        page_size: tokens of a KV page.
        host: where pages may go.
    """

    def __init__(self, costs: CostModel, chunk: int, rows: int, page_size: int, host: HostTier) -> None:
        self._costs = costs
        self._bucket = Bucket(chunk, rows)
        self._features = _NOTHING.with_prefill(chunk, 0)
        self._page_size = page_size
        self._block_tokens = page_size * host.block_pages
        self._host = host
        self._uses = 0
        self._token_s = 0.0

    def recompute_s(self, num_tokens: int) -> float:
        """Seconds to compute so many tokens of a prompt."""
        if self._uses % _REFRESH_USES == 0:  # the cost model learns
            self._token_s = self._costs.predict(self._bucket, self._features) / self._features.tokens
        self._uses += 1
        return num_tokens * self._token_s

    def chunk_s(self, context: int) -> float:
        """Seconds of a step that computes the largest chunk of a prompt behind so many tokens."""
        chunk = self._bucket.tokens
        return self._costs.predict(self._bucket, _NOTHING.with_prefill(chunk, context))

    @property
    def page_share(self) -> float:
        """Of a chunk, that is a page."""
        return self._page_size / self._bucket.tokens

    def compute_s(self, num_tokens: int, context: int) -> float:
        """Seconds to compute so many tokens of a prompt behind so many others."""
        return num_tokens / self._bucket.tokens * self.chunk_s(context + num_tokens // 2)

    def load_s(self, num_blocks: int) -> float:
        """Seconds to copy blocks from the host."""
        return self._host.copy_s(num_blocks)

    def swap_s(self, num_tokens: int) -> float:
        """Seconds to copy the pages of so many tokens to the host and back."""
        return 2 * self._host.copy_s(-(-num_tokens // self._block_tokens))

    def prefers_swap(self, num_tokens: int) -> bool:
        """Whether copying is cheaper than computing."""
        return self._host.num_blocks > 0 and self.swap_s(num_tokens) < self.recompute_s(num_tokens)

    def resume_s(self, request: Request) -> float:
        """Seconds to put a running request back, if it were preempted now."""
        computed = max(1, request.num_computed_tokens)
        recompute_s = self.recompute_s(computed)
        return min(recompute_s, self.swap_s(computed)) if self._host.num_blocks else recompute_s
