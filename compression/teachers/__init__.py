"""Teachers: uploaded encoders of any known family, as a config and numpy arrays. Paddle-free."""

from compression.teachers.checkpoint import (
    CONFIG_FILES,
    PICKLE_FILES,
    WEIGHTS_FILE,
    Checkpoint,
    ModelConfig,
    check_checkpoint,
    legal_widths,
    read_checkpoint,
    read_config,
    write_checkpoint,
)
from compression.teachers.config import EncoderConfig
from compression.teachers.family import Family, Layout
from compression.teachers.parameters import parameter_shapes
from compression.teachers.registry import FAMILIES

__all__ = [
    "CONFIG_FILES",
    "FAMILIES",
    "PICKLE_FILES",
    "WEIGHTS_FILE",
    "Checkpoint",
    "EncoderConfig",
    "Family",
    "Layout",
    "ModelConfig",
    "check_checkpoint",
    "legal_widths",
    "parameter_shapes",
    "read_checkpoint",
    "read_config",
    "write_checkpoint",
]
