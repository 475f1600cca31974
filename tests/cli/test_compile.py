"""`jaxserve compile`, and the bundles that it makes: for the CPU here, so that an engine can load them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.cli import main
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.registry import find_family
from jaxserve.platforms.tpu import Tpu
from jaxserve.runner import ahead_of_time
from jaxserve.runner.ahead_of_time import plan_engine
from jaxserve.runner.bundle import MANIFEST, check_devices, make_manifest, read_manifest, with_bundle
from tests.support.faults import OUT_OF_MEMORY, files_of_at_most, names_in, xla_out_of_memory
from tests.support.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from tests.support.tpu_compiler import devices, needs_libtpu

SIZES = ("--dtype=float32", "--max-num-seqs=2", "--row-buckets=2", "--token-buckets=8", "--num-pages=9")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


pytestmark = pytest.mark.usefixtures("compile_cache_is_restored")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "cpu"
    arguments = ["compile", "--platform=cpu", "--topology=here", f"--model={checkpoint}", *SIZES]
    assert main.main([*arguments, f"--output={folder}"]) == 0
    return folder


def test_an_engine_takes_programs_and_sizes_from_a_bundle(checkpoint: Path, bundle: Path, caplog) -> None:
    programs = {path.name for path in (bundle / "xla").glob("*-cache")}
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    with caplog.at_level("WARNING"), LLM(str(checkpoint), bundle=bundle, use_tqdm=False, page_size=16) as llm:
        (output,) = llm.generate("ab", SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 3
    assert llm is not None
    steps = {name for name in programs if name.startswith("jit_step")}
    assert len(steps) == 2
    after = {path.name for path in (bundle / "xla").glob("*-cache")}
    assert {name for name in after if name.startswith("jit_step")} == steps, "no step was compiled again"
    assert events.count("/jax/compilation_cache/cache_hits") >= len(steps)
    assert not warnings_of(caplog)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_program_that_a_bundle_lacks_is_named_once(
    checkpoint: Path, bundle: Path, tmp_path: Path, caplog
) -> None:
    """As where the bundle was made by another compiler, or for other chips than those that are here."""
    lacking = shutil.copytree(bundle, tmp_path / "lacking")
    shutil.rmtree(lacking / "xla")
    with caplog.at_level("WARNING"), LLM(str(checkpoint), bundle=lacking, use_tqdm=False) as llm:
        llm.generate("ab", SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    start, end = f"bundle={lacking}: has no ", " for this machine; it was compiled here"
    steps = [message for message in warnings_of(caplog) if " step of " in message]
    assert sorted(steps) == [
        f"{start}decode step of 2 tokens in 2 rows (any sampling){end}",
        f"{start}mixed step of 8 tokens in 2 rows (any sampling){end}",
    ]


def test_broken_programs_of_a_bundle_are_compiled_again(
    checkpoint: Path, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    programs = sorted((copied / "xla").glob("*-cache"))
    step = next(path for path in programs if path.name.startswith("jit_step"))
    others = [path for path in programs if not path.name.startswith("jit_step")]
    data = step.read_bytes()
    step.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    for path in others:
        path.write_bytes(path.read_bytes()[:-10])
    for is_first in (True, False):
        caplog.clear()
        with LLM(str(checkpoint), bundle=copied, use_tqdm=False) as llm:
            params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
            (output,) = llm.generate("ab", params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 3
        said = caplog.text.count("is broken (its SHA-256 has changed): it is compiled again")
        assert said == (1 + len(others) if is_first else 0)


def test_a_bundle_that_finds_no_room_is_not_begun(checkpoint: Path, tmp_path: Path, capsys) -> None:
    argv = ["compile", "--platform=cpu", "--topology=here", f"--model={checkpoint}", *SIZES]
    with files_of_at_most(1000):
        assert main.main([*argv, f"--output={tmp_path / 'bundle'}"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"jaxserve compile: {tmp_path / 'bundle'}: cannot be written: Error writing")
    assert names_in(tmp_path) == [], "half a bundle is none"


def edited(bundle: Path, tmp_path: Path, **changes: Any) -> Path:
    content = json.loads((bundle / MANIFEST).read_text())
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = content
        for parent in parents:
            target = target[parent]
        target[name] = value
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    return tmp_path


def test_other_versions_are_refused(bundle: Path, tmp_path: Path) -> None:
    other = edited(bundle, tmp_path, versions__jax="0.1.0")
    with pytest.raises(ConfigError, match=rf"made with jax 0\.1\.0, here is {jax.__version__}"):
        with_bundle(EngineConfig.from_flat({"bundle": other}))


def test_another_topology_or_model_is_refused(bundle: Path, tmp_path: Path) -> None:
    model = find_family(TINY_CONFIG).config_from_hf(TINY_CONFIG)
    device = jax.devices()[0]
    check_devices(None, model, [device], [device])
    check_devices(bundle, model, [device], [device])
    with pytest.raises(ConfigError, match=r"made for here; number of devices 1 there, 2 here"):
        check_devices(bundle, model, [device, device], [device, device])
    with pytest.raises(ConfigError, match=r"made for here; model '[0-9a-f]{16}' there"):
        check_devices(bundle, dataclasses.replace(model, norm_eps=1e-6), [device], [device])
    other = edited(bundle, tmp_path, device_kind="TPU v6 lite", topology="v6e:2x2")
    with pytest.raises(ConfigError, match=r"made for v6e:2x2; devices 'TPU v6 lite' there, 'cpu' here"):
        check_devices(other, model, [device], [device])


def chips(*places: tuple[int, int, int]) -> list[Any]:
    """Devices of one core each, as JAX describes TPUs."""
    return [
        types.SimpleNamespace(device_kind="TPU v6 lite", coords=list(place), core_on_chip=0)
        for place in places
    ]


def test_programs_for_four_chips_are_refused_on_four_of_eight(bundle: Path, tmp_path: Path) -> None:
    model = find_family(TINY_CONFIG).config_from_hf(TINY_CONFIG)
    square = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    other = edited(
        bundle,
        tmp_path,
        device_kind="TPU v6 lite",
        topology="v6e:2x2",
        slice_shape=[2, 2, 1, 1],
        places=[[*place, 0] for place in square],
        options__tensor_parallel_size=4,
    )
    here = chips(*square)
    check_devices(other, model, here, here)
    elsewhere = chips(*((x, y + 2, z) for x, y, z in square))
    check_devices(other, model, elsewhere, elsewhere)  # the same slice of a larger machine
    with pytest.raises(
        ConfigError,
        match=r"made for v6e:2x2; shape of the whole slice \[2, 2, 1, 1\] there, \[2, 4, 1, 1\] here",
    ):
        check_devices(other, model, here, here + elsewhere)
    swapped = [here[0], here[2], here[1], here[3]]
    with pytest.raises(ConfigError, match=r"made for v6e:2x2; places of the devices \[\[0, 0, 0, 0\], "):
        check_devices(other, model, swapped, here)


@needs_libtpu
def test_topologies_say_where_their_chips_are(bundle: Path, tmp_path: Path) -> None:
    """The places that a manifest gets are those that libtpu gives: two cores a chip on tpu7x."""
    model = find_family(TINY_CONFIG).config_from_hf(TINY_CONFIG)
    for topology, shape in (
        ("v6e:2x4", [2, 4, 1, 1]),
        ("v5p:2x2x1", [2, 2, 1, 1]),
        ("tpu7x:2x2x1", [2, 2, 1, 2]),
    ):
        there = list(devices(topology))
        config = EngineConfig.from_flat({"tensor_parallel_size": 4, "num_pages": 9})
        planned, resolved = plan_engine(config, model, there, Tpu)
        taken = list(planned.placement.mesh.devices.flat)
        manifest = make_manifest(config, resolved, model, taken, there, topology)
        assert manifest.slice_shape == shape
        assert len({tuple(place) for place in manifest.places}) == 4
        assert manifest.places[0] == [0, 0, 0, 0]


def test_an_option_may_not_contradict_the_bundle(bundle: Path) -> None:
    config = with_bundle(EngineConfig.from_flat({"bundle": bundle, "max_num_seqs": 2}))
    assert config.cache.num_pages == 9
    assert config.runner.row_buckets == (2,)
    assert config.runner.bundle == bundle
    with pytest.raises(ConfigError, match=r"max_num_seqs=3: the bundle .* was made with 2"):
        with_bundle(EngineConfig.from_flat({"bundle": bundle, "max_num_seqs": 3}))


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 2}'])
def test_what_is_no_bundle_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match="bundle="):
        read_manifest(tmp_path)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, capsys) -> None:
    assert main.main(["compile", "--platform=cpu", f"--output={tmp_path}", "--model=x"]) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err


@needs_libtpu
def test_a_tpu_is_planned_and_compiled_for_from_a_config_alone(tmp_path: Path, capsys) -> None:
    config = TINY_CONFIG | {"head_dim": 128, "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = ["--max-num-seqs=8", "--row-buckets=8", "--token-buckets=16", "--max-num-batched-tokens=16"]
    sizes += ["--kv-cache-dtype=int8"]
    arguments = ["compile", f"--model={tmp_path}", "--topology=v6e:2x2", "--tensor-parallel-size=2", *sizes]
    bundle = tmp_path / "bundle"
    assert main.main([*arguments, f"--output={bundle}"]) == 0
    printed = capsys.readouterr().out
    assert "devices      2 x TPU v6 lite; each:" in printed
    assert "65 of 128 tokens, 8192 tokens in all, int8" in printed
    assert "decode     8" in printed
    assert "mixed     16" in printed
    assert printed.count("2 kernels, 0 copies of a cache, 0 host transfers") == 2
    manifest = read_manifest(bundle)
    assert (manifest.device_kind, manifest.topology) == ("TPU v6 lite", "v6e:2x2")
    pinned = with_bundle(EngineConfig.from_flat({"bundle": bundle}))
    assert pinned.cache.kv_cache_dtype == "int8"
    model = find_family(config).config_from_hf(config)
    with pytest.raises(ConfigError, match="made for v6e:2x2; devices 'TPU v6 lite' there, 'cpu' here"):
        check_devices(bundle, model, jax.devices()[:2], jax.devices()[:2])


@needs_libtpu
def test_what_does_not_fit_on_a_chip_is_said_of_each_step(tmp_path: Path, capsys) -> None:
    """40 GiB of pages: in the compiler's words, and what to lower; there is no bundle."""
    config = TINY_CONFIG | {"head_dim": 128, "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page_bytes = 128 * 2 * config["num_key_value_heads"] * 128 * 2 * config["num_hidden_layers"]
    num_pages = 40 * 2**30 // page_bytes
    sizes = ["--max-num-seqs=8", "--row-buckets=8", "--token-buckets=16", "--max-num-batched-tokens=16"]
    arguments = ["compile", f"--model={tmp_path}", "--topology=v6e:2x2", *sizes, f"--num-pages={num_pages}"]
    assert main.main([*arguments, f"--output={tmp_path / 'bundle'}"]) == 1
    decode, mixed, last = capsys.readouterr().out.splitlines()[-3:]
    for line, name in ((decode, "decode     8"), (mixed, "mixed     16")):
        assert line.startswith(f"{name} does not fit: RESOURCE_EXHAUSTED: Ran out of memory on HBM, ")
        assert "(40.0" in line, "what it needs"
        assert "available HBM (31.24G)" in line
    lower = f"lower num_pages={num_pages}, max_num_seqs=8 or max_num_batched_tokens=16"
    assert last == f"2 of 3 do not fit: {lower}"
    assert names_in(tmp_path) == ["config.json"]


def test_other_steps_are_compiled_beside_one_that_does_not_fit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def compile_steps(*args: Any) -> Any:
        buckets = args[3]
        if any(bucket.is_decode for bucket in buckets):
            raise xla_out_of_memory()
        return ahead_of_time_compile(*args)

    ahead_of_time_compile = ahead_of_time.compile_steps
    monkeypatch.setattr(ahead_of_time, "compile_steps", compile_steps)
    argv = ["compile", "--platform=cpu", f"--model={checkpoint}", *SIZES[:-1]]
    assert main.main(argv) == 1
    decode, mixed, last = capsys.readouterr().out.splitlines()[-3:]
    assert decode == f"decode     2 does not fit: {OUT_OF_MEMORY}", "no pages of buffers"
    assert "GiB temporary" in mixed
    assert last.startswith("1 of 3 do not fit: lower memory_fraction=0.9 or num_pages=")


def test_another_error_of_the_compiler_is_not_called_so(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_steps(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(ahead_of_time, "compile_steps", compile_steps)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        main.main(["compile", "--platform=cpu", f"--model={checkpoint}", *SIZES])


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "topology='v9:2x2': must begin with one of v5e, v5p, v6e, tpu7x"),
        pytest.param("v6e:1x1", "topology='v6e:1x1': libtpu does not take it", marks=needs_libtpu),
    ],
)
def test_a_wrong_topology_is_named(topology: str, message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    assert main.main(["compile", f"--model={tmp_path}", f"--topology={topology}"]) == 2
    assert message in capsys.readouterr().err
