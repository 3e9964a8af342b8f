"""Each side of a comparison is what it is called, and each KL is that of whole distributions."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import save_random_model
from test_adapters import KINDS, opened, save
from test_finding import lay_run

from true_kd.comparing import (
    Comparison,
    NotTheBase,
    Weights,
    check_plain,
    check_same,
    compare,
    compare_in_stages,
    put_on,
    read_weights,
    token_kl,
)
from true_kd.config import KDConfig
from true_kd.errors import CacheError, VocabularyError
from true_kd.models import (
    LoraOptions,
    ModelOptions,
    SamplingOptions,
    add_lora,
    describe,
    open_model,
    save_stand_in,
)
from true_kd.models.streaming import read_logits
from true_kd.prompts import Prompt, from_records, from_strings

GREEDY = SamplingOptions(sampling_temperature=0.0, max_tokens=20)
[PROMPT] = from_strings(["say hello to the cat"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Path:
    """The folder of a domain with a LoRA adapter."""
    return lay_run(tmp_path_factory.mktemp("compared"), "cats", teacher_folder, student_folder)


@pytest.fixture(scope="module")
def config(teacher_folder: Path, student_folder: Path) -> KDConfig:
    return KDConfig(teacher=str(teacher_folder), student=str(student_folder))


@pytest.fixture(scope="module")
def compared(config: KDConfig, folder: Path) -> Comparison:
    return compare(config, folder, PROMPT, GREEDY, 0)


def loaded(folder: Path, adapter: Path | None = None):
    """Model, tokenizer and the tokens of the prompt, by mlx-lm alone."""
    from mlx_lm import load

    module, tokenizer = load(str(folder), adapter_path=adapter and str(adapter))
    messages = [dict(message) for message in PROMPT.messages]
    return module, tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def logprobs_of(logits: mx.array | np.ndarray) -> np.ndarray:
    logits = np.array(logits, dtype=np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def dense(folder: Path, tokens: tuple[int, ...], adapter: Path | None = None) -> np.ndarray:
    """Log-probabilities at each token of a reply by one pass of mlx-lm's model over all of it: [tokens, vocab]."""
    module, _, asked = loaded(folder, adapter)
    module.eval()
    logits = module(mx.array([[*asked, *tokens]]))[0]
    return logprobs_of(logits[len(asked) - 1 : -1])


def written(module: Any, tokenizer: Any, asked: list[int]) -> str:
    """What mlx-lm writes: the text of its tokens, which it shows itself with "!" for ids that no token has."""
    from mlx_lm import stream_generate

    tokens = [part.token for part in stream_generate(module, tokenizer, asked, max_tokens=20)]
    return tokenizer.decode([token for token in tokens if token not in tokenizer.eos_token_ids])


def dense_kl(one: np.ndarray, other: np.ndarray) -> list[float]:
    return (np.exp(one) * (one - other)).sum(axis=-1).tolist()


# The sides


def test_the_base_side_is_what_mlx_lm_writes_without_an_adapter(compared: Comparison, student_folder: Path) -> None:
    module, tokenizer, asked = loaded(student_folder)
    assert compared.base.text == written(module, tokenizer, asked)


