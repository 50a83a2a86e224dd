import os

# Two processes with two threads each on two cores spin more than they compute, and results must not hang on threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TERRASYNTH_QUIET", "1")

import pytest
import torch

from terrasynth.recipe import Recipe


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """A whole study in seconds: four procedural tiles a split, models of a few thousand weights."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {
                "kind": "world",
                "image_size": 32,
                "world": {"gsd": 2.0, "train": 4, "validation": 2, "test": 2},
            },
            "generator": {
                "width": 32,
                "heads": 2,
                "blocks": 2,
                "views": 4,
                "train": {
                    "steps": 6,
                    "batch_size": 4,
                    "evaluate_every": 3,
                    "checkpoint_every": 2,
                    "ema_decay": 0.9,
                    "warmup_steps": 2,
                },
            },
            "sampling": {"steps": 3, "batch_size": 2},
            "steering": {"steps": 2},
            "segmentor": {
                "options": {"encoder_depth": 3, "decoder_channels": [16, 16, 8]},
                "train": {"steps": 4, "batch_size": 4, "evaluate_every": 2, "checkpoint_every": 2, "warmup_steps": 1},
            },
            "study": {"seeds": [0, 1], "ratio": 1},
        }
    )
