"""The whole pipeline on a folder of data, with checkpoints and measurements."""

from minirlhf.pipeline.run import run_pipeline

__all__ = ["run_pipeline"]
