"""State first: saves the reached step when an error ends a run."""

from __future__ import annotations

import logging

from components.checkpoint import CheckpointError
from components.files.lock import LockError
from trainer.run.alarms import GuardStop
from trainer.run.checkpoints import Checkpoints
from trainer.run.troubles import reason

logger = logging.getLogger("titanrepa")


def rescue(error: BaseException, checkpoints: Checkpoints, step: int, *, whole: bool, together: bool) -> None:
    """Save the reached step after an error, or say why that is not possible. Never raises.

    Args:
        error: that ends the run.
        checkpoints: of the run.
        step: number of finished steps.
        whole: whether the state in memory is that after ``step``.
        together: whether all ranks are here; a save needs all.
    """
    # The guard stops a run because its state is bad; a save that failed has been reported; a lost folder is another's.
    if isinstance(error, (GuardStop, CheckpointError, LockError)):
        return
    try:
        checkpoints.finish()  # of all ranks: saves in the background have collectives of their own
        saved = checkpoints.saved
        if step == 0 or saved == step:
            return
        resume = f"the newest checkpoint is that of step {saved}" if saved else "there is no checkpoint yet"
        if not whole:
            logger.error(f"step {step} is not saved: the error interrupted the update of the weights; {resume}")
        elif not together:
            logger.error(f"step {step} is not saved: this rank failed alone, and a save needs all; {resume}")
        else:
            logger.error(f"{reason(error)}: saving step {step} before the run ends")
            try:
                checkpoints.save(step)
            except Exception as failure:
                logger.error(f"step {step} could not be saved: {reason(failure)}; {resume}")
    except Exception as failure:  # the first error counts
        logger.error(f"step {step} could not be saved: {reason(failure)}")