def test_the_base_side_has_the_very_logits_of_mlx_lms_model(student_folder: Path, compared: Comparison) -> None:
    module, _, asked = loaded(student_folder)
    ours = open_model(ModelOptions(model=str(student_folder)), "student").module
    assert read_weights(module) == read_weights(ours)
    assert read_weights(module).digest == compared.proof.digest
    tokens = compared.base.tokens
    assert read_logits(module, asked, tokens).tobytes() == read_logits(ours, asked, tokens).tobytes()
    both = [model(mx.array([[*asked, *tokens]])) for model in (module, ours)]
    assert mx.array_equal(*both)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_side_is_what_mlx_lm_writes_with_the_adapter(
    kind: str, config: KDConfig, student_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    folder = lay_run(tmp_path, "cats", teacher_folder, student_folder, KINDS[kind])
    found = compare(config, folder, PROMPT, GREEDY, 0, with_teacher=False)
    module, tokenizer, asked = loaded(student_folder, folder)
    module.eval()
    assert found.adapted.text == written(module, tokenizer, asked)
    module, tokenizer, asked = loaded(student_folder)
    assert found.base.text == written(module, tokenizer, asked)


def test_the_teachers_side_is_what_mlx_lm_writes(compared: Comparison, teacher_folder: Path) -> None:
    module, tokenizer, asked = loaded(teacher_folder)
    assert compared.teacher.text == written(module, tokenizer, asked)


def test_every_side_names_its_model_and_has_a_value_for_each_token(
    compared: Comparison, student_folder: Path, teacher_folder: Path
) -> None:
    assert [(side.name, side.model) for side in compared.sides] == [
        ("base", str(student_folder)),
        ("adapted", str(student_folder)),
        ("teacher", str(teacher_folder)),
    ]
    for side in compared.sides:
        assert len(side.tokens) == len(side.pieces) == len(side.kl)
        assert side.mean_kl == pytest.approx(np.mean(side.kl))


def test_a_stop_token_adds_no_text_and_has_a_kl(teacher_folder: Path, tmp_path: Path, config: KDConfig) -> None:
    student = tmp_path / "student"
    shutil.copytree(teacher_folder, student)
    facts = json.loads((student / "config.json").read_text())
    # Whatever it says is its stop token.
    (student / "config.json").write_text(json.dumps({**facts, "eos_token_id": list(range(320))}))
    folder = lay_run(tmp_path, "cats", teacher_folder, student)
    found = compare(KDConfig(teacher=str(teacher_folder), student=str(student)), folder, PROMPT, GREEDY, 0)
    assert (found.base.text, found.base.finished, len(found.base.tokens)) == ("", "stop", 1)
    assert found.base.kl == (0.0,), "the teacher's own weights"
    assert found.adapted.kl[0] > 0


def test_the_same_seed_gives_the_same_texts_and_another_seed_others(config: KDConfig, folder: Path) -> None:
    drawn = SamplingOptions(sampling_temperature=1.0, max_tokens=12)
    one, same, other = (compare(config, folder, PROMPT, drawn, seed) for seed in (1, 1, 2))
    assert one == same
    for side, its in zip(one.sides, other.sides, strict=True):
        assert side.tokens != its.tokens


def test_a_conversation_with_a_system_message_reaches_every_side(config: KDConfig, folder: Path) -> None:
    messages = [{"role": "system", "content": "be a dog"}, *({**message} for message in PROMPT.messages)]
    [prompt] = from_records([{"messages": messages}])
    plain, told = compare(config, folder, PROMPT, GREEDY, 0), compare(config, folder, prompt, GREEDY, 0)
    assert all(one.text != other.text for one, other in zip(plain.sides, told.sides, strict=True))


# KL


def test_the_kl_is_that_of_whole_distributions(
    compared: Comparison, teacher_folder: Path, student_folder: Path, folder: Path
) -> None:
    def teacher_to(tokens: tuple[int, ...], adapter: Path | None) -> list[float]:
        return dense_kl(dense(teacher_folder, tokens), dense(student_folder, tokens, adapter))

    theirs = compared.teacher.tokens
    assert compared.base.kl == pytest.approx(teacher_to(compared.base.tokens, None), rel=1e-3)
    assert compared.adapted.kl == pytest.approx(teacher_to(compared.adapted.tokens, folder), rel=1e-3)
    assert compared.teacher.kl == pytest.approx(teacher_to(theirs, folder), rel=1e-3)
    assert compared.base_on_teacher == pytest.approx(teacher_to(theirs, None), rel=1e-3)
    assert [side.measure for side in compared.sides] == [
        "KL(teacher || base)",
        "KL(teacher || adapted)",
        "KL(teacher || adapted)",
    ]


def test_without_a_teacher_the_kl_is_between_adapted_and_base(
    config: KDConfig, folder: Path, student_folder: Path, compared: Comparison
) -> None:
    found = compare(config, folder, PROMPT, GREEDY, 0, with_teacher=False)
    assert (found.teacher, found.base_on_teacher, found.proof) == (None, (), compared.proof)
    for side in found.sides:
        expected = dense_kl(dense(student_folder, side.tokens, folder), dense(student_folder, side.tokens))
        assert side.kl == pytest.approx(expected, rel=1e-3)
        assert side.measure == "KL(adapted || base)"
        assert side.text == next(other.text for other in compared.sides if other.name == side.name)


def test_the_kl_of_a_model_to_itself_is_exactly_zero() -> None:
    logits = np.random.default_rng(0).normal(size=(70, 50)).astype(np.float32)
    assert set(token_kl(logits, logits + np.float32(0))) == {0.0}
    assert max(token_kl(logits, logits + 3)) < 1e-12, "logits are known but for a constant"


def test_the_kl_by_hand() -> None:
    one, other = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    assert token_kl(one, other) == pytest.approx([0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), 0.0])
    certain = np.array([[0.0, -np.inf]])
    assert token_kl(certain, other[:1]) == pytest.approx([np.log(4)])
    assert token_kl(other[:1], certain) == (np.inf,)


