"""`compare`, `chat` and `generate` as their users meet them: on a terminal, in a pipe, and with mistakes first."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import hear_ctrl_c, only_line, refused
from test_finding import lay_run

from true_kd.cli.shading import BOUNDS, show_comparison
from true_kd.comparing import BaseProof, Comparison, Side, compare, put_on
from true_kd.finding import find_domain
from true_kd.models import LanguageModel, ModelOptions, SamplingOptions, open_model
from true_kd.models.streaming import stream_reply
from true_kd.prompts import from_strings

ASK = "say hello to the cat"
SHORT = ("--max-tokens", "12")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Path:
    """A folder with the output of a run of the domain cats."""
    root = tmp_path_factory.mktemp("talked")
    lay_run(root / "adapters_kd", "cats", teacher_folder, student_folder, prompts=str(root / "prompts"))
    return root


@pytest.fixture
def place(original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It is the current folder."""
    monkeypatch.chdir(original)
    return original


@pytest.fixture
def adapted(place: Path) -> LanguageModel:
    """The student with the adapter of cats."""
    found = find_domain("cats")
    model = open_model(found.config.student, "student")
    put_on(model, found.folder)
    return model


class Terminal(io.StringIO):
    """A terminal that keeps what it is shown."""

    def isatty(self) -> bool:
        return True


def said(ended) -> str:
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


