"""The one error that reading a checkpoint raises."""


class CheckpointError(ValueError):
    """A checkpoint, or a file beside it, that cannot be used. The message is one clear sentence."""
