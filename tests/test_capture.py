"""The teacher's targets are its own distribution at its own tokens, and each prompt is asked once."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from true_kd.cache import CachedReply, TargetCache
from true_kd.capture import (
    CaptureOptions,
    CaptureProgress,
    TeacherPrompt,
    capture,
    render_for,
    teacher_identity,
)
from true_kd.models import LanguageModel, ModelOptions, open_model
from true_kd.prompts import Prompt, from_records, from_strings
from true_kd.targets import TargetOptions

GREEDY = CaptureOptions(sampling_temperature=0.0, max_tokens=12)
SAMPLED = CaptureOptions(sampling_temperature=1.0, top_p=0.9, max_tokens=12)
TARGETS = TargetOptions()
ASKED = from_strings([f"say hello to {name}" for name in ("the cat", "the mat", "the world", "said", "5 cats on mats")])
GIVEN = from_records(
    [
        {"prompt": "where is the cat", "completion": "the cat sat on the mat"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to the world"}]},
        {"text": "the cat sat on the mat and said hello"},
    ]
)


@pytest.fixture(scope="session")
def terse_folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """The random teacher, made to end its replies soon: every eighth id is a stop token."""
    folder = tmp_path_factory.mktemp("terse")
    for file in teacher_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, *range(8, 320, 8)]}))
    return folder


@pytest.fixture
def terse(terse_folder: Path) -> LanguageModel:
    return open_model(ModelOptions(model=str(terse_folder)), "teacher")


def ask(
    teacher: LanguageModel,
    prompts: list[Prompt],
    root: Path,
    options: CaptureOptions = GREEDY,
    targets: TargetOptions = TARGETS,
) -> tuple[list[CachedReply], list[CaptureProgress], TargetCache]:
    """The replies to the prompts, in order, and what the capture reported."""
    cache = TargetCache(root, teacher_identity(teacher, options, targets))
    asked = render_for(teacher, prompts)
    progress = list(capture(teacher, asked, cache, options, targets))
    # Opened anew, so that what is looked at has been on disk.
    cache = TargetCache(root, teacher_identity(teacher, options, targets))
    found = cache.read(dict.fromkeys(prompt.key for prompt in asked))
    return [found[prompt.key] for prompt in asked], progress, cache


def forced(teacher: LanguageModel, asked: TeacherPrompt, reply: CachedReply) -> np.ndarray:
    """The teacher's log-probabilities at each token of a reply, from one pass over prompt and reply."""
    prompt = asked.rendered.prompt
    logits = teacher.module(mx.array([prompt + reply.tokens.tolist()]))[0, len(prompt) - 1 : -1]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(np.float64)


def assert_targets_are_forced(teacher: LanguageModel, prompts: list[Prompt], root: Path, options: CaptureOptions):
    replies, _, _ = ask(teacher, prompts, root, options)
    for asked, reply in zip(render_for(teacher, prompts), replies, strict=True):
        expected = forced(teacher, asked, reply)
        targets = reply.targets
        assert len(targets) == len(reply.tokens) == len(expected)
        for row, token in enumerate(reply.tokens):
            entries = slice(targets.offsets[row], targets.offsets[row + 1])
            ids = targets.ids[entries]
            # Half a unit in the last place of a float16, and the rounding of another batch.
            np.testing.assert_allclose(targets.logprobs[entries], expected[row, ids], rtol=6e-4, atol=1e-3)
            assert token in ids
            assert set(np.flatnonzero(expected[row] > np.log(1.02 * TARGETS.threshold))) <= set(ids)
        weights, _ = targets.at_temperature(TARGETS.draw_temperature)
        np.testing.assert_allclose(np.add.reduceat(weights, targets.offsets[:-1]), 1.0, rtol=2e-3)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_greedy_replies_are_those_of_mlx_lm(terse: LanguageModel, tmp_path: Path) -> None:
    from mlx_lm.generate import stream_generate

    replies, _, _ = ask(terse, ASKED, tmp_path)
    ends = set()
    for asked, reply in zip(render_for(terse, ASKED), replies, strict=True):
        written = list(
            stream_generate(terse.module, terse.tokenizer, asked.rendered.prompt, max_tokens=GREEDY.max_tokens)
        )
        assert reply.tokens.tolist() == [response.token for response in written]
        assert reply.finished == written[-1].finish_reason
        ends.add(reply.finished)
    assert ends == {"stop", "length"}, "these prompts no longer show both ways to end"


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_reply_ends_with_its_stop_token_or_at_max_tokens(
    terse: LanguageModel, tmp_path: Path, options: CaptureOptions
) -> None:
    replies, _, _ = ask(terse, ASKED, tmp_path, options)
    for reply in replies:
        stops = [token in terse.stop_ids for token in reply.tokens.tolist()]
        assert not any(stops[:-1])
        if reply.finished == "stop":
            assert stops[-1]
        else:
            assert reply.finished == "length"
            assert len(reply.tokens) == options.max_tokens