def reply_of(model: LanguageModel, *turns: str, tokens: int = 12, seed: int = 0, temp: float = 0.0) -> str:
    """What a model says after user and assistant took turns, by the template of the tests."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]
    asked = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    options = SamplingOptions(sampling_temperature=temp, max_tokens=tokens)
    return "".join(token.text for token in stream_reply(model, asked, options, seed))


def printed(text: str) -> str:
    """A reply as a script reads it, which writes out control characters."""
    from true_kd.suggest import printable

    return printable(text)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["-d", "cat"],
            "adapters_kd/cat: no such folder, expected an adapter; did you mean 'cats'? Domains here: cats.",
        ),
        (["-d", "../cats"], "not a domain name"),
        ([], "no domain was named, expected --domain NAME (cats) or --adapter PATH."),
        (["-d", "cats", "--adapter", "adapters_kd/cats"], "--domain and --adapter: both given"),
        (["--adapter", "adapters_kd/cats", "--out", "x"], "--out: given with --adapter"),
        (["--adapter", "adapters_kd/cats", "--config", "x.yaml"], "--config: given with --adapter"),
        (["--adapter", "nowhere"], "--adapter 'nowhere': no such folder"),
        (["-d", "cats", "--out", "nowhere"], "Run `true-kd distill --domain cats`, or give --out."),
        (["-d", "cats", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["-d", "cats", "--temp", "-1"], "--temp sampling_temperature: -1.0"),
        (["-d", "cats", "--temp", "nan"], "--temp sampling_temperature: nan"),
        (["-d", "cats", "--top-p", "0"], "--top-p top_p: 0.0"),
        (["-d", "cats", "--max-tokens", "0"], "--max-tokens max_tokens: 0"),
        (["-d", "cats", "--seed", "-1"], "--seed"),
        (["-d", "cats", "--student", "nowhere"], "student 'nowhere': no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["compare", "chat", "generate"])
def test_a_mistake_ends_in_one_line(command: str, arguments: list[str], says: str, cli, place: Path) -> None:
    asked = [] if command == "chat" else [ASK]
    assert says in refused(cli(command, *asked, *arguments))


@pytest.mark.parametrize("command", ["compare", "generate"])
@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_an_empty_prompt_is_refused(command: str, prompt: str, cli, place: Path) -> None:
    assert "prompt: empty" in refused(cli(command, prompt, "-d", "cats"))


@pytest.mark.parametrize("command", ["compare", "generate"])
def test_a_prompt_that_is_not_given_is_asked_for(command: str, cli, place: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())
    assert f'Write true-kd {command} "..."' in refused(cli(command, "-d", "cats"))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "prompt: empty" in refused(cli(command, "-d", "cats"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert "stdin: not UTF-8" in refused(cli(command, "-d", "cats"))


def test_two_ways_to_say_the_same_are_one_too_many(cli, place: Path) -> None:
    assert "--no-teacher" in refused(cli("compare", ASK, "-d", "cats", "--no-teacher", "--teacher", "x"))
    assert "--prompts-file" in refused(cli("generate", ASK, "-d", "cats", "--prompts-file", "x.txt"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "none.jsonl: cannot be read"),
        ("empty.txt", "\n\n", "empty.txt: no prompts"),
        ("bad.jsonl", '{"prompt": "hello"}\nno json\n', "bad.jsonl:2"),
        ("raw.jsonl", '{"text": "hello"}', "raw.jsonl:1: raw `text`"),
        ("other.csv", "hello", "expected a file that ends in .jsonl or .txt"),
    ],
)
def test_a_prompt_file_that_is_none_is_refused(
    name: str, content: str | None, says: str, cli, place: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert says in refused(cli("generate", "-d", "cats", "--prompts-file", str(path)))


def test_a_damaged_adapter_ends_with_5(cli, tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    folder = lay_run(tmp_path, "cats", teacher_folder, student_folder)
    (folder / "adapters.safetensors").write_bytes(b"")
    for command in ("compare", "generate"):
        assert "not an adapter of this student" in refused(cli(command, ASK, "--adapter", str(folder)), 5)


# Generate


def test_generate_prints_the_reply_and_nothing_else(cli, adapted: LanguageModel) -> None:
    assert said(cli("generate", ASK, "-d", "cats", *SHORT)) == printed(reply_of(adapted, ASK)) + "\n"


def test_generate_reads_stdin(cli, place: Path, monkeypatch) -> None:
    expected = said(cli("generate", ASK, "-d", "cats", *SHORT))
    for arguments in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASK}\n"))
        assert said(cli("generate", *arguments, "-d", "cats", *SHORT)) == expected


def test_generate_for_programs(cli, adapted: LanguageModel) -> None:
    [line] = said(cli("generate", ASK, "-d", "cats", *SHORT, "--json")).splitlines()
    record = json.loads(line)
    assert record["text"] == reply_of(adapted, ASK)
    assert (record["tokens"], record["finish_reason"]) == (12, "length")
    assert record["prompt_tokens"] == len(
        adapted.tokenizer.apply_chat_template([{"role": "user", "content": ASK}], add_generation_prompt=True)
    )
    assert record["tokens_per_second"] > 0
    one = json.loads(said(cli("generate", ASK, "-d", "cats", "--max-tokens", "1", "--json")))
    assert (one["tokens"], one["tokens_per_second"]) == (1, None)


def test_generate_of_the_base_is_the_plain_student(cli, place: Path, student_folder: Path) -> None:
    plain = open_model(ModelOptions(model=str(student_folder)), "student")
    out = said(cli("generate", ASK, "-d", "cats", *SHORT, "--base"))
    assert out == printed(reply_of(plain, ASK)) + "\n"
    assert out != said(cli("generate", ASK, "-d", "cats", *SHORT))


def test_generate_takes_an_adapter_folder(cli, place: Path) -> None:
    expected = said(cli("generate", ASK, "-d", "cats", *SHORT))
    assert said(cli("generate", ASK, "--adapter", "adapters_kd/cats", *SHORT)) == expected


def test_the_seed_decides_what_is_drawn(cli, adapted: LanguageModel) -> None:
    def drawn(seed: int) -> str:
        return said(cli("generate", ASK, "-d", "cats", *SHORT, "--temp", "1", "--seed", str(seed)))

    assert drawn(3) == drawn(3) == printed(reply_of(adapted, ASK, temp=1.0, seed=3)) + "\n"
    assert drawn(4) != drawn(3)


@pytest.mark.parametrize("name", ["asked.txt", "asked.jsonl"])
def test_a_file_of_prompts_is_answered_line_by_line(name: str, cli, place: Path, tmp_path: Path) -> None:
    asked = [ASK, "who sat on the mat"]
    lines = asked if name.endswith(".txt") else [json.dumps({"prompt": text, "answer": "x"}) for text in asked]
    (tmp_path / name).write_text("\n\n".join(lines))
    records = said(cli("generate", "-d", "cats", *SHORT, "--prompts-file", str(tmp_path / name))).splitlines()
    singles = [json.loads(said(cli("generate", text, "-d", "cats", *SHORT, "--json"))) for text in asked]
    assert [json.loads(record)["text"] for record in records] == [single["text"] for single in singles]


def test_the_domains_system_message_is_said_and_can_be_replaced(
    cli, tmp_path: Path, teacher_folder: Path, student_folder: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_run(tmp_path / "adapters_kd", "cats", teacher_folder, student_folder)
    (tmp_path / "prompts" / "cats").mkdir(parents=True)

    def asked(*arguments: str) -> list[dict[str, str]]:
        return json.loads(said(cli("compare", ASK, "-d", "cats", "-m", "1", "--no-teacher", "--json", *arguments)))[
            "messages"
        ]

    user = {"role": "user", "content": ASK}
    assert asked() == [user]
    (tmp_path / "prompts" / "cats" / "system.md").write_text("be a dog\n")
    assert asked() == [{"role": "system", "content": "be a dog"}, user]
    assert asked("--system", "be a cat") == [{"role": "system", "content": "be a cat"}, user]
    assert asked("--system", "") == [user]


def test_control_characters_of_a_reply_are_written_out(cli, place: Path) -> None:
    hot = ("generate", ASK, "-d", "cats", "--temp", "5", "--top-p", "1", "--max-tokens", "200")
    text = json.loads(said(cli(*hot, "--json")))["text"]
    assert re.search(r"[\x00-\x08\x0b-\x1f]", text), "the reply to be shown has some"
    assert said(cli(*hot)) == printed(text) + "\n"
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", said(cli(*hot)))


def test_on_a_terminal_the_reply_comes_piece_by_piece(place: Path, monkeypatch, cli) -> None:
    from true_kd.cli import run

    written: list[str] = []

    class Watched(Terminal):
        def write(self, text: str) -> int:
            count = super().write(text)
            written.append(text)
            return count

    expected = said(cli("generate", ASK, "-d", "cats", *SHORT))
    monkeypatch.setattr("sys.stdout", Watched())
    assert run(["generate", ASK, "-d", "cats", *SHORT]) == 0
    assert "".join(written) == expected
    assert len(written) > 6


# Chat


def chatted(cli, monkeypatch, text: str, *arguments: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return said(cli("chat", "-d", "cats", *SHORT, *arguments))


def test_a_chat_answers_each_line_in_the_light_of_those_before(cli, adapted: LanguageModel, monkeypatch) -> None:
    first = reply_of(adapted, ASK)
    second = reply_of(adapted, ASK, first, "and the mat")
    assert chatted(cli, monkeypatch, f"{ASK}\nand the mat\n") == f"{printed(first)}\n{printed(second)}\n"


def test_r_forgets_and_q_leaves(cli, adapted: LanguageModel, monkeypatch) -> None:
    first = printed(reply_of(adapted, ASK))
    assert chatted(cli, monkeypatch, f"{ASK}\nr\n\n{ASK}\nq\nand the mat\n") == f"{first}\n{first}\n"


def test_h_says_what_can_be_typed(cli, place: Path, monkeypatch) -> None:
    assert "q or Ctrl-D quits, r forgets" in chatted(cli, monkeypatch, "h\n")
    assert chatted(cli, monkeypatch, "") == ""


def test_a_chat_draws_with_its_seed_and_each_turn_anew(cli, adapted: LanguageModel, monkeypatch) -> None:
    first = reply_of(adapted, ASK, seed=5, temp=1.0)
    second = reply_of(adapted, ASK, first, "and the mat", seed=6, temp=1.0)
    text = f"{ASK}\nand the mat\n"
    assert chatted(cli, monkeypatch, text, "--temp", "1", "--seed", "5") == f"{printed(first)}\n{printed(second)}\n"


def test_a_chat_with_the_base_is_one_with_the_plain_student(
    cli, place: Path, student_folder: Path, monkeypatch
) -> None:
    plain = open_model(ModelOptions(model=str(student_folder)), "student")
    assert chatted(cli, monkeypatch, ASK, "--base") == printed(reply_of(plain, ASK)) + "\n"


def test_whoever_types_is_greeted(place: Path, monkeypatch, capsys) -> None:
    from true_kd.cli import run

    monkeypatch.setattr("sys.stdin", Terminal("h\nr\n"))
    assert run(["chat", "-d", "cats", *SHORT]) == 0
    out = capsys.readouterr().out
    assert "with adapters_kd/cats. q or Ctrl-D quits" in out
    assert out.count(">> ") == 3
    assert "The conversation is forgotten." in out


def test_a_message_that_is_no_text_does_not_end_the_chat(cli, place: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\ud800\nhello\n"))
    ended = cli("chat", "-d", "cats", *SHORT)
    assert ended.code == 0
    assert only_line(ended.err).startswith("message[0]")
    assert ended.out.count("\n") >= 1


def test_ctrl_c_stops_a_reply_and_no_more(place: Path) -> None:
    """A reply of 100,000 tokens, from which only Ctrl-C frees."""
    with subprocess.Popen(
        [sys.executable, "-m", "true_kd", "chat", "-d", "cats", "--max-tokens", "100000"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    ) as process:
        process.stdin.write(f"{ASK}\n".encode())
        process.stdin.flush()
        seen = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        while b" [stopped]\n" not in seen:
            more = process.stdout.read(1)
            assert more, process.stderr.read()
            seen += more
        out, err = process.communicate(b"h\n", timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"q or Ctrl-D quits")


def test_ctrl_c_while_nothing_is_written_leaves_with_130(place: Path, monkeypatch, cli) -> None:
    class Impatient(io.StringIO):
        def readline(self, *_: object) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Impatient())
    ended = cli("chat", "-d", "cats")
    assert (ended.code, ended.out, ended.err) == (130, "", "")


# Compare


@pytest.fixture(scope="module")
def compared(original: Path) -> Comparison:
    found = find_domain("cats", str(original / "adapters_kd"))
    [prompt] = from_strings([ASK])
    return compare(found.config, found.folder, prompt, SamplingOptions(sampling_temperature=0.0, max_tokens=12), 0)


def test_compare_for_programs_says_it_all(cli, place: Path, compared: Comparison) -> None:
    record = json.loads(said(cli("compare", ASK, "-d", "cats", *SHORT, "--json")))
    assert list(record["sides"]) == ["base", "adapted", "teacher"]
    for side in compared.sides:
        shown = record["sides"][side.name]
        assert (shown["text"], shown["measure"], shown["finish_reason"]) == (side.text, side.measure, side.finished)
        assert [token["kl"] for token in shown["tokens"]] == list(side.kl)
        assert "".join(token["text"] for token in shown["tokens"]) == side.text
    assert record["base_proof"] == vars(compared.proof)
    assert record["base_on_teacher"] == list(compared.base_on_teacher)
    assert (record["domain"], record["seed"], record["notes"]) == ("cats", 0, [])


def test_compare_in_a_pipe_is_plain_text(cli, place: Path, compared: Comparison) -> None:
    out = said(cli("compare", ASK, "-d", "cats", *SHORT))
    assert "\x1b" not in out
    for side, title in zip(compared.sides, ("base (", "with adapter (", "teacher ("), strict=True):
        assert f"{title}{side.model})\n{printed(side.text)}\n" in out
        assert f"{side.measure}: {side.mean_kl:.3f} on average over 12 tokens" in out
    last = out.splitlines()[-1]
    assert last.startswith("The base side is ")
    assert compared.proof.digest[:12] in last


def test_without_a_teacher_two_sides_are_compared(cli, place: Path) -> None:
    out = said(cli("compare", ASK, "-d", "cats", *SHORT, "--no-teacher"))
    assert "teacher" not in out
    assert out.count("KL(adapted || base): ") == 2


def test_of_an_adapter_of_mlx_lm_the_teacher_must_be_named(
    cli, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    folder = lay_run(tmp_path, "cats", teacher_folder, student_folder)
    (folder / "run.json").unlink()
    out = said(cli("compare", ASK, "--adapter", str(folder), *SHORT))
    assert "No teacher is known of this adapter: name it with --teacher." in out
    out = said(cli("compare", ASK, "--adapter", str(folder), *SHORT, "--teacher", str(teacher_folder)))
    assert f"teacher ({teacher_folder})" in out


# What a comparison looks like


def side_of(name: str, pieces: list[str], kl: list[float], finished: str = "stop") -> Side:
    measure = "KL(teacher || adapted)" if name == "teacher" else f"KL(teacher || {name})"
    tokens = tuple(zlib.crc32(piece.encode()) for piece in pieces)
    return Side(name, f"some/{name}", tokens, tuple(pieces), finished, tuple(kl), measure)


PIECES = ["the", " cat", " sat", "\n", "on", " it", ""]
HANDMADE = Comparison(
    base=side_of("base", ["a", " dog", "\x1b[2J", "\r", "", "\U0001f415"], [0.05, 0.1, 0.3, 1.0, 3.5, 0.0], "length"),
    adapted=side_of("adapted", [*PIECES[:2], " ran", *PIECES[3:]], [0.0, 0.0, 2.0, 0.4, 0.0, 0.0, 0.7]),
    teacher=side_of("teacher", PIECES, [0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0]),
    base_on_teacher=(0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.1),
    proof=BaseProof(24, "0123456789abcdef" * 4, 6, 4.5),
)


def shown(comparison: Comparison, monkeypatch: pytest.MonkeyPatch, columns: int, **environment: str) -> str:
    """A comparison on a terminal of so many columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    show_comparison(comparison, ["A note."])
    return terminal.getvalue()


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def grounds(text: str) -> dict[str, str]:
    """The pieces of a shown text that have a ground, and its colour."""
    return {piece: colour for colour, piece in re.findall(r"\x1b\[[0-9;]*48;5;(\d+)m([^\x1b]*)", text)}


