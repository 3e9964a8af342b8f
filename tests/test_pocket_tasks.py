"""The pocket tasks can be checked, stay apart by the held-out rule, and the shipped files obey it."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import pocket_tasks  # noqa: E402

POCKET = ROOT / "true_kd" / "pocket"
every_domain = pytest.mark.parametrize("domain", pocket_tasks.DOMAINS)


def draw(domain: str, count: int) -> list[pocket_tasks.Task]:
    """Tasks of one domain from a fixed seed."""
    rng = random.Random(3)
    return [pocket_tasks.generate(domain, rng) for _ in range(count)]


def read_lines(path: Path) -> list[dict[str, str]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@every_domain
def test_the_ideal_reply_passes_the_check(domain):
    assert all(pocket_tasks.is_correct(task.reply, task.answer) for task in draw(domain, 300))


@every_domain
def test_the_reply_to_another_task_fails_the_check(domain):
    for task, other in zip(draw(domain, 300), draw(domain, 301)[1:], strict=True):
        assert pocket_tasks.is_correct(other.reply, task.answer) == (other.answer == task.answer)
        assert not pocket_tasks.is_correct(f"{task.reply} indeed", task.answer)


@every_domain
def test_one_seed_gives_one_sequence_of_tasks(domain):
    assert draw(domain, 20) == draw(domain, 20)


@every_domain
def test_a_domain_holds_thousands_of_held_out_tasks(domain):
    drawn = {task.prompt for task in draw(domain, 4000)}
    # 3,520 distinct in 4,000 even draws put the space above 15,000 tasks; an eighth of it is held out.
    assert len(drawn) > 3520


@every_domain
def test_training_and_held_out_tasks_never_meet(domain):
    rng = random.Random(4)
    training = {pocket_tasks.generate_split(domain, rng, held_out=False).prompt for _ in range(300)}
    held_out = {pocket_tasks.generate_split(domain, rng, held_out=True).prompt for _ in range(50)}
    assert not training & held_out
    assert not any(map(pocket_tasks.is_held_out, training))
    assert all(map(pocket_tasks.is_held_out, held_out))


def test_the_check_reads_the_last_marker_and_collapses_whitespace():
    assert pocket_tasks.is_correct("answer: 1\nno, wait\nanswer:  two \n words ", "two words")
    assert pocket_tasks.is_correct(" two\nwords", "two words")
    assert not pocket_tasks.is_correct("answer: two words\nanswer:", "two words")


def test_a_tool_call_is_json_that_names_an_offered_tool():
    for task in draw("action", 100):
        offered = task.prompt.removeprefix("Tools: ").partition(".")[0].split(", ")
        assert json.loads(task.answer)["tool"] in offered


def test_the_named_line_of_a_program_is_the_one_with_the_planted_fault():
    for task in draw("debug", 300):
        number, _, remedy = task.answer.removeprefix("line ").partition(": ")
        line = task.prompt.splitlines()[int(number)]
        verb, what = remedy.split()
        assert line.startswith(f"{number} ")
        if verb == "add":
            assert what not in line
        else:
            misspelt = task.reply.partition(" is misspelt")[0].split()[-1]
            assert misspelt in line
            assert misspelt != what


def test_every_step_of_a_sum_holds_and_the_last_is_the_answer():
    for task in draw("thinking", 300):
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)", task.reply)
        assert len(steps) == 2
        assert all(eval(left) == int(right) for left, right in steps)
        assert steps[-1][1] == task.answer


def test_which_wordings_are_common_depends_on_a_word_of_the_prompt():
    """A single reply does not show what the teacher has to say: there is a distribution to distil."""
    rng, wordings = random.Random(5), ("one", "two", "three", "four")
    drawn = {
        name: Counter(pocket_tasks.worded(rng, wordings, name) for _ in range(1500)) for name in pocket_tasks.NAMES
    }
    for counts in drawn.values():
        shares = [count / 1500 for _, count in counts.most_common()]
        assert shares == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15], abs=0.05)
    assert len({counts.most_common(1)[0] for counts in drawn.values()}) > 2


@every_domain
def test_replies_are_worded_in_several_ways(domain):
    ways = {task.reply.replace(task.answer, "").split()[1] for task in draw(domain, 300)}
    assert len(ways) > 2


@every_domain
def test_shipped_prompts_are_unique_and_obey_the_held_out_rule(domain):
    train = [row["prompt"] for row in read_lines(POCKET / "prompts" / domain / "train.jsonl")]
    valid = [row["prompt"] for row in read_lines(POCKET / "prompts" / domain / "valid.jsonl")]
    assert len({*train, *valid}) == len(train) + len(valid)
    assert not any(map(pocket_tasks.is_held_out, train))
    assert all(map(pocket_tasks.is_held_out, valid))


def test_the_models_share_one_tokenizer_that_loses_no_text():
    teacher, student = (POCKET / name / "tokenizer.json" for name in ("teacher", "student"))
    assert teacher.read_bytes() == student.read_bytes()
    tokenizer = Tokenizer.from_file(str(teacher))
    texts = [text for domain in pocket_tasks.DOMAINS for task in draw(domain, 20) for text in (task.prompt, task.reply)]
    for text in [*texts, "naïve café, 東京, \t tabs\r\n"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@every_domain
def test_a_task_fits_in_a_hundred_tokens(domain):
    tokenizer = Tokenizer.from_file(str(POCKET / "teacher" / "tokenizer.json"))
    for task in draw(domain, 200):
        turns = f"<|im_start|>user\n{task.prompt}<|im_end|><|im_start|>assistant\n{task.reply}<|im_end|>"
        assert len(tokenizer.encode(turns).ids) <= 100


def test_the_pocket_stays_below_eight_megabytes():
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) <= 8_000_000