def test_padding_of_the_wider_head_is_left_out_of_both() -> None:
    one, other = np.random.default_rng(1).normal(size=(2, 9, 30))
    wide = np.concatenate([one, 5 + np.zeros((9, 4))], axis=-1)
    assert token_kl(wide, other) == token_kl(one, other) == pytest.approx(dense_kl(*map(logprobs_of, (one, other))))
    assert token_kl(other, wide) == token_kl(other, one)


# The teacher


def test_a_teacher_that_only_a_cache_knows_is_left_out(
    config: KDConfig, folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    options = ModelOptions(model=str(teacher_folder))
    stand_in = tmp_path / "teacher.safetensors"
    save_stand_in(options, describe(options, "teacher").digest, stand_in)
    known = KDConfig(teacher=str(stand_in), student=config.student.model)
    assert compare(known, folder, PROMPT, GREEDY, 0) == compare(config, folder, PROMPT, GREEDY, 0, with_teacher=False)


def test_a_teacher_of_another_vocabulary_is_refused(
    config: KDConfig, folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    mixed = KDConfig(teacher=str(other), student=config.student.model)
    with pytest.raises(VocabularyError, match="Give --no-teacher"):
        compare(mixed, folder, PROMPT, GREEDY, 0)
    assert compare(mixed, folder, PROMPT, GREEDY, 0, with_teacher=False).teacher is None


def test_a_teacher_with_less_padding_is_measured_on_what_both_have(
    folder: Path, config: KDConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    narrow = save_random_model(tmp_path / "narrow", tokenizer_folder, seed=5, vocab_size=304)
    found = compare(KDConfig(teacher=str(narrow), student=config.student.model), folder, PROMPT, GREEDY, 0)
    assert max(found.base.tokens) < 304
    assert np.isfinite([kl for side in found.sides for kl in side.kl]).all()


def test_a_reply_that_the_teacher_cannot_read_is_refused(
    folder: Path, config: KDConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    narrow = save_random_model(tmp_path / "narrow", tokenizer_folder, seed=5, vocab_size=100)
    with pytest.raises(VocabularyError, match="expected one below its vocabulary of 100"):
        compare(KDConfig(teacher=str(narrow), student=config.student.model), folder, PROMPT, GREEDY, 0)


def test_teacher_and_student_are_never_in_memory_together(config: KDConfig, folder: Path) -> None:
    def models() -> int:
        return sum(isinstance(thing, nn.Module) and hasattr(thing, "args") for thing in gc.get_objects())

    gc.collect()
    before, seen = models(), []
    for name in compare_in_stages(config, folder, PROMPT, GREEDY, 0):
        gc.collect()
        seen.append((name, models() - before))
    student, teacher = config.student.model, config.teacher.model
    assert seen == [(student, 0), (teacher, 0), (student, 0)]


# The proof


def test_the_proof_says_what_was_compared(compared: Comparison, student_folder: Path) -> None:
    weights = mx.load(str(student_folder / "model.safetensors"))
    assert compared.proof.tensors == len(weights)
    assert compared.proof.tokens == len(compared.base.tokens)
    assert compared.proof.largest_change > 0.01
    assert compared.warnings == ()


def test_the_largest_change_is_that_of_the_adapter_on_the_bases_text(
    compared: Comparison, student_folder: Path, folder: Path
) -> None:
    tokens = compared.base.tokens
    changes = []
    for adapter in (None, folder):
        module, _, asked = loaded(student_folder, adapter)
        changes.append(np.array(module(mx.array([[*asked, *tokens]]))[0])[len(asked) - 1 : -1])
    assert compared.proof.largest_change == pytest.approx(np.abs(changes[1] - changes[0]).max(), rel=1e-3)


def test_a_base_side_that_bears_an_adapter_is_refused(student, folder: Path) -> None:
    plain = read_weights(student.module)
    check_plain(student.name, plain)
    put_on(student, folder)
    adapted = read_weights(student.module)
    logits = np.zeros((2, 3), dtype=np.float32)
    for call in (
        lambda: check_plain(student.name, adapted),
        lambda: check_same(student.name, adapted, adapted, logits, logits),
        lambda: check_same(student.name, plain, adapted, logits, logits),
    ):
        with pytest.raises(NotTheBase, match="tensors of an adapter in it") as caught:
            call()
        assert caught.value.exit_code == 5


def test_a_base_side_into_which_an_adapter_was_fused_is_refused(student, folder: Path) -> None:
    plain = read_weights(student.module)
    layer = student.module.layers[0].self_attn.q_proj
    layer.weight = layer.weight + 1e-6
    logits = np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(NotTheBase, match="its weights are not those of a second opening"):
        check_same(student.name, read_weights(student.module), plain, logits, logits)


def test_logits_that_differ_in_one_bit_are_refused() -> None:
    weights = Weights(("weight",), "0" * 64)
    logits = np.ones((2, 3), dtype=np.float32)
    check_same("student", weights, weights, logits, logits.copy())
    nudged = logits.copy()
    nudged[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    for again in (nudged, logits[:1]):
        with pytest.raises(NotTheBase, match="its logits are not those"):
            check_same("student", weights, weights, logits, again)


def test_the_digest_of_weights_sees_names_types_shapes_and_bits(student) -> None:
    def changed(name: str, value: mx.array) -> Weights:
        module = nn.Linear(2, 3)
        module.update({"weight": mx.arange(6, dtype=mx.float32).reshape(3, 2), "bias": mx.zeros(3)})
        module[name] = value
        return read_weights(module)

    weight = mx.arange(6, dtype=mx.float32).reshape(3, 2)
    same = changed("weight", weight)
    assert changed("weight", weight.T.reshape(3, 2) * 0 + weight) == same
    others = [
        changed("weight", weight.astype(mx.bfloat16)),
        changed("weight", weight.reshape(2, 3)),
        changed("weight", weight + mx.array([[0, 0], [0, 0], [0, 1e-6]])),
        changed("bias", mx.array([0.0, -0.0, 0.0])),
        changed("more", mx.zeros(1)),
        # Rows and columns exchanged, in the layout that a transposition leaves.
        changed("weight", mx.arange(6, dtype=mx.float32).reshape(2, 3).T),
    ]
    assert len({same.digest, *(other.digest for other in others)}) == 7


def test_an_adapter_that_changes_nothing_is_warned_about(
    config: KDConfig, student_folder: Path, tmp_path: Path
) -> None:
    module, options = opened(student_folder), LoraOptions(rank=2)
    add_lora(module, options)
    folder = save(tmp_path / "fresh", module, options, student_folder)
    found = compare(config, folder, PROMPT, GREEDY, 0)
    assert found.proof.largest_change == 0
    assert found.adapted.tokens == found.base.tokens
    [warning] = found.warnings
    assert "changes nothing" in warning


def test_an_adapter_of_another_student_is_refused(config: KDConfig, teacher_folder: Path, tmp_path: Path) -> None:
    folder = lay_run(tmp_path, "cats", teacher_folder, teacher_folder)
    with pytest.raises(CacheError, match="not an adapter of this student"):
        compare(config, folder, PROMPT, GREEDY, 0)


def test_a_quantised_student_is_compared_as_it_is_opened(quantised_folder: Path, tmp_path: Path) -> None:
    asked = KDConfig(teacher=str(quantised_folder), student={"model": str(quantised_folder), "dequantize": "never"})
    folder = lay_run(tmp_path, "cats", quantised_folder, quantised_folder)
    found = compare(asked, folder, PROMPT, GREEDY, 0, with_teacher=False)
    assert found.proof.largest_change > 0


def test_a_prompt_of_several_turns_is_compared(config: KDConfig, folder: Path) -> None:
    turns = [("user", "hello"), ("assistant", "the cat"), ("user", "and the mat")]
    prompt = Prompt("here", tuple({"role": role, "content": said} for role, said in turns))
    assert compare(config, folder, prompt, GREEDY, 0).base.tokens
