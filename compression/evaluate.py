"""Logits of an encoder or one of its sub-networks on a whole split."""

from __future__ import annotations

import numpy as np
import paddle

from compression.batches import Encoded, sorted_batches
from compression.encoder import Encoder
from compression.supernet import Subnetwork


@paddle.no_grad()
def predict(
    encoder: Encoder, data: Encoded, *, subnetwork: Subnetwork | None = None, batch_size: int = 64
) -> np.ndarray:
    """Logits [rows, labels] in the rows' own order."""
    logits = np.empty((len(data), encoder.config.num_labels or 0), np.float32)
    for batch in sorted_batches(data, batch_size=batch_size, pad_id=encoder.config.pad_token_id):
        logits[batch.rows] = encoder(*batch.inputs, subnetwork=subnetwork).numpy()
    return logits