@pytest.mark.parametrize("columns", [40, 60, 99, 100, 140, 200])
@pytest.mark.parametrize("plain", [False, True])
def test_it_fits_the_terminal(columns: int, plain: bool, monkeypatch) -> None:
    text = shown(HANDMADE, monkeypatch, columns, **({"NO_COLOR": "1"} if plain else {}))
    lines = without_styles(text).splitlines()
    assert max(map(len, lines)) <= columns
    titles = [[title for title in ("base (", "with adapter (", "teacher (") if title in line] for line in lines]
    beside = max(map(len, titles))
    assert beside == (3 if columns >= 100 else 1)
    assert "\x1b" not in text or not plain
    assert "A note." in lines


def test_tokens_are_shaded_in_five_steps(monkeypatch) -> None:
    text = shown(HANDMADE, monkeypatch, 99)
    shades = grounds(text)
    steps = [shades[name] for name in (" dog", "\\x1b[2J", "\\r", "\U0001f415")]
    assert len(set(steps)) == 4
    assert "a" not in shades, "below the first bound there is no ground"
    legend = text[text.index("KL at each token") :]
    assert [grounds(legend)[f" from {bound:g} "] for bound in BOUNDS] == steps
    assert "below 0.1" in legend


def test_a_shared_character_has_the_shade_of_its_worst_token(monkeypatch) -> None:
    assert HANDMADE.base.kl[-2:] == (3.5, 0.0)
    assert grounds(shown(HANDMADE, monkeypatch, 60))["\U0001f415"] == "203"


