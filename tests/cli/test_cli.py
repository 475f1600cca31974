from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxserve import config
from jaxserve.cli import arguments, main
from jaxserve.cli.main import COMMANDS
from jaxserve.errors import CheckpointError, ConfigError, ModelNotFoundError
from jaxserve.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.server.config import ServerConfig


def run(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxserve.cli.main", *argv]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def parser_with(*adders: Any) -> arguments.CommandParser:
    parser = arguments.command_parser("test", "A test.")
    for add in adders:
        add(parser)
    return parser


def test_help_is_fast_and_needs_neither_jax_nor_grpc() -> None:
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "from jaxserve.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('seconds', time.perf_counter() - start)\n"
        "assert not {'jax', 'grpc', 'numpy', 'tokenizers'} & sys.modules.keys()"
    )
    # The best of three: other work on the machine must not fail it.
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert min(float(done.stdout.rsplit("seconds", 1)[1]) for done in runs) < 0.3
    assert all(name in runs[0].stdout for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_help_of_commands_needs_no_jax(name: str) -> None:
    program = (
        "import sys\nfrom jaxserve.cli.main import main\n"
        f"try: main([{name!r}, '--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'jax', 'grpc'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: jaxserve {name}")


def test_no_arguments_show_help_and_version_shows_the_version(capsys) -> None:
    assert main.main([]) == 0
    assert "commands:" in capsys.readouterr().out
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxserve 0.")


def test_every_config_field_has_a_flag() -> None:
    parser = parser_with(arguments.add_engine_flags)
    shown = parser.format_help()
    flags = {option for action in parser._actions for option in action.option_strings}
    for name, field in config.flat_fields():
        assert f"--{name.replace('_', '-')}" in flags
        assert " ".join(field.metadata["help"].split()[:2]) in " ".join(shown.split())
    assert "(default: smollm2-135m-instruct)" in " ".join(shown.split())


EXAMPLES: dict[str, tuple[str, Any]] = {
    "model": ("org/name", "org/name"),
    "tokenizer": ("folder", "folder"),
    "revision": ("main", "main"),
    "dtype": ("bfloat16", "bfloat16"),
    "kv_cache_dtype": ("int8", "int8"),
    "batching": ("static", "static"),
    "ordering": ("priority", "priority"),
    "composition": ("slo", "slo"),
    "capacity": ("predicted", "predicted"),
    "demand_quantile": ("0.9", 0.9),
    "preempted_target": ("0.05", 0.05),
    "victim": ("latest", "latest"),
    "decision_log": ("why.jsonl", "why.jsonl"),
    "record": ("run.jsonl", "run.jsonl"),
    "length_predictor": ("fused", "fused"),
    "length_head": ("head.safetensors", "head.safetensors"),
    "record_hidden": ("folder", "folder"),
    "hidden_layers": ("1,2", (1, 2)),
    "attention": ("reference", "reference"),
    "device": ("cpu", "cpu"),
    "page_size": ("32", 32),
    "pipeline_depth": ("2", 2),
    "memory_fraction": ("0.5", 0.5),
    "watermark": ("0.25", 0.25),
    "batch_window_s": ("0.125", 0.125),
    "learning": ("on", "on"),
    "learning_log": ("choices.jsonl", "choices.jsonl"),
    "learning_prior": ("prior.json", "prior.json"),
    "token_buckets": ("8,16", (8, 16)),
    "row_buckets": ("1,4", (1, 4)),
    "bundle": ("/some/bundle", Path("/some/bundle")),
    "cache_dir": ("/some/folder", Path("/some/folder")),
}


@pytest.mark.parametrize("name", [name for name, _ in config.flat_fields()])
def test_flags_reach_the_config(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    if name in ("compile_cache", "enable_prefix_caching"):
        argv, expected = [f"--no-{flag[2:]}"], False
    elif name == "enable_prefix_preloading":
        argv, expected = [flag], True
    else:
        text, expected = EXAMPLES.get(name, ("7", 7))
        argv = [flag, text]
    parser = parser_with(arguments.add_engine_flags)
    options = arguments.engine_options(parser.parse_args(argv))
    assert options == {name: expected}
    built = config.EngineConfig.from_flat(options)
    homes = [built, *(getattr(built, section) for section in config.SECTIONS)]
    assert [getattr(home, name) for home in homes if hasattr(home, name) and home is not name][-1] == expected


def test_flags_that_are_not_given_set_nothing() -> None:
    parser = parser_with(arguments.add_engine_flags)
    assert arguments.engine_options(parser.parse_args([])) == {}


def test_every_sampling_parameter_has_a_flag_or_a_reason() -> None:
    parser = parser_with(arguments.add_sampling_flags)
    flags = {action.dest for action in parser._actions}
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names - arguments.SAMPLING_WITHOUT_FLAG <= flags
    assert names > arguments.SAMPLING_WITHOUT_FLAG


def test_sampling_flags() -> None:
    parser = parser_with(arguments.add_sampling_flags)
    assert arguments.sampling_params(parser.parse_args([])) == SamplingParams(
        temperature=0.0, max_tokens=None
    )
    argv = [
        "--n",
        "2",
        "--temperature",
        "0.5",
        "--top-k",
        "4",
        "--seed",
        "9",
        "--stop",
        "a",
        "--stop",
        "b",
        "--stop-token-ids",
        "1,2",
        "--ignore-eos",
    ]
    expected = SamplingParams(
        n=2,
        temperature=0.5,
        top_k=4,
        seed=9,
        stop=["a", "b"],
        stop_token_ids=(1, 2),
        ignore_eos=True,
        max_tokens=None,
    )
    assert arguments.sampling_params(parser.parse_args(argv)) == expected


def test_server_flags() -> None:
    parser = parser_with(lambda parser: arguments.add_dataclass_flags(parser, ServerConfig, "server options"))
    argv = [
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--insecure-bind",
        "--no-reflection",
        "--drain-timeout",
        "2.5",
    ]
    given = arguments.given(parser.parse_args(argv), ServerConfig)
    assert ServerConfig(**given) == ServerConfig(
        host="0.0.0.0", port=0, insecure_bind=True, reflection=False, drain_timeout=2.5
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sevre"], "no command 'sevre'; did you mean serve?"),
        (["--modle"], "no option '--modle'"),
        (["serve", "--modle", "x"], "no option '--modle'; did you mean --model?"),
        (["serve", "--max-num-seqs", "many"], "--max-num-seqs: invalid int value: 'many'"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs=0: must be a positive integer"),
        (["serve", "--max-num"], "no option '--max-num'; did you mean --max-num-seqs?"),
        (["serve", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["serve", "--page-size", "48"], "page_size=48: must be a power of two"),
        (["serve", "--token-buckets", "8,x"], "'8,x' is not a list of integers"),
        (["serve", "--token-buckets", "8,4"], "token_buckets=(8, 4): must be a strictly increasing list"),
        (["serve", "--host", "0.0.0.0"], "add --insecure-bind"),
        (["serve", "--port", "99999"], "port=99999"),
        (["generate", "x", "--temperature", "nan"], "temperature=nan: must be a finite number in [0, 100]"),
        (["generate", "x", "--n", "0"], "n=0: must be an integer in [1, 128]"),
        (["generate", "x", "y"], "no option 'y'"),
        (["generate", "x", "--server", "h:1", "--dtype", "float32"], "--dtype is an option of the engine"),
        (["serve", "--tls-cert", "x"], "tls_cert='x': needs its tls_key"),
        (["serve", "--port", "0", "--auth-token-file", "/none"], "auth_token_file='/none': cannot be read"),
        (["generate", "x", "--tls-ca", "x"], "--tls-ca is an option of the connection: it needs --server"),
        (["chat", "x", "--server", "h:1", "--tls-ca", "/none"], "tls_ca='/none': must be a PEM file"),
        (["health", "--tls-key", "x"], "tls_key='x': needs its tls_cert"),
        (["generate", "x", "--server", "127.0.0.1:9"], "no jaxserve server answers at 127.0.0.1:9"),
        (["chat", "x", "--server", "127.0.0.1:9"], "no jaxserve server answers at 127.0.0.1:9"),
        (["generate", "x", "--server", ""], "server='': must be host:port"),
        (["generate", "x", "--page-size", "3"], "page_size=3"),
        (["convert", "only-one"], "the following arguments are required: DST"),
        (["pull"], "the following arguments are required: name"),
        (["health", "--timeout", "soon"], "invalid float value: 'soon'"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line_and_exit_with_2(argv: list[str], message: str, capsys) -> None:
    try:
        code = main.main(argv)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("device='tpu': none found"),
        ModelNotFoundError("model='x': not\nfound"),
        CheckpointError("x.gguf: cut short"),
        ConnectionError("nobody there"),
    ],
)
def test_known_errors_show_a_traceback_only_with_debug(error: Exception, monkeypatch, capsys) -> None:
    def fail(argv: list[str]) -> int:
        assert argv == ["a"], "--debug is the command line's own"
        raise error

    monkeypatch.setattr("jaxserve.cli.pull.main", fail)
    assert main.main(["pull", "a"]) == 2
    assert capsys.readouterr().err == f"jaxserve pull: {' '.join(str(error).split())}\n"
    with pytest.raises(type(error)):
        main.main(["pull", "a", "--debug"])


def test_bugs_are_not_hidden(monkeypatch) -> None:
    def fail(argv: list[str]) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("jaxserve.cli.pull.main", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main(["pull", "a"])


def test_bench_runs_the_checkouts_script(monkeypatch, tmp_path: Path, capsys) -> None:
    import jaxserve

    package = tmp_path / "jaxserve" / "__init__.py"
    monkeypatch.setattr(jaxserve, "__file__", str(package))
    assert main.main(["bench", "--rows", "3"]) == 2
    assert "batching_modes.py in the repository" in capsys.readouterr().err
    script = tmp_path / "bench" / "batching_modes.py"
    script.parent.mkdir()
    script.write_text("def main(argv):\n    print(argv)\n")
    assert main.main(["bench", "--rows", "3"]) == 0
    assert capsys.readouterr().out == "['--rows', '3']\n"


def test_doctor_names_versions_devices_and_folders(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))
    (tmp_path / "file").write_bytes(b"x" * 2**20)
    assert main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    import jax

    assert lines["jax"].split() == ["jax", jax.__version__]
    assert str(tmp_path) in lines["cache"]
    assert lines["device"].split()[1].startswith(jax.default_backend())


def test_broken_pipe_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    program = (
        "from jaxserve.cli import main, pull\n"
        "pull.main = lambda argv: print('x' * 10**6) or 0\n"
        "exit(main.main(['pull']))"
    )
    with os.fdopen(write_end, "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


class FakeBackend:
    """Answers with the message in capitals, one letter a step; Ctrl-C at the letter '!'."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.options: list[tuple[str, str]] = []
        self.closed = 0

    def __enter__(self) -> FakeBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed += 1

    def stream(
        self, prompt: str, params: SamplingParams, *, client: str = "", cache_salt: str = ""
    ) -> Generator[RequestOutput]:
        self.seen.append((prompt, params))
        self.options.append((client, cache_salt))
        for end in range(1, len(prompt) + 1):
            if prompt[end - 1] == "!":
                raise KeyboardInterrupt
            completions = [CompletionOutput(index, prompt[:end].upper()) for index in range(params.n)]
            yield RequestOutput("id", prompt, [1], completions, end == len(prompt), RequestMetrics(0.0))

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, **options: str
    ) -> Generator[RequestOutput]:
        self.seen.append(messages)
        return self.stream(messages[-1]["content"], params, **options)


@pytest.fixture
def backend(monkeypatch) -> FakeBackend:
    fake = FakeBackend()
    for module in ("generate", "chat"):
        monkeypatch.setattr(f"jaxserve.cli.{module}.open_backend", lambda arguments: fake)
    return fake


def test_generate_streams_the_answer(backend: FakeBackend, capsys) -> None:
    assert main.main(["generate", "hello", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == "HELLO\n"
    assert backend.seen == [("hello", SamplingParams(temperature=0.0, max_tokens=5))]
    assert backend.closed == 1
    assert main.main(["generate", "hello", "--n", "2"]) == 0
    assert capsys.readouterr().out == "[0] HELLO\n[1] HELLO\n"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_client_and_cache_salt_are_passed_on(command: str, backend: FakeBackend) -> None:
    assert main.main([command, "hello", "--client", "team-a", "--cache-salt", "tenant 7"]) == 0
    assert backend.options == [("team-a", "tenant 7")]
    assert main.main([command, "hello", "--cache-salt", "x" * 257]) == 2
    assert main.main([command, "hello", "--client", "no spaces"]) == 2
    assert backend.options == [("team-a", "tenant 7")]


def test_generate_reads_stdin(backend: FakeBackend, capsys, monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("from a\nfile"))
    assert main.main(["generate"]) == 0
    assert capsys.readouterr().out == "FROM A\nFILE\n"


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        (["generate"], b"caf\xe9 au lait", "generate: prompt=b'caf\\xe9 au lait': must be UTF-8 text"),
        (["generate"], b"", "generate: prompt='': must not be empty"),
        (["generate", b"caf\xe9"], b"", "generate: prompt='caf\\udce9': must be valid Unicode"),
        (["generate", "x", "--stop", b"\xff"], b"", "generate: stop='\\udcff': must be valid Unicode"),
        (["chat"], b"", "chat: message='': must be given as an argument, or on stdin, which is empty"),
        (["chat", b"\xff"], b"", "chat: message='\\udcff': must be valid Unicode"),
        (["chat", "x", "--system", b"\xff"], b"", "chat: system='\\udcff': must be valid Unicode"),
        (["chat", "--server", "127.0.0.1:9"], b"\xff\n", "chat: message=b'\\xff\\n': must be UTF-8 text"),
    ],
)
def test_input_that_is_no_text_is_one_line_before_anything_is_loaded(
    argv: list[Any], stdin: bytes, message: str
) -> None:
    program = (
        "import sys\nfrom jaxserve.cli.main import main\ncode = main(sys.argv[1:])\n"
        "assert 'jax' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program, *argv],
        input=stdin,
        capture_output=True,
        env=os.environ
        | {"PYTHONIOENCODING": "utf-8:strict"},  # as in most locales; some escape what is wrong
        check=False,
    )
    error = done.stderr.decode()
    assert (done.returncode, done.stdout, error.count("\n")) == (2, b"", 1), error
    assert error.startswith(f"jaxserve {message}")


def test_ctrl_c_leaves_with_130(backend: FakeBackend, capsys) -> None:
    assert main.main(["generate", "ab!c"]) == 130
    assert capsys.readouterr() == ("AB", "\n")
    assert backend.closed == 1


def test_chat_answers_one_message(backend: FakeBackend, capsys) -> None:
    assert main.main(["chat", "hi", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "HI\n"
    assert backend.seen[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_conversation_remembers_restarts_and_survives_ctrl_c(
    backend: FakeBackend, capsys, monkeypatch
) -> None:
    lines = iter(["one", "", "cut!off", "two", "/help", "/new", "three"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    from jaxserve.cli.chat import Conversation, converse

    converse(Conversation(backend, SamplingParams(), None), read)
    conversations = [[m["content"] for m in seen] for seen in backend.seen if isinstance(seen, list)]
    assert conversations == [["one"], ["one", "ONE", "cut!off"], ["one", "ONE", "two"], ["three"]]
    assert "CUT" in capsys.readouterr().out
