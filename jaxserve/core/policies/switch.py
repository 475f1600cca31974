"""Policies that change while the scheduler runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

from jaxserve.core.learning.arms import Arm
from jaxserve.core.policies.registry import make_capacity, make_ordering, make_policies, make_victim
from jaxserve.core.policy import OrderingPolicy, Policies, PolicyContext, RequestObserver
from jaxserve.request import Request


@final
class PolicySwitch:
    """The policies in force, and those of another arm.

    An ordering is made anew whenever it changes, and told of who is there (`tell`). A capacity policy comes
    back as it was left: what it learnt of predictions still holds.
    """

    def __init__(self, context: PolicyContext) -> None:
        self._context = context
        self._ordering = context.config.ordering
        self.policies = make_policies(context)
        self._capacities = {context.config.capacity: self.policies.capacity}

    def change(self, arm: Arm) -> Policies:
        """Puts in force what an arm names."""
        config = dataclasses.replace(self._context.config, ordering=arm.ordering, capacity=arm.capacity)
        context = self._context._replace(config=config)
        if arm.capacity not in self._capacities:
            self._capacities[arm.capacity] = make_capacity(context)
        self.policies = self.policies._replace(capacity=self._capacities[arm.capacity])
        if arm.ordering != self._ordering:
            self._ordering = arm.ordering
            ordering, victim = make_ordering(context), make_victim(context)
            self.policies = self.policies._replace(ordering=ordering, victim=victim)
        return self.policies


def tell(ordering: OrderingPolicy, running: Sequence[Request], now: float) -> None:
    """Tells a new ordering of those who run, as if they had joined and been admitted under it."""
    if isinstance(ordering, RequestObserver):
        for request in running:
            ordering.queued(request, now)
            ordering.key(request, now)
            ordering.admitted(request, now)