def test_a_given_completion_is_kept_and_ends_with_a_stop_token(teacher: LanguageModel, tmp_path: Path) -> None:
    replies, _, _ = ask(teacher, GIVEN[:2], tmp_path)
    for reply, text in zip(replies, ("the cat sat on the mat", "hello to the world"), strict=True):
        assert reply.finished == "given"
        assert reply.tokens[-1] in teacher.stop_ids
        assert teacher.tokenizer.decode(reply.tokens[:-1].tolist()) == text


def test_of_a_text_every_token_but_the_first_is_scored(teacher: LanguageModel, tmp_path: Path) -> None:
    [reply], _, _ = ask(teacher, GIVEN[2:], tmp_path)
    assert reply.tokens.tolist() == teacher.tokenizer.encode(GIVEN[2].text)[1:]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_targets_of_written_replies_are_the_teachers_forced_distribution(
    terse: LanguageModel, tmp_path: Path, options: CaptureOptions
) -> None:
    assert_targets_are_forced(terse, ASKED, tmp_path, options)


def test_targets_of_given_replies_are_the_teachers_forced_distribution(teacher: LanguageModel, tmp_path: Path) -> None:
    assert_targets_are_forced(teacher, GIVEN, tmp_path, GREEDY)


def test_a_long_given_reply_is_scored_to_its_end(teacher: LanguageModel, tmp_path: Path) -> None:
    long = from_records([{"text": "the cat sat on the mat and said hello " * 40}])
    assert_targets_are_forced(teacher, long, tmp_path, GREEDY)
    [reply], _, _ = ask(teacher, long, tmp_path)
    assert len(reply.tokens) > 256, "shorter than a chunk of scoring"


@pytest.fixture
def soft_capped(tmp_path: Path, tokenizer_folder: Path) -> LanguageModel:
    """A random Gemma 2, whose head does more than one linear map."""
    from mlx_lm.models import gemma2

    config = {
        "model_type": "gemma2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "query_pre_attn_scalar": 16,
        "eos_token_id": 1,
    }
    folder = tmp_path / "gemma2"
    folder.mkdir()
    mx.random.seed(3)
    module = gemma2.Model(gemma2.ModelArgs.from_dict(config))
    module.model.embed_tokens.weight = 30 * module.model.embed_tokens.weight
    module.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    return open_model(ModelOptions(model=str(folder)), "teacher")


def test_a_soft_capped_teacher_is_scored_as_it_speaks(soft_capped: LanguageModel, tmp_path: Path) -> None:
    one_by_one = GREEDY.model_copy(update={"batch_size": 1})
    assert_targets_are_forced(soft_capped, [*ASKED[:3], *GIVEN], tmp_path / "cache", one_by_one)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_soft_capped_teacher_is_scored_as_it_speaks_in_batches(
    soft_capped: LanguageModel, tmp_path: Path, batch_size: int
) -> None:
    batched = GREEDY.model_copy(update={"batch_size": batch_size})
    assert_targets_are_forced(soft_capped, ASKED[-batch_size:], tmp_path / "cache", batched)


def test_a_sampled_reply_does_not_depend_on_its_neighbours(terse: LanguageModel, tmp_path: Path) -> None:
    together, _, _ = ask(terse, ASKED, tmp_path / "together", SAMPLED)
    for index, prompt in enumerate(ASKED):
        [alone], _, _ = ask(terse, [prompt], tmp_path / f"alone {index}", SAMPLED)
        assert alone.tokens.tolist() == together[index].tokens.tolist()


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"shard_prompts": 2}, {"batch_size": 1, "shard_prompts": 3}])
def test_the_grouping_of_prompts_changes_neither_replies_nor_identity(
    terse: LanguageModel, tmp_path: Path, change: dict
) -> None:
    grouped = SAMPLED.model_copy(update=change)
    assert teacher_identity(terse, grouped, TARGETS).key == teacher_identity(terse, SAMPLED, TARGETS).key
    expected, _, _ = ask(terse, ASKED, tmp_path / "one", SAMPLED)
    found, _, _ = ask(terse, list(reversed(ASKED)), tmp_path / "other", grouped)
    for one, other in zip(expected, reversed(found), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sampling_temperature": 0.5}, {"top_p": 0.5}, {"max_tokens": 11}], ids=lambda c: str(*c)
)
def test_what_changes_the_text_changes_the_identity(teacher: LanguageModel, change: dict) -> None:
    changed = SAMPLED.model_copy(update=change)
    assert teacher_identity(teacher, changed, TARGETS).key != teacher_identity(teacher, SAMPLED, TARGETS).key


