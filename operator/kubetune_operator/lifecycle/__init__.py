"""The life of a job of any kind as one pure function: what is there goes in, what to write and do comes out.

`decide` walks through `STEPS`; the first step that has to wait for the cluster ends the pass. Nothing is remembered
outside the status: an operator that starts anew in the middle of anything decides the same. A status is written before
its actions are taken, so an action that gets lost is taken by the next pass, and none is taken twice.
"""

from collections.abc import Callable
from typing import Final

from kubetune_operator.lifecycle.begin import accept, wait_for_strangers
from kubetune_operator.lifecycle.draft import Decision, Draft, Observed
from kubetune_operator.lifecycle.end import finish, stay_finished, stop_at_deadline
from kubetune_operator.lifecycle.preparing import prepare
from kubetune_operator.lifecycle.queueing import wait_for_quota
from kubetune_operator.lifecycle.suspension import suspend
from kubetune_operator.lifecycle.upstream import write_config
from kubetune_operator.lifecycle.working import work
from kubetune_operator.settings import Settings

Step = Callable[[Draft], bool]

STEPS: Final[tuple[Step, ...]] = (
    stay_finished,
    accept,
    finish,
    stop_at_deadline,
    suspend,
    wait_for_strangers,
    write_config,
    prepare,
    wait_for_quota,
    work,
)
"""The steps of a pass, in order. A step that returns True ends it."""


def decide(seen: Observed, *, settings: Settings) -> Decision:
    """Decide what a pass writes and does. Pure."""
    draft = Draft(seen, settings=settings)
    for step in STEPS:
        if step(draft):
            break
    if draft.status.observed_generation != seen.job.metadata.generation:
        draft.set(observed_generation=seen.job.metadata.generation)
    return draft.decision()
