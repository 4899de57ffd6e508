"""What answers for each sub-network once all trainings are over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compression.batches import Encoded
from compression.encoder import Encoder, build_encoder, numpy_weights
from compression.evaluate import predict
from compression.supernet import Subnetwork, extract_weights
from compression.tasks import Predictions
from compression.teachers.config import EncoderConfig


@dataclass(frozen=True)
class Networks:
    """The supernet, and by name the sub-networks that have weights of their own."""

    supernet: Encoder
    own: Mapping[str, Encoder] = field(default_factory=dict)

    @property
    def config(self) -> EncoderConfig:
        """Of the whole network."""
        return self.supernet.config

    def predict(self, subnetwork: Subnetwork, rows: Encoded, *, threads: int = 1) -> Predictions:
        """Its logits in the rows' own order."""
        if (own := self.own.get(subnetwork.name)) is not None:
            return predict(own, rows, threads=threads)
        return predict(self.supernet, rows, subnetwork=subnetwork, threads=threads)

    def extracted(self, subnetwork: Subnetwork, config: EncoderConfig) -> Encoder:
        """The physically smaller network; `config` is the whole's, with the model's dropout."""
        if (own := self.own.get(subnetwork.name)) is not None:
            weights = numpy_weights(own)
        else:
            weights = extract_weights(config, numpy_weights(self.supernet), subnetwork)
        return build_encoder(subnetwork.config(config), weights)
