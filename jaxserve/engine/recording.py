"""Recordings of a running engine: everything that a replay needs to make the same plans, step by step.

One JSON object a line. The first is the header: how the engine was put together. Then, in the order in which
they happened (``e`` is the kind, ``t`` seconds on the engine's clock):

- ``add``: a request joined; lengths and options, no token of it, and the prediction it was given. ``pages``
  has a number for each full page of its prompt: the same number where the same tokens (and salt) come up to
  the end of that page, so that a replay finds in its prefix cache what the engine found. ``n`` is the number
  of the request.
- ``pages``: request ``n`` ended; numbers of all the pages that it filled, those with its output included.
- ``end``: a request was ended from outside (an abort, a stop string).
- ``plan``: a step was planned; the plan's digest, or null if nothing could run.
- ``done``: the oldest step's result was read; its seconds on the device, and how many decode steps it had.
  ``stopped`` has the requests that ended with a stop token, and how many tokens of the step they got;
  ``bad_rows`` the decode step and the row where logits were not finite; ``arrived`` the loads that had come.
- ``lost``: the step planned last, or one in flight, could not be run: who had a slot or a row ended.
- ``predict``: a request had outgrown its prediction and got another.
- ``refresh``: a look at a request's hidden state changed its prediction, behind the newest ``plan``.
- ``arm``: another configuration (a `learning.arms.Arm`) came in force, behind the newest ``plan``.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, final

from jaxserve.config import OWN_POLICY
from jaxserve.core.assembly import Assembly
from jaxserve.core.cost_model import StepCost
from jaxserve.core.learning.arms import Arm
from jaxserve.core.plan import StepPlan, StepResult, plan_digest
from jaxserve.core.policies.own import METHODS, is_policy
from jaxserve.core.roofline import prior_to_json
from jaxserve.core.updates import StepUpdates
from jaxserve.errors import ConfigError
from jaxserve.request import FinishReason, Request

VERSION = 4


@final
class Recorder:
    """Writes a recording as the engine runs, on the engine's thread."""

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        assembly: Assembly,
        prior: StepCost,
        pipeline_depth: int,
    ) -> None:
        self._write = write
        self._numbers: dict[Request, int] = {}  # of requests that are alive
        self._num_added = 0
        self._pages = _PageNumbers(assembly.page_size)
        header = {"version": VERSION, "assembly": assembly.to_json(), "prior": prior_to_json(prior)}
        write({"e": "header", **header, "pipeline_depth": pipeline_depth})

    def added(self, request: Request, now: float) -> None:
        self._write(
            {
                "e": "add",
                "t": now,
                "id": request.id,
                "arrival": request.arrival_time,
                "prompt_tokens": request.num_prompt_tokens,
                "max_tokens": request.max_tokens,
                "priority": request.priority,
                "deadline": request.deadline,
                "client": request.client,
                "n": self._num_added,
                "pages": self._pages.of(request),
                "predicted": _prediction(request),
            }
        )
        self._numbers[request] = self._num_added
        self._num_added += 1

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        self._write({"e": "end", "t": now, "id": request.id, "reason": reason.value})

    def planned(self, plan: StepPlan | None, now: float) -> None:
        self._write({"e": "plan", "t": now, "plan": None if plan is None else plan_digest(plan)})

    def collected(self, result: StepResult, updates: StepUpdates, now: float, step_s: float) -> None:
        stopped = {request.id: updates.requests.count(request) for request in updates.stopped}
        self._write(
            {
                "e": "done",
                "t": now,
                "step_s": step_s,
                "decode_steps": len(result.token_ids),
                "stopped": stopped,
                "bad_rows": result.bad_rows,
                "arrived": result.arrived,
            }
        )

    def lost(self, now: float) -> None:
        self._write({"e": "lost", "t": now})

    def finished(self, request: Request) -> None:
        number = self._numbers.pop(request, None)
        if number is not None:
            self._write({"e": "pages", "n": number, "pages": self._pages.of(request)})

    def predicted_again(self, request: Request) -> None:
        self._write({"e": "predict", "id": request.id, "predicted": _prediction(request)})

    def retuned(self, arm: Arm, now: float) -> None:
        self._write({"e": "arm", "t": now, "arm": arm.to_json()})

    def refreshed(self, request: Request) -> None:
        self._write({"e": "refresh", "id": request.id, "predicted": _prediction(request)})


class _PageNumbers:
    """Counts the different beginnings that end with a page: 2, 3, ... in the order in which they come."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._known: dict[tuple[int | str, bytes], int] = {}  # (page before or salt, tokens) -> number

    def of(self, request: Request) -> list[int]:
        """The numbers of a request's full pages."""
        tokens = array("i", request.known_token_ids()).tobytes()
        size = self._page_size * array("i").itemsize
        numbers: list[int] = []
        before: int | str = request.cache_salt
        for start in range(0, len(tokens) - size + 1, size):
            before = self._known.setdefault((before, tokens[start : start + size]), len(self._known) + 2)
            numbers.append(before)
        return numbers


def _prediction(request: Request) -> list[float | None]:
    return [request.predicted_output_tokens, request.predicted_output_upper]


def read_recording(path: Path, policies: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The records of a file, header first.

    Args:
        path: of the recording.
        policies: those from files among them take the places of the recorded ones that came from files. What
            such a file holds is code, and a recording may come from anyone: it does not choose what runs.

    Raises:
        ConfigError: if it is no recording of this version, or ``policies`` lacks one that it needs.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(f"recording {path}: {error}") from None
    if not records or records[0].get("e") != "header":
        raise ConfigError(f"recording {path}: does not begin with a header")
    if records[0]["version"] != VERSION:
        raise ConfigError(f"recording {path}: version={records[0]['version']}: must be {VERSION}")
    own = [name for name in policies if OWN_POLICY.fullmatch(name)]
    scheduler: dict[str, Any] = records[0]["assembly"]["scheduler"]
    for options in (scheduler, *(record["arm"] for record in records if record["e"] == "arm")):
        _put_own_policies(path, options, own)
    return records


def _put_own_policies(path: Path, options: dict[str, Any], own: Sequence[str]) -> None:
    for option in METHODS.keys() & options.keys():
        recorded = str(options[option])
        if OWN_POLICY.fullmatch(recorded):
            given = next((name for name in own if is_policy(option, name)), None)
            if given is None:
                raise ConfigError(
                    f"recording {path}: made with {option}={recorded!r}, code that runs only if you name it: "
                    f"--policy {recorded}"
                )
            options[option] = given
