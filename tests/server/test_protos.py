from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from jaxserve.request import SamplingParams
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.requests import FIELD_PATHS, params_from_request, set_params

ROOT = Path(__file__).resolve().parents[2]
# Versions of the tools stand in comments and in the run-time check; they change with every release.
VERSION = re.compile(r"\d+\.\d+\.\d+|\n    \d+,\n    \d+,\n    \d+,\n")


def test_generated_modules_are_those_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools, from the dev group")
    spec = importlib.util.spec_from_file_location("generate_protos", ROOT / "scripts" / "generate_protos.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = script.generate(tmp_path)
    committed = {
        path.relative_to(script.PROTO_ROOT)
        for path in script.PROTO_ROOT.rglob("*_pb2*.py*")
        if path.suffix != ".pyc"
    }
    assert set(written) == committed
    for path in written:
        fresh, kept = ((root / path).read_text() for root in (tmp_path, script.PROTO_ROOT))
        assert VERSION.sub("", fresh) == VERSION.sub("", kept), f"{path}: run scripts/generate_protos.py"


def test_every_sampling_parameter_is_on_the_wire() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= FIELD_PATHS.keys()


def test_client_integers_are_64_bits_wide() -> None:
    """A narrower field would cut a value that is out of range into one that is not."""
    allowed = {"int64", "double", "string", "bool", "message"}
    names = {value: name.removeprefix("TYPE_").lower() for name, value in _types().items()}

    def check(descriptor) -> None:
        for field in descriptor.fields:
            assert names[field.type] in allowed, field.full_name
            if field.message_type is not None:
                check(field.message_type)

    for message in (pb.GenerateRequest, pb.TokenizeRequest, pb.DetokenizeRequest, pb.ListModelsRequest):
        check(message.DESCRIPTOR)


def _types() -> dict[str, int]:
    descriptor = pb.GenerateRequest.DESCRIPTOR.fields[0]
    return {name: getattr(descriptor, name) for name in dir(descriptor) if name.startswith("TYPE_")}


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(max_tokens=None, stop="a", seed=0, logprobs=0)]
)
def test_parameters_survive_the_way(params: SamplingParams) -> None:
    request = pb.GenerateRequest()
    set_params(request, params)
    back = params_from_request(pb.GenerateRequest.FromString(request.SerializeToString()))
    assert dataclasses.replace(back, stop=back.stop_strings) == dataclasses.replace(
        params, stop=params.stop_strings
    )
