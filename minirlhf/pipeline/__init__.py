"""The three steps in a row on a folder of data, with checkpoints, measurements and a report."""

from minirlhf.pipeline.run import run_pipeline

__all__ = ["run_pipeline"]
