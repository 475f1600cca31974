"""Composition ``chunked``: stall-free batching (Sarathi-Serve, OSDI 2024, section 4.2)."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import StepView


@final
class ChunkedPrefill:
    """Prompts take all that the decodes leave of the token budget."""

    def prefill_tokens(self, view: StepView) -> int:
        return view.budget_left