def test_the_end_of_a_line_and_of_the_reply_can_be_seen_to_part(monkeypatch) -> None:
    text = shown(HANDMADE, monkeypatch, 60)
    assert "↵" in grounds(text)
    assert " end" in grounds(text)
    assert "↵" not in without_styles(shown(HANDMADE, monkeypatch, 60, NO_COLOR="1"))


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"TERM": "unknown"}])
def test_without_colours_no_escape_code_is_written(environment: dict[str, str], monkeypatch) -> None:
    for columns in (60, 140):
        text = shown(HANDMADE, monkeypatch, columns, **environment)
        assert "\x1b" not in text
        words = " ".join(text.split())
        for fact in ("' ran' 2.00", "the end 0.70", "'\\n' 0.40"):
            assert fact in words or columns == 140


def test_control_characters_never_reach_the_terminal(monkeypatch) -> None:
    for columns in (60, 140):
        text = without_styles(shown(HANDMADE, monkeypatch, columns))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
        assert "\\x1b[2J" in text


def test_below_each_text_stands_what_there_is_to_know(monkeypatch) -> None:
    text = shown(HANDMADE, monkeypatch, 200, TERM="dumb")
    assert "KL(teacher || base): 0.825 on average over 6 tokens" in text
    assert "cut after 6 tokens (--max-tokens)" in text
    assert "parts from the teacher's text at token 1: 'a', there 'the'" in text
    assert "parts from the teacher's text at token 3: ' ran', there ' sat'" in text
    assert "KL(teacher || adapted): 0.029 on average over 7 tokens, 0.100 without adapter" in text
    assert "highest: ' ran' 2.00, '\\n' 0.40, the end 0.70" in text


