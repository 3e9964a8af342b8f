"""Files and names of strangers: nothing in a model's folder runs, nothing leads out of a folder, no secret comes out.

Each attempt leaves a trace where it succeeds: a canary, a file outside, a planted word in what a run leaves.
`TRUE_KD_CHAOS` multiplies the number of mutated files.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import Ended

from true_kd.errors import InputError, ModelError
from true_kd.models import ModelOptions, check_safetensors, describe, load_head, locate, open_model, open_tokenizer
from true_kd.suggest import quote, redact

CHAOS = int(os.environ.get("TRUE_KD_CHAOS", "1"))
LINUX = sys.platform == "linux"


def copy_model(source: Path, to: Path, **config: Any) -> Path:
    """A model's folder with another config."""
    shutil.copytree(source, to)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **config}))
    return to


def alter_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal_of(folder: Path, seam: str = "teacher", **options: Any) -> str:
    """The one line with which a model is refused, within seconds."""
    started = time.monotonic()
    with pytest.raises(ModelError) as refused:
        open_model(ModelOptions(model=str(folder), **options), seam)
    assert time.monotonic() - started < 30
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# Weights: the header is checked before MLX sees the file.


def tensors(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


A, B = entry(0, 8, [2]), entry(8, 16, [2])
WHOLE = tensors({"a": A, "b": B}, bytes(16))
MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\x01\x02",
    "a length alone": bytes(8),
    "a length beyond the end": tensors({"a": A}, bytes(8), 10**6),
    "a length of 2^63": tensors({"a": A}, bytes(8), 2**63),
    "a header of 200 MB": tensors({"a": A}, bytes(8), 200_000_000),
    "no JSON": tensors(b"{a: b}"),
    "a list": tensors([1, 2]),
    "a number": tensors(7),
    "deep lists": tensors(b"[" * 100_000 + b"]" * 100_000),
    "deep objects": tensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "no UTF-8": tensors(b'{"\xff": 1}'),
    "a name twice": tensors(b'{"a":%s,"a":%s}' % (json.dumps(A).encode(), json.dumps(A).encode()), bytes(8)),
    "an overlap": tensors({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "a thousand on one place": tensors({f"t{i}": entry(0, 4096, [1024]) for i in range(1000)}, bytes(4096)),
    "a hole": tensors({"a": A, "b": entry(12, 20, [2])}, bytes(20)),
    "a hole before the first": tensors({"a": entry(4, 12, [2])}, bytes(12)),
    "trailing bytes": WHOLE + b"\0",
    "a megabyte behind the end": WHOLE + bytes(2**20),
    "cut in the payload": WHOLE[:-1],
    "cut in the header": WHOLE[:40],
    "offsets beyond the end": tensors({"a": entry(0, 80, [20])}, bytes(8)),
    "offsets backwards": tensors({"a": entry(8, 0, [2])}, bytes(8)),
    "negative offsets": tensors({"a": entry(-8, 0, [2])}, bytes(8)),
    "offsets of 2^64": tensors({"a": entry(2**64, 2**64 + 8, [2])}, bytes(8)),
    "offsets of words": tensors({"a": {**A, "data_offsets": ["0", "8"]}}, bytes(8)),
    "three offsets": tensors({"a": {**A, "data_offsets": [0, 4, 8]}}, bytes(8)),
    "no offsets": tensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "a larger shape": tensors({"a": entry(0, 8, [2000])}, bytes(8)),
    "a negative shape": tensors({"a": entry(0, 0, [0, -1])}),
    "a shape that wraps around": tensors({"a": entry(0, 0, [2**40, 0])}),
    "a shape of 2^63": tensors({"a": entry(0, 0, [2**63 - 1, 0])}),
    "a shape of 2^32 times 2^32": tensors({"a": entry(0, 0, [2**32, 2**32])}),
    "a hundred dimensions": tensors({"a": entry(0, 4, [1] * 100)}, bytes(4)),
    "a shape of words": tensors({"a": {**A, "shape": "2"}}, bytes(8)),
    "an unknown type": tensors({"a": entry(0, 8, [2], "F33")}, bytes(8)),
    "a type that MLX lacks": tensors({"a": entry(0, 8, [1], "F64")}, bytes(8)),
    "metadata of numbers": tensors({"__metadata__": {"a": 1}, "a": A}, bytes(8)),
    "metadata of lists": tensors({"__metadata__": ["a"], "a": A}, bytes(8)),
    "a pickle": b"\x80\x04\x95" + bytes(100),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a GGUF": b"GGUF\x03\0\0\0" + bytes(100),
    "an npy": b"\x93NUMPY\x01\0" + bytes(100),
    "a text": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_weights_are_refused_with_a_reason(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r".") as refused:
        check_safetensors(path)
    assert len(str(refused.value)) < 300


def test_whole_weights_are_accepted_with_their_shapes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    arrays = {
        "a": mx.zeros((3, 4)),
        "b": mx.zeros((2,), dtype=mx.bfloat16),
        "none": mx.zeros((0, 7)),
        "one": mx.array(1),
    }
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    assert check_safetensors(path) == {"a": (3, 4), "b": (2,), "none": (0, 7), "one": ()}


def test_mlx_alone_takes_what_is_refused_here(tmp_path: Path) -> None:
    taken = []
    for name in ("an overlap", "a hole", "trailing bytes", "a shape that wraps around", "a name twice"):
        path = tmp_path / "model.safetensors"
        path.write_bytes(MALFORMED[name])
        taken.append(dict(mx.load(str(path))))
    assert len(taken) == 5


@pytest.mark.parametrize("name", ["an overlap", "trailing bytes", "a shape that wraps around", "a pickle"])
def test_no_way_of_opening_weights_skips_the_check(name: str, student_folder: Path, tmp_path: Path) -> None:
    from true_kd.adapters import count_parameters, load_adapter
    from true_kd.errors import TrueKDError
    from true_kd.models import open_skeleton

    folder = copy_model(student_folder, tmp_path / "model")
    (folder / "model-00002.safetensors").write_bytes(MALFORMED[name])
    assert "model-00002.safetensors" in refusal_of(folder)
    with pytest.raises(ModelError, match="model-00002"):
        open_skeleton(ModelOptions(model=str(folder)), "student")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    (adapter / "adapter_config.json").write_text(json.dumps({"num_layers": 1, "lora_parameters": lora}))
    (adapter / "adapters.safetensors").write_bytes(MALFORMED[name])
    refusal_of(student_folder, adapter=str(adapter))
    module = open_model(ModelOptions(model=str(student_folder)), "student").module
    with pytest.raises(TrueKDError):
        load_adapter(module, adapter)
    with pytest.raises(ValueError, match=r"."):
        count_parameters(adapter / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"."):
        load_head(adapter / "adapters.safetensors")


FUZZ = """
import random, sys
from pathlib import Path
import mlx.core as mx
from safetensors import SafetensorError, safe_open
from true_kd.models import check_safetensors

folder, count = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(7)
seed = (folder / "seed.safetensors").read_bytes()
size = 8 + int.from_bytes(seed[:8], "little")
words = [b"0", b"9", b"-1", b"[", b"]", b"{", b"}", b'"', b",", b":", b"F64", b"U8", b"99999999999", b"null", b"1e9"]
path = folder / "model.safetensors"
rejected = taken = 0
for turn in range(count):
    content = bytearray(seed)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(size) if draw.random() < 0.9 else draw.randrange(len(content))
        way = draw.randrange(5)
        if way == 0:
            content[place % len(content)] = draw.randrange(256)
        elif way == 1:
            word = draw.choice(words)
            content[place : place + len(word)] = word
        elif way == 2:
            del content[place : place + draw.randint(1, 9)]
        elif way == 3:
            content[place:place] = draw.choice(words)
        else:
            cut = draw.randrange(len(content))
            content = content[:cut] if draw.random() < 0.3 else content + bytes(draw.randint(1, 9))
    path.write_bytes(content)
    try:
        with safe_open(path, framework="np"):
            whole = True
    except (SafetensorError, OSError):
        whole = False
    try:
        check_safetensors(path)
        accepted = True
    except ValueError:
        accepted = False
    assert whole or not accepted, bytes(content[:size])
    rejected += not whole
    if accepted:
        taken += 1
        try:
            mx.eval(list(mx.load(str(path)).values()))
        except (RuntimeError, ValueError):
            raise AssertionError(bytes(content[:size]))
print(rejected, taken)
"""


def test_of_mutated_weights_all_that_the_reference_rejects_are_rejected_and_mlx_survives_the_rest(
    tmp_path: Path,
) -> None:
    arrays = {f"layers.{i}.weight": mx.random.normal((4, i + 1)) for i in range(4)}
    mx.save_safetensors(str(tmp_path / "seed.safetensors"), arrays, metadata={"format": "mlx"})
    count = 3000 * CHAOS
    command = [sys.executable, "-c", FUZZ, str(tmp_path), str(count)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rejected, taken = map(int, ended.stdout.split())
    assert rejected > count / 2
    assert taken > count / 50


# Folders: nothing runs, nothing outside is opened, nobody is asked.


CODE = "open({canary!r}, 'w').close()\nclass Model: pass\nclass ModelArgs: pass\nclass Evil(Model): pass\n"


def with_code(folder: Path) -> None:
    """Python wherever one of the libraries might look for it."""
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "custom_model.py"):
        (folder / name).write_text(CODE.format(canary=str(folder / "CANARY")))


EVIL = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
REMOTE = {
    name: f"somebody/evil--{what}" for name, what in (("AutoConfig", "evil.Evil"), ("AutoTokenizer", "evil.Evil"))
}


def in_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: alter_json(folder / "config.json", **changes)


def in_tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: alter_json(folder / "tokenizer_config.json", **changes)


def with_index(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../OUTSIDE/secret.safetensors", "x": "/etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_tokenizer_json(**changes: Any) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"\x0a\x05nonsense")
        in_tokenizer(**changes)(folder)

    return alter


HOSTILE: dict[str, Callable[[Path], None]] = {
    "model_file": in_config(model_file="evil.py"),
    "model_file outside": in_config(model_file="../OUTSIDE/evil.py"),
    "auto_map of the model": in_config(auto_map=EVIL),
    "auto_map of an unknown model": in_config(auto_map=EVIL, model_type="evil", architectures=["Evil"]),
    "auto_map of the tokenizer": in_tokenizer(auto_map=EVIL, tokenizer_class="Evil"),
    "auto_map as a list": in_tokenizer(auto_map=["evil.Evil", None], tokenizer_class="Evil"),
    "auto_map of both": lambda folder: (in_config(auto_map=EVIL)(folder), in_tokenizer(auto_map=EVIL)(folder)),
    "auto_map on the hub": lambda folder: (in_config(auto_map=REMOTE)(folder), in_tokenizer(auto_map=REMOTE)(folder)),
    "attention on the hub": in_config(
        _attn_implementation_internal="somebody/evil", attn_implementation="somebody/evil"
    ),
    "experts on the hub": in_config(_experts_implementation_internal="somebody/evil"),
    "custom pipelines": in_config(custom_pipelines={"evil": {"impl": "evil.Evil", "pt": ["Evil"], "tf": []}}),
    "trust in itself": in_config(trust_remote_code=True, auto_map=EVIL),
    "trust of the tokenizer in itself": in_tokenizer(trust_remote_code=True, auto_map=EVIL, tokenizer_class="Evil"),
    "a path as model_type": in_config(model_type="../../OUTSIDE/evil"),
    "a module as model_type": in_config(model_type="..evil"),
    "a path as chat_template_type": in_tokenizer(chat_template_type="../OUTSIDE/evil"),
    "a path as tool_parser_type": in_tokenizer(tool_parser_type="/OUTSIDE/evil"),
    "an index that leads out": with_index,
    "another config outside": in_config(configuration_files=["config.0/../../OUTSIDE/config.json"]),
    "another tokenizer outside": in_tokenizer(fast_tokenizer_files=["../OUTSIDE/tokenizer.1.0.json"]),
    "a tokenizer's file outside": in_tokenizer(tokenizer_file="OUTSIDE/tokenizer.json", vocab_file="OUTSIDE/vocab.txt"),
    "a vocabulary outside": without_tokenizer_json(vocab_file="OUTSIDE/vocab.txt", merges_file="OUTSIDE/merges.txt"),
    "a GGUF for a tokenizer": without_tokenizer_json(gguf_file="weights.gguf", name_or_path="somebody/evil"),
    "a GGUF beside the tokenizer": in_tokenizer(gguf_file="weights.gguf"),
    "another repository": in_config(_name_or_path="somebody/evil", base_model_name_or_path="somebody/evil"),
    "weights as pickles alone": lambda folder: (folder / "model.safetensors").unlink(),
    "nothing": lambda folder: None,
}
DECOYS = (
    "pytorch_model.bin",
    "model.pt",
    "weights.gguf",
    "weights.npz",
    "model.pkl",
    "tf_model.h5",
    "training_args.bin",
)

OPENING = """
import json, os, sys
log = open(sys.argv[2], "w")
def hook(event, arguments):
    if event in ("open", "os.listdir", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "exec", "import"):
        if event == "exec":
            arguments = (getattr(arguments[0], "co_filename", ""),)
        log.write(json.dumps([event, *map(str, arguments[:2])]) + "\\n")
import true_kd
from true_kd.models import ModelOptions, open_model, open_tokenizer
from true_kd.errors import ModelError
sys.addaudithook(hook)
outcomes = {}
for name, folder in json.loads(sys.argv[1]).items():
    log.write(json.dumps(["begin", name, folder]) + "\\n")
    outcomes[name] = "opened"
    for opening in (open_tokenizer, open_model):
        try:
            opening(ModelOptions(model=folder), "teacher")
        except ModelError as error:
            outcomes[name] = str(error)
log.flush()
print("OUTCOMES" + json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def opened(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of opening each hostile folder, with a terminal for stdin and the hub switched on."""
    root = tmp_path_factory.mktemp("hostile")
    outside = root / "OUTSIDE"
    outside.mkdir()
    with_code(outside)
    (outside / "secret.safetensors").write_bytes(WHOLE)
    for name in ("config.json", "tokenizer.json", "tokenizer.1.0.json"):
        (outside / name).write_bytes((student_folder / name.replace(".1.0", "")).read_bytes())
    for name in ("vocab.txt", "merges.txt"):
        (outside / name).write_text("secret\n")
    folders = {}
    for number, (name, spoil) in enumerate(HOSTILE.items()):
        folder = folders[name] = copy_model(student_folder, root / f"m{number}")
        with_code(folder)
        for decoy in DECOYS:
            (folder / decoy).write_bytes(b"\x80\x04cos\nsystem\n(S'touch CANARY'\ntR.")
        spoil(folder)
        for text in folder.glob("*.json"):
            text.write_text(text.read_text().replace('"OUTSIDE', f'"{outside}'))
    log, trace = root / "audit.log", root / "strace.log"
    command = [sys.executable, "-c", OPENING, json.dumps({name: str(at) for name, at in folders.items()}), str(log)]
    if shutil.which("strace"):
        calls = "trace=open,openat,connect,execve"
        command = ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", calls, "-o", str(trace), *command]
    terminal, theirs = pty.openpty()
    # Nothing answers there: whoever tries the hub fails at once, and is seen.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(root / "hf"),
    }
    started = time.monotonic()
    ended = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=300, env=environment)
    os.close(terminal)
    os.close(theirs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    [line] = [line for line in ended.stdout.splitlines() if line.startswith("OUTCOMES")]
    return {
        "outcomes": json.loads(line.removeprefix("OUTCOMES")),
        "said": ended.stdout + ended.stderr,
        "root": root,
        "events": [json.loads(line) for line in log.read_text().splitlines()],
        "calls": trace.read_text(errors="replace").splitlines() if trace.exists() else [],
        "seconds": time.monotonic() - started,
    }


def test_no_code_beside_a_model_runs(opened: dict[str, Any]) -> None:
    assert len(opened["outcomes"]) == len(HOSTILE)
    assert list(opened["root"].rglob("CANARY")) == []
    strangers = [event for event in opened["events"] if event[0] == "exec" and str(opened["root"]) in event[1]]
    assert strangers == []


def test_nobody_is_asked_to_trust_a_model(opened: dict[str, Any]) -> None:
    assert "y/N" not in opened["said"]
    assert "Do you wish" not in opened["said"]


ASKS_FOR_CODE = ("model_file", "model_file outside", "a path as model_type", "a path as chat_template_type")


@pytest.mark.parametrize("name", ASKS_FOR_CODE)
def test_what_cannot_do_without_code_is_refused_in_one_line(name: str, opened: dict[str, Any]) -> None:
    assert opened["outcomes"][name].startswith("teacher '")
    assert "\n" not in opened["outcomes"][name]


def test_each_hostile_folder_is_refused_in_one_line_or_opened_as_the_plain_model_that_it_is(opened) -> None:
    for name, outcome in opened["outcomes"].items():
        assert outcome == "opened" or (outcome.startswith("teacher '") and "\n" not in outcome), name
    assert opened["outcomes"]["nothing"] == "opened"
    assert opened["outcomes"]["an index that leads out"] == "opened"


READABLE = re.compile(r"\.(safetensors|json|jsonl|txt|jinja|md|yaml|tiktoken)$|/tokenizer\.model$")


def test_only_texts_and_safetensors_are_opened_and_none_outside(opened: dict[str, Any]) -> None:
    root = str(opened["root"])
    seen = [event[1] for event in opened["events"] if event[0] == "open"]
    if opened["calls"]:
        # MLX opens files past Python's audit.
        found = [re.search(r'open(?:at)?\((?:[^,"]*, )?"([^"]*)", (\S+)', line) for line in opened["calls"]]
        seen += [match[1] for match in found if match and "O_DIRECTORY" not in match[2]]
        assert any(path.endswith("model.safetensors") for path in seen)
    mine = {path for path in seen if path.startswith(root) and not path.endswith((".log", root)) and "/hf/" not in path}
    assert len(mine) > 40
    files = {path for path in mine if not Path(path).is_dir()}
    assert {path for path in files if not READABLE.search(path)} == set()
    assert {path for path in mine if "OUTSIDE" in path} == set()


def test_a_local_model_reaches_out_to_nobody(opened: dict[str, Any]) -> None:
    tried: dict[str, list[Any]] = {}
    name = ""
    for event in opened["events"]:
        if event[0] == "begin":
            name = event[1]
        elif event[0].startswith("socket") or event[0] == "subprocess.Popen":
            tried.setdefault(name, []).append(event)
    assert tried == {}
    assert [line for line in opened["calls"] if "connect(" in line and "AF_INET" in line] == []


def test_an_overlong_or_deep_text_is_refused_before_it_is_read(student_folder: Path, tmp_path: Path) -> None:
    for number, (name, size) in enumerate(
        {
            "config.json": 2**30,
            "tokenizer_config.json": 2**30,
            "tokenizer.json": 2**40,
            "chat_template.jinja": 2**21,
        }.items()
    ):
        folder = copy_model(student_folder, tmp_path / str(number))
        os.truncate(folder / name, size) if (folder / name).exists() else (folder / name).write_bytes(b" " * size)
        assert f"{name} has {size:,} bytes" in refusal_of(folder)
    for number, name in enumerate(("config.json", "tokenizer_config.json", "tokenizer.json"), 10):
        folder = copy_model(student_folder, tmp_path / str(number))
        (folder / name).write_text("[" * 100_000 + "]" * 100_000)
        assert "cannot load" in refusal_of(folder)


PIPES = (
    "config.json",
    "model.safetensors",
    "model-00002.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "additional_chat_templates/tool_use.jinja",
    "unheard_of.json",
)


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_or_a_device_for_a_file_is_refused_and_not_waited_for(
    kind: str, name: str, student_folder: Path, tmp_path: Path
) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    text = refusal_of(folder)
    assert Path(name).name in text or name == "config.json"


NUMBERS = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 2000),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 10**30),
    ("hidden_size", 10**12),
    ("hidden_size", 2**31 - 1),
    ("hidden_size", 10**30),
    ("hidden_size", 0),
    ("hidden_size", -4),
    ("intermediate_size", 10**12),
    ("intermediate_size", 1e30),
    ("vocab_size", 10**12),
    ("vocab_size", 2**31 - 1),
    ("vocab_size", 0),
    ("head_dim", 10**9),
    ("num_attention_heads", 10**9),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 10**12),
    ("num_experts", 10**9),
    ("hidden_size", "32"),
    ("num_hidden_layers", None),
    ("rms_norm_eps", "small"),
    ("quantization", {"group_size": 0, "bits": 0}),
    ("quantization", {"group_size": 10**12, "bits": 4}),
    ("quantization_config", {"quant_method": "evil"}),
    ("rope_theta", "big"),
    ("eos_token_id", [[1]]),
    ("layer_types", ["evil"] * 3),
    ("text_config", {"num_hidden_layers": 10**9}),
]