@pytest.mark.parametrize("change", [{"threshold": 0.02}, {"draw_temperature": 1.0}, {"max_draws": 100}])
def test_what_changes_the_targets_changes_the_identity(teacher: LanguageModel, change: dict) -> None:
    changed = TARGETS.model_copy(update=change)
    assert teacher_identity(teacher, SAMPLED, changed).key != teacher_identity(teacher, SAMPLED, TARGETS).key


def test_another_teacher_or_other_stop_tokens_change_the_identity(
    teacher: LanguageModel, student: LanguageModel, terse: LanguageModel
) -> None:
    assert len({teacher_identity(model, SAMPLED, TARGETS).key for model in (teacher, student, terse)}) == 3


@pytest.mark.parametrize("change", [{"sampling_temperature": 1e-4}, {"top_p": 1e-4}], ids=lambda change: str(*change))
def test_sampling_without_freedom_takes_the_most_likely_token(
    terse: LanguageModel, tmp_path: Path, change: dict
) -> None:
    greedy, _, _ = ask(terse, ASKED, tmp_path)
    bound, _, _ = ask(terse, ASKED, tmp_path, SAMPLED.model_copy(update=change))
    assert [reply.tokens.tolist() for reply in bound] == [reply.tokens.tolist() for reply in greedy]


def test_another_capture_seed_gives_other_samples(terse: LanguageModel, tmp_path: Path) -> None:
    one, _, _ = ask(terse, ASKED, tmp_path, SAMPLED)
    other, _, _ = ask(terse, ASKED, tmp_path, SAMPLED.model_copy(update={"seed": 1}))
    assert [reply.tokens.tolist() for reply in one] != [reply.tokens.tolist() for reply in other]


def test_the_same_seed_gives_the_same_files(terse: LanguageModel, tmp_path: Path) -> None:
    _, _, one = ask(terse, [*ASKED, *GIVEN], tmp_path / "one", SAMPLED)
    mx.random.seed(123)
    _, _, other = ask(terse, [*ASKED, *GIVEN], tmp_path / "other", SAMPLED)
    assert contents(one.folder) == contents(other.folder)


def test_a_second_capture_does_nothing(terse: LanguageModel, tmp_path: Path) -> None:
    _, _, cache = ask(terse, [*ASKED, *GIVEN], tmp_path)
    before = contents(cache.folder)
    _, progress, _ = ask(terse, [*ASKED, *GIVEN], tmp_path)
    assert [(at.done, at.total, at.tokens) for at in progress] == [(8, 8, 0)]
    assert contents(cache.folder) == before


def test_an_edited_prompt_captures_only_itself(terse: LanguageModel, tmp_path: Path) -> None:
    ask(terse, ASKED, tmp_path)
    edited = [*ASKED[:2], *from_strings(["say hello to the cat!"]), *ASKED[3:]]
    replies, progress, _ = ask(terse, edited, tmp_path)
    assert progress[0].done == len(ASKED) - 1
    assert progress[-1].tokens == len(replies[2].tokens)


def test_replies_of_a_damaged_shard_are_captured_again_as_they_were(terse: LanguageModel, tmp_path: Path) -> None:
    options = GREEDY.model_copy(update={"shard_prompts": 2})
    _, _, cache = ask(terse, ASKED, tmp_path, options)
    before = {path.name: path.read_bytes() for path in cache.folder.glob("*.safetensors")}
    assert len(before) == 3
    damaged = cache.folder / sorted(before)[0]
    damaged.write_bytes(bytes(len(before[damaged.name])))
    _, progress, _ = ask(terse, ASKED, tmp_path, options)
    assert progress[0].done in (3, 4)
    assert {path.name: path.read_bytes() for path in cache.folder.glob("*.safetensors")} == before


def test_a_stopped_capture_keeps_its_finished_shards(terse: LanguageModel, tmp_path: Path) -> None:
    options = GREEDY.model_copy(update={"shard_prompts": 2})
    cache = TargetCache(tmp_path, teacher_identity(terse, options, TARGETS))
    asked = render_for(terse, ASKED)
    for progress in capture(terse, asked, cache, options, TARGETS):
        if progress.done == 3:
            break
    reopened = TargetCache(tmp_path, cache.identity)
    assert [prompt.key in reopened for prompt in asked] == [True, True, False, False, False]


def test_progress_rises_to_the_number_of_different_prompts(terse: LanguageModel, tmp_path: Path) -> None:
    options = SAMPLED.model_copy(update={"shard_prompts": 3})
    replies, progress, _ = ask(terse, [*ASKED, *GIVEN, *ASKED], tmp_path, options)
    done = [at.done for at in progress]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 8)
    assert {at.total for at in progress} == {8}
    assert progress[-1].tokens == sum(len(reply.tokens) for reply in replies[:8])


def test_prompts_of_two_domains_share_their_replies(terse: LanguageModel, tmp_path: Path) -> None:
    ask(terse, ASKED[:3], tmp_path)
    _, progress, _ = ask(terse, ASKED[1:], tmp_path)
    assert progress[0].done == 2
