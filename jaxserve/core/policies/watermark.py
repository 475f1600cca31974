"""Capacity ``watermark``: whoever fits now may run; a few pages are left for growth (vLLM)."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import PagesView
from jaxserve.request import Request


@final
class Watermark:
    """Leaves a constant number of pages free, unless nobody runs who could need them."""

    def has_room(self, view: PagesView, request: Request, num_pages: int) -> bool:
        return num_pages + (view.watermark_pages if view.running else 0) <= view.num_available