# There are no packed weights in this model that anything would be done with.
BUILD_NOTHING = ("quantization", "quantization_config")


@pytest.mark.parametrize(("key", "value"), NUMBERS, ids=[f"{key}={str(value)[:20]}" for key, value in NUMBERS])
def test_absurd_numbers_in_a_config_are_refused_before_anything_is_built(
    key: str, value: Any, student_folder: Path, tmp_path: Path
) -> None:
    folder = copy_model(student_folder, tmp_path / "model", **{key: value})
    if key in BUILD_NOTHING:
        assert open_model(ModelOptions(model=str(folder)), "student").size == 320
    else:
        refusal_of(folder, "student")


# Links.


def test_a_text_that_is_a_link_to_a_secret_is_refused_and_its_words_are_not_repeated(
    student_folder: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "home" / ".docker" / "config.json"
    secret.parent.mkdir(parents=True)
    secret.write_text('{"auths": {"registry": {"auth": "PLANTED"}}}')
    for name in ("added_tokens.json", "config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        folder = copy_model(student_folder, tmp_path / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        text = refusal_of(folder)
        assert name in text
        assert "PLANTED" not in text
        with pytest.raises(ModelError):
            describe(ModelOptions(model=str(folder)), "teacher")


def test_weights_that_are_a_link_to_another_file_are_refused_for_what_it_holds(
    student_folder: Path, tmp_path: Path
) -> None:
    folder = copy_model(student_folder, tmp_path / "model")
    (tmp_path / "id_rsa").write_text("-----BEGIN PLANTED KEY-----\n" * 20)
    (folder / "model-2.safetensors").symlink_to(tmp_path / "id_rsa")
    assert "PLANTED" not in refusal_of(folder)


def test_links_that_people_use_are_followed(student_folder: Path, tmp_path: Path) -> None:
    plain = describe(ModelOptions(model=str(student_folder)), "teacher").digest
    linked = tmp_path / "linked"
    linked.symlink_to(student_folder)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in student_folder.iterdir():
        (mixed / file.name).symlink_to(file)
    hub = tmp_path / "models--some--model"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(student_folder.iterdir()):
        shutil.copy(file, hub / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    for folder in (linked, mixed, snapshot):
        model = open_model(ModelOptions(model=str(folder)), "teacher")
        assert model.digest == plain


def test_a_folder_that_claims_to_be_the_hubs_cache_is_read_for_its_digest(student_folder: Path, tmp_path: Path) -> None:
    honest = describe(ModelOptions(model=str(student_folder)), "teacher").digests["model.safetensors"]
    folder = copy_model(student_folder, tmp_path / "models--a--b" / "snapshots" / "0")
    blob = tmp_path / "models--a--b" / "blobs" / ("e" * 64)
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert describe(ModelOptions(model=str(folder)), "teacher").digests["model.safetensors"] == honest


@pytest.mark.parametrize(
    "name", ["pocket:../cli", "pocket:../../true_kd/pocket/student", "pocket:/etc", "pocket:a/../.."]
)
def test_embedded_names_stay_in_their_folder(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        locate(ModelOptions(model=name), "student")


# Names of domains, caches and checkpoints.


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Path:
    """A folder to run in, with one domain `a`, and something outside that must stay as it is."""
    prompts = tmp_path / "prompts" / "a"
    prompts.mkdir(parents=True)
    for split, count in (("train", 4), ("valid", 2)):
        lines = [json.dumps({"prompt": f"say hello to {split} cat {number}"}) for number in range(count)]
        (prompts / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "teacher": str(teacher_folder),
        "student": str(student_folder),
        "prompts": str(tmp_path / "prompts"),
        "out": str(tmp_path / "out"),
        "capture": {"max_tokens": 4},
        "training": {"iters": 2, "validate_every": 2, "checkpoint_every": 2},
        "lora": {"rank": 2},
        "evaluation": {"speed_tokens": 0},
        "report": False,
        "isolate": False,
    }
    (tmp_path / "base.yaml").write_text(json.dumps(config))
    outside = tmp_path / "outside"
    (outside / "checkpoint_9").mkdir(parents=True)
    for name in ("adapters.safetensors", "notes.txt", "kd_metrics.json", "checkpoint_9/mine.txt", ".lock"):
        (outside / name).write_text("mine")
    return tmp_path


def content(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def of_domain(name: str) -> Callable[[Path], None]:
    """A link out of the folder of domain `a`, or for it."""

    def link(place: Path) -> None:
        at = place / "out" / name
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(place / "outside" / "notes.txt" if Path(name).name.startswith(".lock") else place / "outside")

    return link


LINKS = ("a", "a/checkpoint_2", "a/checkpoint_1", "a/control_sft", ".lock", ".lock.json", ".lock-work")


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_or_deleted_through_a_link_in_the_output_folder(name: str, place: Path, cli) -> None:
    of_domain(name)(place)
    before = content(place / "outside")
    ended = cli("distill", "--config", str(place / "base.yaml"), "--domain", "a", "--fresh")
    assert ended.code == 2, ended
    assert "a link" in ended.err
    assert ended.err.count("\n") == 1
    assert content(place / "outside") == before


def test_a_link_for_a_file_is_replaced_and_not_followed(place: Path, cli) -> None:
    (place / "disk" / "a").mkdir(parents=True)
    # The output folder itself may be a link: people have more than one disk.
    (place / "out").symlink_to(place / "disk")
    names = ("a/adapters.safetensors", "a/adapter_config.json", "a/kd_metrics.json", "a/run.json", "kd_summary.json")
    for name in names:
        (place / "out" / name).symlink_to(place / "outside" / "notes.txt")
    before = content(place / "outside")
    ended = cli("distill", "--config", str(place / "base.yaml"), "--domain", "a", "--fresh")
    assert ended.code == 0, ended.err
    assert content(place / "outside") == before
    assert [name for name in names if (place / "disk" / name).is_symlink()] == []


def test_a_cache_that_is_a_link_is_refused(place: Path, cli, own_cache: Path) -> None:
    assert cli("distill", "--config", str(place / "base.yaml"), "--domain", "a").code == 0
    [store] = [path for path in own_cache.iterdir() if re.fullmatch("[0-9a-f]{16}", path.name)]
    shutil.rmtree(store)
    store.symlink_to(place / "outside")
    before = content(place / "outside")
    ended = cli("distill", "--config", str(place / "base.yaml"), "--domain", "a", "--fresh")
    assert ended.code != 0
    assert "a link" in ended.err
    assert content(place / "outside") == before


HOSTILE_KEYS = (
    "",
    ".",
    "..",
    "../..",
    "../outside",
    "../../outside",
    "/",
    "/etc",
    "/etc/passwd",
    "~",
    "~root",
    "*",
    "?" * 16,
    "[0-9a-f]",
    "a\nb",
    "a\rb",
    "\x1b[31m",
    "a" * 300,
    "-",
    "0000000000000000/../../outside",
    "..%2f..%2foutside",
    "．．/outside",
    "CON",
    "NUL",
    "aux.txt",
    "a b",
    "a;rm -rf x",
    "$(touch x)",
    "`touch x`",
    "manifest.jsonl",
    ".lock",
    "О000",
    "file:///etc/passwd",
    "\u202eabc",
)


@pytest.mark.parametrize("name", HOSTILE_KEYS, ids=[ascii(name)[:30] for name in HOSTILE_KEYS])
def test_the_key_of_a_cache_leads_nowhere_else(name: str, place: Path, cli, own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    before = content(place)
    for command in (["cache", "info"], ["cache", "verify"], ["cache", "prune", "--yes"], ["cache", "export"]):
        rest = [str(place / "export")] if command[1] == "export" else []
        ended = cli(*command, "--", name, *rest)
        assert ended.code in (1, 2), (command, ended)
        assert "Traceback" not in ended.err
        assert "\x1b" not in ended.err
    ended = cli("distill", "--config", str(place / "base.yaml"), "--domain", "a", "--teacher", f"cache:{name}")
    assert ended.code == 2, ended
    assert ended.err.count("\n") <= 3
    assert content(place) == before


# Secrets.

SECRETS = {
    "HF_TOKEN": "hf_" + "Aa1Bb2Cc3Dd4Ee5Ff6Gg7Hh8Ii9Jj0Kk1L",
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Zz9Yy8Xx7Ww6Vv5Uu4Tt3Ss2Rr1Qq0Pp9O",
    "WANDB_API_KEY": "wandbplanted0123456789abcdef0123456789ab",
    "AWS_ACCESS_KEY_ID": "AKIA" + "PLANTED234567QWER",
    "AWS_SECRET_ACCESS_KEY": "awsplanted/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "OPENAI_API_KEY": "sk-" + "plantedplantedplantedplanted1234",
    "GITHUB_TOKEN": "ghp_" + "plantedplantedplantedplanted12345678",
    "HTTPS_PROXY": "http://proxyuser:proxyplanted@127.0.0.1:9",
    "HTTP_PROXY": "http://proxyuser2:proxyplanted2@127.0.0.1:9",
    "ALL_PROXY": "http://proxyuser3:proxyplanted3@127.0.0.1:9",
}
IN_FILES = {"netrc": "netrcplanted123", "token file": "hf_" + "Ff0Ff1Ff2Ff3Ff4Ff5Ff6Ff7Ff8Ff9Ff0F"}
GIVEN = {
    "user": "urluserplanted",
    "password": "urlplanted456",
    "query": "queryplanted789",
    "set": "hf_" + "SetPlanted" * 3,
}
WORDS = (
    *(value for name, value in SECRETS.items() if "PROXY" not in name),
    *("proxyplanted", "proxyplanted2", "proxyplanted3"),
    *IN_FILES.values(),
    *GIVEN.values(),
)
FROM_URLS = (
    f"https://{GIVEN['user']}:{GIVEN['password']}@huggingface.co/org/model",
    f"https://{GIVEN['password']}@huggingface.co/org/model",
    f"https://huggingface.co/org/model?token={GIVEN['query']}",
    f"s3://bucket/model?X-Amz-Signature={GIVEN['query']}&x=1",
    f"git+ssh://{GIVEN['user']}:{GIVEN['password']}@host/org/model.git",
)


@pytest.fixture
def planted(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place, with secrets wherever tools keep them."""
    home = place / "home"
    (home / "hf").mkdir(parents=True)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("TRUE_KD_DEBUG", "1")
    (home / "hf" / "token").write_text(IN_FILES["token file"])
    (home / ".netrc").write_text(f"machine huggingface.co login me password {IN_FILES['netrc']}\n")
    return place


def leaks(text: str) -> list[str]:
    return [word for word in WORDS if word in text]


def leaking_files(root: Path) -> list[tuple[str, list[str]]]:
    """The files of a run that hold a secret, but for those it was planted in."""
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and (root / "home") not in path.parents and path.name != "planted.yaml":
            found += [(str(path), words)] if (words := leaks(path.read_bytes().decode("latin-1"))) else []
    return found


def test_a_whole_run_leaves_no_secret_anywhere(planted: Path, cli: Callable[..., Ended]) -> None:
    config = ("--config", str(planted / "base.yaml"))
    calls = [
        ("doctor",),
        ("distill", *config, "--domain", "a", "--set", "isolate=true"),
        ("distill", *config, "--domain", "a", "--control", "sft", "--set", "report=true"),
        ("evaluate", *config, "--domain", "a"),
        ("report", str(planted / "out")),
        ("cache", "ls"),
        ("cache", "ls", "--json"),
        ("cache", "verify"),
        ("generate", "hello", *config, "--domain", "a", "--max-tokens", "2"),
    ]
    said = {call: cli(*call) for call in calls}
    assert {call[0]: ended.code for call, ended in said.items() if call[0] not in ("doctor", "report")} == {
        "distill": 0,
        "evaluate": 0,
        "cache": 0,
        "generate": 0,
    }, said
    assert [(call, found) for call, ended in said.items() if (found := leaks(ended.out + ended.err))] == []
    assert (planted / "out" / "report.html").is_file()
    assert len(list(planted.rglob("*"))) > 20
    assert leaking_files(planted) == []


MISTAKES: dict[str, tuple[str, ...]] = {
    **{f"a teacher by {url[:12]} {number}": ("--teacher", url) for number, url in enumerate(FROM_URLS)},
    "a student by URL": ("--student", FROM_URLS[0]),
    "a token as an unknown key": ("--set", f"hf_token={GIVEN['set']}"),
    "a token as a number": ("--set", f"training.iters={GIVEN['set']}"),
    "a token as a choice": ("--set", f"control={GIVEN['set']}"),
    "a token as a key": ("--set", f"{GIVEN['set']}=1"),
    "a token as a revision": ("--set", f"teacher.revision={GIVEN['set']}"),
    "a token as a teacher": ("--teacher", GIVEN["set"]),
    "a token in a hub id": ("--teacher", f"org/{GIVEN['set']}"),
    "a token as an adapter": ("--set", f"teacher.adapter=/{GIVEN['set']}"),
    "a token in lora.keys": ("--set", f"lora.keys=[{GIVEN['set']}]"),
    "a token as out": ("--out", f"/proc/{GIVEN['set']}"),
    "a hub id that cannot be reached": ("--teacher", "org/there-is-no-such-model"),
}


@pytest.mark.parametrize("flags", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_that_holds_a_secret_is_refused_without_repeating_it(
    flags: tuple[str, ...], planted: Path, cli: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    for debug in ("1", "0"):
        monkeypatch.setenv("TRUE_KD_DEBUG", debug)
        ended = cli("distill", "--config", str(planted / "base.yaml"), "--domain", "a", *flags)
        assert ended.code in (1, 2, 4), ended
        assert leaks(ended.out + ended.err) == []
        if debug == "0":
            assert ended.err.count("\n") == 1
    assert leaking_files(planted) == []


@pytest.mark.parametrize("value", [GIVEN["set"], GIVEN["query"]], ids=["a token by its form", "any word"])
@pytest.mark.parametrize("key", ["hf_token", "token", "wandb_key", "api_key"])
def test_a_config_has_no_key_for_secrets_and_its_refusal_repeats_none(key: str, value: str, planted: Path, cli) -> None:
    config = json.loads((planted / "base.yaml").read_text())
    (planted / "planted.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in config.items()))
    with (planted / "planted.yaml").open("a") as file:
        file.write(f"\n{key}: {value}\n")
    ended = cli("distill", "--config", str(planted / "planted.yaml"), "--domain", "a")
    assert ended.code == 2
    assert re.search(rf" {key}: (unknown key|holds .*, expected none in a config)", ended.err)
    assert leaks(ended.out + ended.err) == []


def test_python_users_see_no_secret_in_an_error_either() -> None:
    from true_kd import KDConfig

    for values in ({"teacher": FROM_URLS[0]}, {"iters": GIVEN["set"]}, {"student": GIVEN["set"]}):
        with pytest.raises(InputError) as refused:
            KDConfig(**values)
        assert leaks(str(refused.value) + str(refused.value.__cause__)) == []


REDACTED = {
    "https://user:word@host/a": "https://***@host/a",
    "see http://me@host and ftp://x:y@h/z": "see http://***@host and ftp://***@h/z",
    "https://host/a?token=abcdef123&x=1": "https://host/a?token=***&x=1",
    "X-Amz-Signature=0123456789": "X-Amz-Signature=***",
    "hf_token=abcdefghi": "hf_token=***",
    "hf_" + "a" * 30: "hf_***",
    "sk-" + "a1" * 12: "sk-***",
    "mail me@host.org": "mail me@host.org",
    "max_tokens=4096, tokens=123456789": "max_tokens=4096, tokens=123456789",
    "hf_model and sk-learn": "hf_model and sk-learn",
    "/home/me/a@b/c": "/home/me/a@b/c",
    "training.iters=400": "training.iters=400",
    "mlx-community/Qwen2.5-3B-Instruct-4bit": "mlx-community/Qwen2.5-3B-Instruct-4bit",
}


@pytest.mark.parametrize(("text", "shown"), REDACTED.items())
def test_secrets_are_left_out_of_what_is_quoted_and_nothing_else_is(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert quote(text) == repr(shown)


def test_a_tokenizer_of_a_stand_in_is_looked_at_too(student_folder: Path, tmp_path: Path) -> None:
    from true_kd.models.stand_in import write_stand_in

    texts = {name: (student_folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    config = json.loads((student_folder / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    write_stand_in(
        tmp_path / "teacher.safetensors",
        {**texts, "config.json": json.dumps(config).encode()},
        {"model.safetensors": "e" * 64},
    )
    with pytest.raises(ModelError, match="num_hidden_layers"):
        open_tokenizer(ModelOptions(model=str(tmp_path / "teacher.safetensors")), "teacher")
