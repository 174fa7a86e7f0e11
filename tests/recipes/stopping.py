"""A run that is interrupted where a test wants it to be."""

from tensorcomp_ext import recipes


class StopAt(recipes.Callback):
    """Raises KeyboardInterrupt after a step or at the end of an epoch; without either it does nothing."""

    def __init__(self, step=None, epoch=None):
        self.step, self.epoch = step, epoch

    def on_step(self, state):
        if state.step == self.step:
            raise KeyboardInterrupt

    def on_epoch(self, state):
        if state.epoch == self.epoch:
            raise KeyboardInterrupt