def test_texts_that_do_not_part_are_called_the_same(monkeypatch) -> None:
    same = replace(HANDMADE, adapted=side_of("adapted", PIECES, [0.0] * 7))
    assert "the same text as the teacher's" in shown(same, monkeypatch, 200, TERM="dumb")
    shorter = replace(HANDMADE, adapted=side_of("adapted", PIECES[:3], [0.0] * 3, "length"))
    assert "the teacher's text as far as both go, 3 tokens" in shown(shorter, monkeypatch, 200, TERM="dumb")


def test_an_adapter_that_changes_nothing_is_told_last_but_one(monkeypatch) -> None:
    text = shown(replace(HANDMADE, proof=replace(HANDMADE.proof, largest_change=0.0)), monkeypatch, 200, TERM="dumb")
    *_, warning, proof = text.splitlines()
    assert warning.startswith("The adapter changes nothing")
    assert proof.endswith("second opening without adapter.")


def test_a_comparison_without_a_teacher_measures_from_the_base(monkeypatch) -> None:
    alone = replace(HANDMADE, teacher=None, base_on_teacher=())
    text = shown(alone, monkeypatch, 200, TERM="dumb")
    assert "teacher (" not in text
    assert text.count("parts from") == text.count("parts from the base's text") == 1


def test_markup_in_a_reply_is_shown_as_it_stands(monkeypatch) -> None:
    marked = replace(HANDMADE, base=side_of("base", ["[bold]", "x[/bold]"], [0.0, 0.5]))
    for columns in (60, 140):
        assert "[bold]x[/bold]" in without_styles(shown(marked, monkeypatch, columns))
