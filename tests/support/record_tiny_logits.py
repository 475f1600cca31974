"""Records what transformers computes for the tiny models: run by hand where torch and transformers are.

    python -m tests.support.record_tiny_logits

writes tests/models/data/tiny_logits.json: for each model the float32 logits of three of its tokens.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from tests.support.tiny_models import HF_CONFIGS, hf_weights, token_ids

OUTPUT = Path(__file__).parent.parent / "models" / "data" / "tiny_logits.json"
RECORDED_POSITIONS = (3, 11, 23)


def main() -> None:
    """Writes the file."""
    # Not among our own dependencies: this runs where they are.
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")

    recorded: dict[str, dict[str, list[float]]] = {}
    for name, hf in HF_CONFIGS.items():
        config = transformers.AutoConfig.for_model(**hf)
        # The only implementation of transformers that applies every option, soft caps too.
        model = getattr(transformers, hf["architectures"][0])._from_config(
            config, attn_implementation="eager"
        )
        weights = {key: torch.from_numpy(value) for key, value in hf_weights(name).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (name, missing, unexpected)
        model.tie_weights()
        with torch.no_grad():
            logits = model.float().eval()(torch.from_numpy(token_ids(name)).long()[None]).logits[0]
        rows = {str(p): [round(float(x), 6) for x in logits[p]] for p in RECORDED_POSITIONS}
        recorded[name] = rows
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    OUTPUT.write_text(json.dumps({"versions": versions, "logits": recorded}, indent=None) + "\n")


if __name__ == "__main__":
    main()
