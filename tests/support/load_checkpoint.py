"""Loads an opened checkpoint as the engine does, without its progress bar."""

from __future__ import annotations

import jax.numpy as jnp

from jaxserve.loading.checkpoint import Checkpoint
from jaxserve.loading.weights import load_params
from jaxserve.models.decoder import Decoder
from jaxserve.models.params import Params
from jaxserve.models.registry import find_family
from jaxserve.models.sharding import ShardingRules, make_mesh


def load(checkpoint: Checkpoint, dtype=jnp.float32, devices: int = 1) -> Params:
    """The parameters of a checkpoint on a mesh of some devices."""
    family = find_family(checkpoint.hf_config)
    config = family.config_from_hf(checkpoint.hf_config)
    mesh = make_mesh(devices)
    module = Decoder(config, dtype)
    return load_params(checkpoint, module, family.weight_map(config), mesh, ShardingRules(), progress=False)
