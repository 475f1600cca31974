"""Step times as if one kernel computed the attention of decodes and chunks together (POD-Attention).

The engine's kernels run one after the other. One shape was measured both ways on an H100
(`results/kernels.jsonl`, ``mixed-1024-at-8192-64-decodes``): what a fused kernel saved there, as a share of
the shorter of the two parts, is taken for the share that it saves everywhere. An extrapolation.
"""

from __future__ import annotations

import dataclasses
from typing import Final, final

from jaxserve.core.cost_model import StepFeatures
from jaxserve.core.plan import Bucket
from jaxserve.core.roofline import Roofline
from jaxserve.simulator.cluster import Cluster
from jaxserve.simulator.executor import StepTimes

# Microseconds a layer: decodes and chunk in two kernels, in one, and the shorter of the two alone.
_APART_US, _FUSED_US, _SHORTER_US = 711.34, 602.4, 228.93
OVERLAPPED_SHARE: Final = (_APART_US - _FUSED_US) / _SHORTER_US


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PodTimes:
    """The times of steps, less what fusing their attention saves.

    Attributes:
        times: of steps whose attention runs in two kernels.
        roofline: of the same machine; prices the two parts.
    """

    times: StepTimes
    roofline: Roofline

    def predict(self, bucket: Bucket, features: StepFeatures) -> float:
        device, model = self.roofline.device, self.roofline.model
        num_bytes = model.kv_bytes_per_token * features.decode_context
        flops = 4 * model.num_layers * model.num_heads * model.head_dim * features.prefill_pairs
        decode_s = num_bytes / (device.memory_bytes_s * device.memory_efficiency)
        chunk_s = flops / (device.peak_flops * device.flops_efficiency)
        saved_s = OVERLAPPED_SHARE * min(decode_s, chunk_s) / self.roofline.num_devices
        return self.times.predict(bucket, features) - saved_s


def with_pod(cluster: Cluster) -> Cluster:
    """The same machine with fused attention."""
    assert isinstance(cluster.prior, Roofline)
    label = f"{cluster.label}, fused attention extrapolated from one measured shape"
    return dataclasses.replace(cluster, times=PodTimes(cluster.times, cluster.prior), label=label)
